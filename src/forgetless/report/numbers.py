"""Numbers as a report shows them, and careful looks into JSON that may lack any part: what was not measured is None, never a guess."""

from __future__ import annotations

import math
from typing import Any

SIGNED = {"backward_transfer", "forward_transfer"}


def number(value: Any) -> float | None:
    """A finite number, or None: NaN, infinity, text and absent values are all `not measured`."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def get(container: Any, key: Any) -> Any:
    """container[key], or None when any of it is not there (rows of an unfinished run are short)."""
    try:
        return container[key]
    except (TypeError, LookupError):
        return None


def mapping(value: Any) -> dict[str, Any]:
    """The object itself, or an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def objects(value: Any) -> list[dict[str, Any]]:
    """The objects of a list; none for anything else."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def percent(value: Any, metric: str = "", digits: int = 1) -> str | None:
    """0.8754 -> '87.5'; a transfer carries its sign; the minus is a minus, not a hyphen."""
    value = number(value)
    if value is None:
        return None
    text = f"{100 * value:{'+' if metric in SIGNED else ''}.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "−")


def fixed(value: Any, digits: int = 1) -> str | None:
    value = number(value)
    return None if value is None else f"{value:.{digits}f}".replace("-", "−")


def count(value: Any) -> str | None:
    """A number of rows, steps or layers; a thin space stands between thousands."""
    value = number(value)
    return None if value is None else f"{value:,.0f}".replace(",", "\u2009")


def small(value: Any) -> str | None:
    """A leak: two digits and a power of ten, and an exact zero as 0."""
    return None if number(value) is None else f"{value:.1e}" if value else "0"


def size(value: Any) -> str | None:
    value = number(value)
    if value is None:
        return None
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB" if value >= 2**20 else f"{value / 2**10:.0f} KiB"
