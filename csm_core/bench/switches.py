"""``--set slots=8 --set quantize=int8``: any field of EngineConfig or Settings by name, without a list of them here."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from csm_core.config import EngineConfig, Settings
from csm_core.errors import InvalidInputError

_WORDS: Mapping[str, object] = {"true": True, "on": True, "false": False, "off": False, "none": None}
OF_SETTINGS = ("quantize",)  # the fields of Settings that change speed; a new one is added here


def names() -> list[str]:
    """What can be set."""
    engine = [field.name for field in dataclasses.fields(EngineConfig)]
    return engine + [field.name for field in dataclasses.fields(Settings) if field.name in OF_SETTINGS]


def parse(text: str) -> tuple[str, Any]:
    """``name=value`` -> name and value of the field's kind: true, none, 3, 0.5, 1,2,4 or a word."""
    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or name not in names():
        raise InvalidInputError(f"{text!r:.60} is not NAME=VALUE with one of {', '.join(names())}.", "set")
    return name, _value(name, value.strip())


def parse_choices(text: str) -> tuple[str, list[Any]]:
    """``name=value|value`` -> name and values."""
    name, _, values = text.partition("=")
    pairs = [parse(f"{name}={value}") for value in values.split("|")]
    return pairs[0][0], [value for _, value in pairs]


def apply(settings: Settings, values: Iterable[tuple[str, Any]]) -> Settings:
    """``settings`` with some fields changed, the engine's or its own. Raises InvalidInputError for impossible ones."""
    engine_names = {field.name for field in dataclasses.fields(EngineConfig)}
    pairs = dict(values)
    engine = {name: value for name, value in pairs.items() if name in engine_names}
    rest = {name: value for name, value in pairs.items() if name not in engine_names}
    try:
        return dataclasses.replace(settings, engine=dataclasses.replace(settings.engine, **engine), **rest)
    except (ValueError, TypeError) as error:
        raise InvalidInputError(f"These settings do not go together: {error}.", "set") from error


def current(settings: Settings) -> dict[str, Any]:
    """Every field that can be set, as it is."""
    return {name: getattr(settings.engine, name, getattr(settings, name, None)) for name in names()}


def _value(name: str, text: str) -> Any:
    default = next((f.default for f in dataclasses.fields(EngineConfig) if f.name == name), None)
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        if isinstance(default, tuple) or "," in text:
            return tuple(int(part) for part in text.split(",") if part)
        return float(text) if "." in text else int(text)
    except ValueError:
        if isinstance(default, bool | int | float | tuple):
            raise InvalidInputError(f"{name} cannot be {text!r:.40}.", "set") from None
        return text
