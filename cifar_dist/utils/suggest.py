"""Suggestions for misspelled names, and the check for unknown keys that uses them."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from cifar_dist.utils.errors import UserError


def closest(name: str, candidates: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return the candidate that is most similar to `name`, or "" if none is similar."""
    return next(iter(difflib.get_close_matches(name, list(candidates), n=1, cutoff=cutoff)), "")


def known_keys(root: type) -> dict[str, list[str]]:
    """Return the keys of each section: {"": ["name", "run", ...], "run": ["epochs", ...], ...}.

    Follows nested config classes and typed dicts, also optional ones, but no lists.
    """
    keys: dict[str, list[str]] = {}

    def visit(kind: Any, prefix: str) -> None:
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
            for option in typing.get_args(kind):
                visit(option, prefix)
            return
        if dataclasses.is_dataclass(kind):
            names = [field.name for field in dataclasses.fields(kind)]
        elif hasattr(kind, "__required_keys__"):  # typing's and typing_extensions' TypedDict
            names = list(typing.get_type_hints(kind))
        else:
            return
        keys[prefix] = names
        hints = typing.get_type_hints(kind)
        for name in names:
            visit(hints[name], f"{prefix}.{name}".lstrip("."))

    visit(root, "")
    return keys


def refuse_unknown_keys(
    raw: dict[str, Any], root: type, *, where: str, aliases: Mapping[str, str]
) -> None:
    """Raise UserError for the first key of `raw` that `root` does not have, with the closest key.

    `aliases` maps common names from other tools, and old names, to the key that is used here.
    """
    known = known_keys(root)

    def check(value: Any, prefix: str) -> None:
        if prefix not in known or not isinstance(value, dict):
            return
        for name, inner in value.items():
            dotted = f"{prefix}.{name}".lstrip(".")
            if name not in known[prefix]:
                raise UserError(f"{where}: {dotted}: unknown key; {suggestion(name, prefix)}")
            check(inner, dotted)

    def suggestion(name: str, prefix: str) -> str:
        if name in aliases:
            return f"use {aliases[name]}"
        if near := closest(name, known[prefix]):
            return f"did you mean {f'{prefix}.{near}'.lstrip('.')}?"
        dotted = [f"{section}.{key}".lstrip(".") for section in known for key in known[section]]
        # A key that exists in several sections is suggested where it is nested least.
        dotted.sort(key=lambda key: -key.count("."))
        by_last_word = {key.rpartition(".")[2]: key for key in dotted}
        if far := closest(name, by_last_word, cutoff=0.75):
            return f"did you mean {by_last_word[far]}?"
        return f"known keys: {', '.join(known[prefix])}"

    check(raw, "")
