"""Plain numbers in and out: settings with bounds, states of a version, rows of a history."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

__all__ = ["check_settings", "known_fields", "number"]


def check_settings(settings: Any, **bounds: tuple[bool, str]) -> None:
    """Refuse a setting that is not finite, or of which it is known that its bound does not hold."""
    for name, (holds, allowed) in bounds.items():
        value = getattr(settings, name)
        if not holds or not math.isfinite(value):
            raise ValueError(f"Invalid {name}: {value}. Must be finite and {allowed}.")


def known_fields(cls: type, saved: Mapping[str, Any]) -> dict[str, Any]:
    """What a dataclass knows of a saved state, which may be of an older or a later version."""
    names = {field.name for field in fields(cls)}
    return {name: value for name, value in saved.items() if name in names}


def number(row: Mapping[str, Any], name: str) -> float | None:
    """A finite number of a row; None where it was not measured."""
    value = row.get(name)
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    return float(value) if is_number else None  # type: ignore[arg-type]
