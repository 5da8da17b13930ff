"""The three pictures of docs/explained.md, and the numbers beside them, from gradients and inputs of the bundled model.

    python docs/figures/explained.py          # -> docs/img/spectrum.png, leak.png, cut.png, benchmarks/results/explained.json; needs matplotlib, a few minutes

SmolLM2-135M reads rows of two tasks of the demo: cities, the old task, and polarity, the new one. Looked at are three linear layers of block 15. Nothing is
trained: every gradient is taken at the model's own weights, and the optimizers of `leak` step on copies of one layer's weight.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

import forgetless as fl
from forgetless.config import TaskConfig
from forgetless.methods._statistics import batch_of, encoded
from forgetless.subspace import coverage, leak, spectrum
from forgetless.tasks import load_task

ROOT = Path(__file__).resolve().parents[2]
IMAGES, NUMBERS = ROOT / "docs" / "img", ROOT / "benchmarks" / "results" / "explained.json"
LAYERS = {kind: f"model.layers.15.{kind}" for kind in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")}
SHOWN = "mlp.gate_proj"
BATCHES, ROWS, ENERGY = 24, 8, 0.95
BLUE, ORANGE, GREY = "#1b6ca8", "#b0641e", "#8a8a8a"


def measure() -> dict[str, dict[str, tuple[list[Tensor], Tensor]]]:
    """{task: {layer: (a gradient a batch, each (out, in), and the layer's inputs, (tokens, in))}}."""
    model, tokenizer = fl.models.load("bundled:smollm2-135m")
    model.requires_grad_(False)
    modules = {kind: model.get_submodule(name) for kind, name in LAYERS.items()}
    seen: dict[str, list[Tensor]] = {}
    for kind, module in modules.items():
        module.weight.requires_grad_(True)
        module.register_forward_pre_hook(lambda _, args, kind=kind: seen.setdefault(kind, []).append(args[0].detach().flatten(0, 1)))
    found = {}
    for name in ("cities", "polarity"):
        rows = encoded(tokenizer, load_task(TaskConfig(name=name, suite=f"demo/{name}")), BATCHES * ROWS)
        gradients: dict[str, list[Tensor]] = {kind: [] for kind in LAYERS}
        seen.clear()
        for start in range(0, len(rows), ROWS):
            batch = batch_of(model, rows[start : start + ROWS])
            model(**batch).loss.backward()
            real = batch["attention_mask"].flatten().bool()  # padding is nobody's input
            for kind, module in modules.items():
                gradients[kind].append(module.weight.grad.clone())
                module.weight.grad = None
                seen[kind][-1] = seen[kind][-1][real]
        found[name] = {kind: (gradients[kind], torch.cat(seen[kind])) for kind in LAYERS}
    found["weights"] = {kind: module.weight.detach().clone() for kind, module in modules.items()}
    return found


def energies(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Right singular directions of `rows` (in, in), strongest first, and the share of the energy that each holds."""
    values, vectors = torch.linalg.eigh(rows.double().mT @ rows.double())
    values = values.flip(0).clamp_min(0)
    return vectors.flip(1).float(), (values / values.sum()).float()


def leaks(gradients: list[Tensor], W: Tensor, V: Tensor, X: Tensor) -> dict[str, dict[str, list[float]]]:
    """How three optimizers, given the new task's gradients, step into the old task's space V, and how far the answers to its inputs X, and to their part in V, have
    moved after each step."""
    constraint = fl.Constraint(inputs=V)
    parts = {"moved": X, "moved_closed": X @ V @ V.T}
    found = {}
    for name in ("AdamW", "gradient projected, then AdamW", "gradient and step projected (SubspaceAdamW)"):
        weight = torch.nn.Parameter(W.clone())
        if name.startswith("gradient and"):
            optimizer: torch.optim.Optimizer = fl.SubspaceAdamW([{"params": [weight], "constraint": constraint}], lr=1e-4)
        else:
            optimizer = torch.optim.AdamW([weight], lr=1e-4, weight_decay=0.0)
        curves: dict[str, list[float]] = {"share": [], **{key: [] for key in parts}}
        for G in gradients:
            weight.grad = constraint.permitted(G) if name.startswith("gradient projected") else G.clone()
            before = weight.detach().clone()
            optimizer.step()
            curves["share"].append(leak(weight.detach() - before, constraint))
            for key, inputs in parts.items():
                curves[key].append(float((inputs @ (weight.detach() - W).T).norm() / (inputs @ W.T).norm()))
        found[name] = curves
    return found


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = measure()
    numbers: dict = {"command": "python docs/figures/explained.py", "model": "bundled:smollm2-135m", "rows": BATCHES * ROWS, "layers": {}}
    spaces = {}
    for kind, (gradients, X) in found["cities"].items():
        directions, shares = energies(torch.cat(gradients))
        k = int((shares.cumsum(0) < ENERGY).sum()) + 1
        spaces[kind] = (directions, shares, k)
        V, new = directions[:, :k], torch.cat(found["polarity"][kind][0])
        _, S, of_weight = spectrum(found["weights"][kind])
        half = len(S) // 2
        own = energies(X)[0]
        numbers["layers"][kind] = {
            "inputs": len(directions), "closed": k, "new_gradient_in_space": coverage(new, V), "old_inputs_in_space": coverage(X, V),
            "half_of_the_weight": half, "weight_energy_in_half": float(S[:half].square().sum() / S.square().sum()),
            "input_energy_in_half": coverage(X, of_weight[:, :half]), "input_energy_in_as_many_of_its_own": coverage(X, own[:, :half]),
        }  # fmt: skip

    def finish(figure, name: str) -> None:
        for ax in figure.axes:
            ax.spines[["top", "right"]].set_visible(False)
            ax.tick_params(labelsize=8)
        figure.tight_layout()
        figure.savefig(IMAGES / name, dpi=110)

    directions, shares, k = spaces[SHOWN]
    new = torch.cat(found["polarity"][SHOWN][0])
    along = (new @ directions).square().sum(0) / new.square().sum()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
    for kind, colour in zip(LAYERS, (GREY, BLUE, ORANGE), strict=True):
        _, each, closed = spaces[kind]
        cumulated = each.cumsum(0)
        left.semilogx(range(1, len(each) + 1), cumulated, color=colour, label=f"{kind}: {closed} of {len(each)}")
        left.plot(closed, cumulated[closed - 1], "o", color=colour)
    left.axhline(ENERGY, color="black", linewidth=0.6, linestyle=":")
    left.set_ylim(0, 1.02)
    left.set_xlabel("input directions of the layer, strongest first", fontsize=9)
    left.set_title(f"energy of the old task's gradients; dots: {ENERGY:.0%}", fontsize=10)
    left.legend(fontsize=8, loc="lower right")
    right.semilogy(range(1, len(shares) + 1), shares.clamp_min(1e-9), color=GREY, label="the old task's gradients")
    right.semilogy(range(1, len(along) + 1), along.clamp_min(1e-9), color=BLUE, linewidth=0.8, label="the new task's, on the same directions")
    right.axvspan(0.5, k + 0.5, color=ORANGE, alpha=0.2, label=f"closed: {along[:k].sum():.0%} of the new task's energy is taken off")
    right.set_xlim(0, 4 * k)
    right.set_ylim(1e-6, 1)
    right.set_xlabel(f"direction ({SHOWN})", fontsize=9)
    right.set_title("share of the energy on each direction", fontsize=10)
    right.legend(fontsize=8, loc="upper right")
    finish(figure, "spectrum.png")

    stepped = leaks(found["polarity"][SHOWN][0], found["weights"][SHOWN], directions[:, :k].contiguous(), found["cities"][SHOWN][1])
    numbers["leak"] = {
        name: {
            "share_least": min(d["share"]),
            "share_most": max(d["share"]),
            "old_answers_moved": d["moved"][-1],
            "in_the_space": d["moved_closed"][-1],
        }
        for name, d in stepped.items()
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
    for (name, data), colour in zip(stepped.items(), (GREY, ORANGE, BLUE), strict=True):
        left.semilogy(range(1, BATCHES + 1), data["share"], color=colour, label=name)
        wide = {"linewidth": 4, "alpha": 0.6} if colour == BLUE else {"linewidth": 1.5, "zorder": 3}  # two of the curves lie on one another
        right.semilogy(range(1, BATCHES + 1), data["moved"], color=colour, **wide)
        right.semilogy(range(1, BATCHES + 1), data["moved_closed"], color=colour, linestyle="--", **(wide | {"linewidth": 1.5}))
    left.set_ylim(1e-9, 2)
    left.set_title("share of each step that lies in the closed space", fontsize=10)
    right.set_title("the layer's answers to old inputs: how far they have moved", fontsize=10)
    right.plot([], [], color="black", label="all of the old inputs")
    right.plot([], [], color="black", linestyle="--", label="their part in the closed space")
    right.set_ylim(1e-9, 2)
    for ax in (left, right):
        ax.set_xlabel("step of the new task", fontsize=9)
    for ax in (left, right):
        ax.legend(fontsize=8, loc="lower right")
    finish(figure, "leak.png")

    W, X = found["weights"][SHOWN], found["cities"][SHOWN][1]
    _, S, of_weight = spectrum(W)
    own, _ = energies(X)
    in_weight = (S.square() / S.square().sum()).cumsum(0)
    kept = ((X @ of_weight).square().sum(0) / X.square().sum()).cumsum(0)
    best = ((X @ own).square().sum(0) / X.square().sum()).cumsum(0)
    ratio = torch.arange(1, len(S) + 1) / len(S)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
    left.semilogy(range(1, len(S) + 1), S.square() / S.square().sum(), color=GREY, label="the weight's own: S squared")
    left.semilogy(
        range(1, len(S) + 1), (X @ of_weight).square().sum(0) / X.square().sum(), color=BLUE, linewidth=0.8, label="the old task's inputs along V"
    )
    left.axvspan(0.5, len(S) // 2 + 0.5, color=ORANGE, alpha=0.2, label="closed with frozen_ratio: 0.5")
    left.set_xlabel(f"singular direction of the weight ({SHOWN})", fontsize=9)
    left.set_title("share of the energy on each direction", fontsize=10)
    right.plot(ratio, in_weight, color=GREY, label="of the weight, by its directions")
    right.plot(ratio, kept, color=BLUE, label="of the old inputs, by the weight's directions (weights)")
    right.plot(ratio, best, color=BLUE, linestyle="--", label="of the old inputs, by their own (inputs)")
    right.axvline(0.5, color=ORANGE, linewidth=0.8)
    right.set_xlabel("share of the directions that is closed", fontsize=9)
    right.set_title("energy that is covered by the closed part", fontsize=10)
    right.set_ylim(0, 1.02)
    left.legend(fontsize=8, loc="upper right")
    right.legend(fontsize=8, loc="lower right")
    finish(figure, "cut.png")
    NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n")
    print(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
