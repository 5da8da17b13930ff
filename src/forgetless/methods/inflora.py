"""InfLoRA: interference-free low-rank adaptation (Liang and Li, CVPR 2024, arXiv 2404.00228).

    y = W x + s B A x              A (rank x in) is frozen and says where the update may read, B (out x rank), zero at first, learns
    before task t                  H (tokens x in): the layer's inputs on the task's rows;  A = the top `rank` right singular directions of H (I - V V^T) / sqrt(3)
    after it                       W <- W + s B A;  V (in x k), the old inputs, grows by directions of H until it holds the share e_t of ||H||^2
                                   e_t = energy + (energy_end - energy) t / tasks,    t = 0, 1, ... tasks - 1

(In the paper A and B have each other's names.) A V = 0, so dW V = s B A V = 0 whatever an optimizer does to B: the answers to old inputs in V stay as they are, and A
still points where the new task's inputs are. Where V has more than half of a layer's input directions, the rest of them is kept in its place (the paper's DualGPM), so
at most in / 2 x in numbers a layer are kept. Where fewer than `rank` directions hold input that is not in V, the other rows of A are 0.

H comes from at most 200 rows of the task, in eval mode, once before it (the model that is about to learn) and once after it (the model that has learned). The released
code takes shares of the squared eigenvalues of H^T H, which go with the fourth power of the inputs and close fewer directions; here it is the energy ||H V||^2 / ||H||^2,
as in GPM. sqrt(3): the rows of A are as long as LoRA draws them, so that rates mean the same.

When not to use it: over many or wide tasks, when V leaves little (a warning says for how many layers); tasks whose inputs are alike, as only B A x of what is left of
them can tell the new one from the old; where head or embeddings must move.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..adapters import ADAPTER, LoraOptions, adapters, detach, factors, lora_layers
from ..models import logical
from ..subspace import Constraint, Subspace, complement, extend, orthonormalize, project_out, tolerance, top_subspace
from ._statistics import bases_report, encoded
from .base import Memory
from .inclora import IncLoRA

log = logging.getLogger(__name__)
ROWS = 200  # of a task's training rows, whose inputs stand for it
REST = "rest"  # kind of space in memory: of a layer whose old inputs have more than half of the directions, the other ones


class InfLoRAOptions(LoraOptions):
    energy: float = Field(0.95, gt=0, le=1)
    """Share of a task's input energy that V must hold after it; with tasks, after the first one."""
    energy_end: float = Field(1.0, gt=0, le=1)
    """With tasks, what the share rises to; it would be reached one task after the last."""
    tasks: int | None = Field(None, ge=1)
    """How many tasks there will be, over which the share rises; later ones keep the last. Absent: the same share after each."""
    normalise: bool = False
    """Bring each input vector to length 1 first, so that a few huge ones, as the first token's in some layers of a language model, do not own the space."""

    @model_validator(mode="after")
    def _rises(self) -> InfLoRAOptions:
        if self.tasks is not None and self.energy_end < self.energy:
            raise ValueError(f"energy_end {self.energy_end:g} is below energy {self.energy:g}; the share rises over the tasks")
        if self.tasks is None and self.energy_end != 1.0:
            raise ValueError("energy_end is where the share rises to over tasks: N, how many tasks there will be; give tasks, or take energy_end out")
        return self


