"""bitsandbytes, which keeps numbers in 4 and 8 bits for `quantize` and `optimizer_state`. Optional."""

from __future__ import annotations

from typing import Any

import torch

from .errors import ConfigError


def bitsandbytes() -> Any:
    """Its functions on tensors."""
    import bitsandbytes.functional as functional

    return functional


def check(option: str, device: torch.device) -> None:
    """Raises ConfigError where it cannot be imported, or cannot round numbers on `device`."""
    try:
        bitsandbytes().quantize_blockwise(torch.zeros(64, device=device), blocksize=64)
    except ImportError as error:
        raise ConfigError(f"{option}: bitsandbytes cannot be imported ({error}); pip install 'forgetless[quantize]', or take it out") from None
    except Exception as error:  # it raises its own kinds where it has no kernel
        raise ConfigError(f"{option}: bitsandbytes does not work on {device} ({' '.join(str(error).split())[:200]}); take it out") from None
