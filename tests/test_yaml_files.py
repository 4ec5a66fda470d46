"""YAML 1.2, core schema: what a plain word is, and what is refused."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cxrkit import ParameterError
from cxrkit.yaml_files import parse_yaml, read_yaml

PROJECT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # Source: YAML 1.2.2, example 10.9 and the table of 10.3.2.
        *(("null", None), ("Null", None), ("NULL", None), ("~", None), ("", None)),
        *(("true", True), ("True", True), ("TRUE", True), ("false", False), ("False", False), ("FALSE", False)),
        *(("0", 0), ("-19", -19), ("+12", 12), ("0o7", 7), ("0o14", 12), ("0x3A", 58), ("012", 12), ("-08", -8)),
        *(("0.", 0.0), ("-0.0", -0.0), (".5", 0.5), ("+12e03", 12000.0), ("-2E+05", -2e5), ("6.8523015e+5", 685230.15)),
        *(
            ("1e-3", 1e-3),
            ("1E3", 1000.0),
            (".5e1", 5.0),
            ("1.e2", 100.0),
            ("2e0", 2.0),
            ("-.5", -0.5),
            ("1e400", math.inf),
        ),
        *((".inf", math.inf), ("-.Inf", -math.inf), ("+.INF", math.inf)),
        # Values of YAML 1.1 alone are text.
        *((text, text) for text in ("yes", "no", "on", "off", "y", "n", "Yes", "NO", "nUll", "tRUE", "nan", "inf")),
        *(
            (text, text)
            for text in ("1_000", "1:30", "190:20:30", "0b101", "-0x1", "1e", "e3", ".", "+", ".e3", "1.2.3")
        ),
        *((text, text) for text in ("2024-01-31", "2001-12-14t21:59:43.10-05:00", "=", "1 000", "\u0663")),
        # In quotes, everything is text.
        *(('"1e-3"', "1e-3"), ("'true'", "true"), ('""', "")),
    ],
)
def test_plain_words(text, value):
    found = parse_yaml(text, "here")
    assert (found, type(found)) == (value, type(value))
    assert parse_yaml(f"a: [{text}]" if text else "a: [~]", "here")["a"][0] == value


def test_not_a_number():
    assert all(math.isnan(parse_yaml(text, "here")) for text in (".nan", ".NaN", ".NAN"))


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers())
def test_numbers_come_back_as_python_and_json_write_them(number):
    found = parse_yaml(repr(number), "here")
    assert (found, type(found)) == (number, type(number))


def test_names_of_mappings_are_text_where_they_are_words():
    assert parse_yaml("{on: 1, no: 2, 1e-3: 3}", "here") == {"on": 1, "no": 2, 0.001: 3}
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}", "here")["b"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    "text",
    [
        *(
            "a: 1\na: 2",
            "[",
            "a: b: c",
            "!!python/object/apply:os.system [ls]",
            "!!int 1_000",
            "!!int x",
            "\x07",
            "? [a]\n: b",
        ),
        *("9" * 5000, "!!timestamp 2024-99-99", "- a\n---\n- b"),
    ],
)
def test_what_is_refused(text):
    with pytest.raises(ParameterError, match=r"^here: not YAML: "):
        parse_yaml(text, "here")


def test_a_bare_none_is_refused_with_the_cure():
    with pytest.raises(ParameterError, match=r"^here: None is text in YAML; write null$"):
        parse_yaml(" None ", "here")
    assert parse_yaml("'None'", "here") == "None"
    assert parse_yaml("[None]", "here") == ["None"]


def test_files(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfrate: 1e-3\r\n")
    assert read_yaml(tmp_path / "a.yaml") == {"rate": 0.001}
    (tmp_path / "a.yaml").write_bytes(b"\xff")
    for name in ("a.yaml", "none.yaml"):
        with pytest.raises(ParameterError, match=f"{name}: can't be read"):
            read_yaml(tmp_path / name)


def test_the_project_means_the_same_in_both_versions():
    listed = subprocess.run(["git", "ls-files", "*.yaml"], cwd=PROJECT, capture_output=True, text=True).stdout.split()
    for path in [PROJECT / name for name in listed] or sorted(PROJECT.glob("[cdn]*/**/*.yaml")):
        assert repr(read_yaml(path)) == repr(yaml.safe_load(path.read_text(encoding="utf-8"))), path
