"""The grid file: what it may say, and how what is wrong is told, all of it at once."""

from __future__ import annotations

import warnings

import pytest
from grid_project import Project, notebook
from hypothesis import given
from hypothesis import strategies as st

from cxrkit import ParameterError, grid
from cxrkit.grid.planning import Step, combinations, duration
from cxrkit.study.notebook import parameters_for
from cxrkit.train.parameters import TrainParameters


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    monkeypatch.delenv("CXRKIT_RESULTS", raising=False)
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path)


def values(tasks, *names):
    return [tuple(task.parameters.model_dump()[name] for name in names) for task in tasks]


def problems(path, **options) -> str:
    with pytest.raises(ParameterError) as error:
        grid.plan(path, **options)
    return str(error.value)


def test_products_zips_cases_seeds_and_folds_multiply(project):
    project.square = notebook(project.square, "seed = 0\nfold = 0\na = 0\nb = 0\nc = 0\nd = ''\n", "1")
    path = project.grid(
        one={
            "product": {"a": [1, 2]},
            "zip": {"b": [1, 2], "c": [3, 4]},
            "cases": [{"d": "x"}, {"d": "y"}],
            "seeds": 2,
            "folds": "all",
        }
    )
    tasks = grid.plan(path)
    expected = [
        (a, b, c, d, fold, seed)
        for a in (1, 2)
        for b, c in ((1, 3), (2, 4))
        for d in "xy"
        for fold in range(5)
        for seed in range(2)
    ]
    assert values(tasks, "a", "b", "c", "d", "fold", "seed") == expected
    assert len({task.key for task in tasks}) == len(expected)


@given(
    st.dictionaries(st.sampled_from("abcd"), st.lists(st.integers(), min_size=1, max_size=4), max_size=3),
    st.lists(st.fixed_dictionaries({"case": st.integers()}), min_size=1, max_size=3),
)
def test_combinations_agree_with_counting(product, cases):
    rows = combinations(Step(notebook="x", product=product, cases=cases))
    count = len(cases)
    for axis in product.values():
        count *= len(axis)
    assert len(rows) == count
    assert all(set(row) == {*product, "case"} for row in rows)


def test_seeds_and_folds_may_be_lists(project):
    assert values(grid.plan(project.grid(one={"seeds": [3, 7]})), "seed") == [(3,), (7,)]


def test_conditions_choose_among_the_combinations(project):
    notebook(project.square, "seed = 0\nsize = 0\nmodel = ''\noptions = {}\n", "1")
    product = {"model": ["plain", "bcos"], "size": [32, 64, 128]}
    when = {"product": product, "when": ["model == bcos", "size != 32"]}
    assert values(grid.plan(project.grid(one=when)), "model", "size") == [("bcos", 64), ("bcos", 128)]
    when = {"product": product, "when": ["model != bcos", "size == 64"]}
    assert values(grid.plan(project.grid(one=when)), "model", "size") == [("plain", 64)]
    cases = [{"options": {"view": "binary"}}, {"options": {"view": "multilabel"}}, {"options": {}}]
    nested = {"cases": cases, "when": "options.view != binary"}
    assert [task.parameters.options for task in grid.plan(project.grid(one=nested))] == [{"view": "multilabel"}, {}]


def test_a_condition_may_ask_about_the_run_that_is_needed(project):
    notebook(project.folder / "notebooks" / "look.ipynb", "run = ''\nmethod = ''\n", "1")
    path = project.grid(
        one={"seeds": 3},
        two={
            "notebook": "../look.ipynb",
            "after": "one",
            "product": {"method": ["cam", "rap"]},
            "when": "run.seed != 1",
        },
    )
    tasks = grid.plan(path)
    assert [(task.parameters.method, task.needs[:12]) for task in tasks[3:]] == [
        ("cam", "square-seed0"),
        ("cam", "square-seed2"),
        ("rap", "square-seed0"),
        ("rap", "square-seed2"),
    ]


