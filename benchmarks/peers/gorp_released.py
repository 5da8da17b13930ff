"""GORP (arXiv 2507.02503) as its authors' released training computes it: a peer to compare with, not a part of the package.

Written by us from a description of that training; tests/test_peers.py holds it to numbers that training gave. Three kinds of matrices learn together:

- `lora_A` (r, in): Adam. Its gradient is projected off a space S in its OUTPUT index, the r of the LoRA: G <- G - S S^T G.
- `lora_B` (out, r): Adam, never projected.
- `full` (out, in): R = G in `rank` coordinates (GaLore, arXiv 2403.03507), R <- R - S S^T R, Adam on R, the step lifted back.

After a task the leading left singular directions of Adam's first moment, which remembers about ten steps, join S until it holds 0.9 of its energy. As
released, two bugs keep this from the next task; a mode says which of them are fixed:

    mode           S reaches the next task    full weights reach the next task
    as_released    no                         no: each task starts from the base weights and the LoRAs so far
    persist_only   no                         yes
    as_intended    yes                        yes

So as released nothing is ever projected. As intended, what follows is still as in the released training, on purpose:
- Adam divides element by element after the projection, so that a part of the applied step lies in S.
- The r index of a LoRA means nothing from one task to the next, which draws a new A: S holds no inputs and no outputs of earlier tasks there.
- The first task keeps one direction fewer than the energy asks for, and none where the first one reaches it.
- Where coordinates replace the output index (left, full, std on a wide weight), S of a full-rank weight lives in coordinates that soon change.
- Adam's moments are kept as they are when the coordinates change.
- Moments have the gradient's dtype: with bf16 weights and the released rates, the full-rank updates are lost in rounding.

Not as in the release: S is kept as a basis (S S^T dense, there), singular vectors have fixed signs, one process only (it trains one model a GPU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODES = {"as_released": (False, False), "persist_only": (False, True), "as_intended": (True, True)}  # what is kept: S, full weights
KINDS = ("lora_A", "lora_B", "full")
PROJECTIONS = ("std", "reverse_std", "left", "right", "full")
PROTECTS = ("gradient", "moment")
ENERGY = 0.9

# -- the maths -------------------------------------------------------------------------------------------------------------------------


def signed_svd(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, p), s (p,), Vh (p, n) of M (m, n), p = min(m, n), in fp32 or wider; the largest |entry| of each right singular vector is positive.

    The release takes the signs as they come. They count: moments are kept when the coordinates change: in golden.json signs move weights by 1e-2.
    """
    U, s, Vh = torch.linalg.svd(M.to(torch.promote_types(M.dtype, torch.float32)), full_matrices=False)
    signs = Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign()  # (p, 1)
    return U * signs.mT, s, Vh * signs


def coordinates(G: Tensor, rank: int, projection: str = "std") -> dict[str, Tensor]:
    """P (m, k) and Q (n, k), or one of them: orthonormal columns, the k = min(rank, m, n) leading singular directions of G (m, n).

    "left" gives P, "right" Q, "full" both (the k x k form of GORP eq. 3); "std" reduces the shorter side of G, "reverse_std" the longer one.
    A square G counts as tall.
    """
    m, n = G.shape
    side = {"std": "right" if m >= n else "left", "reverse_std": "left" if m >= n else "right"}.get(projection, projection)
    U, _, Vh = signed_svd(G)
    both = {"P": U[:, :rank].to(G.dtype).contiguous(), "Q": Vh[:rank].mT.to(G.dtype).contiguous()}
    return {key: basis for key, basis in both.items() if side == "full" or (side == "left") == (key == "P")}


def reduce(G: Tensor, P: Tensor | None = None, Q: Tensor | None = None) -> Tensor:
    """R = P^T G Q, G (m, n) in its coordinates: (k, n), (m, k) or (k, k)."""
    G = G if P is None else P.mT @ G
    return G if Q is None else G @ Q


def lift(R: Tensor, P: Tensor | None = None, Q: Tensor | None = None) -> Tensor:
    """P R Q^T (m, n): a step in coordinates as a step of the weight."""
    R = R if P is None else P @ R
    return R if Q is None else R @ Q.mT


def off(G: Tensor, S: Tensor | None) -> Tensor:
    """G - S S^T G: the columns of G (m, n) without their part in span(S), S (m, k) with orthonormal columns. None projects nothing."""
    return G if S is None else G - (S @ (S.mT @ G.to(S.dtype))).to(G.dtype)


class Growth(NamedTuple):
    """What a task does to the space of one matrix."""

    space: Tensor  # (m, k), orthonormal columns
    added: int
    held: float  # share of the first moment's energy that the space held before
    singular: Tensor  # (p,), singular values of the first moment off the space


