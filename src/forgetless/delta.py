"""What training changed, as a LoRA adapter (Hu et al. 2021, arXiv 2106.09685) that PEFT loads on the model it started from.

For each linear layer dW = W_trained - W_base (out x in) ~ B A, by the leading singular directions: A (r x in), B (out x r). The best there is for a rank (Eckart and
Young 1936). A run that trained one adapter has its own A and B. Either way what they miss is said: ||dW - s B A|| / ||dW||, for each layer and in total.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import models
from .errors import ConfigError, DataError
from .methods.base import Memory
from .methods.lora import PREFIX
from .progress import Progress
from .subspace import energy_rank, spectrum

ENERGY = 0.99


def chosen(energy: float | None, rank: int | None) -> dict[str, Any]:
    """{"energy": ...} or {"rank": ...}. Raises ConfigError for both, or one out of range."""
    if energy is not None and rank is not None:
        raise ConfigError("give energy or rank, not both: energy finds a rank for each layer")
    if rank is not None:
        if rank < 1:
            raise ConfigError(f"rank {rank}: an adapter has at least rank 1")
        return {"rank": rank}
    energy = ENERGY if energy is None else energy
    if not 0 < energy <= 1:
        raise ConfigError(f"energy {energy}: the share of ||dW||^2 to keep, above 0 and at most 1")
    return {"energy": energy}


def write_adapter(
    folder: Path, trained: str, base: str, how: dict[str, Any], *, own: Memory | None = None, trust: bool = False, progress: Progress | None = None
) -> dict[str, Any]:  # fmt: skip
    """Write adapter_config.json, adapter_model.safetensors and export.json, which is returned, into `folder`.

    trained, base: models as in a config. how: what `chosen` gave; own: instead, the memory of a run that has trained one adapter. One layer is decomposed at a time,
    nothing is written before all are done. Returned: {"base", "energy" or "rank" or "own", "error" of all layers together, "parameters", "layer_parameters" that the
    layers' own weights have, "layers": {name: {"rank", "error", "norm" of dW}}}.

    Raises DataError where the models do not fit each other, do not differ, or differ in what an adapter cannot carry.
    """
    from safetensors.torch import save_file

    old, new = (models.load(name, trust_remote_code=trust, dtype="auto")[0] for name in (base, trained))
    layers = _changed_layers(old, new, base, trained)
    factors = _own_factors(own, layers, trained) if own is not None else _leading(layers, base, trained, how, progress or Progress())
    tensors: dict[str, Tensor] = {}
    report: dict[str, dict[str, float]] = {}
    for name, (before, after), (A, B), scale in factors:
        D = models.logical(_difference(before.weight, after.weight), before)
        norm, missed = (float(torch.linalg.vector_norm(T.double())) for T in (D, D - scale * (B @ A).to(D.dtype)))
        report[name] = {"rank": len(A), "error": missed / norm if norm else 0.0, "norm": norm}
        tensors |= {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}
    total, missed = (math.sqrt(sum(f(layer) ** 2 for layer in report.values())) for f in (lambda x: x["norm"], lambda x: x["error"] * x["norm"]))
    found = {
        "base": base, **({"own": True} if own is not None else how), "error": missed / total, "parameters": sum(t.numel() for t in tensors.values()),
        "layer_parameters": sum(old.get_submodule(name).weight.numel() for name in report), "layers": report,
    }  # fmt: skip
    trained_as = own.info["adapter_config"] if own is not None else {}
    _adapter_config(old, base, report, trained_as).save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "export.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


Layers = dict[str, tuple[nn.Module, nn.Module]]  # by name, before and after


def _changed_layers(old: nn.Module, new: nn.Module, base: str, trained: str) -> Layers:
    """The linear layers whose weight differs. Raises DataError unless they are all that differs."""
    a, b = (dict(model.named_parameters()) for model in (old, new))
    odd = next((f"{name} is in one of them only" for name in [*a, *b] if (name in a) != (name in b)), None)
    odd = odd or next((f"{name} is {tuple(p.shape)} and {tuple(b[name].shape)}" for name, p in a.items() if p.shape != b[name].shape), None)
    if odd or type(old) is not type(new):
        raise DataError(
            f"'{trained}' was not trained from '{base}': {odd or f'a {type(new).__name__} and a {type(old).__name__}'}. Name the model it was trained from"
        )
    # what only the trained model's coarser dtype has changed, no training has
    changed = {name for name, p in a.items() if _difference(p.to(b[name].dtype), b[name]).any()}
    if not changed:
        raise DataError(f"'{trained}' and '{base}' have the same weights; there is nothing to export")
    after, tied = models.named_layers(new), models.tied_weights(old)
    layers = {
        name: (module, after[name])
        for name, module in models.named_layers(old).items()
        if f"{name}.weight" in changed and models.is_linear(module) and id(module.weight) not in tied
    }
    if rest := sorted(changed - {f"{name}.weight" for name in layers}):
        names = ", ".join(rest[:3]) + (f" and {len(rest) - 3} more" if len(rest) > 3 else "")
        raise DataError(
            f"{len(rest)} of the {len(changed)} tensors that training changed are no weights of linear layers, and a LoRA adapter cannot carry them: {names}. "
            f"Use the whole model '{trained}', or train with a method that leaves them (gorp, osft, lora, inclora)"
        )
    return layers


def _difference(before: Tensor, after: Tensor) -> Tensor:
    """after - before, in fp32 or better: one of them may be kept in another dtype."""
    dtype = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    return after.detach().to(dtype) - before.detach().to(dtype)


Factors = Iterator[tuple[str, tuple[nn.Module, nn.Module], tuple[Tensor, Tensor], float]]  # name, layer, (A, B), s


def _leading(layers: Layers, base: str, trained: str, how: dict[str, Any], progress: Progress) -> Factors:
    progress.stage("decomposing", len(layers))
    for done, (name, (before, after)) in enumerate(layers.items(), 1):
        D = models.logical(_difference(before.weight, after.weight), before).contiguous()  # (out, in)
        if not D.isfinite().all():
            raise DataError(f"'{name}' changed by something that is not a number; one of '{trained}' and '{base}' is damaged")
        yield name, (before, after), _factors(D, **how), 1.0
        progress.advance(done)


def _own_factors(memory: Memory, layers: Layers, trained: str) -> Factors:
    """Of the adapter that was trained, on the layers that it has changed."""
    config = memory.info["adapter_config"]
    for name, layer in layers.items():
        A, B = (memory.tensors.get(f"{PREFIX}{name}.lora_{letter}.weight") for letter in "AB")
        if A is None or B is None:
            raise DataError(f"'{trained}': '{name}' has changed, and the adapter that was trained is not on it; choose a rank or an energy instead")
        yield name, layer, (A, B), config["lora_alpha"] / config["r"]


def _factors(D: Tensor, energy: float | None = None, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """A (r, in), B (out, r) with B A the best approximation of D (out, in) of the rank; the singular values are shared out evenly."""
    U, S, V = spectrum(D, rank)
    r = len(S) if rank is not None else max(1, energy_rank(S.double() ** 2, energy))
    root = S[:r].sqrt()
    return (V[:, :r] * root).mT.contiguous(), (U[:, :r] * root).contiguous()


def _adapter_config(model: nn.Module, base: str, layers: dict[str, dict[str, float]], trained_as: dict[str, Any] | None = None) -> Any:
    """PEFT's config. trained_as: of an adapter that was trained; without it B A is added as it is, so alpha = rank in every layer."""
    from peft import LoraConfig

    ranks = {name: int(layer["rank"]) for name, layer in layers.items()}
    most = max(ranks.values())
    # PEFT reads the keys as regular expressions for the ends of names: ^ makes them whole names
    pattern = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != most}
    return LoraConfig(
        r=most, lora_alpha=(trained_as or {}).get("lora_alpha", most), rank_pattern=pattern, alpha_pattern=dict(pattern), target_modules=sorted(ranks),
        lora_dropout=0.0, bias="none", task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM", inference_mode=True,
        base_model_name_or_path=base, fan_in_fan_out=any(models.stored_transposed(model.get_submodule(name)) for name in ranks),
    )  # fmt: skip


def show(found: dict[str, Any], out: Path) -> None:
    """The summary, for people."""
    layers = found["layers"]
    ranks = sorted(layer["rank"] for layer in layers.values())
    worst = max(layers, key=lambda name: layers[name]["error"])
    print(f"{found['trained']} less {found['base']}: {len(layers)} linear layers changed")
    share = found["parameters"] / found["layer_parameters"]
    own = "the adapter that was trained; " if found.get("own") else ""
    print(
        f"ranks   {own}{ranks[0]} to {ranks[-1]}, median {ranks[len(ranks) // 2]}; {found['parameters']:,} parameters, {share:.1%} of the layers' own"
    )
    print(f"error   {found['error']:.2e} of ||dW|| in all; most in {worst}: {layers[worst]['error']:.2e}")
    print(f'adapter {out}: peft.PeftModel.from_pretrained(base, "{out}"); the error of every layer is in export.json')
