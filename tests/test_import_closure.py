"""Which sources a notebook's runs depend on: an edit of a module makes exactly those runs stale that it can change."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from grid_project import notebook

import cxrkit
from cxrkit.study import runs
from cxrkit.study.import_closure import Code
from cxrkit.train.parameters import TrainParameters

PACKAGE = Path(cxrkit.__file__).parent
PROJECT = PACKAGE.parent
STUDY = {name: f"notebooks/{name}.ipynb" for name in ("train", "search", "explain", "judge")}

# Runs the code cells of notebooks with other parameters, and prints the modules of which a function ran in each.
RUN = """
import inspect, json, sys
from pathlib import Path
import cxrkit
root = Path(cxrkit.__file__).parent
def note(frame, event, argument):
    code = frame.f_code
    if event == "call" and code.co_flags & inspect.CO_OPTIMIZED and code.co_filename.startswith(str(root)):
        called.add(code.co_filename)
for path, values in json.loads(sys.argv[1]).items():
    called, space = set(), {"__name__": "__main__"}
    cells = [cell for cell in json.loads(Path(path).read_text())["cells"] if cell["cell_type"] == "code"]
    exec("".join(cells[0]["source"]), space)
    space |= values
    sys.setprofile(note)
    for cell in cells[1:]:
        lines = "".join(cell["source"]).replace("n=1000", "n=5").split(chr(10))
        exec(chr(10).join(line for line in lines if not line.startswith("figures.")), space)
    sys.setprofile(None)
    names = (Path(file).relative_to(root.parent).with_suffix("").parts for file in called)
    print(json.dumps([path, sorted(".".join(name).removesuffix(".__init__") for name in names)]))
"""


def write(folder: Path, **files: str) -> None:
    """Python files, by their dotted name with `__` for a dot."""
    for name, text in files.items():
        path = folder.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def project(tmp_path) -> Path:
    """A package called cxrkit with a lazy package, an eager one and a registry, and a paper's folder."""
    write(
        tmp_path / "cxrkit",
        init="",
        lazy="",
        errors="",
        study__runs="from cxrkit.data import table\nif TYPE_CHECKING:\n    import cxrkit.cli",
        study__report="def f():\n    from cxrkit.metrics import mean",
        study__unused="",
        metrics__mean="def mean(): ...",
        metrics__other="",
        data__table="def table(): ...",
        data__reader="",
        data__public__rsna="",
        data__public__nih="",
        data__sources="import importlib\ndef load(x):\n    importlib.import_module(f'cxrkit.data.public.{x}')",
        maps__registry="def method(x): ...",
        maps__cam="from cxrkit.maps.registry import method\n@method(1)\ndef cam(): ...",
        maps__plain="",
        maps__api="from cxrkit.maps import registry",
        view__figures="from cxrkit import errors",
        cli="",
    )
    for package, text in {
        "": "from cxrkit.lazy import lazily\n_ = lazily(__name__, 'data maps study', maps='attribute')",
        "study": "from cxrkit.lazy import lazily\n_ = lazily(__name__, 'runs report', runs='find ' 'keep')",
        "metrics": "from cxrkit.metrics.mean import mean\nfrom cxrkit.metrics.other import other",
        "data": "from cxrkit.data.sources import load\nfrom cxrkit.data.table import table\nfrom .reader import read",
        "data/public": "",
        "maps": "from cxrkit.maps import cam\nfrom cxrkit.maps.api import attribute",
        "view": "",
    }.items():
        (tmp_path / "cxrkit" / package / "__init__.py").write_text(text)
    (tmp_path / "cxrkit" / "init.py").unlink()
    write(tmp_path / "notebooks" / "papers" / "one", measure="from cxrkit.metrics.mean import mean")
    return tmp_path


def depends(project: Path, *cells: str, folder: str = "notebooks") -> set[str]:
    """What a notebook depends on, without the beginnings of names."""
    path = notebook(project / folder / "a.ipynb", "seed = 0", *cells)
    found = Code(project / "cxrkit", project).sources(path.relative_to(project).as_posix())
    return {name.removeprefix("cxrkit.") for name in found} - {"cxrkit", "lazy"}


SOURCES = {"data", "data.sources", "data.public", "data.public.rsna", "data.public.nih"}


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ((), set()),
        (("import numpy",), set()),
        (("from cxrkit import study", "study.keep()"), {"study", "study.runs", "data", "data.table"}),
        (("import cxrkit", "x = cxrkit.study.report.f"), {"study", "study.report", "metrics", "metrics.mean"}),
        (("%matplotlib inline\nimport cxrkit\ny = !ls", "cxrkit.data.load"), SOURCES),
        (("not python at all", "from cxrkit.data.table import table"), {"data", "data.table"}),
        (("def f():\n    import cxrkit.maps.plain",), {"maps", "maps.plain"}),
        (("import cxrkit.maps.api as api",), {"maps", "maps.api", "maps.registry", "maps.cam"}),
        (("import cxrkit", "cxrkit.attribute()"), {"maps", "maps.api", "maps.registry", "maps.cam"}),
        (("from cxrkit.view import figures", "figures.show()"), set()),
        (("from papers.one import measure",), {"papers.one.measure", "metrics", "metrics.mean"}),
    ],
)
def test_imports_are_followed_to_the_end(project, cells, expected):
    assert depends(project, *cells) == expected


