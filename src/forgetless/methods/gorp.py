"""GORP: gradient low-rank projection for continual learning (Wang et al., ACL 2025, arXiv 2507.02503).

    full-rank branch   R = G Q,  Q (in x r) = top right singular directions of G (I - S S^T)     (eq. 3-4, one-sided, S on the input side)
                       dW = -lr * full_lr_ratio * AdamW(R) Q^T    the state is out x r, the update stays in span(Q), orthogonal to S
                       without a rank: dW = -lr * AdamW(G (I - S S^T)) (I - S S^T)
    LoRA branch        y += s B A x; A starts as A (I - S S^T), and each finished AdamW step of A is projected off S; so B A x = 0 for x in span(S)
                       at the task's end W <- W + s B A, A is drawn anew, B = 0: the rank never grows, what is left is a plain model
    after the task     M' = M - M S S^T, its top directions join S until S holds the share `energy` of M   (eq. 6-8)

One S (in x k) a module, shared by both branches. M is the raw gradient's statistic, before any projection: a sketch of the whole task's gradients, or Adam's
first moment at its end (the paper). A gradient row is a combination of the layer's inputs (G = delta^T X, and G_A = s B^T G), so S spans inputs the old tasks
used, and dW S = 0 leaves their outputs alone.

When not to use it: tasks that contradict each other (a new fact must replace an old one); one task only (use any optimizer); a model whose head or
embeddings must move (they are frozen here).
"""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..adapters import LoraOptions, adapters, attach, detach, factors, family_modules, lora_layers
from ..errors import ConfigError
from ..models import logical, match_modules, stored_transposed
from ..sharding import ALONE, is_sharded, laid_out, norms, spread_like, whole
from ..sketch import Sketch
from ..subspace import Constraint, Subspace, coverage, extend, project_out, working_dtype
from ._statistics import spaces_report
from .base import Memory, Method, clip_factor

log = logging.getLogger(__name__)

# the paper's settings; its two learning rates are 1e-3 and 1e-5 (T5), 2e-4 and 1e-6 (LLaMA)
PAPER = {
    "rank": 8, "refresh_gap": 10, "refresh": "svd", "side": "both", "full_lr_ratio": 0.01, "use_lora": True, "lora_rank": 8, "lora_alpha": 32.0,
    "lora_dropout": 0.1, "space_from": "first_moment", "energy": 0.9,
}  # fmt: skip


