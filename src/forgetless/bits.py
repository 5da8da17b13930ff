"""bitsandbytes, which keeps numbers in 4 and 8 bits for `quantize` and `optimizer_state`. Optional."""

from __future__ import annotations

from typing import Any

from .errors import ConfigError


def bitsandbytes() -> Any:
    """Its functions on tensors."""
    import bitsandbytes.functional as functional

    return functional


def check(option: str) -> None:
    """Raises ConfigError where it cannot be imported."""
    try:
        bitsandbytes()
    except ImportError as error:
        raise ConfigError(f"{option}: bitsandbytes cannot be imported ({error}); pip install 'forgetless[quantize]', or take it out") from None