def test_a_package_that_is_handed_on_counts_whole(project):
    every = {"study", "study.runs", "study.report", "study.unused", "metrics", "metrics.mean", "data", "data.table"}
    assert depends(project, "from cxrkit import study", "getattr(study, 'keep')") == every


def test_settings_beside_a_paper_count(project):
    folder = project / "notebooks" / "papers" / "one"
    (folder / "settings.yaml").write_text("steps: 1")
    expected = {"papers.one.measure", "metrics", "metrics.mean", "notebooks/papers/one/settings.yaml"}
    assert depends(project, "from papers.one import measure") == expected
    assert depends(project, folder="notebooks/papers/one") == {"notebooks/papers/one/settings.yaml"}


def test_remarks_and_layout_change_nothing_but_code_does(project):
    code, path = Code(project / "cxrkit", project), project / "notebooks" / "papers" / "one" / "measure.py"
    name = notebook(project / "notebooks" / "a.ipynb", "", "import papers.one.measure").relative_to(project).as_posix()
    before = code.sources(name)
    path.write_text('"""Says more."""\n\nfrom cxrkit.metrics.mean import (\n    mean,  # a remark\n)\n')
    assert code.sources(name) == before
    path.write_text("from cxrkit.metrics.mean import mean\nx = 1")
    changed = code.sources(name)
    assert {one for one in before if before[one] != changed[one]} == {"papers.one.measure"}


@pytest.fixture(scope="module")
def stale_after(tmp_path_factory) -> dict[str, set[str]]:
    """For each module of the package, the notebooks of the study whose runs an edit of it makes stale."""
    folder = tmp_path_factory.mktemp("copy")
    package = shutil.copytree(PACKAGE, folder / "cxrkit", ignore=shutil.ignore_patterns("__pycache__"))
    code = Code(package, PROJECT)
    before = {name: code.sources(path) for name, path in STUDY.items()}
    found = {}
    for file in sorted(package.rglob("*.py")):
        text = file.read_text()
        file.write_text(text + "\n_edited = True\n")
        edited = Code(package, PROJECT)
        edited.path, edited.modules = code.path, code.modules
        edited._read = {path: read for path, read in code._read.items() if path != file}
        after = {name: edited.sources(path) for name, path in STUDY.items()}
        module = ".".join(file.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        found[module] = {name for name in STUDY if after[name] != before[name]}
        assert all(after[name].keys() == before[name].keys() for name in STUDY)
        file.write_text(text)
    return found


def test_whatever_runs_in_a_notebook_makes_its_runs_stale_when_it_is_edited(tmp_path, stale_after):
    shared = {"results": str(tmp_path), "device": "cpu"}
    training = {"dataset_options": {"view": "multilabel", "images": 40}, "size": 32, "epochs": 1}
    training |= {"model": "bcos_resnet18"}
    key = runs.key(TrainParameters(**training))
    explaining = {"run": key, "images": 2, "maps": 1, "methods": ["layercam", "bcos"], "n_steps": 2}
    notebooks = {STUDY["train"]: training | shared, STUDY["explain"]: explaining | shared}
    command = [sys.executable, "-c", RUN, json.dumps(notebooks)]
    told = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300)
    assert told.returncode == 0, told.stderr[-2000:]
    ran = dict(json.loads(line) for line in told.stdout.splitlines() if line.startswith('["notebooks/'))
    for name in ("train", "explain"):
        modules = {one for one in ran[STUDY[name]] if name not in stale_after[one]}
        assert {one for one in modules if not one.startswith(("cxrkit.view", "cxrkit.grid", "cxrkit.study"))} == set()
        assert {one for one in modules if one.startswith("cxrkit.study")} <= {
            "cxrkit.study.run_key",
            "cxrkit.study.import_closure",
        }
        assert len(ran[STUDY[name]]) > 30


def test_an_edit_leaves_alone_what_it_cannot_change(stale_after):
    everywhere = set(STUDY)
    assert stale_after["cxrkit.phantom.source"] == stale_after["cxrkit.models.bcos"] == everywhere
    assert stale_after["cxrkit.data.public.rsna"] == everywhere, "a source is loaded by its name"
    assert stale_after["cxrkit.attribution.cam"] == {"explain", "judge"}
    assert stale_after["cxrkit.study.explanation"] == {"explain", "judge"}
    assert stale_after["cxrkit.study.phantom_benchmark"] == {"judge"}
    assert stale_after["cxrkit.train.search"] == {"search"}
    for module, stale in stale_after.items():
        if module.startswith(("cxrkit.view", "cxrkit.grid", "cxrkit.cli", "cxrkit.terminal", "cxrkit.book")):
            assert stale == set(), module
