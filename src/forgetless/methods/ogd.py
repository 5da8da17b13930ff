"""OGD: orthogonal gradient descent (Farajtabar, Azizan, Mott, Li, AISTATS 2020, arXiv 1910.07104): updates stay off the gradients of earlier tasks' outputs.

    g = grad f_y(x; theta)          of a sample x of the task just learned: how its output f_y moves with theta, all trained weights as one long vector
    v = g - sum_u <g, u> u          for the directions u of S, those kept so far; S <- S + [v / ||v||]        (Gram-Schmidt; here twice, for rounding)
    d theta <- d theta - sum_u <d theta, u> u       so that f_y(x; theta + d theta) = f_y(x; theta) to first order

f_y(x) is the logit of the right answer, the paper's variant OGD-GTL; of an answer of several tokens the sum of their logits, so that a row costs one direction.
Kept: `samples` numbers a trained weight with every task, which for a language model is far more than the model itself: 20 samples are 80 bytes a weight and task
in fp32, 40 in bf16. Here to compare with; gpm and gorp keep a layer's share of the same thing in far less.

Where we depart: the paper projects the gradient and trains by SGD. Here the *applied* update is projected, after Adam's division, weight decay and clipping, as one vector
over all tensors. The projection is exact for what is kept, also where bf16 has rounded it. Weight decay pulls a matrix to where the task began.

When not to use it: on a model where 80 bytes a weight and task do not fit (name the layers to train with `modules`, or keep_in: bf16); and where steps are large, since
the promise is of first order and of the sampled rows.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..models import match_modules
from ..subspace import Constraint, working_dtype
from ._statistics import encoded, row_gradients, trained_names
from .base import Memory, Method, Options

NOTHING_NEW = 1e-4  # of a gradient's length: what is left of one that lies in what is kept is rounding


class OGDOptions(Options):
    modules: str | list[str] | None = None
    """Train only the weights of these linear layers (a regex over whole dotted names, or a list of names); absent: every parameter. "linear": all linear layers but the head."""
    samples: int = Field(20, ge=1)
    """Rows of a task whose gradients are kept (paper: 200)."""
    keep_in: Literal["fp32", "bf16"] = "fp32"
    """What they are kept in. bf16: half the bytes, and the gradients are known to three digits only."""


class OGD(Method):
    name = "ogd"
    summary = "orthogonal gradient descent: updates stay off the gradients of earlier tasks' answers"
    paper = "arXiv 1910.07104"
    extra_forward = "20 rows forward and back, one by one, at a task's end"
    bytes_a_task = "gradients: samples numbers a trained weight"
    Options = OGDOptions

    def __init__(self, /, **options: Any):
        super().__init__(**options)
        self.bases: dict[str, Tensor] = {}  # parameter -> its part (k, *shape) of S

    def begin_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        return self.recall(model, memory)

    def resume_task(self, model: nn.Module, task: Any, memory: Memory, state: dict[str, Tensor]) -> nn.Module:
        return self.recall(model, memory)

    def recall(self, model: nn.Module, memory: Memory) -> nn.Module:
        device = next(model.parameters()).device
        self.bases = {name: B.to(device) for name, B in memory.of(self.name).items()}
        return model

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        pattern, trained = self.options.modules, dict(model.named_parameters())
        if pattern is not None:
            trained = {f"{n}.weight": m.weight for n, m in match_modules(model, None if pattern == "linear" else pattern, "method.modules").items()}
        groups = []
        for name, p in trained.items():
            # biases and norms do not decay, as with the Trainer's own groups; a matrix has an empty space, so that decay pulls it toward the task's start
            own = {"weight_decay": 0.0} if p.ndim < 2 else {"constraint": Constraint(inputs=p.new_empty(p.shape[1], 0))} if p.ndim == 2 else {}
            groups.append({"params": [p], "names": [name], **own})
        return groups

    def optimizer(self, groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
        from ..optim.constrained import constrain_together

        optimizer = super().optimizer(groups, **settings)
        if self.bases:
            constrain_together(optimizer, {p: self.bases[name] for group in groups for p, name in zip(group["params"], group["names"], strict=True)})
        return optimizer

    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        from ..optim.constrained import along, combined

        o, parameters, names = self.options, dict(model.named_parameters()), trained_names(self.param_groups(model))
        rows = encoded(self.tokenizer, task, o.samples)
        self.progress.stage(f"{task.name}: gradients of its answers", len(rows))
        dtypes = {name: torch.bfloat16 if o.keep_in == "bf16" else working_dtype(parameters[name].dtype) for name in names}
        new, count = {name: parameters[name].new_empty(len(rows), *parameters[name].shape, dtype=dtypes[name]) for name in names}, 0
        for found in row_gradients(model, rows, names, self.progress, of="logits"):
            g = {name: found[name].to(working_dtype(found[name].dtype)) for name in names}
            length = _norm(g)
            for _ in range(2):
                for S in (self.bases, {name: part[:count] for name, part in new.items()} if count else {}):
                    c = sum(along(B, g[name]).to("cpu", torch.float64) for name, B in S.items())
                    for name, B in S.items():
                        g[name] = g[name] - combined(B, c, g[name].dtype)
            if (left := _norm(g)) > NOTHING_NEW * length:
                for name in names:
                    new[name][count] = (g[name] / left).to(dtypes[name])
                count += 1
        kept = {name: torch.cat([*([self.bases.pop(name)] if name in self.bases else []), new.pop(name)[:count]]) for name in names}
        memory.put(self.name, kept if count or memory.of(self.name) else {})
        return model

    # -- planning and the record -----------------------------------------------------------------------------------------------------

    def statistics_bytes(self, model: nn.Module) -> int:
        """What the last of the stream's tasks holds: the gradients of those before it, and its own as they are measured."""
        tasks, size = len(self.stream) if self.stream else 1, 2 if self.options.keep_in == "bf16" else 4
        return tasks * size * self.options.samples * sum(p.numel() for group in self.param_groups(model) for p in group["params"])

    def held_bytes(self) -> int:
        return sum(B.nbytes for B in self.bases.values())

    def report(self, memory: Memory) -> dict[str, Any] | None:
        parts = memory.of(self.name).values()
        if not parts:
            return None
        k, numbers = len(next(iter(parts))), sum(B[0].numel() for B in parts)
        return {"modules": len(parts), "rank_mean": k, "rank_max": k, "share": k / numbers, "bytes": sum(B.nbytes for B in parts)}


def _norm(g: dict[str, Tensor]) -> float:
    return float(torch.stack([torch.linalg.vector_norm(part).to("cpu", torch.float64) for part in g.values()]).norm())
