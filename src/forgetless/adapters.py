"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) through PEFT, attached to a model in place and merged away again: y += s B A x, s = alpha / rank.

A is (rank, in), B (out, rank). Between tasks a model is plain: every commit holds whole weights and nothing of PEFT.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from .errors import ConfigError
from .methods.base import Options
from .models import logical, match_modules
from .subspace import working_dtype

ADAPTER = "default"  # PEFT's name for the first adapter of a model

# model_type -> what the GORP paper adapts with LoRA, and what it trains full-rank (its section 4.1); families of one layout together
FAMILIES = {
    "llama": (["q_proj", "v_proj"], ["gate_proj"]),
    "gpt2": (["attn.c_attn"], ["mlp.c_fc"]),
    "t5": (["SelfAttention.q", "SelfAttention.v"], ["EncDecAttention.q", "EncDecAttention.v"]),
}
LAYOUTS = {name: "llama" for name in ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2")} | {
    "mt5": "t5", "umt5": "t5", "longt5": "t5",
}  # fmt: skip


class LoraOptions(Options):
    lora_rank: int = Field(8, ge=1)
    lora_alpha: float = Field(32.0, gt=0)
    """The adapter's output is multiplied by lora_alpha / lora_rank."""
    lora_dropout: float = Field(0.1, ge=0, lt=1)
    lora_modules: str | list[str] | None = None
    """Which linear layers get an adapter: a regex over whole dotted names, or a list of names; absent: the attention's query and value, as in the paper."""


def family_modules(model: nn.Module, kind: str, option: str) -> list[str]:
    """Names of the layers the paper adapts (kind "lora") or trains full-rank ("full") in this family. Raises ConfigError for a family nobody has named."""
    model_type = getattr(getattr(model, "config", None), "model_type", "?")
    layout = LAYOUTS.get(model_type, model_type)
    if layout in FAMILIES:
        return FAMILIES[layout][("lora", "full").index(kind)]
    if kind == "lora":
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known

        if model_type in known:
            return list(known[model_type])
    raise ConfigError(f"{option}: no default for a model of type '{model_type}'; name the layers, e.g. {option}: '.*proj'")


def lora_layers(model: nn.Module, pattern: str | list[str] | None) -> dict[str, nn.Module]:
    """The layers that get an adapter, by name."""
    return match_modules(model, family_modules(model, "lora", "method.lora_modules") if pattern is None else pattern, "method.lora_modules")


def attach(model: nn.Module, names: list[str], rank: int, alpha: float, dropout: float) -> dict[str, nn.Module]:
    """Give the layers `names` an adapter each, in place: A drawn from torch's global generator (Kaiming), B = 0. Returns PEFT's layers by name.

    What required a gradient still does (PEFT would freeze it): gorp trains both.
    """
    import warnings

    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(names))
    trained = [p for p in model.parameters() if p.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Conv1D is stored transposed, which PEFT has just taken into account
        inject_adapter_in_model(config, model, ADAPTER)
    for p in trained:
        p.requires_grad_(True)
    found = adapters(model)
    for layer in found.values():  # in fp32 also on bf16 weights, whose rounding would swallow an adapter's steps
        for factor in factors(layer):
            factor.data = factor.data.to(working_dtype(factor.dtype))
    if set(found) != set(names):
        raise ConfigError(f"method.lora_modules: PEFT cannot adapt {', '.join(sorted(set(names) - set(found))[:3])}")
    return found


def adapters(model: nn.Module) -> dict[str, nn.Module]:
    """PEFT's LoRA layers of a model, by the name of the layer each stands on."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def factors(layer: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """(A (rank, in), B (out, rank)) of an adapted layer."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


@torch.no_grad()
def add_delta(layer: nn.Module, sign: float = 1.0) -> None:
    """W <- W + sign * s B A, in fp32 or better, then rounded to W's dtype."""
    A, B = factors(layer)
    base = layer.get_base_layer()
    W = logical(base.weight, base)
    W.copy_(W.to(A.dtype).addmm(B, A, alpha=sign * layer.scaling[ADAPTER]).to(W.dtype))


def detach(model: nn.Module, merge: bool = True) -> nn.Module:
    """Take the adapters off again, adding each to its weight first where `merge`. The model is as plain as before attach()."""
    for name, layer in adapters(model).items():
        if merge:
            add_delta(layer)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The factors under the names PEFT saves them by, on the CPU: what PeftModel.from_pretrained reads as adapter_model.safetensors."""
    out = {}
    for name, layer in adapters(model).items():
        A, B = factors(layer)
        out[f"base_model.model.{name}.lora_A.weight"], out[f"base_model.model.{name}.lora_B.weight"] = (t.detach().cpu().clone() for t in (A, B))
    return out


def adapter_config(model: nn.Module, options: LoraOptions) -> dict[str, Any]:
    """What PEFT reads as adapter_config.json, beside the tensors of adapter_tensors()."""
    found = adapters(model)
    return {
        "peft_type": "LORA", "r": options.lora_rank, "lora_alpha": options.lora_alpha, "lora_dropout": options.lora_dropout, "bias": "none",
        "inference_mode": True, "target_modules": sorted(found), "fan_in_fan_out": any(layer.fan_in_fan_out for layer in found.values()),
    }  # fmt: skip


@contextlib.contextmanager
def carrying(model: nn.Module, increments: dict[str, tuple[Tensor, Tensor]]) -> Iterator[nn.Module]:
    """The plain model with y += B A x at the layers named, {layer: (A (r, in), B (out, r))}, while this is open. Beside the weights, as while it was trained: in
    bf16 the weights would swallow most of it, and what is not written need not be taken back."""
    handles = []
    try:
        for name, (A, B) in increments.items():
            layer = model.get_submodule(name)
            handles.append(layer.register_forward_hook(partial(_add_beside, A.to(layer.weight.device), B.to(layer.weight.device))))
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _add_beside(A: Tensor, B: Tensor, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    x = args[0].to(A.dtype)
    return (output + nn.functional.linear(nn.functional.linear(x, A), B)).to(output.dtype)
