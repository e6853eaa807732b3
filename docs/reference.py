"""recipes/schema.json and the sections of params.yaml → docs/reference.md, a table of every key.

Run after a change of settings, and after `python -m stages.schema`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from pipeline.core import plugins, sections
from pipeline.section_schema import json_schema

PAGE = Path(__file__).with_name("reference.md")
SCHEMA = Path(__file__).parents[1] / "recipes" / "schema.json"
INTRODUCTION = """# Reference of settings

Every key of a recipe, then every key of `params.yaml`. `python -m docs.reference` writes this page from the code: do not
edit it. All keys are required and none has a default. [Recipes](recipes.md) says how the two files go
together.
"""
RECIPE_OF = {"train": "method", "extract": "method", "fit_refiner": "refiner", "refine": "refiner"}
PARAMS = {
    "dataset": sections.Dataset, "methods.&lt;run&gt;": sections.Run, "prepare": sections.Prepare,
    "export": sections.Export, "evaluate": sections.Evaluate, "report": sections.Report,
}  # fmt: skip
Row = tuple[str, str, str]  # key, what it may be, what it means


def main() -> None:
    PAGE.write_text(text(), encoding="utf-8")


def recipe_sections() -> dict[str, Any]:
    """JSON schema of each section of a recipe."""
    return json.loads(SCHEMA.read_text(encoding="utf-8"))["properties"]


def text() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for name, section in recipe_sections().items():
        parts += [f"## {name}\n", *_section(name, section, f"of {RECIPE_OF.get(name, 'segmenter')}")]
    parts.append("## params.yaml\n")
    for name, kind in PARAMS.items():
        parts += [f"### {name}\n", *_section(name, json_schema(kind), "")]
    for name in plugins.available("datasets"):
        schema = json_schema(plugins.load("datasets", name).Params)
        parts += [f"### dataset.options of {name}\n", *_section("dataset.options", schema, "")]
    return "\n".join(parts)


def _section(name: str, section: dict[str, Any], member: str) -> Iterator[str]:
    """A table of the section's own keys, then one per member of each open set that has settings in it."""
    if "anyOf" in section:  # fit_refiner as a whole is the refiner's
        for schema in section["anyOf"]:
            yield f"### {name} {member} {schema['title']}\n"
            yield _table(list(rows(name, schema)), schema)
        return
    of_members = {key: schema for key, schema in section["properties"].items() if _is_open(schema)}
    yield _table(list(rows(name, section, leave=set(of_members))), section)
    for key, schema in of_members.items():
        for option in schema["anyOf"]:
            yield f"### {name}.{key} {member} {option['title']}\n"
            yield _table(list(rows(f"{name}.{key}", option)), {})


def _is_open(schema: dict[str, Any]) -> bool:
    """Whether the members of an open set say what the key holds: all alternatives are objects with their names as titles."""
    return len(schema.get("anyOf", ())) > 1 and all(option.get("type") == "object" for option in schema["anyOf"])


def rows(path: str, schema: dict[str, Any], leave: Collection[str] = ()) -> Iterator[Row]:
    """Every key below `path`, with those of nested objects and of alternatives right after it, but for the insides of
    `leave`."""
    for key, value in schema.get("properties", {}).items():
        yield f"{path}.{key}", allowed(value), value.get("description", "")
        if key not in leave:
            yield from rows(f"{path}.{key}", value)
    for option in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from rows(path, option)
    if isinstance(schema.get("items"), dict):
        yield from rows(f"{path}[]", schema["items"])


def allowed(schema: dict[str, Any]) -> str:
    """What a value may be, in words."""
    for key in ("anyOf", "oneOf"):
        if key in schema:
            words = dict.fromkeys(allowed(option) for option in schema[key])
            return " or ".join(word for word in words if word != "`{}`" or len(words) == 1)
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    match schema.get("type"):
        case "integer" | "number" as kind:
            limits = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
            bounds = [f"{sign} {schema[key]}" for key, sign in limits if key in schema]
            return " ".join([{"integer": "whole number", "number": "number"}[kind], ", ".join(bounds)]).strip()
        case "boolean":
            return "`true`, `false`"
        case "string":
            return "text"
        case "null":
            return "`null`"
        case "array" if "prefixItems" in schema:
            return f"[{', '.join(allowed(item) for item in schema['prefixItems'])}]"
        case "array":
            return f"list: {allowed(schema['items'])}"
        case "object":
            if isinstance(schema.get("additionalProperties"), dict):
                return f"names, each with: {allowed(schema['additionalProperties'])}"
            return "the keys below" if schema.get("properties") else "`{}`"
        case _:
            return "its keys below"


def _table(lines: list[Row], section: dict[str, Any]) -> str:
    about = section.get("description", "")
    if not lines:
        return f"{about}\n\nNo keys: `{{}}`.\n".lstrip()
    head = f"{about}\n\n" if about else ""
    body = "".join(f"| `{key}` | {_cell(kind)} | {_cell(meaning)} |\n" for key, kind, meaning in lines)
    return f"{head}| key | allowed | meaning |\n|---|---|---|\n{body}"


def _cell(words: str) -> str:
    return words.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("\n", " ")


if __name__ == "__main__":
    main()
