"""params.yaml → frozen dataclasses without defaults; every wrong key is reported at once, before any work.

Types of fields: bool, int, float, str, Any, Literal, dict[str, X], tuple[X, ...], tuple[X, Y], nested dataclasses, X | None,
unions, and numbers with bounds: Annotated[float, pydantic.Field(gt=0, le=1)]. A union of dataclasses names the Literal field
that tells them apart: Annotated[A | B, pydantic.Field(discriminator="source")].
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NewType, TypeVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import ErrorDetails, SchemaValidator

PARAMS_FILE = Path("params.yaml")
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}  # keywords of JSON schema
TYPES = {"integer": "a whole number", "number": "a number", "string": "a text", "boolean": "true or false", "null": "null"}

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
AboveZero = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]

T = TypeVar("T")


class ParamsError(ValueError):
    """Something in params.yaml is not allowed; the text names key, value, what is allowed and the file."""


def read(path: Path) -> dict[str, Any]:
    """The whole file as plain values. ParamsError if it is missing, no YAML, or no mapping."""
    if not path.is_file():
        raise ParamsError(f"{path} is missing; start from a copy of one in presets/")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ParamsError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ParamsError(f"{path} must hold a mapping of sections, got {type(values).__name__}")
    return values


def section(values: Mapping[str, Any], *keys: str, file: Path = PARAMS_FILE) -> Any:
    """values[k1][k2]…; ParamsError names the first key that is missing and what stands there instead."""
    inner: Any = values
    for depth, key in enumerate(keys):
        if not isinstance(inner, Mapping) or key not in inner:
            there = ", ".join(map(str, inner)) if isinstance(inner, Mapping) else repr(inner)
            raise ParamsError(f"{file}: {'.'.join(keys[: depth + 1])} is missing (there: {there}; edit {file})")
        inner = inner[key]
    return inner


def parse(kind: type[T], value: Any, where: str, file: Path = PARAMS_FILE) -> T:
    """`value` (plain YAML) as an instance of the frozen dataclass `kind`. `where` is its dotted key for errors.

    Nothing is converted but lists to tuples and whole numbers to floats. Raises ParamsError listing every offender.
    """
    try:
        return _validator(kind).validate_python(value)
    except ValidationError as error:
        schema = json_schema(kind)
        lines = [_line(schema, value, where, list(problem["loc"]), problem) for problem in error.errors()]
        raise ParamsError("\n".join(f"{file}: {line}" for line in dict.fromkeys(lines)) + f"\n(edit {file})") from None


def json_schema(kind: type[Any], generator: type[GenerateJsonSchema] = GenerateJsonSchema) -> dict[str, Any]:
    """JSON schema (draft 2020-12) of what `parse` takes for the dataclass `kind`, without $ref (section_schema.py adds
    words)."""
    schema = _adapter(kind).json_schema(schema_generator=generator)
    return _inlined(schema, schema.pop("$defs", {}))


@functools.cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    section = NewType("section", kind)  # pyright: ignore[reportGeneralTypeIssues]
    return TypeAdapter(section, config=STRICT)  # beside a dataclass itself, pydantic refuses a config


@functools.cache
def _validator(kind: type[Any]) -> SchemaValidator:
    return SchemaValidator(_for_yaml(_adapter(kind).core_schema))


def _for_yaml(schema: Any) -> Any:
    """pydantic's strict core schema → one that takes a mapping for a dataclass and a list for a tuple, since YAML has no
    other."""
    if isinstance(schema, list):
        return [_for_yaml(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {key: _for_yaml(part) for key, part in schema.items()}
    return parts | {"strict": False} if parts.get("type") in ("dataclass", "tuple") else parts


def _inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_inlined(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        beside = {key: part for key, part in schema.items() if key != "$ref"}
        schema = definitions[schema["$ref"].rpartition("/")[2]] | beside
    if "propertyName" in schema:  # of a discriminator; `mapping` beside it only points to definitions
        schema = {"propertyName": schema["propertyName"]}
    return {key: _inlined(part, definitions) for key, part in schema.items()}


# ---- errors in plain words
# ----------------------------------------------------------------------------------------------------


def _line(schema: dict[str, Any], value: Any, where: str, steps: list[Any], error: ErrorDetails) -> str:
    """One of pydantic's errors. `steps` lead to it from `where`, which holds `value` and allows `schema`."""
    options = [option for option in schema.get("anyOf", ()) if option.get("type") != "null"]
    if len(options) == 1:  # "X or null": X's own words say more
        schema = options[0]
    if not steps or "anyOf" in schema:  # among several options, nobody knows which was meant
        return _refusal(schema, value, where, error)
    step, *rest = steps
    if "discriminator" in schema:  # pydantic has the variant's name as a step
        name = schema["discriminator"]["propertyName"]
        variant = next(option for option in schema["oneOf"] if step in _words(option["properties"][name]))
        return _line(variant, value, where, rest, error)
    if "properties" in schema:
        return _line_of_key(schema["properties"], value, where, step, rest, error)
    if schema["type"] == "array":
        if step >= len(value):  # the list is too short
            return _refusal(schema, value, where, error)
        item = schema["prefixItems"][step] if "prefixItems" in schema else schema["items"]
        return _line(item, value[step], f"{where}[{step}]", rest, error)
    if rest == ["[key]"]:  # the key is wrong, not what it holds
        return _refusal(schema, value, where, error)
    return _line(schema["additionalProperties"], value[step], f"{where}.{step}", rest, error)


