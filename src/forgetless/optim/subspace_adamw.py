"""AdamW whose state may live in a low-rank subspace and whose update may be kept off protected directions, exactly.

Four kinds of tensor, in any mixture, chosen by the parameter group:
- plain: nothing set. torch's AdamW, to the bit.
- `constraint`: dense Adam; the part of the finished step that the Constraint forbids is removed AFTER Adam's division. (Projecting the gradient only
  leaks: dividing by sqrt(v) element by element does not commute with a projection. tests/test_optim.py shows it on the authors' own numbers: over a tenth.)
- `rank`: G (out, in) is used in r coordinates R = G Q (GaLore, arXiv 2403.03507), Adam runs on R, the step is lifted back: dW = -lr * step(R) Q^T; or on
  both sides, R = P^T G Q and dW = -lr * P step(R) Q^T (GORP eq. 3-4). With a constraint on the inputs, Q is drawn orthogonal to it, so no element-wise
  operation on R can reach the protected space; P likewise on the outputs (coordinates.py).
- `directions`: the same in given P and Q that are never chosen anew (OSFT, arXiv 2504.07097: the singular directions of W that may learn).

Moments and bases are per-parameter tensors in fp32 (fp64 for fp64 weights), also for bf16 and fp16 weights, whose own coarseness is `precision`'s matter
(rounding.py); all state loads with weights_only=True. Not for: sparse gradients, complex weights, tensors that are not matrices with a rank or a basis.

Parameters that fully_shard has spread over processes by rows (sharding.py) are trained as the whole matrix is: each process keeps the state of its own rows.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..fake import storage_key
from ..products import add_product_, full_precision, product
from ..sharding import ALONE, Imagined, Spread, is_sharded, like, local, norms, rows_of, whole
from ..subspace import Constraint, working_dtype
from . import coordinates, moments, rounding
from .captured import Captured

# what a group holds that is not a number: taken from the running program, never from a checkpoint
NOT_SAVED = ("constraint", "directions", "names", "release", "observe")
BATCH = 1 << 22  # numbers that go through Adam in one call

Used = tuple[dict[str, Any], Tensor, Tensor, int]  # in one step: group, weight, R, the weight's place among all


class SubspaceAdamW(torch.optim.Optimizer):
    """AdamW with low-rank state and protected subspaces.

    Args:
        params: tensors or parameter groups. A group may carry, beside lr, betas, eps and weight_decay:
            constraint (Constraint, optional): where the update must not go.
            rank (int, optional): keep the state in this many directions; None is dense.
            side (str): "inputs" (R = G Q, Q in x r; state (2 out + in) r), "outputs" (R = Q^T G, Q out x r; (2 in + out) r), or "both" (R = P^T G Q,
                P out x r, Q in x r; (2 r + out + in) r).
            directions (pair, optional): in place of a rank, fixed orthonormal P (out, p) and Q (in, q), R = P^T G Q, dW = P step(R) Q^T, so all outside span(P) and
                span(Q) is protected. Either may be None: that side stays whole, R is held off what the constraint protects there before Adam and after it.
            release (bool): with directions or a rank, take R from a gradient as soon as backward has made it and let the gradient go, so that no two whole ones live
                at once. Micro-batches add up in R (each costs the products). p.grad is None at the step; clipping is by the norm of all R, as without it. Of a rank's
                directions: they are chosen for the step's whole gradient where `optimizer.micro_batches` says how many make a step (those gradients are kept until
                then), else for the first micro-batch's.
            observe (callable): with release, observe(G) sees each whole gradient before it goes, but for those that are kept.
            transposed (bool): the weight is stored (in, out), as transformers' Conv1D does; constraint, directions and side speak of the logical (out, in)
                matrix all the same. `param_groups` then shows them as they are for the stored weight, and no `transposed`.
            refresh_gap (int): steps between two choices of Q, and P.
            stagger (bool): choose Q of one tensor in one step and of the next in the next, so that no step is refresh_gap times as long as the others.
            refresh (str): "cold" (two subspace iterations from a seeded random start), "warm" (one, from the old Q), "exact" (eigh of the Gram matrix), "svd".
                With both sides, P is what G Q points along.
            projection (str): "bf16" multiplies R = G Q in bf16, which is quicker where the processor's units for it are, from a rank of 32 or so. R is then off by
                a few thousandths; Q, the step, and with them what is protected, stay in fp32. "fp32" otherwise.
            moments (str): at a refresh "rotate" them into the new basis, "reset" them with the step count, or "keep" them as they are (what GaLore does).
            scale (float): multiplies the low-rank step (GaLore's alpha).
            lr_scale (float): multiplies lr for this group, so that one scheduler reaches groups with different rates.
            precision (str), optimizer_state (str): as below, for this group.
        lr: step size. betas, eps: as in torch.optim.AdamW.
        weight_decay: plain tensors decay toward zero; constrained or low-rank ones toward their value at the optimizer's creation (the task's start),
            inside the permitted directions: decay toward zero would itself be forgetting.
        precision: what becomes of updates too small for a bf16 or fp16 weight; no effect on fp32 and fp64 ones. "fp32_master" (4 bytes an element: the weight is
            the rounding of an fp32 copy, made at its first step; what else writes to the weight later is overwritten), "stochastic_rounding" (none; up or
            down at random, right in the mean), "kahan" (2 bytes: what rounding lost joins the next update), "plain" (updates under half an ulp vanish).
        optimizer_state: what the moments are kept in between steps: "fp32", or "8bit" (moments.py; a quarter of the bytes, by bitsandbytes).
        max_grad_norm: clip the global norm of the gradients AS USED (after projection, in the r coordinates for low-rank tensors); None or 0 never clips.
            The gradients of constrained tensors are replaced by their permitted part in p.grad.
        seed: of the random starts of "cold", and of stochastic rounding.

    `track_leak = True` makes each step measure the largest ||forbidden part|| / ||update|| over its tensors into `update_leak` (a small extra product a tensor).
    `track_captured = True` makes each step that chooses directions note the share of a gradient's energy they hold, ||R||^2 / ||G||^2, its mean over the tensors, in
    `captured`, and every tenth choice how much that is of the most r directions could hold (as a longer search finds it), on one tensor, in `captured_of_best`. Both
    None in other steps.

    Raises ValueError for a basis that does not fit its weight, an unknown option value, a rank below 1, a rank or `transposed` on a tensor that is no matrix.

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
        precision: str = "fp32_master",
        optimizer_state: str = "fp32",
        max_grad_norm: float | None = None,
        seed: int = 0,
    ):
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, constraint=None, rank=None, directions=None, release=False, observe=None, side="inputs",
            refresh_gap=10, stagger=False, refresh="cold", projection="fp32", moments="rotate", scale=1.0, lr_scale=1.0, precision=precision,
            optimizer_state=optimizer_state, names=None,
        )  # fmt: skip
        self._released: dict[Tensor, Tensor] = {}  # R of the gradients that were let go since the last step
        self._order: list[Tensor] = []  # the parameters as they were at the last step
        self.micro_batches = 1
        super().__init__(params, defaults)
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.track_leak = False
        self.update_leak: float | None = None
        self.track_captured = False
        self.captured: float | None = None
        self.captured_of_best: float | None = None
        self._noted = Captured()
        self.grad_norm: Tensor | None = None

    # -- checking ------------------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(dict(param_group))  # a copy: what is changed below stays out of the caller's group, who may use it again
        group = self.param_groups[-1]
        constraint: Constraint | None = group["constraint"]
        transposed = group.pop("transposed", False)
        options = dict(side=coordinates.SIDES, refresh=coordinates.REFRESH, moments=coordinates.MOMENTS, projection=coordinates.PROJECTIONS, precision=rounding.PRECISIONS,
                       optimizer_state=moments.KINDS)  # fmt: skip
        for key, allowed in options.items():
            if group[key] not in allowed:
                raise ValueError(f"SubspaceAdamW: {key}={group[key]!r}; one of {', '.join(allowed)}")
        if not isinstance(transposed, bool):
            raise ValueError(f"SubspaceAdamW: transposed={transposed!r}; True for a weight stored (in, out), or False")
        if group["release"] and not coordinates.reduced(group):
            raise ValueError("SubspaceAdamW: release=True needs directions or a rank: a dense gradient is no smaller as Adam uses it")
        if group["rank"] is not None and group["rank"] < 1 or group["refresh_gap"] < 1:
            raise ValueError(f"SubspaceAdamW: rank={group['rank']} and refresh_gap={group['refresh_gap']} must be at least 1")
        if group["projection"] == "bf16" and (group["rank"] is None or any(p.dtype == torch.float64 for p in group["params"])):
            raise ValueError("SubspaceAdamW: projection='bf16' is how a gradient is read in the coordinates of a rank, and not for fp64 weights")
        for p in group["params"]:
            if group["rank"] is not None and p.ndim != 2:
                raise ValueError(f"SubspaceAdamW: rank={group['rank']} on a tensor of shape {tuple(p.shape)}; low-rank state needs a matrix")
            if transposed and p.ndim != 2:
                raise ValueError(f"SubspaceAdamW: transposed=True on a tensor of shape {tuple(p.shape)}; only a matrix is stored as its transpose")
            if constraint is not None:
                constraint.check(p.shape[::-1] if transposed else p.shape)
            if group["directions"] is not None:
                coordinates.check_directions(group, p.shape[::-1] if transposed else p.shape)
        group.setdefault("flipped", transposed)  # which way both sides are read; there already where the group comes from another optimizer
        if transposed:  # from here on everything speaks of the weight as stored
            group["side"] = {"inputs": "outputs", "outputs": "inputs", "both": "both"}[group["side"]]
            constraint = None if constraint is None else constraint.transposed
            group["directions"] = None if group["directions"] is None else group["directions"][::-1]
        for p in group["params"]:
            if group["directions"] is not None:
                group["directions"] = tuple(None if B is None else B.detach().to(p.device, working_dtype(p.dtype)) for B in group["directions"])
            if constraint is not None:
                constraint = constraint.to(p.device, working_dtype(p.dtype))
            if group["optimizer_state"] == "8bit" and rows_of(p) is not ALONE:
                raise ValueError("SubspaceAdamW: optimizer_state='8bit' scales blocks of numbers, which a sharded parameter cuts through; use fp32")
            if self._keeps_start(group):
                self.state[p]["start"] = local(p.detach()).to(working_dtype(p.dtype), copy=True)
        if constraint is not None and not coordinates.reduced(group):
            constraint.prepare(outputs=not any(is_sharded(p) for p in group["params"]))
        group["constraint"] = constraint
        self._order += group["params"]
        if group["release"]:
            if any(is_sharded(p) for p in group["params"]):
                raise ValueError("SubspaceAdamW: release=True takes a whole gradient, and sharded parameters have none; leave it out")
            first = sum(len(g["params"]) for g in self.param_groups[:-1])
            for i, p in enumerate(group["params"]):
                self._release_gradients(p, first + i)

    @staticmethod
    def _keeps_start(group: dict[str, Any]) -> bool:
        return bool(group["weight_decay"]) and (coordinates.reduced(group) or group["constraint"] is not None)

    # -- the step ------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with full_precision():
            self._step()
        return loss

    def _step(self) -> None:
        self._follow()
        own = [(coordinates.part(group, p), p, i) for i, (group, p) in enumerate(self._each()) if p.grad is not None or p in self._released]
        if not any(self.state.values()) and not self._released and not any(norms([(rows_of(p), local(p.grad)) for _, p, _ in own])):
            return  # torch.distributed.checkpoint's way to have a state made, which comes with the first gradient: nothing is counted as a step
        used = [(group, p, self._gradient(group, p, i), i) for group, p, i in own]
        used = [(group, p, coordinates.cleaned(group, R), i) for group, p, R, i in used if R is not None]
        self._clip(used)
        self.captured, self.captured_of_best = self._noted.take()
        leaks = [leak for batch in _batches(used) for leak in self._update(batch)]
        constrained = any(coordinates.protects(group) for group, *_ in used)
        self.update_leak = max(leaks) if self.track_leak and constrained else None  # where nothing is protected there is nothing to leak into

    def _each(self):
        return ((group, p) for group in self.param_groups for p in group["params"])

    def _follow(self) -> None:
        """Parameters may have been replaced since they were given, by those that fully_shard makes of them: what is kept of the old ones is the new ones', by their places."""
        now = [p for _, p in self._each()]
        for (group, p), old in zip(self._each(), self._order, strict=True):
            if p is not old and old in self.state:
                part = coordinates.part(group, p)
                self.state[p] = {key: _own(part, key, t) for key, t in self.state.pop(old).items()}
        self._order = now

    def _gradient(self, group: dict[str, Any], p: Tensor, index: int) -> Tensor | None:
        """The gradient as Adam will see it: G, its permitted part, or its coordinates R. None: nothing to do in this step."""
        return self._released.pop(p) if p in self._released else self._reduce(group, p, index)

    def _reduce(self, group: dict[str, Any], p: Tensor, index: int, refresh: bool = True) -> Tensor | None:
        G = local(p.grad)
        if G.is_sparse:
            raise RuntimeError("SubspaceAdamW does not support sparse gradients")
        dtype, constraint = working_dtype(p.dtype), group["constraint"]
        if constraint is not None and constraint.full:
            return None
        if not coordinates.reduced(group):
            if constraint is not None and G.dtype == dtype:
                constraint.restrict_(G)
            elif constraint is not None:
                permitted = constraint.restrict_(G.to(dtype))
                G.copy_(permitted)
                G = permitted  # what bf16 would round away is still here
            return G if G.dtype == dtype and G.stride() == local(p).stride() and G.is_contiguous() else G.to(dtype).contiguous()
        chosen = partial(self._note, group, p, index) if self.track_captured else None
        return coordinates.gradient(group, self.state[p], G.to(dtype), self.seed, index, refresh, chosen)

    def _note(self, group: dict[str, Any], p: Tensor, index: int, G: Tensor, R: Tensor) -> None:
        ranked = [i for i, (other, _) in enumerate(self._each()) if other["rank"] is not None]
        self._noted.note(group, int(self.state[p].get("updates", 0)), ranked.index(index), len(ranked), G, R)

    def _release_gradients(self, p: Tensor, index: int) -> None:
        """From now on p's gradient becomes R as soon as backward is done with it. Ends with the optimizer."""
        held, number = weakref.ref(self), len(self.param_groups) - 1

        def take(p: Tensor) -> None:
            optimizer = held()
            if optimizer is None or p.grad is None:  # none where the layer has handed R in already
                return
            group = optimizer.param_groups[number]  # as it is now: a reload brings new ones
            begun = p in optimizer._released
            if group["rank"] is not None and optimizer.micro_batches > 1 and not begun and coordinates.due(group, optimizer.state[p], index):
                return  # kept: directions are chosen for the whole step's gradient
            with torch.no_grad(), full_precision():
                if group["observe"] is not None:
                    group["observe"](p.grad)
                R = optimizer._reduce(group, p, index, refresh=not begun)
            p.grad = None
            if R is not None:
                optimizer._add_up(p, R)

        weakref.finalize(self, p.register_post_accumulate_grad_hook(take).remove)

    @torch.no_grad()
    def receive(self, group: dict[str, Any], p: Tensor, R: Tensor, permitted: bool = False) -> None:
        """Add R, the gradient of p in the coordinates of its group's directions, to what the next step will use. (optim/released.py hands it in.)

        permitted: nothing of R lies in what is closed on a side that stays whole, but for rounding.
        """
        if R.numel():
            R = R.to(working_dtype(p.dtype)).contiguous()
            self._add_up(p, R if permitted else coordinates.restrict_whole_side_(group, R))

    @torch.no_grad()
    def _add_up(self, p: Tensor, R: Tensor) -> None:
        self._released[p] = R if p not in self._released else self._released[p].add_(R)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._released.clear()
        self._noted.take()

    def _clip(self, used: list[Used]) -> None:
        if not self.max_grad_norm or not used:
            self.grad_norm = None
            return
        self.grad_norm = torch.linalg.vector_norm(torch.stack(norms([(coordinates.spread_state(group, "exp_avg"), R) for group, _, R, _ in used])))
        factor = (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
        for _, _, R, _ in used:
            R.mul_(factor.to(R.device, R.dtype))

    def _update(self, batch: list[Used]) -> list[float]:
        """Adam on every R, one call for all that share its settings, then the weights. Returns each update's leak as computed, before it is rounded into the weight."""
        together: dict[tuple, list[tuple]] = defaultdict(list)
        for group, p, R, index in batch:
            state = self.state[p]
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=R.device)  # where the fused kernels want it
                moments.write(state, (torch.zeros_like(R), torch.zeros_like(R)), "fp32")
            if group["rank"] is not None or rounding.counts_updates(p, group["precision"]):
                state["updates"] = state.get("updates", torch.zeros((), dtype=torch.int64)) + 1
            rounding.prepare(local(p), state, group["precision"])
            W = rounding.exact(local(p), state)
            # everything but a plain tensor steps a zero buffer first: the buffer IS the update, so it can be projected, lifted, scaled and measured
            plain = not coordinates.reduced(group) and group["constraint"] is None and W is not None and W.is_contiguous()
            target = W if plain else torch.zeros_like(R)
            rate, decay = float(group["lr"]) * group["lr_scale"], group["weight_decay"] if plain else 0.0
            fused = R.dtype != torch.float64 and R.device.type in ("cpu", "cuda")
            tensors = (target, R, *moments.read(state), state["step"])
            together[rate, decay, *group["betas"], group["eps"], fused].append((group, p, index, plain, *tensors))
        leaks = []
        for (rate, decay, beta1, beta2, eps, fused), alike in together.items():
            groups, weights, indices, plains, targets, gradients, first, second, steps = map(list, zip(*alike, strict=True))
            adamw(
                targets, gradients, first, second, [], steps,
                fused=fused, foreach=False, amsgrad=False, maximize=False, lr=rate, beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay,
            )  # fmt: skip
            for group, p, index, plain, target, *pair in zip(groups, weights, indices, plains, targets, first, second, strict=True):
                moments.write(self.state[p], pair, group["optimizer_state"])
                if plain:
                    rounding.settle(local(p), target)
                else:
                    leaks.append(self._apply(group, p, target, index))
        return leaks

    def _apply(self, group: dict[str, Any], p: Tensor, delta: Tensor, index: int) -> float:
        """Lift the step to the weight's shape, decay, take off what is forbidden, add it to the weight. Returns the leak."""
        state, constraint, rows = self.state[p], group["constraint"], group.get("rows", ALONE)
        rate = float(group["lr"]) * group["lr_scale"] * group["weight_decay"]
        seeds = (self.seed, index, int(state.get("updates", 0)), 1, *([] if rows is ALONE else [rows.start]))
        p = local(p)
        if coordinates.reduced(group):
            delta.mul_(group["scale"])
            if group["directions"] is not None:
                coordinates.restrict_whole_side_(group, delta)
            L, K = coordinates.factors(group, state, delta)
            if coordinates.covers(group) and not rate:
                W = rounding.exact(p, state)
                if W is None:
                    rounding.add(p, product(L, K), state, group["precision"], seeds)
                else:
                    add_product_(W, L, K)
                    rounding.settle(p, W)
                return coordinates.leak(group, state, delta) if self.track_leak else 0.0
            delta = product(L, K)  # decay and whatever the coordinates do not keep out need the dense update
        if rate:
            W = rounding.value(p, state)
            delta = delta - rate * (W - state["start"]) if "start" in state else delta - rate * W
        if constraint is not None:
            constraint.restrict_(delta)
        rounding.add(p, delta, state, group["precision"], seeds)
        norm = float(rows.norm(delta.double())) if self.track_leak and coordinates.protects(group) else 0.0
        return coordinates.forbidden_norm(group, delta) / norm if norm > 0 else 0.0

    # -- saving --------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's, without constraints and names: they are the method's to give again. Tensors only: loads with weights_only=True.

        What a sharded parameter has of its own rows is a DTensor, as torch.distributed.checkpoint has it, also for other numbers of processes.
        """
        self._follow()
        saved = super().state_dict()
        for index, (group, p) in enumerate(self._each()):
            if index in saved["state"] and rows_of(p) is not ALONE:
                part = coordinates.part(group, p)
                saved["state"][index] = {key: _spread(part, key, t, p) for key, t in saved["state"][index].items()}
        saved["param_groups"] = [{k: v for k, v in group.items() if k not in NOT_SAVED} for group in saved["param_groups"]]
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's: options come from `state_dict`, but for constraints and names; an option it does not know yet keeps its value.

        State may be whole or spread over any number of processes.
        """
        kept = self.param_groups
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, kept, strict=True):
            group.update({k: v for k, v in own.items() if k in NOT_SAVED or k not in group})
        # torch casts floating state to the weight's dtype; bf16 moments, bases and masters would be ruin, so put the saved values back
        self._order = [p for _, p in self._each()]
        parts = [coordinates.part(group, p) for group, p in self._each()]
        # torch.distributed.checkpoint's keys are the parameters' names
        places = {key: i for i, key in enumerate(key for group in state_dict["param_groups"] for key in group["params"])}
        for index, values in state_dict["state"].items():
            place = places[index]
            p = self._order[place]
            for key, value in values.items():
                if torch.is_tensor(value):
                    self.state[p][key] = _own(parts[place], key, value.detach()).clone().to(p.device)
            if not rounding.is_coarse(p):  # saved with a bf16 weight: an fp32 one needs neither, and a master that no longer moves would be believed
                self.state[p].pop("master", None)
                self.state[p].pop("compensation", None)

    def state_bytes(self) -> int:
        """Bytes of all state tensors, bases of constraints and given directions, each storage once."""
        return _storage_bytes([t for state in self.state.values() for t in state.values() if torch.is_tensor(t)] + self._given_tensors())

    def planned_bytes(self, processes: int = 1) -> int:
        """Bytes `state_bytes` will report once every tensor has had a step (full ranks, no start copies missing); in the first of so many that share the model."""
        total = _storage_bytes(self._given_tensors(shared=processes > 1))
        for group, p in self._each():
            part = group if processes == 1 else group | {"rows": Spread(p.shape[0], Imagined(processes))}
            size, rows = working_dtype(p.dtype).itemsize, part.get("rows", ALONE)
            if group["constraint"] is not None and group["constraint"].full:  # never stepped
                total += rows.held(p.numel()) * size if self._keeps_start(group) else 0
                continue
            if not coordinates.reduced(group):
                total += moments.planned_bytes(rows.held(p.numel()), working_dtype(p.dtype), group["optimizer_state"]) + 4  # step
            else:
                numbers = coordinates.numbers(group, p.shape)
                held = coordinates.spread_state(part, "exp_avg").held(numbers)
                total += moments.planned_bytes(held, working_dtype(p.dtype), group["optimizer_state"]) + 4
                total += coordinates.chosen_numbers(part, p.shape) * size
            total += 8 if group["rank"] is not None or rounding.counts_updates(p, group["precision"]) else 0  # updates
            total += rows.held(p.numel()) * size if self._keeps_start(group) else 0
            total += rows.held(rounding.planned_bytes(p, group["precision"]))
        return total

    def _given_tensors(self, shared: bool = False) -> list[Tensor]:
        """shared: as of weights whose rows are spread over processes, from the start."""
        constraints = [group["constraint"] for group in self.param_groups if group["constraint"] is not None]
        directions = [B for group in self.param_groups for B in group["directions"] or ()]
        given = [t for c in constraints for t in (c.inputs, c.outputs, c.mask, *c.open[: 1 if shared else 2])]
        return [t for t in (*given, *directions) if t is not None]


