"""Strict YAML: refuse what PyYAML would silently read as something else."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from cifar_dist.utils.errors import UserError, first_line

# The YAML 1.2 form of each scalar type. PyYAML accepts more, also under a tag such as !!float.
_FORMS = {
    "null": (re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    "int": (re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")),
    "float": (
        re.compile(r"^[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
        list("-+.0123456789"),
    ),
}

_UNEXPANDED = re.compile(r"^~(?=/)|^\$|(?<=/)\$|\$(?=\{)")  # of a home folder or a variable


def _error(message: str, node: Any) -> yaml.MarkedYAMLError:
    """Return the error for a node or an event, with its line and column."""
    return yaml.constructor.ConstructorError(None, None, message, node.start_mark)


class _Loader(yaml.SafeLoader):
    """Loader with YAML 1.2 scalars (1e-3 is a number; `no` and `010` are strings).

    Duplicate keys, anchors and aliases are errors.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _error("anchors and aliases are not allowed; write the value out", event)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = self.construct_object(key_node, deep=True)
            if not isinstance(name, str):
                raise _error(f"the key {name!r} is not a string; quote it", key_node)
            if name in seen:
                raise _error(f"{name!r} is given twice; keep one", key_node)
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_text(self, node: Any) -> str:
        """Return a string; refuse ~/... and $NAME, which would create folders called `~` and `$NAME`."""
        text = self.construct_scalar(node)
        if found := _UNEXPANDED.search(text):
            raise _error(f"{text[:40]!r}: {found[0]} is not expanded; write the full path", node)
        return text

    def construct_strict(self, node: Any) -> Any:
        """Return PyYAML's value of a scalar if its text has the YAML 1.2 form of its type."""
        text, kind = self.construct_scalar(node), node.tag.rpartition(":")[2]
        form, _ = _FORMS[kind]
        if not form.fullmatch(text):  # `$` would accept a trailing newline
            raise _error(f"{text[:40]!r} is not a valid {kind}; remove the tag", node)
        return yaml.SafeLoader.yaml_constructors[node.tag](self, node)


# Tags such as !!binary and !!set, whose values are not plain data, get no constructor.
_Loader.yaml_constructors = {
    tag: yaml.SafeLoader.yaml_constructors[tag]
    for tag in (
        None,  # raises the error for all other tags
        *(f"tag:yaml.org,2002:{name}" for name in ("seq", "map")),
    )
}
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_text)
_Loader.yaml_implicit_resolvers = {}
for _kind, (_form, _first) in _FORMS.items():
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_strict)
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _form, _first)


def parse_yaml(text: str, *, where: str) -> Any:
    """Return the plain data of YAML text; raise UserError with line and column for anything else."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        position = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        raise UserError(f"{position}: {error.problem}") from None
    except (yaml.YAMLError, ArithmeticError, LookupError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a recipe: {first_line(error)}") from None
