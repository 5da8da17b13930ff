"""AdamW whose state may live in a low-rank subspace and whose update may be kept off protected directions, exactly.

Three kinds of tensor, in any mixture, chosen by the parameter group:
- plain: nothing set. torch's AdamW, to the bit.
- `constraint`: dense Adam; the part of the finished step that the Constraint forbids is removed AFTER Adam's division. (Projecting the gradient only
  leaks: dividing by sqrt(v) element by element does not commute with a projection. tests/test_optim.py shows it on the authors' own numbers: over a tenth.)
- `rank`: G (out, in) is used in r coordinates R = G Q (GaLore, arXiv 2403.03507; GORP eq. 3-4), Adam runs on R, the step is lifted back: dW = -lr * step(R) Q^T.
  With a constraint on the inputs, Q is drawn orthogonal to it, so no element-wise operation on R can reach the protected space.

All state is per-parameter tensors in fp32 (fp64 for fp64 weights), also for bf16 weights, and loads with weights_only=True. Not for: sparse gradients, complex
weights, tensors that are not matrices with a rank or a basis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..subspace import Constraint, working_dtype
from . import coordinates

# what a group holds that is not a number: taken from the running program, never from a checkpoint
NOT_SAVED = ("constraint", "names")


class SubspaceAdamW(torch.optim.Optimizer):
    """AdamW with low-rank state and protected subspaces.

    Args:
        params: tensors or parameter groups. A group may carry, beside lr, betas, eps and weight_decay:
            constraint (Constraint, optional): where the update must not go.
            rank (int, optional): keep the state in this many directions; None is dense.
            side (str): "inputs" (R = G Q, Q in x r) or "outputs" (R = Q^T G, Q out x r).
            refresh_gap (int): steps between two choices of Q.
            refresh (str): "cold" (two subspace iterations from a seeded random start), "warm" (one, from the old Q), "exact" (eigh of the Gram matrix), "svd".
            moments (str): at a refresh "rotate" them into the new basis, "reset" them with the step count, or "keep" them as they are (what GaLore does).
            scale (float): multiplies the low-rank step (GaLore's alpha).
            lr_scale (float): multiplies lr for this group, so that one scheduler reaches groups with different rates.
        lr: step size. betas, eps: as in torch.optim.AdamW.
        weight_decay: plain tensors decay toward zero; constrained or low-rank ones toward their value at the optimizer's creation (the task's start),
            inside the permitted directions: decay toward zero would itself be forgetting.
        max_grad_norm: clip the global norm of the gradients AS USED (after projection, in the r coordinates for low-rank tensors); None or 0 never clips.
            The gradients of constrained tensors are replaced by their permitted part in p.grad.
        seed: of the random starts of "cold".

    `track_leak = True` makes each step measure the largest ||forbidden part|| / ||update|| over its tensors into `update_leak` (a small extra product a tensor).

    Raises ValueError for a basis that does not fit its weight, an unknown option value, a rank below 1 or on a tensor that is no matrix.

    >>> W = torch.nn.Parameter(torch.zeros(4, 3)); V = torch.eye(3)[:, :1]
    >>> opt = SubspaceAdamW([{"params": [W], "constraint": Constraint(inputs=V)}], lr=0.1)
    >>> W.grad = torch.ones(4, 3); opt.step(); W[0].detach()
    tensor([ 0.0000, -0.1000, -0.1000])
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        max_grad_norm: float | None = None,
        seed: int = 0,
    ):
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, constraint=None, rank=None, side="inputs",
            refresh_gap=10, refresh="cold", moments="rotate", scale=1.0, lr_scale=1.0, names=None,
        )  # fmt: skip
        super().__init__(params, defaults)
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.track_leak = False
        self.update_leak: float | None = None
        self.grad_norm: Tensor | None = None

    # -- checking ------------------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for key, allowed in (("side", coordinates.SIDES), ("refresh", coordinates.REFRESH), ("moments", coordinates.MOMENTS)):
            if group[key] not in allowed:
                raise ValueError(f"SubspaceAdamW: {key}={group[key]!r}; one of {', '.join(allowed)}")
        if group["rank"] is not None and group["rank"] < 1 or group["refresh_gap"] < 1:
            raise ValueError(f"SubspaceAdamW: rank={group['rank']} and refresh_gap={group['refresh_gap']} must be at least 1")
        constraint: Constraint | None = group["constraint"]
        for p in group["params"]:
            if group["rank"] is not None and p.ndim != 2:
                raise ValueError(f"SubspaceAdamW: rank={group['rank']} on a tensor of shape {tuple(p.shape)}; low-rank state needs a matrix")
            if constraint is not None:
                constraint.check(p.shape)
                group["constraint"] = constraint = constraint.to(p.device, working_dtype(p.dtype))
            if group["weight_decay"] and (group["rank"] is not None or constraint is not None):
                self.state[p]["start"] = p.detach().to(working_dtype(p.dtype), copy=True)

    @staticmethod
    def _plain(group: dict[str, Any], p: Tensor) -> bool:
        return group["rank"] is None and group["constraint"] is None and working_dtype(p.dtype) == p.dtype

    # -- the step ------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        used = [(group, p, self._gradient(group, p, i)) for i, (group, p) in enumerate(self._each()) if p.grad is not None]
        used = [(group, p, R) for group, p, R in used if R is not None]
        self._clip([R for _, _, R in used])
        leaks = [self._update(group, p, R) for group, p, R in used]
        constrained = any(group["constraint"] is not None and not group["constraint"].empty for group, _, _ in used)
        self.update_leak = max(leaks) if self.track_leak and constrained else None  # where nothing is protected there is nothing to leak into
        return loss

    def _each(self):
        return ((group, p) for group in self.param_groups for p in group["params"])

    def _gradient(self, group: dict[str, Any], p: Tensor, index: int) -> Tensor | None:
        """The gradient as Adam will see it: G, its permitted part, or R = G Q (out, r). None: nothing to do in this step."""
        G = p.grad
        if G.is_sparse:
            raise RuntimeError("SubspaceAdamW does not support sparse gradients")
        dtype, constraint = working_dtype(p.dtype), group["constraint"]
        if group["rank"] is None:
            if constraint is not None:
                G.copy_(constraint.permitted(G.to(dtype)))
            return G if G.dtype == dtype and G.stride() == p.stride() and G.is_contiguous() else G.to(dtype).contiguous()
        return coordinates.gradient(group, self.state[p], G.to(dtype), self.seed, index)

    def _clip(self, gradients: list[Tensor]) -> None:
        if not self.max_grad_norm or not gradients:
            self.grad_norm = None
            return
        self.grad_norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(R.float()) for R in gradients]))
        factor = (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
        for R in gradients:
            R.mul_(factor.to(R.device, R.dtype))

    def _update(self, group: dict[str, Any], p: Tensor, R: Tensor) -> float:
        """Adam on R, then the weight. Returns the leak of the update as computed, before it is rounded into the weight."""
        state, dtype = self.state[p], working_dtype(p.dtype)
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=R.device)  # where the fused kernels want it
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(R), torch.zeros_like(R)
        if group["rank"] is not None:
            state["updates"] = state.get("updates", torch.zeros((), dtype=torch.int64)) + 1
        plain = self._plain(group, p)
        # everything but a plain tensor steps a zero buffer first: the buffer IS the update, so it can be projected, lifted, scaled and measured
        target = p if plain and p.is_contiguous() else torch.zeros_like(R)
        adamw(
            [target], [R], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
            fused=R.dtype != torch.float64 and R.device.type in ("cpu", "cuda"), foreach=False, amsgrad=False, maximize=False,
            beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
            lr=float(group["lr"]) * group["lr_scale"], weight_decay=group["weight_decay"] if target is p else 0.0,
        )  # fmt: skip
        if target is p:
            return 0.0
        return self._apply(group, p, target, dtype)

    def _apply(self, group: dict[str, Any], p: Tensor, delta: Tensor, dtype: torch.dtype) -> float:
        state, constraint = self.state[p], group["constraint"]
        rate = float(group["lr"]) * group["lr_scale"] * group["weight_decay"]
        if group["rank"] is not None:
            delta.mul_(group["scale"])
            L, K = coordinates.factors(group, state, delta)
            if coordinates.covers(group) and not rate:
                if p.dtype == dtype:
                    p.addmm_(L, K)
                else:
                    p.add_((L @ K).to(p.dtype))
                return coordinates.leak(group, state, delta) if self.track_leak else 0.0
            delta = L @ K  # decay and whatever the coordinates do not keep out need the dense update
        if rate:
            delta = delta - rate * (p.to(dtype) - state["start"]) if "start" in state else delta - rate * p.to(dtype)
        if constraint is not None:
            delta = constraint.permitted(delta)
        p.add_(delta.to(p.dtype))
        if not self.track_leak or constraint is None:
            return 0.0
        norm = float(delta.double().norm())
        return constraint.forbidden_norm(delta) / norm if norm > 0 else 0.0

    # -- saving --------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's, without constraints and names: they are the method's to give again. Tensors only: loads with weights_only=True."""
        saved = super().state_dict()
        saved["param_groups"] = [{k: v for k, v in group.items() if k not in NOT_SAVED} for group in saved["param_groups"]]
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        kept = [{k: group[k] for k in NOT_SAVED} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, kept, strict=True):
            group.update(own)
        # torch casts floating state to the weight's dtype; bf16 moments and bases would be ruin, so put the saved values back
        order = [p for group in self.param_groups for p in group["params"]]
        for index, values in state_dict["state"].items():
            p = order[index]
            for key, value in values.items():
                if torch.is_tensor(value):
                    self.state[p][key] = value.detach().clone().to(p.device)

    def state_bytes(self) -> int:
        """Bytes of all state tensors and bases of constraints, each storage once."""
        tensors = [t for state in self.state.values() for t in state.values() if torch.is_tensor(t)]
        for group in self.param_groups:
            c = group["constraint"]
            tensors += [t for t in ((c.inputs, c.outputs, c.mask) if c is not None else ()) if t is not None]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def planned_bytes(self) -> int:
        """Bytes `state_bytes` will report once every tensor has had a step (full ranks, no start copies missing)."""
        total = 0
        for group, p in self._each():
            size = 8 if p.dtype == torch.float64 else 4
            constraint = group["constraint"]
            if group["rank"] is None:
                total += 2 * p.numel() * size + 4
            else:
                m, n, r = coordinates.sizes(group, p.shape)
                total += (2 * m + n) * r * size + 4 + 8  # moments, basis, step, updates
            total += p.numel() * size if group["weight_decay"] and not self._plain(group, p) else 0
            total += sum(t.nbytes for t in (constraint.inputs, constraint.outputs, constraint.mask) if t is not None) if constraint is not None else 0
        return total