def _batches(used: list[Used]) -> Iterator[list[Used]]:
    """`used` in order, in parts that together have no more than BATCH numbers: small tensors share one call, and the buffers of large ones do not pile up.

    Of sharded ones the numbers of all processes count: what these exchange they must come to in one order.
    """
    batch: list[Used] = []
    size = 0
    for one in used:
        numbers = coordinates.spread_state(one[0], "exp_avg").shape(one[2]).numel()
        if batch and size + numbers > BATCH:
            yield batch
            batch, size = [], 0
        batch.append(one)
        size += numbers
    if batch:
        yield batch


def _own(part: dict[str, Any], key: str, t: Any) -> Any:
    """Of a tensor of the state, whole or spread, the own rows of a group as coordinates.part has it."""
    return coordinates.spread_state(part, key).own(whole(t)) if torch.is_tensor(t) and t.ndim else t


def _spread(part: dict[str, Any], key: str, t: Any, p: Tensor) -> Any:
    """The inverse: a DTensor that lies as p does, or t itself where every process has all of it."""
    rows = coordinates.spread_state(part, key)
    return like(p, t, rows.total) if torch.is_tensor(t) and t.ndim and rows is not ALONE else t


def _storage_bytes(tensors: list[Tensor]) -> int:
    return sum({storage_key(t): t.untyped_storage().nbytes() for t in tensors}.values())
