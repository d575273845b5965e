"""YAML as people write it: numbers by YAML 1.2, each key once, plain values only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from fastexperts.errors import FastexpertsError, refuse


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-4` is a number and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen and key != "<<":
                raise FastexpertsError(f"`{key}` is in line {seen[key]} and line {line}: remove one.")
            seen[key] = line
        return super().construct_mapping(node, deep)


# YAML 1.2's numbers: YAML 1.1, which PyYAML implements, needs a dot in `1.0e-4`.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> Any:
    """What the file holds, as plain values; raises FastexpertsError if it is no plain YAML."""
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no such file"
        raise refuse("recipe", str(path), got=got, needs="a YAML file", way_out="See examples/recipe.yaml.")
    try:
        # _Loader is a SafeLoader: no Python objects are built.
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FastexpertsError as error:
        way_out = str(error)
        raise refuse("recipe", str(path), got="a setting twice", needs="it once", way_out=way_out) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        got, needs = "text that is not plain YAML", "`name: value` lines"
        raise refuse("recipe", str(path), got=got, needs=needs, way_out=problem) from error