def grow(S: Tensor | None, M: Tensor, energy: float = ENERGY) -> Growth:
    """S (m, k), None in a first task, and leading left singular directions of M - S S^T M, M (m, n) the first moment at a task's end (GORP eq. 6-8).

    First task: as many as stay below `energy`, hence one short of it, or none. Later tasks, also where S is empty: as many as reach it, given S.
    """
    U, s, _ = signed_svd(off(M, S))
    total = M.to(s.dtype).square().sum()
    if not total > 0:
        return Growth(U[:, :0] if S is None else S, 0, 0.0, s)
    shares = s.square() / total
    held = 0.0 if S is None else float(1 - shares.sum())
    added = int((held + shares.cumsum(0) < energy).sum())
    if S is None:
        return Growth(U[:, :added].contiguous(), added, held, s)
    added = min(added + 1, len(s)) if held < energy else 0
    return Growth(torch.cat([S, U[:, :added]], 1)[:, : len(M)], added, held, s)


# -- the optimizer ---------------------------------------------------------------------------------------------------------------------


def param_groups(
    lora_A: Iterable[Tensor],
    lora_B: Iterable[Tensor],
    full: Iterable[Tensor],
    lr: float,
    full_lr: float,
    rank: int = 8,
    gap: int = 10,
    scale: float = 1.0,
    projection: str = "std",
) -> list[dict[str, Any]]:
    """A model's groups: LoRA factors at rate `lr`, full-rank weights at `full_lr` in `rank` coordinates new every `gap` steps, steps times `scale`.

    The release. T5: LoRA on q and v of SelfAttention, full-rank q and v of EncDecAttention, rates 1e-3 and 1e-5, batch 4 x 2; rank, gap, scale
    8, 10, 1 (orders 1-3) or 32, 20, 0.25 (orders 4-6). LLaMA: LoRA on q_proj and v_proj, full-rank gate_proj, rates 2e-4 and 1e-6, batch 1 x 8;
    8, 10, 1 or 8, 20, 0.25.
    """
    return [
        {"params": list(lora_A), "kind": "lora_A", "lr": lr},
        {"params": list(lora_B), "kind": "lora_B", "lr": lr},
        {"params": list(full), "kind": "full", "lr": full_lr, "rank": rank, "gap": gap, "scale": scale, "projection": projection},
    ]


class ReleasedGORP(torch.optim.Optimizer):
    """The released arithmetic over `lora_A`, `lora_B` and `full` groups; one object for all tasks, `end_task()` after each.

    Args:
        params: groups with a `kind`, as `param_groups` makes them.
        lr, betas, eps, weight_decay: AdamW's, but eps is added before the bias correction and decay follows the step: w <- w - lr * weight_decay * w.
        mode: one of MODES.
        protect: "gradient", off S before Adam sees it, or "moment": Adam sees the whole gradient, and its first moment is used off S.

    For a language model, with a constant rate, since a scheduler starts from the rate it finds:

        opt = ReleasedGORP(param_groups(A, B, W, lr=2e-4, full_lr=1e-6))
        for task in tasks:      # merge B A into its weight, draw new A, set B to zero: all in place
            Trainer(model, TrainingArguments(lr_scheduler_type="constant", ...), train_dataset=task, optimizers=(opt, None)).train()
            ...                 # score here: the released training scores with the task's own full-rank updates
            opt.end_task()      # as_released: and then loses them

    Raises ValueError for an unknown kind, mode, projection or protect.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        mode: str = "as_released",
        protect: str = "gradient",
    ):
        for name, value, allowed in (("mode", mode, MODES), ("protect", protect, PROTECTS)):
            if value not in allowed:
                raise ValueError(f"ReleasedGORP: {name}={value!r}; one of {', '.join(allowed)}")
        self.keeps_space, self.keeps_full = MODES[mode]
        self.protect = protect
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, kind=None, rank=8, gap=10, scale=1.0, projection="std"))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for key, allowed in (("kind", KINDS), ("projection", PROJECTIONS)):
            if self.param_groups[-1][key] not in allowed:
                raise ValueError(f"ReleasedGORP: a group with {key}={self.param_groups[-1][key]!r}; one of {', '.join(allowed)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(group, p)
        return loss

    def _update(self, group: dict[str, Any], p: Tensor) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        t = state["step"] = state.get("step", 0) + 1  # of this task
        R, bases, S = p.grad, {}, state.get("space")
        if group["kind"] == "full":
            if t == 1 and not self.keeps_full:
                state["start"] = p.clone()
            if (t - 1) % group["gap"] == 0:
                state.update(coordinates(R, group["rank"], group["projection"]))
            bases = {key: state[key] for key in ("P", "Q") if key in state}
            R = reduce(R, **bases)
        if self.protect == "gradient":
            R = off(R, S)
        if t == 1:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(R), torch.zeros_like(R)
        M, v = state["exp_avg"], state["exp_avg_sq"]
        M.mul_(beta1).add_(R, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(R, R, value=1 - beta2)
        step = (M if self.protect == "gradient" else off(M, S)) / (v.sqrt() + group["eps"])
        if group["kind"] == "full":
            step = group["scale"] * lift(step, **bases)
        p.add_(step, alpha=-group["lr"] * (1 - beta2**t) ** 0.5 / (1 - beta1**t))
        if group["weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])

    @torch.no_grad()
    def end_task(self) -> dict[Tensor, Growth]:
        """Grow the space of each LoRA-A and full-rank matrix that was trained, drop moments and coordinates, and whatever the mode does not keep.

        Returns the growth by matrix, also where the mode then drops the space.
        """
        report = {}
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.pop(p, {})
                space = state.get("space")
                if "exp_avg" in state and group["kind"] != "lora_B":
                    report[p] = grow(space, state["exp_avg"])
                    space = report[p].space
                if self.keeps_space and space is not None:
                    self.state[p]["space"] = space
                if "start" in state:
                    p.copy_(state["start"])
        return report


# -- the reference problem -------------------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """y = W_f tanh((W_q + s sum_t B_t A_t) x): `q` has frozen W_q (10, 12) and one LoRA (r, s = 32 / r) a task, `f` is full-rank, W_f (14, 10)."""

    def __init__(self, Wq: Tensor, Wf: Tensor, r: int):
        super().__init__()
        self.Wq, self.f, self.s = Wq, nn.Parameter(Wf.clone()), 32 / r
        self.A, self.B = nn.Parameter(Wq.new_zeros(r, Wq.shape[1])), nn.Parameter(Wq.new_zeros(Wq.shape[0], r))
        self.learned: list[tuple[Tensor, Tensor]] = []  # the LoRAs of earlier tasks, frozen

    def forward(self, X: Tensor) -> Tensor:  # (rows, 12) -> (rows, 14)
        q = F.linear(X, self.Wq)
        for A, B in [*self.learned, (self.A, self.B)]:
            q = q + self.s * F.linear(F.linear(X, A), B)
        return F.linear(torch.tanh(q), self.f)

    @torch.no_grad()
    def begin_task(self, A: Tensor) -> None:
        """B = 0 and a new A (r, 12), drawn by the caller."""
        self.A.copy_(A)
        self.B.zero_()

    @torch.no_grad()
    def end_task(self) -> None:
        self.learned.append((self.A.clone(), self.B.clone()))

    def named(self) -> dict[str, nn.Parameter]:
        return {"q.loranew_A": self.A, "q.loranew_B": self.B, "f": self.f}


def batches(problem: dict[str, Tensor], task: int, steps: int, size: int) -> Iterable[tuple[Tensor, Tensor]]:
    """X (size, 12) and Y (size, 14) of each step: consecutive slices of the task's rows, again and again."""
    X, Y = problem[f"X_{task}"], problem[f"Y_{task}"]
    for t in range(steps):
        at = t * size % len(X)
        yield X[at : at + size], Y[at : at + size]


