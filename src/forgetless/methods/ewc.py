"""EWC: elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796). A penalty on moving the weights that earlier tasks depend on.

    L(theta) = L_B(theta) + sum over old tasks t of  lambda / 2  sum_i F_t,i (theta_i - theta*_t,i)^2                                        (eq. 3)
    F_t,i = mean over rows x of task t of  (d log p(y | x, theta*_t) / d theta_i)^2      the diagonal of the Fisher information at the optimum theta*_t

y is drawn from what the model foretells after the row's own beginnings, which makes it the Fisher information (`answers: given` takes the row's own answer, the
"empirical" one of most implementations). Gradients are of single rows: the square of a batch's mean gradient is another, smaller number.

form: full     the paper's sum, in two tensors a weight whatever the number of tasks: a sum of parabolas is a parabola. With S = sum F_t and the centre
               c = sum F_t theta*_t / S it is  lambda / 2 (sum_i S_i (theta_i - c_i)^2 + K),  K a number without a gradient. c and K are kept rather than
               sum F_t theta*_t, from which the difference of theta and c could not be told in fp32.
form: online   S <- gamma S + F_t, c <- theta*_t (Schwarz et al. 2018, arXiv 1805.06370): early tasks fade, and the last weights alone are returned to.

With adapters theta is the weight W + s B A that the model works with: B and A of one task have no counterpart in the next, and F of the factors would depend on
how the product is shared between them. The penalty is computed tensor by tensor and again in the backward pass, so no copy of the weights is held for it.
Beside a constrained method the gradient of the penalty goes through the constraint like any other.

When not to use it: models whose weights are counted in billions (two fp32 numbers for every weight that learns; on adapters for every weight they stand beside);
with `quantize`; where no dev rows tell what lambda should be, since results hang on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError
from ..quantised import QuantisedLinear
from ..sharding import ALONE, local, rows_of
from ..subspace import working_dtype
from ._statistics import current, encoded, fisher, readers, trained_names
from .base import Memory
from .beside import Beside, BesideOptions, add


class EWCOptions(BesideOptions):
    strength: float = Field(400.0, ge=0)
    """lambda. 400 is that of the paper's Atari runs, and tuned on nothing here. It multiplies what hangs on the model and on the length of the answers, so it has to be
    found on dev rows."""
    form: Literal["full", "online"] = "full"
    """full: every task's weights are returned to, as in the paper. online: only the last ones, and the importance of earlier tasks fades by gamma."""
    gamma: float = Field(0.95, ge=0, le=1)
    """form: online only. What is left of the importance at each later task."""
    answers: Literal["sampled", "given"] = "sampled"
    """Whose log-likelihood the Fisher information is taken of: answers drawn from the model, or the rows' own."""
    rows: int = Field(200, ge=1)
    """At most so many of a task's training rows are measured."""

    @model_validator(mode="after")
    def _nothing_ignored(self) -> EWCOptions:
        if self.form == "full" and self.gamma != EWCOptions.model_fields["gamma"].default:
            raise ValueError("gamma is how fast form: online forgets, and form is full; take it out, or set form: online")
        return self


