"""Kinds of fields that several requests share, each with its limits."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

from app.api.faults import kind_of, shown

METADATA_PAIRS = 16
METADATA_KEY = 64
METADATA_VALUE = 512


class Body(BaseModel):
    """A JSON object from a client: no unknown keys, no guessing between types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def fault(code: str, message: str) -> PydanticCustomError:
    """An error whose code and sentence reach the client as they are."""
    # Braces would be read as a template.
    return PydanticCustomError(code, "{text}", {"text": message})


def _without_control(value: str) -> str:
    # PostgreSQL cannot hold NUL, and no name needs the other control characters.
    if not value.isprintable():
        raise fault("invalid_value", "Invalid value: control characters are not allowed here.")
    return value


def _findable(value: str) -> str:
    """An id that cannot exist is looked for like any other, and not found."""
    return "".join(c if c.isprintable() else "�" for c in value[:512])


Name = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_without_control)]
Id = Annotated[str, AfterValidator(_findable)]


def check_metadata(value: object) -> object:
    """Up to 16 pairs of strings."""
    if not isinstance(value, dict):
        return value
    if len(value) > METADATA_PAIRS:
        raise fault(
            "object_above_max_properties",
            f"Invalid 'metadata': too many properties. Expected at most {METADATA_PAIRS}, got {len(value)}.",
        )
    for key, item in value.items():
        _check_pair(key, item)
    return value


def _check_pair(key: str, item: object) -> None:
    where = f"metadata.{shown(key)}"
    if len(key) > METADATA_KEY:
        text = f"Invalid '{where}': key too long. Expected at most {METADATA_KEY} characters."
        raise fault("string_above_max_length", text)
    if not isinstance(item, str):
        text = f"Invalid type for '{where}': expected a string, but got {kind_of(item)} instead."
        raise fault("invalid_type", text)
    if len(item) > METADATA_VALUE:
        text = f"Invalid '{where}': string too long. Expected at most {METADATA_VALUE} characters."
        raise fault("string_above_max_length", text)
    if "\0" in key + item:
        raise fault("invalid_value", f"Invalid value for '{where}': the NUL character is not allowed.")


Metadata = Annotated[dict[str, str], BeforeValidator(check_metadata)]


def number_or_auto(
    kind: type[int] | type[float], *, low: float, high: float, above: bool = False
) -> PlainValidator:
    """A number between `low` and `high`, or "auto". `above`: `low` itself is too small."""
    words = "an integer" if kind is int else "a number"
    number = "integer" if kind is int else "decimal"

    def check(value: Any) -> Any:
        if value is None or value == "auto":
            return "auto"
        _check_kind(value, kind, words)
        if value < low or (above and value == low):
            wanted = f"Expected a value {'>' if above else '>='} {low:g}, but got {value}."
            raise fault(f"{number}_below_min_value", f"Invalid value: {number} below minimum value. {wanted}")
        if value > high:
            wanted = f"Expected a value <= {high:g}, but got {value}."
            raise fault(f"{number}_above_max_value", f"Invalid value: {number} above maximum value. {wanted}")
        return value

    return PlainValidator(check, json_schema_input_type=kind | str)


def _check_kind(value: object, kind: type, words: str) -> None:
    allowed = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed):
        if isinstance(value, str):
            raise fault("invalid_value", f'Invalid value: {shown(value)!r}. Expected {words} or "auto".')
        raise fault("invalid_type", f'Invalid type: expected {words} or "auto", but got {kind_of(value)}.')
    if isinstance(value, float) and not math.isfinite(value):
        raise fault("invalid_value", f'Invalid value: expected a finite number or "auto", but got {value}.')
