"""Write recipes/schema.json, for editors, and docs/recipe_keys.md: `make schema`.

A key is described by the comment of its field: at the end of its line, or in the lines above it.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import json
import re
import tokenize
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from cifar_dist.losses.registry import LOSSES
from cifar_dist.recipe.schema import ADAPTER
from cifar_dist.utils.files import atomic_write, write_json

ROOT = Path(__file__).parents[1]

Schema = dict[str, Any]

HEADER = """# Recipe keys

All keys of a recipe with their types and defaults; `make schema` generates this page from the config classes. Override a
key on the command line with `KEY=VALUE`:

```
python -m cifar_dist.train recipes/r18_32.yaml run.epochs=20 augment.affine.degrees=10 'optim.betas=[0.9, 0.95]'
```"""


def field_comments(cls: type) -> dict[str, str]:
    """Return the comment of each field of a config class, inherited fields included."""
    comments: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        source = inspect.getsource(base)
        by_line = {  # a comment, and whether it has the line to itself
            token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        [definition] = ast.parse(source).body
        assert isinstance(definition, ast.ClassDef)
        for node in definition.body:
            if not isinstance(node, ast.AnnAssign):
                continue
            first = node.lineno
            while by_line.get(first - 1, ("", False))[1]:
                first -= 1
            lines = range(first, (node.end_lineno or node.lineno) + 1)
            words = [by_line[line][0] for line in lines if line in by_line]
            comments[ast.unparse(node.target)] = " ".join(words)
    return comments


class DescribedJsonSchema(GenerateJsonSchema):
    """Adds the comments of the fields as descriptions of the properties."""

    def dataclass_schema(self, schema: Any) -> Schema:
        described = super().dataclass_schema(schema)
        comments = field_comments(schema["cls"])
        for name, content in described["properties"].items():
            content["description"] = comments[name]
        return described


def json_schema() -> Schema:
    """Return the JSON Schema of a recipe."""
    schema = ADAPTER.json_schema(schema_generator=DescribedJsonSchema)
    for name, kind in LOSSES.items():
        description = first_paragraph(schema["$defs"][kind.__name__]["description"])
        schema["$defs"]["Losses"]["properties"][name]["description"] = description
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def keys_page(schema: Schema) -> str:
    """Return docs/recipe_keys.md: a section with a table of the keys for each config class."""
    homes: dict[str, str] = {}  # the first key that refers to a definition has its section
    blocks = [HEADER]

    def add_section(key: str, definition: Schema, *, of_list: bool) -> None:
        properties, required = definition["properties"], definition.get("required", ())
        prefix = "" if of_list or not key else f"{key}."
        rows = ["| key | type | default | description |", "|---|---|---|---|"]
        nested: list[tuple[str, Schema]] = []
        for name, content in properties.items():
            reference = find_reference(content)
            if reference and reference not in homes:
                homes[reference] = prefix + name
                nested.append((reference, content))
            default = "required" if name in required else default_words(content)
            description = content["description"].replace("|", r"\|")
            cells = (f"`{prefix}{name}`", type_words(content, homes), default, description)
            rows.append(f"| {' | '.join(cells)} |")
        blocks.append(f"{'###' if '.' in key else '##'} {key or 'Top level'}")
        if of_list:
            blocks.append("Keys of each item of the list:")
        elif key and "description" in definition:
            blocks.append(first_paragraph(definition["description"]))
        blocks.append("\n".join(rows))
        for reference, content in nested:
            is_list = any("items" in option for option in content.get("anyOf", ()))
            add_section(homes[reference], schema["$defs"][reference], of_list=is_list)

    add_section("", schema, of_list=False)
    return "\n\n".join(blocks) + "\n"


def first_paragraph(text: str) -> str:
    return " ".join(text.partition("\n\n")[0].split())


def find_reference(content: Schema) -> str | None:
    """Return the name of the definition that a property, or the items of its list, refer to."""
    for option in content.get("anyOf", [content]):
        item = option.get("items", option)
        if "$ref" in item:
            return str(item["$ref"]).rpartition("/")[2]
    return None


def type_words(content: Schema, homes: dict[str, str]) -> str:
    """Return the type of a property in words, like `integer >= 1 or null`; a section is a link."""
    *others, last = type_options(content, homes)
    return f"{', '.join(others)} or {last}" if others else last


def type_options(content: Schema, homes: dict[str, str]) -> list[str]:
    match content:
        case {"anyOf": options}:
            return [words for option in options for words in type_options(option, homes)]
        case {"$ref": _}:
            anchor = homes[str(find_reference(content))].replace(".", "")
            return [f"[section](#{anchor})"]
        case {"enum": values}:
            return [str(value) for value in values]
        case {"const": value}:
            return [str(value)]
        case {"type": "boolean"}:
            return ["true", "false"]
        case {"prefixItems": [item, *_] as items}:  # of the same type
            return [f"list of {len(items)} {plural(type_words(item, homes))}"]
        case {"items": item}:
            return [f"list of {plural(type_words(item, homes))}"]
        case {"type": "object"}:
            return ["mapping"]
    return [content["type"] + range_words(content)]


def plural(words: str) -> str:
    return re.sub(r"[a-z]+", r"\g<0>s", words, count=1)


def range_words(content: Schema) -> str:
    """Return the range of a number, like ` >= 1` or ` in [0, 1)`; "" if it has none."""
    match content:
        case {"exclusiveMinimum": 0, "exclusiveMaximum": 2_147_483_648}:  # `Count`
            return " >= 1"
        case {"minimum": low, "maximum": high}:
            return f" in [{low:g}, {high:g}]"
        case {"minimum": low, "exclusiveMaximum": high}:
            return f" in [{low:g}, {high:g})"
        case {"exclusiveMinimum": low, "maximum": high}:
            return f" in ({low:g}, {high:g}]"
        case {"minimum": low}:
            return f" >= {low:g}"
        case {"exclusiveMinimum": low}:
            return f" > {low:g}"
    return ""


def default_words(content: Schema) -> str:
    """Return the default of a property as in YAML; "" for a section."""
    default = content.get("default", {})
    return "" if isinstance(default, dict) else f"`{yaml_words(default)}`"


def yaml_words(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(yaml_words(item) for item in value)}]"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    write_json(ROOT / "recipes/schema.json", json_schema())
    atomic_write(ROOT / "docs/recipe_keys.md", keys_page(json_schema()))
