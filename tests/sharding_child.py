"""One of several processes (torchrun): trains small matrices that fully_shard has spread over them, and the same in one process, for test_sharding.py.

torchrun --nproc_per_node 2 tests/sharding_child.py OUT.json
"""

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from forgetless import sharding
from forgetless.evaluation.drift import weight_leak
from forgetless.optim import SubspaceAdamW, coordinates
from forgetless.sharding import gathered_state, whole
from forgetless.subspace import Constraint, orthonormalize

STEPS, BATCH = 7, 12
SHAPES = {
    "square": (7, 7),
    "wide": (4, 9),
    "thin": (1, 5),
}  # over 2 processes: 4 and 3 rows, 2 and 2, 1 and none; as stored (in, out) 4 and 3, 5 and 4, 3 and 2


def basis(n: int, k: int, seed: int) -> Tensor:
    return orthonormalize(torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def complement(V: Tensor) -> Tensor:
    return torch.linalg.qr(V, mode="complete")[0][:, V.shape[1] :].contiguous()


def options(case: str, m: int, n: int) -> dict[str, Any]:
    """Of the parameter group of a weight (out m, in n)."""
    V, U = basis(n, 2, 1), basis(m, min(1, m - 1), 2)
    either = Constraint(inputs=V, outputs=U)
    mask = torch.rand(m, n, generator=torch.Generator().manual_seed(3)) < 0.5
    ranked = {"rank": 2, "refresh_gap": 3}
    return {
        "plain": {},
        "inputs": {"constraint": Constraint(inputs=V)},
        "outputs": {"constraint": Constraint(outputs=U)},
        "either": {"constraint": either},
        "most": {"constraint": Constraint(inputs=basis(n, n * 5 // 8, 1), outputs=U)},
        "both": {"constraint": Constraint(inputs=V, outputs=U, forbid="both")},
        "mask": {"constraint": Constraint(mask=mask)},
        "rank": ranked,
        "rank-inputs": ranked | {"constraint": Constraint(inputs=V)},
        "rank-warm": ranked | {"constraint": Constraint(inputs=V), "refresh": "warm"},
        "rank-exact": ranked | {"constraint": Constraint(inputs=V), "refresh": "exact"},
        "rank-svd": ranked | {"constraint": Constraint(inputs=V), "refresh": "svd", "moments": "reset"},
        "rank-either": ranked | {"constraint": either},
        "rank-stagger": ranked | {"stagger": True},
        "rank-outputs": {"rank": 1, "refresh_gap": 3, "side": "outputs", "constraint": Constraint(outputs=U)},
        "rank-both-sides": {"rank": 1, "refresh_gap": 3, "side": "both", "constraint": either},
        "rank-both-block": {"rank": 1, "refresh_gap": 3, "side": "both", "constraint": Constraint(inputs=V, outputs=U, forbid="both")},
        "directions": {"directions": (complement(U), complement(V))},
        "directions-inputs": {"directions": (None, complement(V)), "constraint": Constraint(outputs=U)},
        "directions-outputs": {"directions": (complement(U), None), "constraint": Constraint(inputs=V)},
    }[case]


CASES = (
    "plain", "inputs", "outputs", "either", "most", "both", "mask", "rank", "rank-inputs", "rank-warm", "rank-exact", "rank-svd", "rank-either", "rank-stagger", "rank-outputs",
    "rank-both-sides", "rank-both-block", "directions", "directions-inputs", "directions-outputs",
)  # fmt: skip

LEAKS = (
    "inputs",
    "outputs",
    "either",
    "most",
    "both",
    "rank-inputs",
    "rank-either",
    "rank-both-sides",
    "directions",
    "directions-inputs",
    "directions-outputs",
)


class Problem(nn.Module):
    """Least squares for each of several weights, on inputs of falling energy. transposed: weights are stored (in, out), as Conv1D does."""

    def __init__(self, dtype: torch.dtype, transposed: bool):
        super().__init__()
        self.transposed = transposed
        drawn = torch.Generator().manual_seed(0)
        for name, (m, n) in SHAPES.items():
            W = torch.randn(m, n, dtype=torch.float64, generator=drawn).to(dtype)
            layer = nn.Linear(n, m, bias=False)
            layer.weight = nn.Parameter(W.mT.contiguous() if transposed else W)
            self.add_module(name, layer)

    def forward(self, step: int, rows: slice) -> Tensor:
        total = 0.0
        for i, (name, (m, n)) in enumerate(SHAPES.items()):
            drawn = torch.Generator().manual_seed(100 * step + i)
            X = torch.randn(BATCH, n, dtype=torch.float64, generator=drawn) * torch.arange(1, n + 1, dtype=torch.float64) ** -1.0
            Y = torch.randn(BATCH, m, dtype=torch.float64, generator=drawn) * torch.arange(1, m + 1, dtype=torch.float64) ** -0.5
            W = self.weight_of(name)
            total = total + ((X[rows].to(W.dtype) @ W.mT - Y[rows].to(W.dtype)) ** 2).mean(0).sum()
        return total

    def weight_of(self, name: str) -> Tensor:
        W = self.get_submodule(name).weight
        return W.mT if self.transposed else W


def groups(model: Problem, case: str) -> list[dict[str, Any]]:
    return [
        {"params": [model.get_submodule(name).weight], "names": [name], "transposed": model.transposed} | options(case, m, n)
        for name, (m, n) in SHAPES.items()
    ]


def train(model: Problem, optimizer: SubspaceAdamW, rows: slice, steps: range) -> list[float]:
    leaks = []
    for step in steps:
        optimizer.track_leak = step == steps[-1]
        model(step, rows).backward()
        optimizer.step()
        leaks.append(optimizer.update_leak or 0.0)
        optimizer.zero_grad()
    return leaks


def sharded(model: Problem, mesh: Any) -> Problem:
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def optimizer_of(model: Problem, case: str, weight_decay: float = 0.1) -> SubspaceAdamW:
    optimizer = SubspaceAdamW(groups(model, case), lr=0.02, weight_decay=weight_decay, max_grad_norm=2.0)
    optimizer.track_captured = True
    return optimizer


def own_rows() -> slice:
    size = BATCH // dist.get_world_size()
    return slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)


def difference(model: Problem, other: Problem) -> float:
    """Largest difference of any entry, against a model in one process."""
    return max(float((whole(p.detach()) - q.detach()).abs().max()) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def equality(case: str, transposed: bool, mesh: Any) -> dict[str, Any]:
    plain, spread = Problem(torch.float64, transposed), sharded(Problem(torch.float64, transposed), mesh)
    one, many = optimizer_of(plain, case), optimizer_of(spread, case)
    train(plain, one, slice(None), range(STEPS))
    train(spread, many, own_rows(), range(STEPS))
    moved = difference(spread, Problem(torch.float64, transposed))
    return {
        "difference": difference(spread, plain), "moved": moved, "leak": abs((one.update_leak or 0) - (many.update_leak or 0)), "norm": float(abs(one.grad_norm - many.grad_norm)),
        "state_bytes": sum(t.nbytes for state in many.state.values() for t in state.values()), "whole_bytes": sum(t.nbytes for state in one.state.values() for t in state.values()),
    }  # fmt: skip


def leaks(case: str, transposed: bool, mesh: Any) -> dict[str, float]:
    """Row 1 of the contract in fp32: of the update and of the weight."""
    spread = sharded(Problem(torch.float32, transposed), mesh)
    optimizer = optimizer_of(spread, case)
    start = {p: p.detach().clone() for p in spread.parameters()}
    found = train(spread, optimizer, own_rows(), range(50))
    worst = weight_leak(optimizer, start, 50)
    return {"update": max(found), "weight": worst["leak"], "bound": worst["bound"]}


def checkpointed_before(case: str, mesh: Any) -> float:
    """torch.distributed.checkpoint takes the state of an optimizer that has none yet, by a step with zero gradients."""
    plain, spread = Problem(torch.float64, False), sharded(Problem(torch.float64, False), mesh)
    one, many = optimizer_of(plain, case, 0.0), optimizer_of(spread, case, 0.0)  # with weight decay there is state from the beginning
    get_optimizer_state_dict(spread, many)
    assert not any(many.state.values())
    train(plain, one, slice(None), range(4))
    train(spread, many, own_rows(), range(4))
    return difference(spread, plain)


def checkpointed_within(case: str, mesh: Any) -> float:
    """What torch.distributed.checkpoint takes after some steps, given to another optimizer: it goes on as the first."""
    plain, spread = Problem(torch.float64, False), sharded(Problem(torch.float64, False), mesh)
    one, many = optimizer_of(plain, case), optimizer_of(spread, case)
    train(plain, one, slice(None), range(7))
    train(spread, many, own_rows(), range(4))
    again, saved = optimizer_of(spread, case), get_optimizer_state_dict(spread, many)
    set_optimizer_state_dict(spread, again, saved)
    train(spread, again, own_rows(), range(4, 7))
    return difference(spread, plain)


def resumed_alone(case: str, mesh: Any) -> float:
    """Weights and state of sharded training, whole, go on in one process."""
    plain, spread, alone = Problem(torch.float64, False), sharded(Problem(torch.float64, False), mesh), Problem(torch.float64, False)
    one, many = optimizer_of(plain, case), optimizer_of(spread, case)
    train(plain, one, slice(None), range(7))
    train(spread, many, own_rows(), range(4))
    again = optimizer_of(alone, case)
    again.load_state_dict(gathered_state(many, everywhere=True))
    alone.load_state_dict({name: whole(p.detach()) for name, p in spread.named_parameters()})
    train(alone, again, slice(None), range(4, 7))
    return difference(alone, plain)


def replaced(case: str, mesh: Any) -> float:
    """fully_shard comes after the optimizer, and its parameters are put into the groups in the place of the old ones, as Accelerate does."""
    plain, spread = Problem(torch.float64, False), Problem(torch.float64, False)
    one, many = optimizer_of(plain, case), optimizer_of(spread, case)
    names = {p: name for name, p in spread.named_parameters()}
    sharded(spread, mesh)
    now = dict(spread.named_parameters())
    for group in many.param_groups:
        group["params"] = [now[names[p]] for p in group["params"]]
    train(plain, one, slice(None), range(STEPS))
    train(spread, many, own_rows(), range(STEPS))
    return difference(spread, plain)


LOOKS = {"checkpointed_before": checkpointed_before, "checkpointed_within": checkpointed_within, "resumed_alone": resumed_alone, "replaced": replaced}


def sent(mesh: Any) -> dict[str, float]:
    """Numbers that a process sends in a step that chooses directions, in one that does not, and to gather the gradient."""
    m, n = 1024, 256
    layer = nn.Linear(n, m, bias=False)
    fully_shard(layer, mesh=mesh)
    optimizer = SubspaceAdamW([{"params": [layer.weight], "rank": 8, "constraint": Constraint(inputs=basis(n, 16, 1))}], lr=0.01, max_grad_norm=1.0)
    steps = []
    for step in range(2):
        G = torch.randn(m, n, generator=torch.Generator().manual_seed(step))
        layer.weight.grad = sharding.spread_like(layer.weight.detach(), G)
        with sharding.counting() as count:
            optimizer.step()
        steps.append(count.numbers)
    with sharding.counting() as count:
        sharding.rows_of(layer.weight).whole(sharding.local(layer.weight.grad))
    return {"refresh": steps[0], "step": steps[1], "gather": count.numbers}


def planned(case: str, transposed: bool, mesh: Any) -> dict[str, float]:
    """What a process sends in a step that chooses directions, in another, and holds of the state, beside what is planned without any other process."""
    m, n = 96, 64
    layer = nn.Linear(m, n, bias=False) if transposed else nn.Linear(n, m, bias=False)
    group = {"transposed": transposed} | options(case, m, n)
    plan = SubspaceAdamW([group | {"params": [layer.weight]}], lr=0.01, weight_decay=0.1)
    shape, processes = layer.weight.shape, dist.get_world_size()
    chosen, other = coordinates.sent(plan.param_groups[0], shape, processes)
    found = {
        "plan_choice": chosen.numbers,
        "plan_other": other.numbers,
        "plan_exchanges": chosen.exchanges,
        "plan_bytes": plan.planned_bytes(processes),
    }
    fully_shard(layer, mesh=mesh)
    optimizer = SubspaceAdamW([group | {"params": [layer.weight]}], lr=0.01, weight_decay=0.1)
    for step in range(6):
        layer.weight.grad = sharding.spread_like(layer.weight.detach(), torch.randn(*shape, generator=torch.Generator().manual_seed(step)))
        with sharding.counting() as count:
            optimizer.step()
        found |= {
            {3: "choice", 4: "other"}.get(step, "of another step"): count.numbers,
            "exchanges": count.exchanges if step == 3 else found.get("exchanges"),
        }
    return found | {"bytes": optimizer.state_bytes()}


def statistics(mesh: Any) -> dict[str, tuple[float, float]]:
    """{case: (numbers a process sends for gorp's sketches in a step, as planned)}: both sides, either storage, fewer rows than a sketch has probes."""
    from transformers.pytorch_utils import Conv1D

    from forgetless.methods import get
    from forgetless.methods.base import Memory

    found = {}
    for side in ("inputs", "outputs"):
        for stored, make in (("linear", lambda m, n: nn.Linear(n, m, bias=False)), ("conv1d", lambda m, n: Conv1D(m, n))):
            model = nn.Sequential(*(make(*shape) for shape in ((40, 24), (24, 40), (8, 40), (40, 8))))
            method = get("gorp", side=side, sketch_size=16)
            planned = method.sent_each_step(model) * (1 - 1 / dist.get_world_size())
            method.begin_task(model, None, Memory())
            fully_shard(model, mesh=mesh)
            for p in (p for p in model.parameters() if p.ndim == 2):
                p.grad = sharding.spread_like(p.detach(), torch.randn(*p.shape, generator=torch.Generator().manual_seed(p.shape[0])))
            with sharding.counting() as count:
                method.on_step(model)
            found[f"{side}, {stored}"] = count.numbers, planned
    return found


def main(out: str) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found: dict[str, Any] = {"processes": dist.get_world_size()}
    for transposed in (False, True):
        for case in CASES:
            key = f"{case}{'-transposed' * transposed}"
            found[key] = equality(case, transposed, mesh)
            found[key] |= planned(case, transposed, mesh)
            if case in LEAKS and not transposed:
                found[key] |= {"leaks": leaks(case, transposed, mesh)}
    for case in ("rank-inputs", "either", "directions"):
        found[case] |= {name: look(case, mesh) for name, look in LOOKS.items()}
    found["sent"] = sent(mesh)
    found["statistics"] = statistics(mesh)
    if dist.get_rank() == 0:
        with open(out, "w") as f:
            json.dump(found, f, indent=1)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
