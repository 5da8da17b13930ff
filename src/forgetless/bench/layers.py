"""One linear layer, trained by OSFT in every form there is to compare, and by AdamW without any protection.

Each contender takes a layer and k, how many leading singular directions are closed, and gives back what trains it. All have AdamW's settings in common; peers
are used as their documents say, and none of their code is here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import get
from ..methods.base import Memory
from .measure import Phases, live_bytes
from .options import fused

ADAMW = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

Side = tuple[str, Tensor]  # ("closed", B): a basis of what is closed on a side of W; or ("open", B): of all that is not


class Missing(Exception):
    """A contender that cannot run here, and why."""


class Model(nn.Module):
    """The layer as a model: what methods and peers are given."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:  # (tokens, in) -> (tokens, out)
        return self.layer(x)


@dataclass
class Trained:
    """A layer with what trains it. `sides`, outputs and inputs, say what is closed; None: what the method osft closes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    sides: tuple[Side, Side] | None = None
    method: Any = None

    def phases(self, x: Tensor, dy: Tensor) -> Phases:
        """One step of training at inputs x (tokens, in), which want a gradient as any but the first layer's do, and gradients dy (tokens, out) of the outputs."""
        out = []

        def forward():
            x.grad = None
            out.append(self.model(x))

        def backward():
            out.pop().backward(dy)

        def step():
            self.optimizer.step()
            self.optimizer.zero_grad()

        return {"forward": forward, "backward": backward, "step": step}

    def bytes(self) -> int:
        """Of weights, factors, bases, gradients and the optimizer's state, as they are now."""
        return live_bytes(self.model, self.optimizer, self.method)

    def trains(self) -> dict[str, Any]:
        """How many numbers learn, and in which dtypes."""
        learning = [p for group in self.optimizer.param_groups for p in group["params"]]
        return {"elements": sum(p.numel() for p in learning), "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in learning})}

    @torch.no_grad()
    def dense(self, unit: Tensor) -> Tensor:
        """The matrix (out, in) that the model applies now, in fp64, by what it makes of the unit matrix (in, in)."""
        return self.model(unit).mT.double()


def off(D: Tensor, side: Side) -> Tensor:
    """D (n, ...) without what of its columns is closed."""
    kind, B = side[0], side[1].to(D)
    return D - B @ (B.mT @ D) if kind == "closed" else B @ (B.mT @ D)


def leak(D: Tensor, sides: tuple[Side, Side]) -> float:
    """||forbidden part|| / ||D|| of an update D (out, in) that must touch neither closed outputs nor closed inputs."""
    permitted = off(off(D, sides[0]).mT, sides[1]).mT
    return float((D - permitted).norm() / D.norm())


def torch_adamw(parameters, device: torch.device) -> torch.optim.AdamW:
    """torch's AdamW, by its fused kernel where there is one."""
    return torch.optim.AdamW(parameters, **ADAMW, fused=fused(device))


# -- the contenders --------------------------------------------------------------------------------------------------------------------


def adamw(layer: nn.Linear, k: int) -> Trained:
    """Full fine-tuning: nothing is closed."""
    model = Model(layer)
    return Trained(model, torch_adamw(model.parameters(), layer.weight.device))


def ours(layer: nn.Linear, k: int, **options: Any) -> Trained:
    """The method osft with these options."""
    method = get("osft", frozen_ratio=k, **options)
    model = method.begin_task(Model(layer), None, Memory())
    return Trained(model, method.optimizer(method.param_groups(model), **ADAMW), method=method)


def peft_osf(layer: nn.Linear, k: int) -> Trained:
    """PEFT's OSF: the low factors are a delta on the frozen weight; their gradients are projected by hooks, their update is not."""
    try:
        from peft import OSFConfig, get_peft_model
    except ImportError as error:
        raise Missing(f"peft has no OSFConfig here ({error})") from None
    model = get_peft_model(Model(layer), OSFConfig(target_modules=["layer"], effective_rank=k))
    osf = model.base_model.model.layer
    name = osf.active_adapters[0]
    # of a square side it keeps only the open directions
    high, low = (osf._osf_U_high, osf._osf_V_high), (osf._osf_U_low_init[name], osf._osf_V_low_init[name].mT)
    U, V = (("closed", H[name] if i == 0 else H[name].mT) if name in H else ("open", L) for i, (H, L) in enumerate(zip(high, low, strict=True)))
    return Trained(model, torch_adamw([p for p in model.parameters() if p.requires_grad], layer.weight.device), (U, V))


def mini_trainer(layer: nn.Linear, k: int) -> Trained:
    """rhai-innovation-mini-trainer's OSFT: W as high and low factors, both multiplied in each pass; gradients projected before the step, low factors after it."""
    osft, device = _mini_trainer_osft(), layer.weight.device
    if device.type == "cpu" and torch.cuda.is_available():
        raise Missing("mini_trainer decomposes on the GPU wherever there is one; hide it (CUDA_VISIBLE_DEVICES=) to measure a CPU")

    class Base(Model):  # its class wants a configuration first, and finds the weights made by the class under it
        def __init__(self, config: Any):
            super().__init__(config.layer)

    with contextlib.redirect_stdout(io.StringIO()):  # it tells its progress
        model = osft.create_osft_model_class(Base)(
            types.SimpleNamespace(layer=layer), osft_config={"layer.weight": k}, output_dtype=layer.weight.dtype
        )
    optimizer = osft.optim_wrapper(torch_adamw([p for p in model.parameters() if p.requires_grad], device), model)
    return Trained(model, optimizer, (("closed", model.layer.osft_U_high), ("closed", model.layer.osft_V_high.mT)))


def _mini_trainer_osft():
    """mini_trainer.osft_utils without the rest of its package, whose launcher and data loader want much more to be installed."""
    name = "mini_trainer"
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise Missing("not installed: pip install --no-deps rhai-innovation-mini-trainer")
        package = types.ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations or [])
        sys.modules[name] = package
    try:
        return importlib.import_module(f"{name}.osft_utils")
    except ImportError as error:
        raise Missing(f"its osft_utils cannot be imported ({error})") from None


CONTENDERS: dict[str, Callable[[nn.Linear, int], Trained]] = {
    "adamw": adamw,
    "peft-osf": peft_osf,
    "mini-trainer": mini_trainer,
    "coordinates": ours,
    "coordinates-kept": partial(ours, release_gradients=False),
    "adapter": partial(ours, form="adapter"),
    "adapter-thin": partial(ours, form="adapter", thin=True),
}


def missing(names: list[str], device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Which of these contenders cannot run here, and why: each has trained a small layer once, which also loads what it needs before any time is taken."""
    logging.getLogger("peft").setLevel(logging.ERROR)
    reasons = {}
    for name in names:
        layer = nn.Linear(24, 16, bias=False, device=device, dtype=dtype)
        try:
            trained = CONTENDERS[name](layer, 8)
        except Missing as reason:
            reasons[name] = str(reason)
            continue
        x, dy = (torch.randn(4, n, device=device, dtype=dtype) for n in (24, 16))
        for phase in trained.phases(x.requires_grad_(), dy).values():
            phase()
    return reasons
