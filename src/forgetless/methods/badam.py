"""BAdam: Bayesian adaptive moment regularisation (Foster and Brintrup 2023, arXiv 2309.08546), on an adapter.

Every number of the adapter is a Gaussian N(mu, sigma^2); the posterior of one task is the prior of the next (optim/badam.py has the steps of mu and sigma):
    w = mu + sigma eps while training;  mu <- mu - eta sigma^2 m_hat / (sqrt(v_hat) + gamma);  sigma <- sigma sqrt(1 + (sigma h / 2)^2) - sigma^2 h / 2, h = E[g eps]
A number that earlier tasks have made sure of (a small sigma) moves little. Nothing else is kept of them: no rows, no boundaries, no old model.

One adapter goes on through all tasks, as with `lora`: one that is merged and drawn anew has no posterior to carry on. Each commit holds mu, as PEFT reads it, and sigma.
eta is train.learning_rate / sigma_0^2, so that the rate means what it means elsewhere.

Read of the paper: not its text; the steps were checked against a public implementation and Bayesian gradient descent's (arXiv 1803.10123). That code takes ten draws a batch and
goes on with Adam's moments from task to task; here a step has one draw, for all its micro-batches and processes, because it has one forward pass. Both sum the gradient
over what the batch holds before sigma sees it: there over images, here over answer tokens. Clipping (train.max_grad_norm) comes before both.

When not to use it: where the adapter's rank is all the room there is and many tasks have to fit (gorp, inclora); where memory for four more numbers a trained weight is
short; where tasks are so short that sigma has not begun to fall: then it is `lora` with noise.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from .. import distributed
from ..adapters import LoraOptions, adapters, factors
from ..batches import IGNORED
from .base import Memory
from .lora import LoRA


class BAdamOptions(LoraOptions):
    sigma: float = Field(0.01, gt=0)
    """sigma_0: how unsure a number of the adapter is before the first task, in the adapter's own unit (A begins at about 1 / sqrt(in), B at 0)."""


class BAdam(LoRA):
    name = "badam"
    summary = "one adapter whose numbers are Gaussians; what a task has made sure of moves little in the next"
    paper = "arXiv 2309.08546"
    extra_forward = "draws the weights of each step"
    bytes_a_task = "none; A and B of every adapted layer, and sigma of each of their numbers"
    Options = BAdamOptions

    trained: Any = None  # the optimizer of the task in progress
    prior: dict[str, Tensor] = {}
    tokens = 0  # answer tokens of the step in progress, of this process

    def go_on(self, model: nn.Module, memory: Memory) -> nn.Module:
        self.prior, self.trained, self.tokens = memory.of(self.name), None, 0
        return super().go_on(model, memory)

    def optimizer(self, groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
        from ..optim.badam import BAdam as Optimizer

        named = {name: p for group in groups for name, p in zip(group["names"], group["params"], strict=True)}
        prior = {p: self.prior[name] for name, p in named.items() if name in self.prior}
        known = {key: settings[key] for key in ("lr", "betas", "eps", "weight_decay", "seed") if key in settings}
        self.trained = Optimizer(groups, sigma=self.options.sigma, prior=prior, **known)
        return self.trained

    def extra_loss(self, model: nn.Module, inputs: dict[str, Tensor], outputs: Any) -> None:
        self.tokens += int((inputs["labels"] != IGNORED).sum())

    def on_step(self, model: nn.Module) -> None:
        if self.trained is not None:
            self.trained.evidence = distributed.mean(float(self.tokens), next(model.parameters()).device) * distributed.world_size()
        self.tokens = 0

    @torch.no_grad()
    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        layers, sigma = adapters(model), dict(self.prior)
        for group in self.trained.param_groups if self.trained is not None else ():
            for name, p in zip(group["names"], group["params"], strict=True):
                layer, _, letter = name.rpartition(".lora_")
                factors(layers[layer])["AB".index(letter)].copy_(self.trained.state[p]["mean"])
                sigma[name] = self.trained.state[p]["sigma"].clone()
        model = super().end_task(model, task, memory)
        memory.put(self.name, sigma)
        self.trained = None
        return model
