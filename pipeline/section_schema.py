"""A dataclass of params.yaml → its JSON schema, in which every field that the docstring explains has a description.

Docstrings list fields as lines `name   text` or `name, name   text`, with two spaces or more; lines that follow, up to the
next such line or an empty one, go on with the text. What stands before and after is the description of the class.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from pipeline.core import config

FIELD_LINE = re.compile(r"(?P<names>\w+(?:, \w+)*) {2,}(?P<text>\S.*)")


def json_schema(kind: type[Any]) -> dict[str, Any]:
    """JSON schema (draft 2020-12) of what config.parse takes for the dataclass `kind`: all keys required, no others allowed.

    Self-contained, without $ref, so it may stand inside another schema. Rules between keys (__post_init__) are not in it.
    """
    return {"$schema": GenerateJsonSchema.schema_dialect, **config.json_schema(kind, _WithDescriptions)}


class _WithDescriptions(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # it would repeat the key

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> dict[str, Any]:
        described = super().dataclass_schema(schema)
        about, fields = docstring_parts(schema["cls"])
        if about:
            described["description"] = about
        for name, text in fields.items():
            described["properties"][name]["description"] = text
        return described


def docstring_parts(kind: type[Any]) -> tuple[str, dict[str, str]]:
    """A dataclass → what its docstring says of the class ("" for nothing), and of each field, those of its bases
    included."""
    names = {field.name for field in dataclasses.fields(kind)}
    about, described = "", {}
    for cls in reversed([cls for cls in kind.__mro__ if dataclasses.is_dataclass(cls)]):
        about, own = _parts(inspect.cleandoc(_written_docstring(cls)), names)
        described |= own
    return about, described


def _written_docstring(cls: type[Any]) -> str:
    text = cls.__doc__ or ""
    return "" if text.startswith(f"{cls.__name__}(") else text  # `dataclass` writes the signature where there is none


def _parts(docstring: str, names: set[str]) -> tuple[str, dict[str, str]]:
    about: list[str] = []
    texts: dict[str, list[str]] = {}
    lines = about
    for line in docstring.splitlines():
        entry = FIELD_LINE.fullmatch(line)
        named = entry["names"].split(", ") if entry else []
        if entry and names.issuperset(named):
            lines = [entry["text"]]
            texts |= dict.fromkeys(named, lines)
        elif line.strip():
            lines.append(line)
        else:
            lines = about
            lines.append("")
    paragraphs = "\n".join(about).split("\n\n")
    return (
        "\n\n".join(" ".join(text.split()) for text in paragraphs if text.strip()),
        {name: " ".join(" ".join(text).split()) for name, text in texts.items()},
    )
