"""YAML as the kit reads it everywhere: version 1.2, core schema, without code, each name of a mapping once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from cxrkit.errors import ParameterError

__all__ = ["parse_yaml", "read_yaml"]

# Source: YAML 1.2.2, 10.3.2. PyYAML's own table is that of version 1.1, where 1e-3 is text, no is false, 012 is ten and
# 1:30 is ninety. "<<" (merge) is of 1.1, and kept.
_PLAIN = {
    "null": r"null|Null|NULL|~|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "merge": r"<<",
}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    yaml_implicit_resolvers: ClassVar[dict] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and name.tag != "tag:yaml.org,2002:merge":
                if name.value in seen:  # the second would silently replace the first
                    line = name.start_mark.line + 1
                    raise yaml.constructor.ConstructorError(None, None, f"line {line}: {name.value!r} is there twice")
                seen.add(name.value)
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        if not re.fullmatch(_PLAIN["int"], node.value):  # !!int says that it is one
            raise ValueError(f"line {node.start_mark.line + 1}: {node.value!r} is no whole number")
        return int(node.value, 0 if node.value[:2] in ("0o", "0x") else 10)


for _name, _pattern in _PLAIN.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), None)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def parse_yaml(text: str, where: str) -> Any:
    """The value that a YAML text holds. Raises ParameterError, naming `where`, for what is no YAML, and for a bare
    None, which would be text."""
    if text.strip() == "None":
        raise ParameterError(f"{where}: None is text in YAML; write null")
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ParameterError(f"{where}: not YAML: {error}") from None


def read_yaml(path: Path) -> Any:
    """The value that a YAML file holds. Raises ParameterError for a file that can't be read or is no YAML."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ParameterError(f"{path.name}: can't be read: {error}") from None
    return parse_yaml(text, path.name)