def test_steps_may_stand_in_any_order(project):
    notebook(project.folder / "notebooks" / "all.ipynb", "runs = []\n", "1")
    path = project.grid(
        last={"notebook": "../all.ipynb", "after": ["one", "two"]},
        two={"after": "one", "parameters": {"seed": 9}},
        one={"seeds": 2},
    )
    tasks = grid.plan(path)
    assert [task.step for task in tasks] == ["one", "one", "two", "last"]
    assert tasks[2].after == (tasks[0].key, tasks[1].key)
    assert tasks[2].needs is None
    assert tasks[3].parameters.runs == [task.key for task in tasks[:3]]


def test_a_profile_changes_steps(project):
    path = project.grid(
        one={"seeds": 5, "parameters": {"nap": 1.0}, "cases": [{"name": "a"}, {"name": "b"}]},
        two={"product": {"seed": [11, 12]}, "parameters": {"nap": 0.2}},
        profiles={
            "quick": {"all": {"parameters": {"nap": 0}, "time_limit": "10 s"}, "one": {"seeds": 1}},
            "one": {"two": {"skip": True}, "one": {"parameters": {"seed": 4, "name": "c"}}},
        },
    )
    assert len(grid.plan(path)) == 12
    quick = grid.plan(path, "quick")
    assert values(quick, "seed", "nap", "name") == [(0, 0, "a"), (0, 0, "b"), (11, 0, None), (12, 0, None)]
    assert {task.time_limit for task in quick} == {10.0}
    assert values(grid.plan(path, "one"), "seed", "nap", "name") == [(4, 1.0, "c")]


def test_limits_are_read_with_their_units(project):
    task = grid.plan(project.grid(one={"time_limit": "2 h", "memory_limit": "1.5 GB"}))[0]
    assert (task.time_limit, task.memory_limit) == (7200.0, 1_500_000_000)


@pytest.mark.parametrize(
    ("text", "seconds"), [(5, 5), ("5", 5), ("5 s", 5), ("1.5 min", 90), ("2h", 7200), ("1 d", 86400)]
)
def test_times_have_units(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["soon", "-5 s", "0", True, "5 weeks", ""])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="a time is"):
        duration(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one: [", "not YAML"),
        ("[]", "expected step names"),
        ("", "expected step names"),
        ("{}", "expected step names"),
        ("one: 3", "step 'one': Input should be a valid dictionary"),
        ("one: {}", "must name its notebook"),
        ("one: {notebook: x}\none: {notebook: y}", r"line 2: 'one' is there twice"),
        ("one: {notebook: ../square.ipynb, parameters: {seed: 1, seed: 2}}", "'seed' is there twice"),
    ],
)
def test_a_file_that_is_no_grid_is_refused(project, text, message):
    with pytest.raises(ParameterError, match=message):
        grid.plan(project.grid(text))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"product": {"seed": []}}, "'product.seed' must have something in it"),
        ({"cases": []}, "'cases' must have something in it"),
        ({"product": {"seed": 3}}, "'product.seed'"),
        ({"products": {"seed": [1]}}, "unknown part 'products'; did you mean 'product'?"),
        ({"zip": {"seed": [1, 2], "nap": [1.0]}}, "lists in 'zip' must be equally long: seed 2, nap 1"),
        ({"seeds": 2, "product": {"seed": [1]}}, "'seed' varied in more than one of"),
        ({"seeds": 0}, "'seeds'"),
        ({"folds": "some"}, "'folds'"),
        ({"time_limit": "soon"}, "'time_limit': a time is a number of seconds"),
        ({"memory_limit": "a lot"}, "'memory_limit': a memory limit is text such as"),
        ({"when": "seed = 3"}, "expected 'name == value'"),
        ({"when": "__import__('os')"}, "expected 'name == value'"),
        ({"when": "sede == 3"}, "'sede' is no parameter"),
        ({"when": "seed < 3"}, "expected 'name == value'"),
        ({"when": "seed == 3"}, "its conditions leave no run"),
        ({"product": {"seed": [1, 1]}}, "the same run comes twice"),
        ({"after": "one"}, "steps wait for each other: one → one"),
        ({"after": "zero"}, "'after' names 'zero', which is no step here"),
        ({"notebook": "nowhere.ipynb"}, "there is no notebook 'nowhere.ipynb'"),
        ({"notebook": "../../../square.ipynb"}, "lies outside the project"),
        ({"parameters": {"seed": "many"}}, "parameter 'seed' for square"),
        ({"parameters": {"seed": True}}, "parameter 'seed' for square"),
        ({"parameters": {"nap": "x"}}, "parameter 'nap' for square"),
        ({"parameters": {"sede": 1}}, "unknown parameter 'sede' for square; did you mean 'seed'?"),
    ],
)
def test_a_step_that_is_not_right_is_refused(project, step, message):
    assert message in problems(project.grid(one=step))


