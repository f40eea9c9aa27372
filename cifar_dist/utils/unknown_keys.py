"""Floor 0. A key that no config class has is refused, with the key that was probably meant."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from typing_extensions import is_typeddict

from cifar_dist.utils.errors import UserError


def known_keys(root: type) -> dict[str, list[str]]:
    """{"": ["name", "run", ...], "run": ["epochs", ...], "losses.arcface": [...], ...}.

    Of config classes and typed dicts in each other, optional ones too; what is in a list has no names.
    """
    keys: dict[str, list[str]] = {}

    def visit(kind: Any, prefix: str) -> None:
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
            for option in typing.get_args(kind):
                visit(option, prefix)
        elif is_typeddict(kind) or (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            inner = typing.get_type_hints(kind)
            if not is_typeddict(kind):  # without class variables
                inner = {field.name: inner[field.name] for field in dataclasses.fields(kind)}
            keys[prefix] = list(inner)
            for name, inner_kind in inner.items():
                visit(inner_kind, f"{prefix}.{name}".lstrip("."))

    visit(root, "")
    return keys


def refuse_unknown_keys(
    raw: dict[str, Any], root: type, *, where: str, habits: Mapping[str, str]
) -> None:
    """UserError for the first key of plain data that `root` does not have, with the nearest that it has.

    `habits`: what people write from habit, and what it is called here.
    """
    known = known_keys(root)
    everywhere = [f"{section}.{name}".lstrip(".") for section in known for name in known[section]]

    def visit(value: Any, prefix: str) -> None:
        if prefix not in known or not isinstance(value, dict):
            return
        for name, inner in value.items():
            dotted = f"{prefix}.{name}".lstrip(".")
            if name not in known[prefix]:
                raise UserError(f"{where}: {dotted}: unknown key; {suggest(name, prefix)}")
            visit(inner, dotted)

    def suggest(name: str, prefix: str) -> str:
        if name in habits:
            return f"use {habits[name]}"
        near = difflib.get_close_matches(name, known[prefix], n=1)
        if near:
            return f"did you mean {f'{prefix}.{near[0]}'.lstrip('.')}?"
        deepest_first = sorted(everywhere, key=lambda dotted: -dotted.count("."))
        last_words = {dotted.rpartition(".")[2]: dotted for dotted in deepest_first}
        far = difflib.get_close_matches(name, list(last_words), n=1, cutoff=0.75)
        if far:
            return f"did you mean {last_words[far[0]]}?"
        return f"known here: {', '.join(known[prefix])}"

    visit(raw, "")