def trajectory(
    problem: dict[str, Tensor],
    mode: str,
    *,
    steps: int = 40,
    batch: int = 16,
    lr: float = 1e-2,
    full_lr: float = 1e-3,
    weight_decay: float = 0.0,
    rank: int = 3,
    gap: int = 10,
    scale: float = 1.0,
    projection: str = "std",
    protect: str = "gradient",
) -> dict[str, Tensor]:
    """All tasks of `problem` (keys Wq, Wf; A_new_t, X_t, Y_t of task t), in its dtype: what golden.json lists for a traj_* file, by the same keys."""
    tasks = sorted(int(key.removeprefix("X_")) for key in problem if key.startswith("X_"))
    model = Toy(problem["Wq"], problem["Wf"], len(problem["A_new_1"]))
    groups = param_groups([model.A], [model.B], [model.f], lr, full_lr, rank, gap, scale, projection)
    opt = ReleasedGORP(groups, weight_decay=weight_decay, mode=mode, protect=protect)
    kept: dict[str, Tensor] = {}
    losses = []
    for task in tasks:
        model.begin_task(problem[f"A_new_{task}"])
        for t, (X, Y) in enumerate(batches(problem, task, steps, batch), 1):
            opt.zero_grad()
            loss = F.mse_loss(model(X), Y)
            loss.backward()
            losses.append(loss.item())
            if t == 1:
                kept |= {f"t{task}/grad1/{name}.weight": p.grad.clone() for name, p in model.named().items()}
            opt.step()
            if t in (1, 2, 5, 10, 11, 20, 30, 40):
                kept |= {f"t{task}/s{t}/{name}.weight": p.detach().clone() for name, p in model.named().items()}
            state = opt.state[model.f]
            if t in (1, 11, 21, 31) and projection != "full":
                kept[f"t{task}/s{t}/ortho_f"] = state["P"] if "P" in state else state["Q"].mT
        for name, p in model.named().items():
            kept |= {f"t{task}/end/{moment}/{name}": opt.state[p][moment] for moment in ("exp_avg", "exp_avg_sq")}
        with torch.no_grad():
            kept |= {f"t{task}/end/mse_task{i}": F.mse_loss(model(problem[f"X_{i}"]), problem[f"Y_{i}"])[None] for i in tasks}
        report = opt.end_task()
        for name, growth in ((name, report[p]) for name, p in model.named().items() if p in report):
            values = {"basis": growth.space, "S": growth.singular, "r_added": torch.tensor([growth.added]), "acc0": torch.tensor([growth.held])}
            kept |= {f"t{task}/end/{key}/{name}": value for key, value in values.items()}
        model.end_task()
    return kept | {"losses": torch.tensor(losses, dtype=torch.float64)}