def test_every_problem_is_told_at_once(project):
    told = problems(
        project.grid(
            three={"after": "one", "product": {"seed": []}},
            four={"parameters": {"root": 1}, "tme_limit": 3},
            profiles={"quick": {"one": {"sedes": 2}}},
        ),
        profile="qick",
    )
    for part in (
        "step 'three': 'product.seed' must have something in it",
        "step 'four': unknown part 'tme_limit'; did you mean 'time_limit'",
        "profile 'quick', step 'one': unknown part 'sedes'; did you mean 'seeds'",
    ):
        assert part in told, part
    told = problems(
        project.grid(
            one={"cases": [{"sede": 3}, {"seed": 0.5}], "after": "three"},
            two={"notebook": "nowhere.ipynb"},
            three={"after": "one", "parameters": {"seed": 8}},
            five={"when": "model == x"},
            six={"seeds": 2},
            seven={"seeds": 1},
        )
    )
    for part in ("'sede'", "'seed'", "nowhere.ipynb", "'model' is no parameter", "): in six and seven"):
        assert part in told, part
    path = project.grid(one={}, profiles={"quick": {"eight": {}}})
    told = problems(path, profile="qick")
    assert "profile 'quick': there is no step 'eight'" in told
    assert "unknown profile 'qick'; known: quick" in told


def test_a_circle_of_steps_is_named(project):
    told = problems(project.grid(one={"after": "two"}, two={"after": "three"}, three={"after": "one"}))
    assert "steps wait for each other: one → two → three → one" in told


def test_an_unknown_grid_names_the_known(project):
    project.grid(one={})
    with pytest.raises(ParameterError, match="known: mine"):
        grid.plan("quik")


def test_types_are_those_of_the_parameters_cell(project):
    cell = "a = 1\nb = 0.5\nc = 'x'\nd = False\ne = None\nf = [1.5]\ng = []\nh = {}\ni: float | None = None\nj = -2\n"
    check = parameters_for(notebook(project.square, cell, "1"))
    good = {"a": 2, "b": 1, "c": "y", "d": True, "e": 3.5, "f": [2], "g": ["x", 1], "h": {"k": [1]}, "i": 2, "j": 4}
    assert check(**good).model_dump() == good
    assert check(results="elsewhere").results == "elsewhere"
    assert check().model_dump()["f"] == [1.5]
    for plain in ("text", False, [1, "x"], {"rate": 0.1}, None):
        assert check(e=plain).model_dump()["e"] == plain
    plain = {"a": 1.5, "b": True, "c": 1, "d": 1, "e": {1}, "f": ["x"], "g": 3, "h": [], "i": "x", "j": None}
    cases = [{name: value} for name, value in plain.items()]
    for wrong in (*cases, {"a": "1"}, {"b": float("nan")}, {"g": [float("inf")]}, {"h": {1: 2}}):
        with pytest.raises(ParameterError, match=next(iter(wrong))):
            check(**wrong)


