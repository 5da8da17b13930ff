"""The picture of docs/gorp.md, made by our code: where a step goes, and what the spaces cost and keep.

    python benchmarks/scripts/gorp_picture.py       # -> docs/img/gorp.png     (needs matplotlib; the right half reads benchmarks/results/standard_cl_order1_final.json)

Left: a linear layer learns a second task with a protected space of a quarter of its inputs; the share of each step that lies in the space, for a projected gradient handed to
AdamW (what released code does) and for SubspaceAdamW, dense and with rank 8. Right: the share of each layer's input directions that is closed after each task, and
accuracy on the first task.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import torch

import forgetless as fl
from forgetless.subspace import leak, orthonormalize

ROOT = Path(__file__).resolve().parents[2]
STEPS, OUT, IN, CLOSED = 60, 48, 64, 16


def leaks() -> dict[str, list[float]]:
    """{name: share of each step in the space}. The same data, start and space for all."""
    torch.manual_seed(0)
    V = orthonormalize(torch.randn(IN, CLOSED))
    X, Y, W = torch.randn(256, IN), torch.randn(256, OUT), torch.randn(OUT, IN) / 8
    constraint = fl.Constraint(inputs=V)
    found: dict[str, list[float]] = {}
    for name, group in {
        "gradient projected, then AdamW": None,
        "SubspaceAdamW, dense": {"constraint": constraint},
        "SubspaceAdamW, rank 8": {"constraint": constraint, "rank": 8},
    }.items():
        weight = torch.nn.Parameter(W.clone())
        optimizer = (
            torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.0) if group is None else fl.SubspaceAdamW([{"params": [weight], **group}], lr=1e-2)
        )
        found[name] = []
        for step in range(STEPS):
            rows = torch.arange(16) + 16 * (step % 16)
            optimizer.zero_grad()
            (X[rows] @ weight.T - Y[rows]).square().mean().backward()
            if group is None:
                weight.grad = constraint.permitted(weight.grad)
            before = weight.detach().clone()
            optimizer.step()
            found[name].append(leak(weight.detach() - before, constraint))
    return found


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12.5, 3.6))
    for (name, values), colour in zip(leaks().items(), ("#b0641e", "#1b6ca8", "#5aa0d0"), strict=True):
        left.semilogy(range(1, STEPS + 1), values, color=colour, label=name)
        print(f"{name}: {min(values):.1e} to {max(values):.1e} of a step in the space")
    left.set_xlabel("step")
    left.set_title("share of each step in the protected space", fontsize=10)
    left.legend(fontsize=8, loc="center right")
    left.set_ylim(1e-9, 2)

    runs = json.loads((ROOT / "benchmarks" / "results" / "standard_cl_order1_final.json").read_text())["runs"]
    for prompt, style in (("options", "-"), ("bare", "--")):
        for method, colour, label in (("gorp", "#1b6ca8", "gorp"), ("seqft", "#8a8a8a", "seqft")):
            entries = [r for name, r in runs.items() if name.startswith(f"final-{prompt}-{method}-seed")]
            if not entries:
                continue
            tasks = entries[0]["tasks"]
            said = "options in the prompt" if prompt == "options" else "text only"
            if method == "gorp":
                middle.plot(
                    tasks,
                    [mean(r["protection"][i]["space"]["share"] for r in entries) for i in range(len(tasks))],
                    style,
                    color=colour,
                    marker="o",
                    label=said,
                )
            right.plot(
                tasks,
                [mean(r["scores"]["choice"][i][0] for r in entries) for i in range(len(tasks))],
                style,
                color=colour,
                marker="o",
                label=f"{label}, {said}",
            )
    middle.set_title("share of input directions closed after each task", fontsize=10)
    middle.set_ylim(0, None)
    right.set_title("choice accuracy on the first task", fontsize=10)
    right.set_ylim(0, 1)
    for ax in (middle, right):
        ax.legend(fontsize=8)
    for ax in (left, middle, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "img" / "gorp.png", dpi=110)


if __name__ == "__main__":
    main()
