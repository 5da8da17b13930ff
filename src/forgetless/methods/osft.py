"""OSFT: constrained full fine-tuning in orthogonal subspaces ("Sculpting Subspaces", ICLR 2026, arXiv 2504.07097).

Before each task every target matrix W (out x in) = U diag(S) V^T is decomposed; its k leading singular directions U_h, V_h hold what the model knows and are closed.

    block: low_low   dW = (I - U_h U_h^T) dW (I - V_h V_h^T)      neither side of dW touches a closed direction: what every implementation does, and the stricter
    block: paper     dW = dW - U_h U_h^T dW V_h V_h^T             only the block closed on both sides is closed, as the paper's equation has it

low_low learns in coordinates: R = U_l^T G V_l, Adam on R, dW = -lr U_l step(R) V_l^T, with the n - k other directions U_l, V_l. W stays a plain parameter, nothing is
added to a forward pass. Of a matrix that is not square the longer side stays whole, and is projected after Adam, so that no permitted direction is lost.

    protect: inputs  dW = D (I - S S^T)                           S: the leading directions of the layer's inputs on learned tasks, and on protect_from's prompts
    protect: both    low_low, with S among the closed inputs

All of them hold for the update that is applied, not only for the gradient. The weights are decomposed anew for each task; S grows from task to task.

When not to use it: protect: weights, where the small singular directions of the model at hand are not free, as is the rule for small models: a spectrum knows
nothing of the data.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from pydantic import Field, StrictFloat, StrictInt, model_validator
from torch import Tensor, nn

from ..errors import ConfigError
from ..models import logical, match_modules, stored_transposed
from ..subspace import Constraint, Subspace, orthonormalize, project_out, spectrum, tolerance, top_subspace, working_dtype
from ..tasks import sample
from .base import Memory, Method, Options

Ratio = StrictInt | StrictFloat
ROWS = 200  # of a task's training rows, whose inputs stand for it


class OSFTOptions(Options):
    block: Literal["low_low", "paper"] = "low_low"
    """Where dW must not go: low_low closes each side of its own, paper the block of both sides only."""
    frozen_ratio: Ratio | Literal["schedule"] | dict[str, Ratio] = 0.5
    """k of each matrix: a share of its min(out, in) singular directions in [0, 1), a number of directions (1 or more), "schedule" ((i - 1) / tasks before the
    i-th task), or {regex over whole dotted names: share or number}, the first that matches."""
    tasks: int | None = Field(None, ge=1)
    """With frozen_ratio: schedule, how many tasks there will be. Later ones keep the last share."""
    protect: Literal["weights", "inputs", "both"] = "weights"
    """What is closed: the weights' leading directions, those of the layers' inputs on the tasks learned so far, or both."""
    protect_energy: float = Field(0.9, gt=0, le=1)
    """With inputs or both: the share of a task's input energy, and of protect_from's prompts', that is closed after it."""
    max_share: float = Field(0.75, gt=0, lt=1)
    """With inputs or both: the largest share of a layer's input directions that may be closed; beyond it inputs of least energy are given up."""
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
        given = self.model_fields_set
        if self.protect == "inputs" and given & {"frozen_ratio", "block"}:
            raise ValueError(
                "protect: inputs closes nothing of the weights' spectrum, so block and frozen_ratio mean nothing; take them out, or use protect: both"
            )
        if self.protect == "weights" and given & {"protect_energy", "max_share"}:
            raise ValueError("protect: weights looks at no inputs, so protect_energy and max_share mean nothing; take them out, or use protect: both")
        if self.protect == "both" and self.block == "paper":
            raise ValueError("block: paper leaves closed inputs open to some outputs, which protect: both does not; use low_low, or protect: weights")
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
        o, room = self.options, 0
        for name, layer in self.layers(model).items():
            W = logical(layer.weight, layer)
            room = max(room, int(o.max_share * W.shape[1]) - self.frozen(name, min(W.shape), (o.tasks or 1) - 1))
        if o.protect == "both" and room < 1:
            raise ConfigError(
                f"method osft: beside frozen_ratio, max_share {o.max_share:g} leaves no room for inputs in any layer; raise it, or use protect: weights"
            )

    def begin_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        self.prepare(model, memory)
        return model

    def resume_task(self, model: nn.Module, task: Any, memory: Memory, state: dict[str, Tensor]) -> nn.Module:
        self.prepare(model, memory)  # the weights of the last commit, with which the task began
        return model

    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        memory.info["tasks"] = memory.info.get("tasks", 0) + 1
        if self.options.protect != "weights":
            rows = sample(task.train, ROWS, seed=0)
            self.progress.stage(f"{task.name}: the layers' inputs", len(rows))
            self.protect(model, [task.encode(self.tokenizer, row)["input_ids"] for row in rows], memory, self.progress.advance)
        return model

    def protect(self, model: nn.Module, prompts: list[list[int]], memory: Memory, advance: Any = None) -> None:
        from ..protect import input_spaces

        o = self.options
        if o.protect == "weights":
            raise ConfigError("protect_from: method osft looks at inputs with protect: inputs or protect: both only")
        layers = self.layers(model)
        memory.keep(input_spaces(model, layers, prompts, o.protect_energy, max_share=o.max_share, known=memory.spaces(), advance=advance))

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
    def prepare(self, model: nn.Module, memory: Memory) -> None:
        """What is closed and, where coordinates are used, what learns, of every target matrix: one after another."""
        self.parts, layers, spaces = {}, self.layers(model), memory.spaces()
        self.progress.stage("decomposing the weights", len(layers))
        for done, (name, layer) in enumerate(layers.items(), 1):
            W = logical(layer.weight, layer).detach()
            W = W.to(working_dtype(W.dtype))
            S = None if self.options.protect == "weights" or name not in spaces else spaces[name].to(W)
            k = 0 if self.options.protect == "inputs" else self.frozen(name, min(W.shape), memory.info.get("tasks", 0))
            self.parts[name] = self.part(W, k, S)
            self.progress.advance(done)

    def part(self, W: Tensor, k: int, S: Subspace | None) -> tuple[Constraint, tuple[Tensor | None, Tensor | None] | None]:
        """(what is closed, the directions that learn or None) of W (out, in): its k leading singular directions and the inputs S."""
        if k == 0:  # an empty space is there so that weight decay pulls toward the task's start
            return Constraint(inputs=Subspace.empty(W.shape[1], W.dtype, W.device) if S is None else S), None
        U, _, V = spectrum(W)  # (out, R), (R,), (in, R)
        U_high, V_high = U[:, :k].contiguous(), V[:, :k].contiguous()
        if self.options.block == "paper":
            return Constraint(outputs=U_high, inputs=V_high, forbid="both"), None
        # a side with more dimensions than singular directions stays whole: the rest of them may learn too
        U_low, V_low = (B[:, k:].contiguous() if B.shape[0] == B.shape[1] else None for B in (U, V))
        if S is not None:
            V_high = torch.cat([V_high, self.beyond(S, V_high)], 1)
            V_low = None if V_low is None else orthonormalize(V_low, against=V_high, scale=1.0)
        return Constraint(outputs=U_high, inputs=V_high), (U_low, V_low)

    def beyond(self, S: Subspace, V: Tensor) -> Tensor:
        """The directions of most energy of S outside V (in, k), orthonormal, as many as max_share leaves room for: the two together must not close everything."""
        rows = (S.basis * S.energy.sqrt()).mT  # (s, in): their Gram matrix is S with its energies
        rest = project_out(rows, V)
        room = int(self.options.max_share * len(V)) - V.shape[1]
        if room < 1 or not torch.linalg.matrix_norm(rest) > tolerance(V.dtype) * torch.linalg.matrix_norm(rows):
            return V[:, :0]
        return orthonormalize(top_subspace(rest, room).basis, against=V, scale=1.0)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        if not self.parts:
            self.prepare(model, Memory())
        groups = []
        for name, layer in self.layers(model).items():
            constraint, directions = self.parts[name]
            group = {"params": [layer.weight], "names": [f"{name}.weight"], "constraint": constraint, "transposed": stored_transposed(layer)}
            groups.append(group | {"directions": directions})
        return groups

    # -- the record ------------------------------------------------------------------------------------------------------------------

    def protected_inputs(self, memory: Memory) -> dict[str, Tensor]:
        o = self.options
        if o.block == "paper":
            return {}  # no input direction is closed to every output
        spaces = {} if o.protect == "weights" else memory.spaces()
        found = {name: space.basis for name, space in spaces.items()}
        for name, (constraint, _) in self.parts.items() if o.protect != "inputs" else ():
            V = constraint.inputs.cpu()
            found[name] = torch.cat([V, self.beyond(spaces[name].to(V), V)], 1) if name in spaces else V
        return {name: V for name, V in found.items() if V.shape[1]}

    def report(self, memory: Memory) -> dict[str, Any] | None:
        blocks = {name: constraint.inputs for name, (constraint, _) in self.parts.items() if constraint.forbid == "both"}
        bases = blocks or self.protected_inputs(memory)
        if not bases:
            return None
        ranks = [V.shape[1] for V in bases.values()]
        share = sum(V.shape[1] / V.shape[0] for V in bases.values()) / len(bases)
        held = [B for constraint, _ in self.parts.values() for B in (constraint.inputs, constraint.outputs) if B is not None]
        numbers = {"modules": len(bases), "rank_mean": sum(ranks) / len(ranks), "rank_max": max(ranks), "share": share, "evicted": 0}
        return numbers | {"bytes": sum(B.nbytes for B in held)}