class EWC(Beside):
    name = "ewc"
    summary = "beside another: a penalty on moving the weights earlier tasks depend on"
    paper = "arXiv 1612.00796"
    adds_to_gradients = True
    needs_whole_weights = True
    extra_forward = "200 rows forward and back, one by one, at a task's end"
    bytes_a_task = "none; two numbers a weight that learns"
    Options = EWCOptions

    def __init__(self, /, **options: Any):
        super().__init__(**options)
        self.held: dict[str, tuple[Tensor, Tensor]] = {}  # name of a weight: S and c, as it is stored
        self.constant = 0.0  # K
        self.readers: dict[str, Callable[[], Tensor]] | None = None
        self.rows = ALONE  # of a sharded model: over which processes those of its weights are

    # -- a task ----------------------------------------------------------------------------------------------------------------------

    def check(self, model: nn.Module) -> None:
        self.refuse((), "it leaves several models, and the penalty is on the weights of one", "routed")
        self.refuse(("mtl",), "it learns all tasks anew from the untouched model, and the penalty would hold it to where they were learned before")
        super().check(model)

    def begin_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        model = super().begin_task(model, task, memory)
        self.recall(model, memory)
        return model

    def resume_task(self, model: nn.Module, task: Any, memory: Memory, state: dict[str, Tensor]) -> nn.Module:
        model = super().resume_task(model, task, memory, state)
        self.recall(model, memory)
        return model

    def recall(self, model: nn.Module, memory: Memory) -> None:
        device, kept = next(model.parameters()).device, memory.of(self.name)
        names = [key.removesuffix(":S") for key in kept if key.endswith(":S")]
        self.held = {name: (kept[f"{name}:S"].to(device), kept[f"{name}:c"].to(device)) for name in names}
        self.constant = memory.info.get(self.name, {}).get("constant", 0.0)
        self.readers = None  # layers may still be put in the place of others before the first step

    def extra_loss(self, model: nn.Module, inputs: dict[str, Tensor], outputs: Any) -> Tensor | None:
        other = super().extra_loss(model, inputs, outputs)
        if self.readers is None:
            if any(isinstance(module, QuantisedLinear) for module in model.modules()):
                raise ConfigError(f"method {self.name}: quantize moves the very weights that the penalty holds where they were; take one of them out")
            self.readers = readers(model, self.held)
            spread = {name: rows_of(p) for name, p in model.named_parameters() if name in self.held}
            self.rows = next((rows for rows in spread.values() if rows is not ALONE), ALONE)
            if self.rows is not ALONE:
                self.held = {name: tuple(spread[name].own(t).clone() for t in pair) for name, pair in self.held.items()}
        if not self.held:
            return other
        device = next(iter(self.held.values()))[0].device.type
        with torch.autocast(device, enabled=False):
            terms = [
                checkpoint(parabola, read, *self.held[name], use_reentrant=False, preserve_rng_state=False) for name, read in self.readers.items()
            ]
            own = torch.stack(terms).sum()
            total = own + (self.rows.sum(own.detach().clone()) - own.detach())  # the gradient is that of own rows
            return add(self.options.strength / 2 * (total + self.constant), other)

    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        names = trained_names(self.on.param_groups(model))
        model = super().end_task(model, task, memory)
        self.held, self.readers = {}, None
        o, kept, info = self.options, memory.of(self.name), memory.info.get(self.name, {"tasks": 0, "constant": 0.0})
        if task is None:
            raise ConfigError(f"method {self.name}: measures rows of the task when it ends; give end_task the task")
        rows = encoded(self.tokenizer, task, o.rows)
        self.progress.stage("measuring the Fisher information", len(rows))
        found = fisher(model, rows, names, self.progress, o.answers, seed=info["tasks"])
        parameters, constant = dict(model.named_parameters()), info["constant"]
        for name in names:
            F = found.pop(name).cpu()
            theta = parameters[name].detach().to("cpu", working_dtype(F.dtype), copy=True)
            if f"{name}:S" not in kept:
                kept[f"{name}:S"], kept[f"{name}:c"] = F, theta
            elif o.form == "online":
                kept[f"{name}:S"], kept[f"{name}:c"] = o.gamma * kept[f"{name}:S"] + F, theta
            else:
                S, c, more = joined(kept[f"{name}:S"], kept[f"{name}:c"], F, theta)
                kept[f"{name}:S"], kept[f"{name}:c"], constant = S, c, constant + more
        memory.put(self.name, kept)
        memory.info[self.name] = {"tasks": info["tasks"] + 1, "constant": constant}
        return model

    def held_bytes(self) -> int:
        return super().held_bytes() + sum(t.nbytes for pair in self.held.values() for t in pair)

    def statistics_bytes(self, model: nn.Module) -> int:
        """Of the first task, for planning, what later ones hold."""
        learns = current(model, trained_names(self.on.param_groups(model))) if not self.held else {}
        return super().statistics_bytes(model) + sum(2 * p.numel() * working_dtype(p.dtype).itemsize for p in learns.values())


def parabola(read: Callable[[], Tensor], S: Tensor, c: Tensor) -> Tensor:
    """sum S (theta - c)^2 of one weight, over the rows that are here."""
    return (S * (local(read()).to(S.dtype) - c).square()).sum()


def joined(S: Tensor, c: Tensor, F: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, float]:
    """S', c', k with  S (x - c)^2 + F (x - theta)^2 = S' (x - c')^2 + k  for every x; k is summed over the entries.

    >>> S, c, k = joined(*torch.tensor([[3.0], [0.0], [1.0], [4.0]])); (S.item(), c.item(), k)
    (4.0, 1.0, 12.0)
    """
    total = S + F
    share = torch.where(total > 0, F / total, 0.5)  # where neither task depends on a weight, its centre means nothing
    way = theta - c
    return total, c + share * way, float((S * share * way.square()).sum(dtype=torch.float64))