class InfLoRA(IncLoRA):
    name = "inflora"
    summary = "a LoRA adapter a task that reads the task's inputs outside those of earlier tasks; only B learns"
    paper = "arXiv 2404.00228"
    constrained = True
    extra_forward = "two passes over at most 200 of the task's rows, before it and after it"
    bytes_a_task = "directions of every adapted layer's inputs, at most half of them x in numbers in all"
    Options = InfLoRAOptions

    def __init__(self, /, **options: Any):
        super().__init__(**options)
        self.spaces: dict[str, Subspace] = {}  # V of each layer
        self.frozen = 0  # bytes of all A

    def begin_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        sums, same = self.inputs(model, task) if task is not None else ({}, {})
        self.go_on(model, memory)
        found: dict[str, Tensor] = {}  # layers that read the same inputs have the same V
        short = 0
        for name, layer in adapters(model).items():
            A = factors(layer)[0].detach()
            if task is None:  # nobody's inputs: as drawn
                A.copy_(project_out(A, self.basis(name, A)))
                continue
            source = same.get(name, name)
            if source not in found:
                found[source] = leading(*sums.pop(source).of, self.basis(name, A), len(A))
            Q = found[source]
            A.zero_()
            A[: Q.shape[1]] = Q.mT / 3**0.5
            short += Q.shape[1] < len(A)
        if short:
            log.warning("inflora: %d layers have fewer than lora_rank %d directions of the task's inputs outside the old ones", short, len(A))
        return model

    def go_on(self, model: nn.Module, memory: Memory) -> nn.Module:
        self.spaces, self.merge_leak = recalled(memory), None
        self.frozen = sum(factors(layer)[0].nbytes for layer in self.attach(model).values())
        return model

    def inputs(self, model: nn.Module, task: Any) -> tuple[dict, dict]:
        """The inputs of every adapted layer on the task's rows, as protect.input_sums gives them."""
        from ..protect import input_sums

        rows = encoded(self.tokenizer, task, ROWS)
        self.progress.stage(f"{task.name}: the layers' inputs", len(rows))
        return input_sums(model, lora_layers(model, self.options.lora_modules), rows, self.options.normalise, self.autocast, self.progress.advance)

    def basis(self, name: str, like: Tensor) -> Tensor:
        space = self.spaces.get(name)
        return like.new_zeros(like.shape[1], 0) if space is None else space.basis.to(like)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        found = adapters(model)
        return [{"params": [factors(layer)[1] for layer in found.values()], "names": [f"{name}.lora_B" for name in found]}]

    @torch.no_grad()
    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        self.merge(model)
        if task is not None:
            sums, same = self.inputs(model, task)
            share = self.share(memory.info.get("tasks", 0))
            for name in list(sums):
                H, gram = sums.pop(name).of
                known = self.spaces.get(name) or Subspace.empty(H.shape[1])
                self.spaces[name] = extend(known.to(H), H, share, gram=gram)[0].to("cpu")
            for name, source in same.items():
                self.spaces[name] = Subspace(self.spaces[source].basis.clone(), self.spaces[source].energy.clone())
            keep(memory, self.spaces)
        memory.info["tasks"] = memory.info.get("tasks", 0) + 1
        return model

    def share(self, t: int) -> float:
        """e_t, t tasks having been learned before."""
        o = self.options
        return o.energy if o.tasks is None else o.energy + (o.energy_end - o.energy) * min(t, o.tasks - 1) / o.tasks

    @torch.no_grad()
    def merge(self, model: nn.Module) -> None:
        """Every adapter into its weight; how far what was merged lies in V becomes `merge_leak`, as weight_leak has it."""
        from ..evaluation.drift import leak_of, worse

        self.merge_leak = None
        for name, layer in adapters(model).items():
            A, B = factors(layer)
            V, base = self.basis(name, A), layer.get_base_layer()
            if V.shape[1]:
                W = logical(base.weight, base).to(A.dtype)
                merged = W.addmm(B, A, alpha=layer.scaling[ADAPTER])
                self.merge_leak = worse(self.merge_leak, leak_of({"constraint": Constraint(inputs=V), "names": [f"{name}.weight"]}, merged, W, 1))
        detach(model)

    def protect(self, model: nn.Module, prompts: list[list[int]], memory: Memory, advance: Any = None) -> None:
        from ..protect import input_spaces

        layers = lora_layers(model, self.options.lora_modules)
        keep(memory, input_spaces(model, layers, prompts, self.options.energy, autocast=self.autocast, advance=advance))

    def spaced(self, model: nn.Module) -> dict[str, int]:
        return {name: logical(m.weight, m).shape[1] for name, m in lora_layers(model, self.options.lora_modules).items()}

    def held_bytes(self) -> int:
        return self.frozen

    def protected_inputs(self, memory: Memory) -> dict[str, Tensor]:
        return {name: space.basis for name, space in recalled(memory).items() if space.rank}

    def report(self, memory: Memory) -> dict[str, Any] | None:
        found = bases_report(list(self.protected_inputs(memory).values()))
        kept = sum(t.nbytes for key, t in memory.tensors.items() if key.endswith(".basis"))  # the smaller half of each
        return found and found | {"evicted": 0, "bytes": kept}


def leading(H: Tensor, gram: bool, V: Tensor, rank: int) -> Tensor:
    """Q (in, k), k <= rank: the leading right singular directions of H (I - V V^T), V (in, b) orthonormal, off V to the last digit.

    gram: H is not the inputs (tokens, in), but their H^T H (in, in). Directions with less of the inputs' energy than rounding leaves in any are none.
    """
    V = V.to(H)
    total = float(H.diagonal().double().sum() if gram else (H.double() ** 2).sum())
    space = top_subspace(project_out(project_out(H, V).mT, V), rank, "symmetric") if gram else top_subspace(H, rank, off=V)
    Q = space.basis[:, space.energy > tolerance(H.dtype) * total]
    return orthonormalize(Q, against=V, scale=1.0)


def keep(memory: Memory, spaces: dict[str, Subspace]) -> None:
    """V of each layer into memory, or what is not in it where that is smaller."""
    for name, space in spaces.items():
        n, k = space.basis.shape
        if 2 * k > n:
            for part in ("basis", "energy"):
                memory.tensors.pop(f"{name}.{part}", None)
            memory.keep({name: Subspace(complement(space.basis), space.energy.new_zeros(n - k))}, REST)
        else:
            memory.keep({name: space})


def recalled(memory: Memory) -> dict[str, Subspace]:
    """V of each layer, as keep() has put it there."""
    rest = {name: complement(space.basis) for name, space in memory.spaces(REST).items()}
    return memory.spaces() | {name: Subspace(V, V.new_zeros(V.shape[1])) for name, V in rest.items()}
