"""OSFT: constrained full fine-tuning in orthogonal subspaces ("Sculpting Subspaces", ICLR 2026, arXiv 2504.07097).

Before each task every target matrix W (out x in) = U diag(S) V^T is decomposed; its k leading singular directions U_h, V_h hold what the model knows and are closed.

    block: low_low   dW = (I - U_h U_h^T) dW (I - V_h V_h^T)      neither side of dW touches a closed direction: what every implementation does, and the stricter
    block: paper     dW = dW - U_h U_h^T dW V_h V_h^T             only the block closed on both sides is closed, as the paper's equation has it

low_low learns in coordinates: R = U_l^T G V_l, Adam on R, dW = -lr U_l step(R) V_l^T, with the n - k other directions U_l, V_l. W stays a plain parameter, nothing is
added to a forward pass. Of a matrix that is not square the longer side stays whole, and is projected after Adam, so that no permitted direction is lost.

Either holds for the update that is applied, not only for the gradient. Nothing of a task is kept: the next one decomposes the weights anew.

When not to use it: where the small singular directions of the model at hand are not free, as is the rule for small models: a spectrum knows nothing of the data.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from pydantic import Field, StrictFloat, StrictInt, model_validator
from torch import Tensor, nn

from ..errors import ConfigError
from ..models import logical, match_modules, stored_transposed
from ..subspace import Constraint, Subspace, spectrum, working_dtype
from .base import Memory, Method, Options

Ratio = StrictInt | StrictFloat


class OSFTOptions(Options):
    block: Literal["low_low", "paper"] = "low_low"
    """Where dW must not go: low_low closes each side of its own, paper the block of both sides only."""
    frozen_ratio: Ratio | Literal["schedule"] | dict[str, Ratio] = 0.5
    """k of each matrix: a share of its min(out, in) singular directions in [0, 1), a number of directions (1 or more), "schedule" ((i - 1) / tasks before the
    i-th task), or {regex over whole dotted names: share or number}, the first that matches."""
    tasks: int | None = Field(None, ge=1)
    """With frozen_ratio: schedule, how many tasks there will be. Later ones keep the last share."""
    target_modules: str | list[str] | None = None
    """Linear layers that learn: a regex over whole dotted names, or a list of ends of names; absent: all but the head. Everything else is frozen."""

    @model_validator(mode="after")
    def _sensible(self) -> OSFTOptions:
        ratios = self.frozen_ratio.items() if isinstance(self.frozen_ratio, dict) else [("", self.frozen_ratio)]
        for pattern, ratio in ratios:
            where = f"frozen_ratio{f' of {pattern!r}' if pattern else ''}"
            if isinstance(ratio, float) and not 0 <= ratio < 1:
                raise ValueError(f"{where}: {ratio} is no share of the directions, in [0, 1), and no whole number of them")
            if isinstance(ratio, int) and ratio < 0:
                raise ValueError(f"{where}: {ratio} directions")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{where}: no regular expression ({error})") from None
        if (self.frozen_ratio == "schedule") != (self.tasks is not None):
            raise ValueError("frozen_ratio: schedule goes with tasks: N, how many tasks there will be; neither means anything without the other")
        return self


class OSFT(Method):
    name = "osft"
    summary = "constrained full fine-tuning: updates stay off the leading singular directions of each weight"
    paper = "arXiv 2504.07097"
    constrained = True
    Options = OSFTOptions

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.parts: dict[
            str, tuple[Constraint, tuple[Tensor | None, Tensor | None] | None]
        ] = {}  # module -> what is closed, the directions that learn

    # -- a task ----------------------------------------------------------------------------------------------------------------------

    def check(self, model: nn.Module) -> None:
        for name, layer in self.layers(model).items():
            self.frozen(name, min(layer.weight.shape), 0)

    def begin_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        self.decompose(model, memory.info.get("tasks", 0))
        return model

    def resume_task(self, model: nn.Module, task: Any, memory: Memory, state: dict[str, Tensor]) -> nn.Module:
        self.decompose(model, memory.info.get("tasks", 0))  # the weights of the last commit, with which the task began
        return model

    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        memory.info["tasks"] = memory.info.get("tasks", 0) + 1
        return model

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        return match_modules(model, self.options.target_modules, "method.target_modules")

    def frozen(self, name: str, directions: int, index: int) -> int:
        """k of a module with so many singular directions, before the task of this index (from 0). Raises ConfigError where nothing would be left, or nothing is said."""
        ratio: Any = self.options.frozen_ratio
        if ratio == "schedule":
            ratio = min(index, self.options.tasks - 1) / self.options.tasks
        elif isinstance(ratio, dict):
            found = [r for pattern, r in ratio.items() if re.fullmatch(pattern, name)]
            if not found:
                raise ConfigError(
                    f"method osft: frozen_ratio has no pattern that matches {name}; end it with '.*': 0.5, or leave the module out of target_modules"
                )
            ratio = found[0]
        k = ratio if isinstance(ratio, int) else int(ratio * directions)
        if k >= directions:
            raise ConfigError(f"method osft: frozen_ratio closes {k} directions of {name}, which has {directions}; nothing would be left to train")
        return k

    @torch.no_grad()
    def decompose(self, model: nn.Module, index: int) -> None:
        """U_h, V_h and, where coordinates are used, U_l, V_l of every target matrix, one matrix after another."""
        self.parts = {}
        for name, layer in self.layers(model).items():
            W = logical(layer.weight, layer).detach()
            W = W.to(working_dtype(W.dtype))
            k = self.frozen(name, min(W.shape), index)
            if k == 0:  # nothing is closed; the empty space is there so that weight decay pulls toward the task's start
                self.parts[name] = Constraint(inputs=Subspace.empty(W.shape[1], W.dtype, W.device)), None
                continue
            U, _, V = spectrum(W)  # (out, R), (R,), (in, R)
            closed = U[:, :k].contiguous(), V[:, :k].contiguous()
            if self.options.block == "paper":
                self.parts[name] = Constraint(outputs=closed[0], inputs=closed[1], forbid="both"), None
                continue
            # a side with more dimensions than singular directions stays whole: the rest of them may learn too
            learn = tuple(B[:, k:].contiguous() if B.shape[0] == B.shape[1] else None for B in (U, V))
            self.parts[name] = Constraint(outputs=closed[0], inputs=closed[1]), learn

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        if not self.parts:
            self.decompose(model, 0)
        groups = []
        for name, layer in self.layers(model).items():
            constraint, directions = self.parts[name]
            group = {"params": [layer.weight], "names": [f"{name}.weight"], "constraint": constraint, "transposed": stored_transposed(layer)}
            groups.append(group | {"directions": directions})
        return groups

    # -- the record ------------------------------------------------------------------------------------------------------------------

    def protected_inputs(self, memory: Memory) -> dict[str, Tensor]:
        if self.options.block == "paper":
            return {}  # no input direction is closed to every output
        return {name: constraint.inputs.cpu() for name, (constraint, _) in self.parts.items() if not constraint.empty}

    def report(self, memory: Memory) -> dict[str, Any] | None:
        closed = [constraint for constraint, _ in self.parts.values() if not constraint.empty]
        if not closed:
            return None
        ranks = [c.inputs.shape[1] for c in closed]
        share = sum(c.inputs.shape[1] / c.inputs.shape[0] for c in closed) / len(closed)
        numbers = {"modules": len(closed), "rank_mean": sum(ranks) / len(ranks), "rank_max": max(ranks), "share": share, "evicted": 0}
        return numbers | {"bytes": sum(c.inputs.nbytes + c.outputs.nbytes for c in closed)}