@pytest.mark.parametrize(
    ("annotation", "good", "wrong"),
    [
        ("float | None", [None, 1, 0.5], ["x", True, [1.0]]),
        ("None | float", [None, 1, 0.5], ["x", True, [1.0]]),
        ("Optional[float]", [None, 1, 0.5], ["x", True, [1.0]]),
        ("typing.Optional[int]", [None, 1], [0.5, "1"]),
        ("'int | None'", [None, 1], [0.5, "1"]),
        ("Union[int, str, None]", [None, 1, "x"], [0.5, [1]]),
        ("int | str", [None, 1, "x"], [0.5, [1]]),
        ("list[int] | None", [None, [], [1, 2]], [1, [0.5], ["x"], {}]),
        ("Optional[List[float]]", [None, [1, 0.5]], [["x"], 0.5]),
        ("list[int | None]", [None, [1, None]], [["x"]]),
        ("list[list[float]]", [None, [[1, 0.5], []]], [[1]]),
        ("dict[str, float] | None", [None, {"a": 1}], [{"a": "x"}, [1], {1: 1}]),
        ("dict[str, int | None]", [None, {"a": None}], [{"a": "x"}]),
        ("Literal['a', 2]", [None, "a", 2], ["b", 3]),
        ("Optional[Literal['a']]", [None, "a"], ["b"]),
        ("tuple[int, ...]", [None, [1, 2]], [1, "x"]),
        ("Path", [None, "x", 1, [1]], [{1: 2}, {1, 2}]),
    ],
)
def test_an_annotation_says_the_type(project, annotation, good, wrong):
    check = parameters_for(notebook(project.square, f"a: {annotation} = None\n", "1"))
    assert check().model_dump()["a"] is None
    for value in good:
        assert check(a=value).model_dump()["a"] == value
    for value in wrong:
        with pytest.raises(ParameterError, match="'a'"):
            check(a=value)


def test_numbers_of_a_grid_file_are_numbers(project):
    notebook(project.square, "lr = 0.001\nfree = None\noptions = {}\nlisted = []\ntext = ''\n", "1")
    step = "lr: [1e-3, 1E-4, .5e-1], free: [2e-5]"
    more = "options: {lr: 1e-3, scale: [1e2]}, listed: [1e-3, no], text: no"
    tasks = grid.plan(project.grid(f"a: {{notebook: ../square.ipynb, product: {{{step}}}, parameters: {{{more}}}}}"))
    assert values(tasks, "lr", "free") == [(0.001, 2e-5), (0.0001, 2e-5), (0.05, 2e-5)]
    found = tasks[0].parameters.model_dump()
    assert (found["options"], found["listed"]) == ({"lr": 0.001, "scale": [100.0]}, [0.001, "no"])
    assert found["text"] == "no"
    picked = f"a: {{notebook: ../square.ipynb, product: {{{step}}}, when: 'lr == 1e-4'}}"
    assert values(grid.plan(project.grid(picked)), "lr") == [(0.0001,)]
    assert "not YAML" in problems(project.grid("a: {notebook: ../square.ipynb, when: 'lr == ['}"))
    for wrong in ("parameters: {free: None}", "when: lr == None", "product: {lr: [0.1, None]}"):
        assert "None is text in YAML; write null" in problems(
            project.grid(f"a: {{notebook: ../square.ipynb, {wrong}}}")
        )
    assert values(grid.plan(project.grid("a: {notebook: ../square.ipynb, parameters: {free: ~}}")), "free") == [(None,)]
    with pytest.raises(ParameterError, match=r"\['weights'\] for train: None is text"):
        TrainParameters(weights="None")
    with pytest.raises(ParameterError, match=r"\['label_separator'\] for dataset_options of train: None is text"):
        TrainParameters(dataset="folder", dataset_options={"label_separator": "None"})


