"""OSFT: constrained full fine-tuning in orthogonal subspaces ("Sculpting Subspaces", ICLR 2026, arXiv 2504.07097).

Before each task every target matrix W (out x in) = U diag(S) V^T is decomposed; its k leading singular directions U_h, V_h hold what the model knows and are closed.

    block: low_low   dW = (I - U_h U_h^T) dW (I - V_h V_h^T)      neither side of dW touches a closed direction: what every implementation does, and the stricter
    block: paper     dW = dW - U_h U_h^T dW V_h V_h^T             only the block closed on both sides is closed, as the paper's equation has it

low_low learns in coordinates of what is open, U_l and V_l: dW = U_l C V_l^T.

    form: coordinates    C = sum of Adam's steps on R = U_l^T G V_l, added to W step by step: W stays a plain parameter, nothing is added to a forward pass
    form: adapter        y = W x + U_l C V_l^T x with W frozen, merged at the end of the task: G, as large as W, is never formed

Both take the same steps. Of a matrix that is not square the longer side stays whole, and is projected after Adam, so that no permitted direction is lost.

    protect: inputs  dW = D (I - S S^T)                           S: the leading directions of the layer's inputs on learned tasks, and on protect_from's prompts
    protect: both    low_low, with S among the closed inputs

All of them hold for the update that is applied, not only for the gradient. The weights are decomposed anew for each task, and with remember: union what was closed for
earlier tasks stays closed beside it, as far as there is room; S grows from task to task.

When not to use it: protect: weights, where the small singular directions of the model at hand are not free, as is the rule for small models: a spectrum knows
nothing of the data.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, StrictFloat, StrictInt, model_validator
from torch import Tensor, nn

from ..batches import Readable
from ..decomposition import cached_split
from ..errors import ConfigError
from ..fake import is_fake
from ..importance import block_importance, block_of
from ..models import logical, match_modules, stored_transposed
from ..subspace import Constraint, Subspace, complement, orthonormalize, project_out, tolerance, top_subspace, working_dtype
from ..subspace_linear import SubspaceLinear, attach, attached
from ..tasks import sample
from ._statistics import bases_report
from .base import Memory, Method, Options

log = logging.getLogger(__name__)
Ratio = StrictInt | StrictFloat
ROWS = 200  # of a task's training rows, whose inputs stand for it
KINDS = ("outputs", "inputs")  # of the spaces that remember: union keeps
MOST = 0.95  # the largest share that frozen_ratio: adaptive may close


class OSFTOptions(Options):
    block: Literal["low_low", "paper"] = "low_low"
    """Where dW must not go: low_low closes each side of its own, paper the block of both sides only."""
    form: Literal["coordinates", "adapter"] = "coordinates"
    """How low_low is trained: W itself, with Adam in coordinates; or a frozen W with U_l C V_l^T beside it, merged at the end of the task."""
    thin: bool = False
    """With form: adapter, keep C of a matrix that is not square within its singular directions: smaller, and the rest of the longer side cannot learn."""
    release_gradients: bool | None = None
    """With form: coordinates and block: low_low, read each gradient in coordinates within backward and keep nothing else of it: less memory, and less work where a
    micro-batch has fewer than about 3 n tokens. Absent: wherever it can be (several processes exchange whole gradients)."""
    frozen_ratio: Ratio | Literal["schedule", "adaptive"] | dict[str, Ratio] = 0.5
    """k of each matrix: a share of its min(out, in) singular directions in [0, 1), a number of directions (1 or more), "schedule" ((i - 1) / tasks before the
    i-th task), "adaptive" (by how much a block changes its inputs), or {regex over whole dotted names: share or number}, the first that matches."""
    tasks: int | None = Field(None, ge=1)
    """With frozen_ratio: schedule, how many tasks there will be. Later ones keep the last share."""
    min_ratio: float = Field(0.1, ge=0, lt=1)
    """With frozen_ratio: adaptive, the share for a block of no importance (the paper's mrr), and the least there is."""
    target_ratio: float = Field(0.8, ge=0, lt=1)
    """With frozen_ratio: adaptive, the share for a block of mean importance (the paper's trr), and of every block while none has been measured."""
    remember: Literal["spectrum", "union"] = "spectrum"
    """What of the weights is closed: the leading directions as they are now, or beside them those closed for earlier tasks, strongest first."""
    protect: Literal["weights", "inputs", "both"] | None = None
    """What is closed: the weights' leading directions (the paper's method), those of the layers' inputs on the tasks learned so far, or both. Absent: inputs, or the
    weights where another option speaks of their directions (block, frozen_ratio, remember, form: adapter, thin, release_gradients)."""
    protect_energy: float = Field(0.9, gt=0, le=1)
    """With inputs or both: the share of a task's input energy, and of protect_from's prompts', that is closed after it."""
    max_share: float = Field(0.75, gt=0, lt=1)
    """With inputs, both or union: the largest share of a side's directions that may be closed; beyond it what has least energy is given up."""
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
        if self.protect is None:
            named = self.model_fields_set & {"block", "frozen_ratio", "remember"}
            self.protect = "weights" if named or self.form == "adapter" or self.thin or self.release_gradients else "inputs"
        given = {
            name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default
        }  # a run's run.yaml spells the defaults out
        if (self.frozen_ratio == "schedule") != (self.tasks is not None):
            raise ValueError("frozen_ratio: schedule goes with tasks: N, how many tasks there will be; neither means anything without the other")
        if self.frozen_ratio != "adaptive" and given & {"min_ratio", "target_ratio"}:
            raise ValueError("min_ratio and target_ratio mean something with frozen_ratio: adaptive only")
        if self.protect == "inputs" and given & {"frozen_ratio", "block", "remember"}:
            raise ValueError(
                "protect: inputs closes nothing of the weights' spectrum, so block, frozen_ratio and remember mean nothing; take them out, or use protect: both"
            )
        if self.protect == "weights" and "protect_energy" in given:
            raise ValueError("protect: weights looks at no inputs, so protect_energy means nothing; take it out, or use protect: both")
        if self.protect == "weights" and self.remember == "spectrum" and "max_share" in given:
            raise ValueError("protect: weights with remember: spectrum closes frozen_ratio and nothing more, so max_share means nothing; take it out")
        if self.protect == "both" and self.block == "paper":
            raise ValueError("block: paper leaves closed inputs open to some outputs, which protect: both does not; use low_low, or protect: weights")
        if self.form == "adapter" and self.block == "paper":
            raise ValueError("block: paper permits updates that no product U_l C V_l^T holds, so it has no form: adapter; use form: coordinates")
        if self.thin and (self.form != "adapter" or self.protect == "inputs" or self.frozen_ratio == 0):
            raise ValueError("thin: true means something with form: adapter only, and where directions of the weights are closed")
        if self.target_ratio < self.min_ratio:
            raise ValueError(f"target_ratio {self.target_ratio:g} is below min_ratio {self.min_ratio:g}, so importance could only ever mean nothing")
        if self.release_gradients and not self.fixed_coordinates:
            raise ValueError("release_gradients needs fixed coordinates: form: coordinates, block: low_low and protect: weights or both")
        return self

    @property
    def fixed_coordinates(self) -> bool:
        return self.form == "coordinates" and self.block == "low_low" and self.protect != "inputs"


@dataclass
class Part:
    """Of one matrix: what is closed, as bases or as all outside the directions that learn (coordinates.py), and, where it is remembered, with its energy."""

    constraint: Constraint
    directions: tuple[Tensor | None, Tensor | None] | None
    closed: tuple[Subspace, Subspace] | None = None  # of the outputs and the inputs
    dropped: int = 0  # directions that max_share had no room for

    def closed_inputs(self) -> Tensor:
        """Basis (in, b) of the inputs whose outputs stay as they are."""
        if self.directions is not None and self.directions[1] is not None:
            return complement(self.directions[1])
        V = self.constraint.inputs
        assert V is not None
        return V


class OSFT(Method):
    name = "osft"
    summary = "constrained full fine-tuning: updates stay off the input directions that learned tasks use, or off the leading singular directions of each weight"
    paper = "arXiv 2504.07097"
    constrained = True
    extra_forward = "a pass over 200 rows, at a task's end; none with protect: weights but for frozen_ratio: adaptive"
    bytes_a_task = "new input directions of every layer, until max_share is reached; with protect: weights none but for remember: union"
    Options = OSFTOptions

    def __init__(self, /, **options: Any):
        super().__init__(**options)
        self.parts: dict[str, Part] = {}
        self.trained: dict[Tensor, nn.Module] = {}  # weight -> its layer

    # -- a task ----------------------------------------------------------------------------------------------------------------------

    def check(self, model: nn.Module) -> None:
        o, room, last = self.options, 0, Memory(info={"tasks": (self.options.tasks or 1) - 1})
        for name, layer in self.layers(model).items():
            W = logical(layer.weight, layer)
            if not W.is_floating_point():
                raise ConfigError(
                    f"method osft: the weight of {name} is quantised ({W.dtype}) and cannot be decomposed or changed; load the model unquantised"
                )
            k = 0 if o.protect == "inputs" else self.frozen(model, name, min(W.shape), last)
            sides = W.shape if o.remember == "union" else W.shape[1:]
            room = max(room, min(int(o.max_share * side) - k for side in sides))
        if (o.protect == "both" or o.remember == "union") and room < 1:
            raise ConfigError(
                f"method osft: beside frozen_ratio, max_share {o.max_share:g} leaves no room in any layer for what else is to be closed; raise it"
            )
        if o.frozen_ratio == "adaptive" and not any(block_of(model, name) for name in self.layers(model)):
            raise ConfigError(
                "method osft: frozen_ratio: adaptive finds no blocks in this model (modules in an nn.ModuleList); give a number or a map"
            )
        self.check_processes()

    def check_processes(self) -> None:
        if self.options.release_gradients and self.processes > 1:
            raise ConfigError("method osft: release_gradients works in one process: gradients are exchanged whole; take it out, or use form: adapter")
        if self.options.release_gradients and self.whole_gradients:
            raise ConfigError(
                "method osft: release_gradients lets go of gradients that a penalty beside it adds to, or a training loop that is not forgetless' reads; take it out"
            )

    def begin_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        return self.build(model, memory)

    def resume_task(self, model: nn.Module, task: Any, memory: Memory, state: dict[str, Tensor]) -> nn.Module:
        return self.build(model, memory)  # all of it follows from the last commit, with which the task began

    def build(self, model: nn.Module, memory: Memory) -> nn.Module:
        self.prepare(model, memory)
        if self.options.form == "adapter":
            for name, layer in self.layers(model).items():
                attach(model, name, SubspaceLinear(layer, *(self.parts[name].directions or (None, None))))
        return model

    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        from ..optim.released import keep

        o = self.options
        keep(model)
        self.merge(model)
        memory.info["tasks"] = memory.info.get("tasks", 0) + 1
        for kind, side in zip(KINDS, (0, 1), strict=True) if o.remember == "union" else ():
            memory.keep({name: part.closed[side] for name, part in self.parts.items() if part.closed}, kind)
        if o.protect != "weights" or o.frozen_ratio == "adaptive":
            rows = sample(task.train, ROWS, seed=0)
            self.look(model, [task.encode(self.tokenizer, row) for row in rows], memory, task.name)
        return model

    def protect(self, model: nn.Module, prompts: list[list[int]], memory: Memory, advance: Any = None) -> None:
        if self.options.protect == "weights" and self.options.frozen_ratio != "adaptive":
            raise ConfigError("protect_from: method osft looks at inputs with protect: inputs, protect: both or frozen_ratio: adaptive only")
        self.look(model, prompts, memory, "protect_from")

    def look(self, model: nn.Module, prompts: list[Readable], memory: Memory, source: str) -> None:
        """What is to be measured on `prompts`, or rows with their answers: their spaces, and how important each block is to them."""
        from ..protect import input_spaces

        o, layers = self.options, self.layers(model)
        if o.protect != "weights":
            self.progress.stage(f"{source}: the layers' inputs", len(prompts))
            memory.keep(
                input_spaces(
                    model,
                    layers,
                    prompts,
                    o.protect_energy,
                    max_share=o.max_share,
                    known=memory.spaces(),
                    autocast=self.autocast,
                    advance=self.progress.advance,
                )  # fmt: skip
            )
        if o.frozen_ratio == "adaptive":
            self.progress.stage(f"{source}: the blocks' importance", len(prompts))
            found = memory.info["importance"] = block_importance(model, layers, prompts, self.autocast, self.progress.advance)
            shares = [self.adaptive(block, memory) for block in found]
            cosines = f"{min(found.values()):.3f} to {max(found.values()):.3f}"
            self.progress.say(f"{source}: cosine of a block's input and output {cosines}; closed next: {min(shares):.1%} to {max(shares):.1%}")

    @torch.no_grad()
    def merge(self, model: nn.Module) -> None:
        """Every adapter into its weight; how far what was merged lies in what is closed becomes `merge_leak`, as weight_leak has it."""
        from ..evaluation.drift import leak_of, worse

        worst = None
        for name, layer in attached(model).items():
            W = logical(layer.base_layer.weight, layer.base_layer).to(layer.C.dtype, copy=True)
            part, merged = self.parts.get(name), W + layer.delta()
            attach(model, name, layer.merge())
            if part is not None:
                group = {"constraint": part.constraint, "directions": part.directions, "names": [f"{name}.weight"]}
                worst = worse(worst, leak_of(group, merged, W, 1))
        self.merge_leak = worst

    # -- what is closed --------------------------------------------------------------------------------------------------------------

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        return match_modules(model, self.options.target_modules, "method.target_modules")

    def frozen(self, model: nn.Module, name: str, directions: int, memory: Memory) -> int:
        """k of a module with so many singular directions. Raises ConfigError where nothing would be left, or nothing is said."""
        ratio: Any = self.options.frozen_ratio
        if ratio == "schedule":
            ratio = min(memory.info.get("tasks", 0), self.options.tasks - 1) * directions // self.options.tasks
        elif ratio == "adaptive":
            ratio = self.adaptive(block_of(model, name), memory)
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

    def adaptive(self, block: str | None, memory: Memory) -> float:
        """The share closed in a block: min_ratio + I (target_ratio - min_ratio), I its importance with mean 1 over the blocks, between min_ratio and MOST."""
        o, known = self.options, memory.info.get("importance", {})
        mean = sum(known.values()) / len(known) if known else 0.0
        importance = known[block] / mean if block in known and mean > 0 else 1.0
        return min(max(o.min_ratio + importance * (o.target_ratio - o.min_ratio), o.min_ratio), MOST)

    @torch.no_grad()
    def prepare(self, model: nn.Module, memory: Memory) -> None:
        """The Part of every target matrix: one after another, so that one decomposition is in memory at a time."""
        o, layers = self.options, self.layers(model)
        self.parts, self.merge_leak = {}, None
        inputs = memory.spaces() if o.protect != "weights" else {}
        outs, ins = (memory.spaces(kind) if o.remember == "union" else {} for kind in KINDS)
        self.progress.stage("decomposing the weights", len(layers))
        for done, (name, layer) in enumerate(layers.items(), 1):
            W = logical(layer.weight, layer).detach()
            W = W.to(working_dtype(W.dtype))
            k = 0 if o.protect == "inputs" else self.frozen(model, name, min(W.shape), memory)
            known = (space if space is None else space.to(W) for space in (outs.get(name), ins.get(name), inputs.get(name)))
            self.parts[name] = self.part(W, k, *known, cache=self.scratch)
            self.progress.advance(done)
        if dropped := sum(part.dropped for part in self.parts.values()):
            log.warning("osft: max_share %g has no room for %d directions of least energy; they are not protected in this task", o.max_share, dropped)

    def part(
        self, W: Tensor, k: int, outputs: Subspace | None = None, inputs: Subspace | None = None, S: Subspace | None = None, cache: Path | None = None
    ) -> Part:
        """What is closed of W (out, in), and what learns.

        Its k leading singular directions are closed, and as much as has room of what was closed for earlier tasks (outputs, inputs) and of learned inputs S.
        """
        o, (m, n) = self.options, W.shape
        U_high, U_low, V_high, V_low = cached_split(W, k, cache) if k else (W.new_zeros(m, 0), None, W.new_zeros(n, 0), None)
        (U, lost), (V, more) = self.join(U_high, outputs), self.join(V_high, inputs, S)
        lost += more
        closed = (with_energy(W.mT, U, outputs).to("cpu"), with_energy(W, V, inputs).to("cpu")) if o.remember == "union" else None
        if o.block == "paper":
            constraint = Constraint(outputs=U, inputs=V, forbid="both") if U.shape[1] and V.shape[1] else Constraint(inputs=W.new_zeros(n, 0))
            return Part(constraint, None, closed, lost)
        # a side with more dimensions than singular directions stays whole: the rest of them may learn too
        P = None if m > n or not U.shape[1] else complement(U) if U.shape[1] > k or U_low is None else U_low
        Q = None if n > m or not V.shape[1] else complement(V) if V.shape[1] > k or V_low is None else V_low
        if k == 0:
            P = Q = None  # inputs alone: few directions are closed, and Adam on the weight's own entries is the cheaper and the better known
        if o.thin and k and m != n:  # of what W makes of its open directions, a weak part too: it is there to be learned in
            if m > n:
                P = orthonormalize(W @ Q, against=U, scale=0.0)
            else:
                Q = orthonormalize(W.mT @ P, against=V, scale=0.0)
        # an empty space is there so that weight decay pulls toward the task's start
        constraint = Constraint(outputs=U if P is None and U.shape[1] else None, inputs=V if Q is None else None)
        return Part(constraint, None if P is None and Q is None else (P, Q), closed, lost)

    def join(self, V: Tensor, *spaces: Subspace | None) -> tuple[Tensor, int]:
        """V (n, k) and the directions of most energy of `spaces` outside it, orthonormal, as many as max_share leaves room for; and how many it does not."""
        given, room = [space for space in spaces if space is not None and space.rank], max(int(self.options.max_share * len(V)) - V.shape[1], 0)
        if not given:
            return V, 0
        if len(given) == 1 and not V.shape[1]:  # nothing to bring together
            strongest = given[0].energy.argsort(descending=True, stable=True)[:room]
            return given[0].basis[:, strongest].contiguous(), max(given[0].rank - room, 0)
        rows = [rows_of(space) for space in given]
        A = torch.cat(rows)
        if is_fake(A):
            return torch.cat([V, V.new_empty(len(V), min(len(A), room))], 1), 0
        rest = project_out(A, V)
        if not torch.linalg.matrix_norm(rest) > tolerance(V.dtype) * torch.linalg.matrix_norm(A):
            return V, 0
        found = top_subspace(rest).basis
        return torch.cat([V, orthonormalize(found[:, :room], against=V, scale=1.0)], 1), max(found.shape[1] - room, 0)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        if not self.parts and self.options.form == "adapter":
            raise ConfigError("method osft: form: adapter trains beside the weights; call begin_task first, and end_task to merge what was learned")
        if not self.parts:  # nobody has begun a task: as before the first
            self.build(model, Memory())
        adapters, groups, self.trained = attached(model), [], {}
        for name, layer in self.layers(model).items():
            part = self.parts[name]
            if name in adapters:
                groups.append(
                    {"params": [adapters[name].C], "names": [f"{name}.C"], "constraint": None if part.constraint.empty else part.constraint}
                )
                continue
            group = {"params": [layer.weight], "names": [f"{name}.weight"], "constraint": part.constraint, "transposed": stored_transposed(layer)}
            groups.append(group | {"directions": part.directions})
            self.trained[layer.weight] = layer
        return groups

    @property
    def releases(self) -> bool:
        o = self.options
        wise = self.processes == 1 and not self.whole_gradients
        return o.fixed_coordinates and (wise if o.release_gradients is None else o.release_gradients)

    def optimizer(self, groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
        from ..optim import SubspaceAdamW
        from ..optim.released import release

        self.check_processes()  # here too: a run may go on in more processes than it began in
        released = [self.releases and group.get("directions") is not None for group in groups]
        optimizer = SubspaceAdamW([group | {"release": r} for group, r in zip(groups, released, strict=True)], **settings)
        for group, r in zip(groups, released, strict=True):
            for p in group["params"] if r else ():
                release(self.trained[p], optimizer)
        return optimizer

    def spaced(self, model: nn.Module) -> dict[str, int]:
        return {name: logical(m.weight, m).shape[1] for name, m in self.layers(model).items()} if self.options.protect != "weights" else {}

    def held_bytes(self) -> int:
        parts = self.parts.values() if self.options.form == "adapter" else ()
        return sum(B.nbytes for part in parts for B in part.directions or () if B is not None)

    # -- the record ------------------------------------------------------------------------------------------------------------------

    def protected_inputs(self, memory: Memory) -> dict[str, Tensor]:
        o = self.options
        if o.block == "paper":
            return {}  # no input direction is closed to every output
        spaces = {} if o.protect == "weights" else memory.spaces()
        found = {name: space.basis for name, space in spaces.items()}
        for name, part in self.parts.items() if o.protect != "inputs" else ():
            V = part.closed_inputs().cpu()
            found[name] = self.join(V, spaces[name].to(V))[0] if name in spaces else V
        return {name: V for name, V in found.items() if V.shape[1]}

    def report(self, memory: Memory) -> dict[str, Any] | None:
        blocks = {name: part.constraint.inputs for name, part in self.parts.items() if part.constraint.forbid == "both"}
        found = bases_report(list((blocks or self.protected_inputs(memory)).values()))
        held = [
            B for part in self.parts.values() for B in (part.constraint.inputs, part.constraint.outputs, *(part.directions or ())) if B is not None
        ]
        dropped = sum(part.dropped for part in self.parts.values())
        return found and found | {"evicted": dropped, "bytes": sum(B.nbytes for B in held)}


def rows_of(space: Subspace) -> Tensor:
    """(s, n), rows whose Gram matrix is the space with its energies."""
    return (space.basis * space.energy.sqrt()).mT


def with_energy(W: Tensor, V: Tensor, known: Subspace | None) -> Subspace:
    """The closed directions V (n, k) with their energy: the share of ||W||^2 of W (m, n) that lies along each, added to what the space `known` has there."""
    energy = ((W @ V).double() ** 2).sum(0) / (W.double() ** 2).sum().clamp_min(torch.finfo(torch.float64).tiny)
    if known is not None and known.rank:
        energy = energy + ((rows_of(known) @ V).double() ** 2).sum(0)
    return Subspace(V, energy.to(V.dtype))