def _line_of_key(
    properties: Mapping[str, Any], value: Mapping[str, Any], where: str, key: Any, rest: list[Any], error: ErrorDetails
) -> str:
    if key not in properties:
        return f"{where}.{key}: unknown key, allowed are {', '.join(properties) or 'none'}"
    if key not in value:
        return f"{where}.{key}: missing, allowed is {_allowed(properties[key])}"
    return _line(properties[key], value[key], f"{where}.{key}", rest, error)


def _refusal(schema: dict[str, Any], value: Any, where: str, error: ErrorDetails) -> str:
    if error["type"] == "value_error" and "ctx" in error and "anyOf" not in schema:
        return f"{where}: {error['ctx']['error']}"  # rules between keys live in __post_init__
    if "discriminator" in schema and isinstance(value, dict):
        name = schema["discriminator"]["propertyName"]
        return _line_of_key({name: _tag(schema)}, value, where, name, [], error)
    return f"{where}: got {value!r}, allowed is {_allowed(schema)}"


def _tag(schema: dict[str, Any]) -> dict[str, Any]:
    """What the discriminator of a union may hold."""
    name = schema["discriminator"]["propertyName"]
    return {"enum": [word for option in schema["oneOf"] for word in _words(option["properties"][name])]}


def _words(literal: dict[str, Any]) -> list[str]:
    """What a Literal's schema allows."""
    return literal.get("enum", [literal.get("const")])


def _allowed(schema: dict[str, Any]) -> str:
    """What a JSON schema allows, in plain words."""
    if "discriminator" in schema:
        return f"a mapping whose {schema['discriminator']['propertyName']} is {_allowed(_tag(schema))}"
    if "anyOf" in schema:
        return " or ".join(map(_allowed, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return "one of " + ", ".join(map(str, _words(schema)))
    match schema.get("type"):
        case "array" if "prefixItems" in schema:
            return f"a list [{', '.join(map(_allowed, schema['prefixItems']))}]"
        case "array":
            return f"a list of {_allowed(schema['items'])}"
        case "object" if "properties" in schema:
            return f"a mapping with {', '.join(schema['properties'])}"
        case "object":
            return f"a mapping to {_allowed(schema['additionalProperties'])}"
        case None:
            return "anything"
        case plain:
            bounds = " and ".join(f"{sign} {schema[keyword]:g}" for keyword, sign in BOUNDS.items() if keyword in schema)
            return f"{TYPES[plain]} {bounds}" if bounds else TYPES[plain]
