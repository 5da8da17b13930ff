"""`forgetless export-lora`: what training changed, as a LoRA adapter (Hu et al. 2021, arXiv 2106.09685) that PEFT loads on the model it started from.

For each linear layer dW = W_trained - W_base (out x in) ~ B A, by the leading singular directions: A (r x in), B (out x r). The best there is for a rank (Eckart and
Young 1936), and what it misses is said: ||dW - B A|| / ||dW||, for each layer and in total.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import models
from .config import load_config
from .errors import ConfigError, DataError
from .progress import Progress
from .subspace import energy_rank, spectrum

ENERGY = 0.99


def export_lora(
    trained: str | Path, base: str | None, out: str | Path, *, energy: float | None = None, rank: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:  # fmt: skip
    """Write the adapter folder `out`: adapter_config.json, adapter_model.safetensors, and export.json, which is returned.

    trained: a run's folder (its current model), or a model as in a config. base: the model it was trained from; None: what the run's own config says. Each layer
    gets the smallest rank that keeps the share `energy` of ||dW||^2 (0.99 by default), or `rank`. One layer is decomposed at a time, nothing is written before
    all are done. Returned: {"trained", "base", "energy" or "rank", "error" of all layers together, "parameters", "layer_parameters" that the layers' own weights
    have, "layers": {name: {"rank", "error", "norm" of dW}}}.

    Raises ConfigError for bad arguments, DataError where the models do not fit each other, do not differ, or differ in what an adapter cannot carry.
    """
    progress, out = progress or Progress(), Path(out)
    chosen = _chosen(energy, rank)
    _refuse_occupied(out)
    trained, base, trust = _models(Path(trained), base)
    old, new = (models.load(name, trust_remote_code=trust, dtype="auto")[0] for name in (base, trained))
    layers = _changed_layers(old, new, base, trained)
    progress.stage("decomposing", len(layers))
    tensors: dict[str, Tensor] = {}
    report: dict[str, dict[str, float]] = {}
    for done, (name, (before, after)) in enumerate(layers.items(), 1):
        D = models.logical(_difference(before.weight, after.weight), before).contiguous()  # (out, in)
        if not D.isfinite().all():
            raise DataError(f"'{name}' changed by something that is not a number; one of '{trained}' and '{base}' is damaged")
        A, B = _factors(D, **chosen)
        norm, missed = (float(torch.linalg.vector_norm(T.double())) for T in (D, D - B @ A))
        report[name] = {"rank": len(A), "error": missed / norm, "norm": norm}
        tensors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
        progress.advance(done)
    total, missed = (math.sqrt(sum(f(layer) ** 2 for layer in report.values())) for f in (lambda x: x["norm"], lambda x: x["error"] * x["norm"]))
    found = {
        "trained": trained, "base": base, **chosen, "error": missed / total, "parameters": sum(t.numel() for t in tensors.values()),
        "layer_parameters": sum(before.weight.numel() for before, _ in layers.values()), "layers": report,
    }  # fmt: skip
    _write(out, _adapter_config(old, base, report), tensors, found)
    return found


def _chosen(energy: float | None, rank: int | None) -> dict[str, Any]:
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


def _refuse_occupied(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(
            f"{out}: exists already{' and is not empty' if out.is_dir() else ' and is a file'}; name another folder. Nothing was touched"
        )


def _models(trained: Path, base: str | None) -> tuple[str, str, bool]:
    """(trained model, base model, may they run their own code?), from a run's folder or as given."""
    if not (trained / "current").is_file():
        if (trained / "run.yaml").is_file():
            raise ConfigError(f"{trained}: this run has not learned a task yet; there is nothing to export")
        if base is None:
            raise ConfigError(f"{trained}: not a run's folder, so it does not say what it was trained from; name that model with --base")
        return str(trained), base, False
    config = load_config(trained / "run.yaml")
    return str(trained / "model"), base or config.model, config.trust_remote_code


def _changed_layers(old: nn.Module, new: nn.Module, base: str, trained: str) -> dict[str, tuple[nn.Module, nn.Module]]:
    """The linear layers whose weight differs, by name, (before, after). Raises DataError unless they are all that differs."""
    a, b = (dict(model.named_parameters()) for model in (old, new))
    odd = next((f"{name} is in one of them only" for name in [*a, *b] if (name in a) != (name in b)), None)
    odd = odd or next((f"{name} is {tuple(p.shape)} and {tuple(b[name].shape)}" for name, p in a.items() if p.shape != b[name].shape), None)
    if odd or type(old) is not type(new):
        raise DataError(
            f"'{trained}' was not trained from '{base}': {odd or f'a {type(new).__name__} and a {type(old).__name__}'}. Name the model it was trained from"
        )
    changed = {name for name, p in a.items() if _difference(p, b[name]).any()}
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


def _factors(D: Tensor, energy: float | None = None, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """A (r, in), B (out, r) with B A the best approximation of D (out, in) of the rank; the singular values are shared out evenly."""
    U, S, V = spectrum(D, rank)
    r = len(S) if rank is not None else max(1, energy_rank(S.double() ** 2, energy))
    root = S[:r].sqrt()
    return (V[:, :r] * root).mT.contiguous(), (U[:, :r] * root).contiguous()


def _adapter_config(model: nn.Module, base: str, layers: dict[str, dict[str, float]]) -> Any:
    """PEFT's config: B A is added as it is, so alpha = rank in every layer."""
    import re

    from peft import LoraConfig

    ranks = {name: layer["rank"] for name, layer in layers.items()}
    most = max(ranks.values())
    # PEFT reads the keys as regular expressions for the ends of names: ^ makes them whole names
    pattern = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != most}
    return LoraConfig(
        r=most, lora_alpha=most, rank_pattern=pattern, alpha_pattern=dict(pattern), target_modules=sorted(ranks), lora_dropout=0.0, bias="none",
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM", inference_mode=True, base_model_name_or_path=base,
        fan_in_fan_out=any(models.stored_transposed(model.get_submodule(name)) for name in ranks),
    )  # fmt: skip


def _write(out: Path, config: Any, tensors: dict[str, Tensor], found: dict[str, Any]) -> None:
    """All of the folder or nothing."""
    from safetensors.torch import save_file

    work = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)  # of an export that was killed
        work.mkdir()
        config.save_pretrained(str(work))
        save_file(tensors, work / "adapter_model.safetensors", metadata={"format": "pt"})
        (work / "export.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        work.replace(out)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror}); name another folder") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def show(found: dict[str, Any], out: Path) -> None:
    """The summary, for people."""
    layers = found["layers"]
    ranks = sorted(layer["rank"] for layer in layers.values())
    worst = max(layers, key=lambda name: layers[name]["error"])
    print(f"{found['trained']} less {found['base']}: {len(layers)} linear layers changed")
    share = found["parameters"] / found["layer_parameters"]
    print(f"ranks   {ranks[0]} to {ranks[-1]}, median {ranks[len(ranks) // 2]}; {found['parameters']:,} parameters, {share:.1%} of the layers' own")
    print(f"error   {found['error']:.2e} of ||dW|| in all; most in {worst}: {layers[worst]['error']:.2e}")
    print(f'adapter {out}: peft.PeftModel.from_pretrained(base, "{out}"); the error of every layer is in export.json')
