"""Floor 0. YAML, the unsurprising part of it: what PyYAML would read silently wrong is refused."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from cifar_dist.utils.errors import UserError

# A plain scalar's type by its form, YAML 1.2's; under a tag like !!float PyYAML would read more than that.
_FORMS = {
    "null": (re.compile(r"^(?:~|null|)$"), ["~", "n", ""]),
    "bool": (re.compile(r"^(?:true|false)$"), list("tf")),
    "int": (re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")),
    "float": (
        re.compile(r"^[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
        list("-+.0123456789"),
    ),
}


def _wrong(what: str, place: Any) -> yaml.MarkedYAMLError:
    """The refusal of a node or an event, with its line and column."""
    return yaml.constructor.ConstructorError(None, None, what, place.start_mark)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: 1e-3 is a number, `no` and `010` are text; no repeats, no aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _wrong("anchors and aliases are not allowed; write the value out", event)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = self.construct_object(key_node, deep=True)
            if not isinstance(name, str):
                raise _wrong(f"the key {name!r} is not a word", key_node)
            if name in seen:
                raise _wrong(f"{name!r} is given twice; keep one", key_node)
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_text(self, node: Any) -> str:
        """A text; one like ~/data, which only shells expand, would make a folder of that name."""
        text = self.construct_scalar(node)
        if text.startswith("~/"):
            raise _wrong(f"{text[:40]!r}: nothing expands the ~ here; write the whole path", node)
        return text

    def construct_strict(self, node: Any) -> Any:
        """What PyYAML makes of a scalar, if its text has the form of its type: `!!int 010` has not."""
        text, kind = self.construct_scalar(node), node.tag.rpartition(":")[2]
        form, _ = _FORMS[kind]
        if not form.fullmatch(text):  # `$` would let a line end pass
            raise _wrong(f"{text[:40]!r} is no {kind}; remove the tag", node)
        return yaml.SafeLoader.yaml_constructors[node.tag](self, node)


# A tag like !!binary or !!set would make what is no plain data; without a constructor it is refused.
_Loader.yaml_constructors = {
    tag: yaml.SafeLoader.yaml_constructors[tag]
    for tag in (
        None,  # refuses what no other entry takes
        *(f"tag:yaml.org,2002:{name}" for name in ("seq", "map")),
    )
}
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_text)
_Loader.yaml_implicit_resolvers = {}
for _kind, (_form, _first) in _FORMS.items():
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_strict)
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _form, _first)


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
