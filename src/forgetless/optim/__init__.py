"""Optimizers. subspace_adamw.py is the one the library trains with, on coordinates.py (low-rank state) and rounding.py (bf16 and fp16 weights); constrained.py
gives its guarantee to any torch optimizer; reference.py is the slow, obvious version the tests hold the fast one to."""

from .constrained import constrain, constrain_together
from .subspace_adamw import SubspaceAdamW

__all__ = ["SubspaceAdamW", "constrain", "constrain_together"]
