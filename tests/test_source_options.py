"""What all public sources share: options are checked before anything is read."""

from __future__ import annotations

import typing

import pytest

import cxrkit
from cxrkit.data.sources import SOURCES
from cxrkit.errors import DataError, ParameterError

PUBLIC = [name for name, source in SOURCES.items() if source.module.startswith("cxrkit.data.public") and name != "lvot"]


@pytest.mark.parametrize("name", PUBLIC)
def test_options_and_folders_that_are_refused(name, tmp_path):
    (tmp_path / "file").touch()
    for root in (tmp_path / "nowhere", tmp_path / "file", tmp_path):
        with pytest.raises(DataError, match=f"^{root}: (is no folder|holds no )"):
            cxrkit.data.load(name, root)
    hints = typing.get_type_hints(SOURCES[name].loader())
    chosen = [option for option, hint in hints.items() if typing.get_origin(hint) is typing.Literal]
    assert {"missing", "split_by", "tables"} & set(SOURCES[name].options()) <= set(chosen)
    for option in chosen:
        with pytest.raises(ParameterError, match=f"{option}='odd' is unknown; use one of"):
            cxrkit.data.load(name, tmp_path, **{option: "odd"})
