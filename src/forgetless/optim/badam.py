"""BAdam: every weight is a Gaussian N(mu, sigma^2) of its own, and the optimizer moves both numbers (Foster and Brintrup 2023, arXiv 2309.08546).

    w     = mu + sigma eps, eps ~ N(0, 1)                                     the weights that a step's gradient g is taken at
    mu    <- mu - eta sigma^2 m_hat / (sqrt(v_hat) + gamma)                   m, v: Adam's moments of E[g]
    sigma <- sigma sqrt(1 + (sigma h / 2)^2) - sigma^2 h / 2,  h = E[g eps]   Bayesian gradient descent's closed form (Zeno et al. 2018, arXiv 1803.10123)

What is known well (a small sigma) moves little: sigma is what one task leaves to the next. g is the gradient of the summed negative log-likelihood, of which the loss is the mean
over `evidence` answer tokens. E over eps is the step's one draw, and the draw is that of (seed, tensor, step): it is the same in every process, for every micro-batch,
and after a resume, and is made again where it is needed, not kept. eta = lr / sigma_0^2, so that lr is the length of a step where nothing is known.

Not for: sparse gradients; weights in less than fp32, whose rounding is larger than sigma.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .rounding import is_coarse, seeded


def sigma_step(sigma: Tensor, h: Tensor) -> Tensor:
    """sigma sqrt(1 + (sigma h / 2)^2) - sigma^2 h / 2, positive for every h: sqrt(1 + a^2) - a is 1 / (sqrt(1 + a^2) + a), which cancels nothing where a > 0.

    >>> sigma_step(torch.tensor([1.0]), torch.tensor([1.5]))
    tensor([0.5000])
    """
    a = sigma * h / 2
    grown = (1 + a * a).sqrt() + a.abs()
    return sigma * torch.where(a > 0, 1 / grown, grown)


class BAdam(torch.optim.Optimizer):
    """Adam on the mean of a Gaussian a weight, Bayesian gradient descent on its deviation.

    Args:
        params: tensors or parameter groups. The values they have are the first mu; from here on they hold draws, until `rest`.
        lr: step of a mean whose sigma is sigma_0. betas: of the moments. eps: gamma.
        weight_decay: mu <- (1 - lr weight_decay) mu, as AdamW has it (not in the paper).
        sigma: sigma_0, of every weight that `prior` does not name.
        prior: tensor -> its sigma, as an earlier task has left it.
        seed: of the draws.

    `evidence` is to be set before each step to the number of terms that the loss is the mean of. Raises ValueError for weights in less than fp32, or a sigma that is not positive.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        sigma: float = 0.01,
        prior: dict[Tensor, Tensor] | None = None,
        seed: int = 0,
    ):
        if not sigma > 0:
            raise ValueError(f"BAdam: sigma={sigma!r} must be positive")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, sigma=sigma))
        self.seed, self.evidence = seed, 1.0
        for group, p, _ in self._each():
            if is_coarse(p):
                raise ValueError(f"BAdam: a weight in {p.dtype} is rounded by more than its sigma; keep it in fp32")
            known = (prior or {}).get(p)
            self.state[p] = {
                "step": 0, "mean": p.detach().clone(), "sigma": torch.full_like(p, group["sigma"]) if known is None else known.detach().to(p, copy=True),
                "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p),
            }  # fmt: skip
        self.draw()

    def _each(self) -> Iterator[tuple[dict[str, Any], Tensor, int]]:
        pairs = ((group, p) for group in self.param_groups for p in group["params"])
        return ((group, p, index) for index, (group, p) in enumerate(pairs))

    def noise(self, p: Tensor, index: int) -> Tensor:
        """eps of the tensor's current draw."""
        drawn = torch.randn(p.shape, generator=seeded(self.seed, index, self.state[p]["step"]), dtype=torch.float32)
        return drawn.to(p.device, p.dtype)

    @torch.no_grad()
    def draw(self) -> None:
        """w = mu + sigma eps, for the next step's gradient."""
        for _, p, index in self._each():
            p.copy_(self.state[p]["mean"] + self.state[p]["sigma"] * self.noise(p, index))

    @torch.no_grad()
    def rest(self) -> None:
        """w = mu: what the model answers with."""
        for _, p, _ in self._each():
            p.copy_(self.state[p]["mean"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, p, index in self._each():
            if p.grad is None:
                continue
            state, g, (beta1, beta2) = self.state[p], p.grad, group["betas"]
            mean, sigma, m, v = (state[key] for key in ("mean", "sigma", "exp_avg", "exp_avg_sq"))
            h = self.evidence * g * self.noise(p, index)
            state["step"] += 1
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            m_hat, v_hat = m / (1 - beta1 ** state["step"]), v / (1 - beta2 ** state["step"])
            mean.mul_(1 - group["lr"] * group["weight_decay"])
            mean.sub_((sigma / group["sigma"]) ** 2 * m_hat / (v_hat.sqrt() + group["eps"]), alpha=group["lr"])
            sigma.copy_(sigma_step(sigma, h))
        self.draw()
        return loss

    def planned_bytes(self) -> int:
        """Bytes of the state: four numbers a weight."""
        return sum(4 * p.nbytes for _, p, _ in self._each())

    state_bytes = planned_bytes  # made whole at once
