"""All settings that a recipe may hold → recipes/schema.json, by which editors complete, explain and check recipes."""

from __future__ import annotations

import json
from typing import Any

from pipeline.core import plugins, sections
from pipeline.crf import CrfSettings
from pipeline.section_schema import json_schema
from pipeline.training.settings import Training

SCHEMA = "recipes/schema.json"
TITLE = "A recipe of tag2mask: the settings of one method, stage by stage (docs/recipes.md)"


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12). params.yaml says which method, refiner and segmenter a recipe is for: any is allowed."""
    training = _section(Training)
    extract, refine, segment = _section(sections.Extract), _section(sections.Refine), _section(sections.Segment)
    properties = {
        "train": _with(training, model=_any("methods", "Params")),
        "extract": _with(extract, options=_any("methods", "Options")),
        "fit_refiner": _any("refiners", "FitParams"),
        "refine": _with(refine, options=_any("refiners", "Params")),
        "cross_validate": _section(sections.CrossValidate),
        "retrain": _with(training, model=_any("segmenters", "Params")),
        "relabel": _with(_section(sections.Relabel), crf={"anyOf": [{"type": "null"}, _section(CrfSettings)]}),
        "segment": _with(
            segment, crf={"anyOf": [{"type": "null"}, _section(CrfSettings)]}, options=_any("segmenters", "Options")
        ),
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": TITLE,
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def text() -> str:
    """The file's content."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"


def _section(kind: type[Any]) -> dict[str, Any]:
    schema = json_schema(kind)
    del schema["$schema"]
    return schema


def _with(section: dict[str, Any], **parts: dict[str, Any]) -> dict[str, Any]:
    """The section with what plug-ins call their own; a description of the key stays."""
    described = {
        name: part | {key: text for key, text in section["properties"][name].items() if key == "description"}
        for name, part in parts.items()
    }
    return section | {"properties": section["properties"] | described}


def _any(kind: str, name: str) -> dict[str, Any]:
    """What `name` of any member of an open set allows; members that allow the same stand in one line of titles."""
    members: dict[str, list[str]] = {}
    for member in plugins.available(kind):
        schema = json.dumps(_section(getattr(plugins.load(kind, member), name)))
        members.setdefault(schema, []).append(member)
    return {"anyOf": [{**json.loads(schema), "title": ", ".join(names)} for schema, names in members.items()]}
