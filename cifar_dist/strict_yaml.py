"""Floor 0. YAML, the unsurprising part of it: what PyYAML would read silently wrong is refused."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from cifar_dist.errors import UserError

_INTEGER = re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: 1e-3 is a number, `no` and `010` are text; no repeats, no aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.constructor.ConstructorError(
                None,
                None,
                "anchors and aliases are not allowed; write the value out",
                event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = self.construct_object(key_node, deep=True)
            if not isinstance(name, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {name!r} is not a word", key_node.start_mark
                )
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name!r} is given twice; keep one", key_node.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        """Under the tag !!int PyYAML would also read 010 as 8 and 1:30 as 90."""
        text = self.construct_scalar(node)
        if not _INTEGER.match(text):
            raise yaml.constructor.ConstructorError(
                None, None, f"{text[:40]!r} is no integer; write decimal digits", node.start_mark
            )
        return int(text)


# A tag like !!binary or !!set would make what is no plain data; without a constructor it is refused.
_Loader.yaml_constructors = {
    tag: yaml.SafeLoader.yaml_constructors[tag]
    for tag in (
        None,  # refuses what no other entry takes
        *(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float")),
        *(f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map")),
    )
}
_Loader.yaml_constructors["tag:yaml.org,2002:int"] = _Loader.construct_yaml_int
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|)$", ["~", "n", ""]),
    ("bool", r"^(?:true|false)$", list("tf")),
    ("int", _INTEGER.pattern, list("-+0123456789")),
    (
        "float",
        r"^[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def parse_yaml(text: str, *, where: str) -> Any:
    """Plain data from YAML text; UserError with line and column for what is not plain."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        raise UserError(f"{place}: {error.problem}") from None
    except (yaml.YAMLError, ArithmeticError, LookupError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a recipe: {str(error).splitlines()[0]}") from None