class GORPOptions(LoraOptions):
    preset: Literal["paper"] | None = None
    """paper: two-sided k x k coordinates, T = 10, k = 8, LoRA on query and value, the full-rank branch on the layers the paper names; what is given beside it wins."""
    use_full_rank: bool = True
    """The full-rank branch: weights whose gradient is used in `rank` coordinates."""
    use_lora: bool = False
    """The LoRA branch. With use_full_rank and use_shared_space these are the rows of the paper's ablation."""
    use_shared_space: bool = True
    """False trains the same way but protects nothing."""
    rank: int | None = Field(None, ge=1)
    """Directions the optimizer's state lives in (paper: 8), for its memory; null: dense Adam inside the permitted space, which learned more in every trial."""
    refresh_gap: int = Field(10, ge=1)
    """Steps between two choices of Q (paper: 10)."""
    stagger: bool = False
    """Choose the layers' Q in turn, some in each step, where all at once would make every refresh_gap-th step a long one."""
    release_gradients: bool | None = None
    """With a rank, read a layer's gradient in its coordinates as soon as backward has made it, and let it go: less memory by nearly all gradients. null: wherever the
    steps stay the same, so in one process, without gradient accumulation, with space_from: sketch. With accumulation (true) coordinates add up, whole gradients are
    kept in steps that choose directions, and in the others the sketch knows a gradient's energy from its probes only, with an error of some per cent."""
    refresh: Literal["cold", "warm", "exact", "svd"] = "cold"
    projection: Literal["fp32", "bf16"] = "fp32"
    """bf16: multiply G Q in bf16, which pays from a rank of 32 or so where the processor has units for it. What is protected does not depend on it."""
    moments: Literal["rotate", "reset"] = "rotate"
    full_lr_ratio: float | None = Field(None, gt=0)
    """Learning rate of the full-rank branch, times train.learning_rate, which is the LoRA branch's; absent: 1, or 10 with a rank, whose steps are shorter."""
    full_modules: str | list[str] | None = None
    """Linear layers of the full-rank branch: a regex over whole dotted names, or a list of names; absent: all but the head (preset paper: those the paper names)."""
    side: Literal["inputs", "outputs", "both"] = "inputs"
    """Which side of W is reduced to `rank` and carries the space; both: reduced on both (k x k), the space on the inputs. The paper's S S^T G, read with row
    vectors, is the input side."""
    space_from: Literal["sketch", "first_moment"] = "sketch"
    energy: float = Field(0.95, gt=0, le=1)
    """Share of a task's gradient energy the space must hold after it."""
    max_rank: int | None = Field(None, ge=1)
    """Largest space a module may have; beyond it the directions of least energy are given up, and said so."""
    sketch_size: int = Field(256, ge=8)
    """Directions the sketch keeps while a task trains."""
    protect_energy: float = Field(0.9, gt=0, le=1)
    """Share of the input energy of `protect_from`'s prompts that is protected before the first task."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return PAPER | values if isinstance(values, dict) and values.get("preset") == "paper" else values

    @model_validator(mode="after")
    def _something_learns(self) -> GORPOptions:
        if not (self.use_full_rank or self.use_lora):
            raise ValueError("use_full_rank and use_lora are both false, so nothing would be trained")
        if self.side == "both" and self.rank is None and self.use_full_rank:
            raise ValueError("side: both reduces the gradient on both sides, so it needs a rank, such as rank: 8")
        if self.stagger and (self.rank is None or not self.use_full_rank):
            raise ValueError("stagger: true says when directions are chosen, so it needs use_full_rank and a rank, such as rank: 8")
        if self.projection == "bf16" and (self.rank is None or not self.use_full_rank):
            raise ValueError("projection: bf16 says how gradients are read in coordinates, so it needs use_full_rank and a rank, such as rank: 32")
        if self.release_gradients and not self.may_release:
            raise ValueError(
                "release_gradients: true reads gradients in coordinates, so it needs use_full_rank, a rank, such as rank: 8, and space_from: sketch"
            )
        return self

    @property
    def may_release(self) -> bool:
        return self.use_full_rank and self.rank is not None and (self.space_from == "sketch" or not self.use_shared_space)


class GORP(Method):
    name = "gorp"
    summary = "gradient low-rank projection: updates stay off the input directions earlier tasks used"
    paper = "arXiv 2507.02503"
    constrained = True
    bytes_a_task = "new input directions of every layer: in numbers a direction"
    Options = GORPOptions

    def __init__(self, /, **options: Any):
        super().__init__(**options)
        self.max_grad_norm: float | None = 1.0
        self.spaces: dict[str, Subspace] = {}
        self.statistics: dict[str, Sketch | Tensor] = {}  # "full/<module>" and "lora/<module>"
        self.drawn: dict[str, Tensor] = {}  # A of each adapter as the task began
        self.order: dict[str, int] = {}  # the keys of statistics: their seeds
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}  # of the gradients that were let go since the last step: probes and norm

    # -- a task ----------------------------------------------------------------------------------------------------------------------

    def check(self, model: nn.Module) -> None:
        self.check_processes()
        self.full_layers(model)
        if self.options.use_lora:
            lora_layers(model, self.options.lora_modules)

    def begin_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        self.spaces = memory.spaces()
        self.statistics, self.drawn = {}, {}
        for name, layer in self.attach(model).items():
            A, _ = factors(layer)
            if (constraint := self.constraint(name)) is not None and self.space_side == "inputs":
                with torch.no_grad():
                    A.copy_(project_out(A, constraint.inputs.to(A)))
            self.drawn[name] = A.detach().cpu().clone()
        return model

    def resume_task(self, model: nn.Module, task: Any, memory: Memory, state: dict[str, Tensor]) -> nn.Module:
        self.spaces = memory.spaces()
        self.load_state_dict(state)
        for name, layer in self.attach(model).items():
            with torch.no_grad():
                factors(layer)[0].copy_(self.drawn[name])
        return model

    def protect(self, model: nn.Module, prompts: list[list[int]], memory: Memory, advance: Any = None) -> None:
        from ..protect import input_spaces

        o = self.options
        if self.space_side != "inputs" or not o.use_shared_space:
            raise ConfigError("protect_from: protects input directions, which need use_shared_space and side: inputs or both")
        layers = self.full_layers(model) | (lora_layers(model, o.lora_modules) if o.use_lora else {})
        memory.keep(input_spaces(model, layers, prompts, o.protect_energy, max_rank=o.max_rank, autocast=self.autocast, advance=advance))

    @property
    def space_side(self) -> str:
        return "outputs" if self.options.side == "outputs" else "inputs"

    def attach(self, model: nn.Module) -> dict[str, nn.Module]:
        o = self.options
        if not o.use_lora:
            return {}
        return attach(model, list(lora_layers(model, o.lora_modules)), o.lora_rank, o.lora_alpha, o.lora_dropout)

    def full_layers(self, model: nn.Module) -> dict[str, nn.Module]:
        o = self.options
        if not o.use_full_rank:
            return {}
        pattern = family_modules(model, "full", "method.full_modules") if o.full_modules is None and o.preset == "paper" else o.full_modules
        return match_modules(model, pattern, "method.full_modules")

    def constraint(self, name: str) -> Constraint | None:
        """What the space of a module forbids; None where it has none."""
        space = self.spaces.get(name)
        return Constraint(**{self.space_side: space}) if self.options.use_shared_space and space is not None and space.rank else None

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        o = self.options
        ratio = o.full_lr_ratio or (1.0 if o.rank is None else 10.0)
        common = dict(
            rank=o.rank,
            refresh_gap=o.refresh_gap,
            stagger=o.stagger,
            refresh=o.refresh,
            projection=o.projection,
            moments=o.moments,
            side=o.side,
            lr_scale=ratio,
        )
        groups = []
        branches = {"full": self.full_layers(model), "lora": adapters(model)}
        self.order = {key: i for i, key in enumerate(f"{branch}/{name}" for branch, layers in branches.items() for name in layers)}
        self.seen = {}
        for name, layer in branches["full"].items():
            constraint = self.constraint(name)
            if o.rank is None and constraint is None:  # an empty space, so that weight decay pulls toward the task's start here too
                m, n = logical(layer.weight, layer).shape
                constraint = Constraint(**{self.space_side: Subspace.empty(n if self.space_side == "inputs" else m)})
            group = {"params": [layer.weight], "names": [f"{name}.weight"], "constraint": constraint, "transposed": stored_transposed(layer)}
            groups.append(group | common)
        for name, layer in branches["lora"].items():
            # A (rank, in) reads the inputs and B (out, rank) writes the outputs: whichever side the space is on, one factor carries it
            constraint, carries = self.constraint(name), "AB".index("A" if self.space_side == "inputs" else "B")
            for k, factor in enumerate(factors(layer)):
                groups.append({"params": [factor], "names": [f"{name}.lora_{'AB'[k]}"], "constraint": constraint if k == carries else None})
        return groups

    def check_processes(self) -> None:
        if self.options.release_gradients and self.processes > 1:
            raise ConfigError("method gorp: release_gradients works in one process: gradients are exchanged whole; take it out")
        if self.options.release_gradients and self.whole_gradients:
            raise ConfigError(
                "method gorp: release_gradients lets go of gradients that a penalty beside it adds to, or a training loop that is not forgetless' reads; take it out"
            )

    @property
    def releases(self) -> bool:
        o = self.options
        exact = o.may_release and self.processes == 1 and self.micro_batches == 1 and not self.whole_gradients
        return exact if o.release_gradients is None else o.release_gradients

    def optimizer(self, groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
        self.check_processes()  # here too: a run may go on in more processes than it began in
        if self.releases:
            groups = [group | {"release": True, "observe": self.observer(group)} if group.get("rank") else group for group in groups]
        optimizer = super().optimizer(groups, **settings)
        optimizer.micro_batches = self.micro_batches
        return optimizer

    def observer(self, group: dict[str, Any]) -> Any:
        """What a released gradient of the group's weight, as stored, is shown to before it goes."""
        if not self.options.use_shared_space:
            return None
        key = f"full/{group['names'][0].removesuffix('.weight')}"
        turned = group["transposed"] == (self.space_side == "inputs")

        def observe(G: Tensor) -> None:
            G = G.mT if turned else G
            sketch = self.sketch(key, G.shape[1])
            Y, norm = sketch.probe(G)
            if key in self.seen:  # of an earlier micro-batch
                Y = Y + self.seen[key][0]
                norm = sketch.norm(Y, G.shape[0])
            self.seen[key] = Y, norm

        return observe

    def sketch(self, key: str, n: int) -> Sketch:
        """The running sketch of these gradients (m, n), begun where there is none."""
        if key not in self.statistics:
            self.statistics[key] = Sketch(n, min(self.options.sketch_size, n), seed=self.order[key])
        return self.statistics[key]

    def gradients(self, model: nn.Module) -> dict[str, Tensor]:
        """The raw gradients whose rows live in the spaces, by branch and module: G or G_A (G^T or G_B^T where the space is on the outputs)."""
        inputs = self.space_side == "inputs"
        found = {f"full/{n}": logical(m.weight.grad, m) for n, m in self.full_layers(model).items() if m.weight.grad is not None}
        for name, layer in adapters(model).items():
            factor = factors(layer)[0 if inputs else 1]
            if factor.grad is not None:
                found[f"lora/{name}"] = factor.grad
        return found if inputs else {key: G.mT for key, G in found.items()}

    @torch.no_grad()
    def on_step(self, model: nn.Module) -> None:
        """Collect the raw gradients, clipped as a whole so that one wild step does not own the space."""
        o = self.options
        if not o.use_shared_space:
            return
        gradients = self.gradients(model)
        self.order = self.order or {key: i for i, key in enumerate(gradients)}
        released = {key: self.seen[key] for key in self.order if key in self.seen}
        own = [laid_out(G) for G in gradients.values() if is_sharded(G)]
        known = [*(norm for _, norm in released.values()), *norms([(columns if rows is ALONE else rows, G) for G, rows, columns in own])]
        factor = clip_factor([G for G in gradients.values() if not is_sharded(G)], self.max_grad_norm, known)
        for key, (Y, norm) in released.items():
            self.sketch(key, Y.shape[1]).add(Y, float(norm) * factor)
        self.seen = {}
        for key, G in gradients.items():
            if o.space_from == "sketch":
                self.sketch(key, G.shape[1]).update(G, factor)
            else:
                if key not in self.statistics:
                    self.statistics[key] = torch.zeros_like(G, dtype=working_dtype(G.dtype), memory_format=torch.contiguous_format)
                elif is_sharded(G) and not is_sharded(self.statistics[key]):  # a resumed one comes from a file, whole
                    self.statistics[key] = spread_like(G, self.statistics[key].to(G.device))
                M = self.statistics[key] = self.statistics[key].to(G.device)
                M.lerp_(G.to(M.dtype) * factor, 0.1)  # Adam's first moment, beta1 = 0.9

    @torch.no_grad()
    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        o = self.options
        evicted, short = 0, []
        by_module: dict[str, list[tuple[Tensor, float]]] = defaultdict(list)
        for key, statistic in self.statistics.items():
            by_module[key.partition("/")[2]].append(_rows(statistic))
        for name, parts in by_module.items():
            A, total = _joint(parts)
            space = self.spaces.get(name) or Subspace.empty(A.shape[1], A.dtype)
            space, lost = extend(space.to(A), A, o.energy, max_rank=o.max_rank, total=total)
            if o.max_rank is None and total and coverage(A, space.basis) * float((A.double() ** 2).sum()) < 0.99 * o.energy * total:
                short.append(name)  # the sketch has dropped more than the space may lack
            evicted += lost
            self.spaces[name] = space.to("cpu")
        memory.keep(self.spaces)
        memory.info["evicted"] = memory.info.get("evicted", 0) + evicted
        if evicted:
            log.warning("gorp: max_rank %s is reached; %d directions of least energy were given up and are no longer protected", o.max_rank, evicted)
        if short:
            log.warning(
                "gorp: %d modules do not reach energy %g, because their sketch dropped too much; raise sketch_size (%d)",
                len(short),
                o.energy,
                o.sketch_size,
            )
        self.statistics, self.drawn = {}, {}
        return detach(model) if adapters(model) else model

    # -- saving ----------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {f"drawn/{name}": A for name, A in self.drawn.items()}
        for key, statistic in self.statistics.items():
            if isinstance(statistic, Sketch):
                state.update({f"{key}:{part}": value for part, value in statistic.state_dict().items()})
            else:
                state[key] = whole(statistic)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.statistics, self.drawn = {}, {}
        sketches: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, value in state.items():
            name, _, part = key.partition(":")
            if key.startswith("drawn/"):
                self.drawn[key.removeprefix("drawn/")] = value
            elif part:
                sketches[name][part] = value
            else:
                self.statistics[name] = value.clone()
        for name, parts in sketches.items():
            n = parts["rows"].shape[1]
            self.statistics[name] = sketch = Sketch(n, min(self.options.sketch_size, n))
            sketch.load_state_dict(parts)

    def spaced(self, model: nn.Module) -> dict[str, int]:
        o = self.options
        layers = self.full_layers(model) | (lora_layers(model, o.lora_modules) if o.use_lora else {})
        return {name: logical(m.weight, m).shape[self.space_side == "inputs"] for name, m in layers.items()} if o.use_shared_space else {}

    def statistics_bytes(self, model: nn.Module) -> int:
        o = self.options
        waiting = sum(4 * 16 * n for _, n, _ in self.observed(model, use_lora=False)) if self.releases else 0  # probes of the step, until its end
        if o.space_from == "sketch":
            return waiting + sum(4 * n * (2 * min(o.sketch_size, n) + 16) for _, n, _ in self.observed(model, o.use_lora))
        parts = self.planned[0] if self.planned and self.planned[1] else 1  # as the gradients lie
        return waiting + sum(4 * -(-(m if by_rows else n) // parts) * (n if by_rows else m) for m, n, by_rows in self.observed(model, o.use_lora))

    def observed(self, model: nn.Module, use_lora: bool) -> list[tuple[int, int, bool]]:
        """(m, n) of each gradient whose rows live in the spaces, and whether processes that share the model have rows of it each, or columns."""
        if not self.options.use_shared_space:
            return []
        inputs = self.space_side == "inputs"
        layers = [(logical(m.weight, m).shape, stored_transposed(m)) for m in self.full_layers(model).values()]
        found = [(*(shape if inputs else shape[::-1]), transposed != inputs) for shape, transposed in layers]
        if use_lora:
            factors = [logical(m.weight, m).shape for m in lora_layers(model, self.options.lora_modules).values()]
            found += [(self.options.lora_rank, shape[1 if inputs else 0], inputs) for shape in factors]
        return found

    def sent_each_step(self, model: nn.Module) -> int:
        if self.options.space_from != "sketch":
            return 0
        # a sketch's probes of own rows are summed, those of own columns gathered, and so is what has fewer rows than there are probes
        return sum(2 * 16 * n if by_rows and m > 16 else min(m, 16) * n for m, n, by_rows in self.observed(model, self.options.use_lora))

    def protected_inputs(self, memory: Memory) -> dict[str, Tensor]:
        if self.space_side != "inputs" or not self.options.use_shared_space:
            return {}
        return {key.removesuffix(".basis"): V for key, V in memory.tensors.items() if key.endswith(".basis")}

    def report(self, memory: Memory) -> dict[str, Any] | None:
        found = spaces_report(memory.spaces()) if self.options.use_shared_space else None
        return found and found | {"evicted": memory.info.get("evicted", 0)}


def _rows(statistic: Sketch | Tensor) -> tuple[Tensor, float]:
    """(rows (k, n) whose Gram matrix is the statistic, the energy it stands for)."""
    if isinstance(statistic, Sketch):
        statistic.compress()
        return statistic.rows, float(statistic.total)
    statistic = whole(statistic)
    return statistic, float((statistic.double() ** 2).sum())


def _joint(parts: list[tuple[Tensor, float]]) -> tuple[Tensor, float]:
    """The branches' statistics on top of each other, each brought to energy 1: they differ by s B^T, which starts at zero and would let one branch speak alone."""
    parts = [(A, total) for A, total in parts if total > 0] or parts[:1]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([A / total**0.5 for A, total in parts]), float(len(parts))
