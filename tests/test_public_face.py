"""The names that readers build on stay: packages, networks, methods, metrics, commands and their options."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path

import pytest
import typer
import typer.testing

import cxrkit
from cxrkit import attribution, cli, metrics, models
from cxrkit.study import import_closure

PROJECT = Path(__file__).resolve().parents[1]
PACKAGES = "attribution data grid metrics models phantom study train view"
NETWORKS = """
    resnet18 resnet34 resnet50 resnet50_v2 densenet121 densenet161 vgg16 vgg19 inception_v3 inception_resnet_v2 xception
    efficientnet_b0 efficientnet_lite0 convnext_tiny vit_c_b
    bcos_resnet18 bcos_resnet34 bcos_resnet50 bcos_densenet121 bcos_convnext_tiny bcos_vit_c_b
"""
METHODS = """
    saliency input_x_gradient smoothgrad guided_backprop integrated_gradients deeplift occlusion cam gradcam
    gradcam_plus_plus layercam scorecam guided_gradcam normgrad lrp rap guided_ig blur_ig xrai bcos
"""
OPTIONS = """
    n_steps baseline n_samples noise window stride fill virtual_layer alpha beta first_layer fraction max_distance
    max_sigma algorithm segments protocol layer layers
"""
METRICS = {  # and the parameters that are promised
    "energy_pointing_game": "maps masks kind threshold",
    "pointing_game": "maps masks tolerance tolerance_fraction",
    "mask_iou": "maps masks threshold average",
    "difference_of_means": "scores_a scores_b",
    "neuron_activation_profiles": "model images groups layers",
    "inactive_feature_maps": "model images layers",
    "bootstrap": "values patients n seed",
}
COMMANDS = {  # and their options
    "book": "--workers --single",
    "data list": "--cache",
    "data describe": "--root --option",
    "data check": "--root --option --ignore --workers --format --to",
    "data prepare": "--root --size --workers --cache --bits --preprocessing --seed --option",
    "data get": "--to",
    "grid run": "--workers --dry-run --profile --scheduler --slurm --serial --time-limit --memory-limit",
    "grid status": "--profile",
    "grid retry": "--workers --profile --scheduler --slurm --serial --time-limit --memory-limit",
    "grid show": "--results --lines",
    "grid why": "--file --results",
    "grid clean": "--profile --all --yes",
    "grid keep": "--profile --source",
}


def commands(group: typer.core.TyperGroup = None, words: tuple[str, ...] = ()):
    """Each command of the command line: its words and its options."""
    for name, command in (group or typer.main.get_command(cli.app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*words, name))
        else:
            yield " ".join((*words, name)), {option for one in command.params for option in one.opts}


@pytest.mark.parametrize("package", ["", *PACKAGES.split()])
def test_every_name_of_a_package_is_there(package):
    module = importlib.import_module(f"cxrkit.{package}".rstrip("."))
    assert [name for name in getattr(module, "__all__", ()) if not hasattr(module, name)] == []


def test_packages():
    assert {*PACKAGES.split(), "attribute"} <= {*cxrkit.__all__}


@pytest.mark.parametrize("name", ["TrainParameters", "SearchParameters", "fit", "load_data", "predict", "presets"])
def test_names_that_moved_are_found_with_a_warning(name):
    with pytest.warns(FutureWarning, match=f"cxrkit.train.{name} now"):
        assert getattr(cxrkit.study, name) is getattr(cxrkit.train, name)


def test_a_notebook_with_names_that_moved_depends_on_the_modules_that_have_them(tmp_path):
    notebook = tmp_path / "own.ipynb"
    cell = {"cell_type": "code", "source": "from cxrkit import study\nstudy.fit"}
    notebook.write_text(json.dumps({"cells": [cell]}), encoding="utf-8")
    code = import_closure.Code(Path(cxrkit.__file__).parent, tmp_path)
    assert {"cxrkit.train.loop", "cxrkit.train.losses"} <= set(code.sources("own.ipynb"))


def test_networks_and_methods():
    assert set(NETWORKS.split()) <= set(models.NETWORKS)
    cards = attribution.methods()
    assert set(METHODS.split()) <= {card.name for card in cards}
    assert set(OPTIONS.split()) <= {option for card in cards for option in card.options}


@pytest.mark.parametrize("name", METRICS)
def test_metrics(name):
    assert {*METRICS[name].split()} <= {*inspect.signature(getattr(metrics, name)).parameters}


def test_commands_and_options():
    there = dict(commands())
    gone = {name: set(options.split()) - there.get(name, set()) for name, options in COMMANDS.items()}
    assert {name: options for name, options in gone.items() if options or name not in there} == {}


def test_the_page_of_reproduction_tells_each_way():
    cells = json.loads((PROJECT / "notebooks" / "reproduce.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    for said in ("On a laptop", "On a machine with a GPU", "On a cluster", "--profile full", "grid keep", "--slurm"):
        assert said in text


@pytest.mark.parametrize("words", [["book"], ["grid", "keep", "bcos"]])
def test_commands_of_the_book_say_that_they_need_a_checkout(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cxrkit.CxrkitError, match="no checkout of cxrkit"):
        typer.testing.CliRunner().invoke(cli.app, words, catch_exceptions=False)
