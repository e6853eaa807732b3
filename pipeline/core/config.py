"""params.yaml → frozen dataclasses without defaults; every wrong key is reported at once, before any work."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import yaml

PARAMS_FILE = Path("params.yaml")


class ParamsError(ValueError):
    """Something in params.yaml is not allowed; the text names key, value, what is allowed and the file."""


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both included; `above` excludes its bound."""

    low: float | None = None
    high: float | None = None
    above: float | None = None

    def __str__(self) -> str:
        words = []
        if self.above is not None:
            words.append(f"> {self.above:g}")
        if self.low is not None:
            words.append(f">= {self.low:g}")
        if self.high is not None:
            words.append(f"<= {self.high:g}")
        return " and ".join(words)

    def holds(self, value: float) -> bool:
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
        )


Positive = Annotated[int, Range(low=1)]
Count = Annotated[int, Range(low=0)]
Share = Annotated[float, Range(low=0, high=1)]
AboveZero = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(low=0)]

T = TypeVar("T")


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
    found: Any = values
    for depth, key in enumerate(keys):
        if not isinstance(found, Mapping) or key not in found:
            there = ", ".join(map(str, found)) if isinstance(found, Mapping) else repr(found)
            raise ParamsError(f"{file}: {'.'.join(keys[: depth + 1])} is missing (there: {there}; edit {file})")
        found = found[key]
    return found


def parse(kind: type[T], value: Any, where: str, file: Path = PARAMS_FILE) -> T:
    """`value` (plain YAML) as an instance of the frozen dataclass `kind`. `where` is its dotted key for errors.

    Types understood: bool, int, float, str, Literal, None, unions, tuple[X, ...], dict[str, X], nested dataclasses and
    Annotated[number, Range]. Raises ParamsError listing every offender.
    """
    errors: list[str] = []
    result = _convert(kind, value, where, errors)
    if errors:
        raise ParamsError("\n".join(f"{file}: {error}" for error in errors) + f"\n(edit {file})")
    return result


def _describe(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin is Annotated:
        base, *extras = typing.get_args(kind)
        return " ".join([_describe(base), *map(str, extras)])
    if origin is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(kind))
    if origin is tuple:
        return f"a list of {_describe(typing.get_args(kind)[0])}"
    if origin is dict:
        return f"a mapping to {_describe(typing.get_args(kind)[1])}"
    if kind is type(None):
        return "null"
    if dataclasses.is_dataclass(kind):
        return "a mapping with " + ", ".join(field.name for field in dataclasses.fields(kind))
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}.get(kind, str(kind))


def _convert(kind: Any, value: Any, where: str, errors: list[str]) -> Any:
    origin = typing.get_origin(kind)

    def refuse() -> None:
        errors.append(f"{where}: got {value!r}, allowed is {_describe(kind)}")

    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _convert_dataclass(kind, value, where, errors)
    if origin is Annotated:
        base, *extras = typing.get_args(kind)
        before = len(errors)
        converted = _convert(base, value, where, errors)
        if len(errors) == before and not all(extra.holds(converted) for extra in extras):
            refuse()
        elif len(errors) > before:
            del errors[before:]
            refuse()
        return converted
    if origin in (Union, types.UnionType):
        return _convert_union(kind, value, where, errors)
    if origin is Literal:
        if not any(value == option and type(value) is type(option) for option in typing.get_args(kind)):
            refuse()
        return value
    if origin is tuple:
        if not isinstance(value, list):
            return refuse()
        inner = typing.get_args(kind)[0]
        return tuple(_convert(inner, item, f"{where}[{at}]", errors) for at, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            return refuse()
        inner = typing.get_args(kind)[1]
        return {key: _convert(inner, item, f"{where}.{key}", errors) for key, item in value.items()}
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if value != value or value in (float("inf"), float("-inf")):
            refuse()
        return float(value)
    if kind is Any or (isinstance(kind, type) and type(value) is kind):
        return value
    if kind is type(None) and value is None:
        return None
    refuse()
    return None


def _convert_union(kind: Any, value: Any, where: str, errors: list[str]) -> Any:
    options = typing.get_args(kind)
    attempts: list[list[str]] = []
    for option in options:
        attempt: list[str] = []
        converted = _convert(option, value, where, attempt)
        if not attempt:
            return converted
        attempts.append(attempt)
    real = [option for option in options if option is not type(None)]
    if len(real) == 1 and value is not None:  # "X or null": X's own words say more
        errors.extend(attempts[options.index(real[0])])
    else:
        errors.append(f"{where}: got {value!r}, allowed is {_describe(kind)}")
    return None


def _convert_dataclass(kind: type[Any], value: Any, where: str, errors: list[str]) -> Any:
    if not isinstance(value, dict):
        errors.append(f"{where}: got {value!r}, allowed is {_describe(kind)}")
        return None
    hints = typing.get_type_hints(kind, include_extras=True)
    names = [field.name for field in dataclasses.fields(kind)]
    for key in value:
        if key not in names:
            errors.append(f"{where}.{key}: unknown key, allowed are {', '.join(names)}")
    before = len(errors)
    made = {}
    for name in names:
        if name not in value:
            errors.append(f"{where}.{name}: missing, allowed is {_describe(hints[name])}")
        else:
            made[name] = _convert(hints[name], value[name], f"{where}.{name}", errors)
    if len(errors) > before or set(made) != set(names):
        return None
    try:
        return kind(**made)
    except ValueError as error:  # rules between keys live in __post_init__
        errors.append(f"{where}: {error}")
        return None
