"""What avalanche-lib 0.6.0 and mergekit 0.1.5 compute on toys: tests/golden/beside.json, which tests/test_beside.py compares with.

Neither is a dependency of anything here. To make the file again: in an environment of its own, pip install avalanche-lib==0.6.0 mergekit==0.1.5, then
    python benchmarks/scripts/golden_beside.py tests/golden/beside.json

The toy of EWC and LwF is a bigram model: logits = head(embed(token)), in fp64, every parameter trained; a row is a pair of tokens.
"""

import json
import sys
from types import SimpleNamespace

import torch
from avalanche.training.plugins.ewc import EWCPlugin
from avalanche.training.regularization import LearningWithoutForgetting
from mergekit.merge_methods.generalized_task_arithmetic import get_mask
from mergekit.sparsify import magnitude

V, D = 5, 3
ROWS = [[(0, 1), (2, 3), (4, 0), (2, 1)], [(1, 4), (3, 0), (0, 2)]]


class Bigram(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(V, D), torch.nn.Linear(D, V, bias=False)

    def forward(self, x):
        return self.head(self.embed(x))


def weights(model, given):
    with torch.no_grad():
        for p, w in zip(model.parameters(), given, strict=True):
            p.copy_(w)


def ewc(points, mode):
    plugin = EWCPlugin(2.0, mode, 0.5 if mode == "online" else None)
    model = Bigram().double()
    strategy = SimpleNamespace(
        model=model, _criterion=torch.nn.CrossEntropyLoss(), optimizer=torch.optim.SGD(model.parameters(), 0.0), device="cpu", train_mb_size=1,
        clock=SimpleNamespace(train_exp_counter=0), experience=None, loss=None,
    )  # fmt: skip
    for i, rows in enumerate(ROWS):
        weights(model, points[i])
        strategy.clock.train_exp_counter = i
        strategy.experience = SimpleNamespace(dataset=[(torch.tensor(x), torch.tensor(y), torch.tensor(0)) for x, y in rows])
        plugin.after_training_exp(strategy)
    weights(model, points[2])
    strategy.clock.train_exp_counter, strategy.loss = 2, torch.zeros((), dtype=torch.float64)
    plugin.before_backward(strategy)
    gradients = torch.autograd.grad(strategy.loss, list(model.parameters()))
    return {"penalty": strategy.loss.item(), "gradients": [g.tolist() for g in gradients]}


def lwf(points):
    model = Bigram().double()
    weights(model, points[0])
    method = LearningWithoutForgetting(alpha=1, temperature=2)
    seen = SimpleNamespace(targets=SimpleNamespace(uniques=set(range(V))))
    experience = SimpleNamespace(dataset=SimpleNamespace(targets_task_labels=SimpleNamespace(uniques=[0]), task_set={0: seen}))
    method.post_adapt(SimpleNamespace(model=model), experience)
    weights(model, points[1])
    x = torch.tensor([a for a, _ in ROWS[1]])
    loss = method(x, model(x), model)
    return {"loss": loss.item(), "gradients": [g.tolist() for g in torch.autograd.grad(loss, list(model.parameters()))]}


def ties(vectors, density):
    trimmed = torch.stack([magnitude(v, density) for v in vectors])
    mask = get_mask(trimmed, "sum")
    return ((trimmed * mask).sum(0) / mask.sum(0).clamp_min(1)).tolist()


if __name__ == "__main__":
    g = torch.Generator().manual_seed(0)
    points = [[torch.randn(V, D, generator=g, dtype=torch.float64) for _ in range(2)] for _ in range(3)]
    vectors = [torch.randn(30, generator=g, dtype=torch.float64) for _ in range(3)]
    found = {
        "points": [[w.tolist() for w in point] for point in points], "rows": ROWS, "vectors": [v.tolist() for v in vectors],
        "ewc_full": ewc(points, "separate"), "ewc_online": ewc(points, "online"), "lwf": lwf(points), "ties": ties(vectors, 0.2),
    }  # fmt: skip
    with open(sys.argv[1], "w") as f:
        f.write(json.dumps(found))