def test_a_parameters_cell_may_import_what_its_annotations_need(project):
    cell = "from __future__ import annotations\nfrom typing import Any, Optional\na: Optional[int] = None\nb: Any = 1"
    check = parameters_for(notebook(project.square, cell, "1"))
    assert check(a=2, b="text").model_dump() == {"a": 2, "b": "text"}
    assert check(b=[None]).model_dump()["b"] == [None]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, "no cell is tagged 'parameters'"),
        ("a = ", "isn't Python"),
        ("a = 2 * 3", r"line 1 of the parameters cell is no plain 'name = value': a = 2 \* 3"),
        ("import os", "line 1 of the parameters cell"),
        ("a = 1\na.b = 2", "line 2 of the parameters cell"),
    ],
)
def test_a_parameters_cell_that_is_no_list_of_values_is_refused(project, cell, message):
    with pytest.raises(ParameterError, match=message):
        parameters_for(notebook(project.square, cell, "1"))


def test_a_notebook_that_is_none_is_refused(project):
    project.square.write_text("{")
    assert "square.ipynb: not a notebook" in problems(project.grid(one={}))


def test_options_and_folder_of_a_notebooks_own_data_set_stay_with_it(project):
    cell = "dataset = 'phantom'\ndataset_options = {'view': 'multilabel'}\nroot = 'here'\n"
    check = parameters_for(notebook(project.square, cell, "1"))
    assert check().model_dump() == {"dataset": "phantom", "dataset_options": {"view": "multilabel"}, "root": "here"}
    assert check(dataset="phantom").model_dump() == check().model_dump()
    assert check(dataset="folder", root="x").model_dump() == {"dataset": "folder", "dataset_options": {}, "root": "x"}
    assert check(dataset="folder").root == ""
    own = {"dataset": "folder", "root": "x", "dataset_options": {"labels": ["Mass"]}}
    assert check(**own).model_dump() == own
    # As papermill gives them: in a cell of their own, behind that of the notebook.
    for injected, options in (
        ("dataset = 'folder'\nroot = 'x'", {}),
        ("dataset = 'phantom'", {"view": "multilabel"}),
        ("dataset = 'folder'\nroot = 'x'\ndataset_options = {'labels': ['Mass']}", {"labels": ["Mass"]}),
    ):
        held = {"In": ["", cell, injected, "%matplotlib inline", "check"]}
        exec(f"{cell}\n{injected}", held)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert check.from_notebook(held).model_dump()["dataset_options"] == options
            held.pop("root" if held["dataset"] == "phantom" else "", None)
            assert TrainParameters.from_notebook(held).dataset_options == options
        expected = "dataset_options was set for data set 'phantom' and is left out for 'folder'"
        assert [str(one.message) for one in told] == ([expected] * 2 if options == {} else [])


def test_options_of_another_source_are_told_with_their_origin(project):
    notebook(project.folder / "notebooks" / "train.ipynb", "seed = 0", "1")
    wrong = {"dataset": "folder", "root": "x", "dataset_options": {"view": "binary"}}
    tasks = grid.plan(project.grid(one={"notebook": "../train.ipynb", "parameters": wrong}))
    with pytest.raises(ParameterError, match=r"'view' is unknown to source 'folder'.*from the grid, step 'one'"):
        grid.check_names(tasks)
    right = {"dataset": "folder", "root": "x"}
    grid.check_names(grid.plan(project.grid(one={"notebook": "../train.ipynb", "parameters": right})))
    for held in (wrong, wrong | {"dataset_options": {"size": 3}}):
        with pytest.raises(ParameterError, match=r"is unknown to source 'folder'.*from this notebook"):
            TrainParameters.from_notebook(held)


def test_notebooks_with_a_class_of_parameters_use_it(project):
    assert parameters_for("anywhere/train.ipynb") is TrainParameters
    notebook(project.folder / "notebooks" / "other" / "train.ipynb", "seed = 0", "1")
    assert "kept for notebooks/train.ipynb" in problems(project.grid(one={"notebook": "../other/train.ipynb"}))
    notebook(project.folder / "notebooks" / "train.ipynb", "seed = 0", "1")
    told = problems(project.grid(one={"notebook": "../train.ipynb", "parameters": {"epohcs": 3, "fold": 7}}))
    assert "did you mean 'epochs'" in told
    assert "'fold'" in told
