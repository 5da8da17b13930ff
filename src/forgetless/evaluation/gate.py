"""May a new model replace the one before it? Sequential tests of what it lost, on rows that both answered, which say `undecided` where the rows do not suffice.

For each limit L, and each task or watch set that it is about, one row i gives d_i = score before - score now, between -1 and 1, and two hypotheses are tested:

    the limit is kept        E[d] <= L             rejected: the limit is `broken`
    it is broken by a margin E[d] >= L + margin    rejected: `keep`; where neither is: `undecided`

Each test is a bet against its hypothesis (Waudby-Smith and Ramdas 2023, arXiv 2010.09686, section 4). With x_i = d_i - L, or L + margin - d_i, whose mean the
hypothesis says is not above 0, a bettor who begins with 1 and stakes lambda_i >= 0, chosen before row i is seen and so that he cannot lose more than he has, holds

    K_n = prod_{i <= n} (1 + lambda_i x_i),        E[K_n] <= 1 under the hypothesis, and P(K_n ever reaches 1 / level) <= level   (Ville's inequality)

for any bounded scores, any number of rows, however often one looks and whenever one stops; nothing is taken to be normal. The 1 is divided among
    the largest bet, nearly 1 / (largest loss):  fastest where no row, or every one, changes;
    a grid of fixed bets, each half of the last: one of them suits whatever size the drop and the share of rows that change have;
    a bet aimed at the last row there is:        at each row the one for which the least drop brings its part to the target by then, see _aimed().
With the grid alone a drop of the margin takes half as many rows again as a test with a fixed number of them (exact McNemar) to be found with 95 %, with all three a
fifth more, and on average two thirds of them, as most gates end earlier (docs/gate.md has the tables, benchmarks/scripts/gate_power.py makes them).

Over the whole gate: `broken` is by Holm's rule at level alpha over all hypotheses of the first kind, so the chance of any false alarm, over all tasks, watch sets and looks
together, is at most alpha, whatever depends on what. A model is accepted when every limit is `keep`, each at level beta: to be accepted with a broken limit it must pass that
limit's own test, so no correction is needed. max_drift_kl is no test: a measured number is held to a number.

The rows of a file are taken as a sample of the task, and the verdict is about the task: where all rows are used and do not decide, it stays `undecided`.
They must come in an order that has nothing to do with them (a seeded shuffle), the same at every look.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from ..config import GateConfig

SURE = 0.95  # the chance with which the rows that rows_needed() names decide
# parts of the largest bet, the grid and the aimed one against each hypothesis; a third for the largest makes 200 rows without a change `keep` at a margin of 0.02
KEPT = (1 / 6, 1 / 3, 1 / 2)
BROKEN = (1 / 3, 1 / 3, 1 / 3)
REBETS = 32  # the aimed bet is chosen anew after 1/32 of the rows seen, or left, whichever are fewer: all of them would cost time and gain nothing


@dataclass(frozen=True)
class Criterion:
    """One limit and what was seen of it: drops and scores from 0 to 1, max_drift_kl in nats. rows_to_decide: of each task, where it is undecided."""

    limit: str
    name: str | None
    allowed: float
    observed: float
    rows: int
    available: int
    outcome: str
    rows_to_decide: int | None = None


@dataclass(frozen=True)
class Verdict:
    """accept, undecided or reject, and why. wanted: the tasks and watch sets of which more rows may change it; none once it is final."""

    outcome: str
    scorer: str
    alpha: float
    beta: float
    margin: float
    criteria: tuple[Criterion, ...]
    wanted: frozenset[str] = frozenset()

    def content(self) -> dict[str, Any]:
        """What metrics.json holds of it."""
        return {k: v for k, v in asdict(self).items() if k != "wanted"} | {"criteria": [asdict(c) for c in self.criteria]}


@dataclass
class _Hypothesis:
    """E[values] <= limit, or >= limit + margin; values between low and 1, of which there will be `available`."""

    kind: str
    name: str | None
    allowed: float
    observed: float
    values: NDArray
    limit: float
    low: float
    available: int
    needs: list[str]  # whose rows more values would take
    tasks: int = 1  # each value is a mean over


def judge(
    limits: GateConfig,
    scorer: str,
    earlier: Mapping[str, tuple[ArrayLike, ArrayLike]],
    watch: Mapping[str, tuple[ArrayLike, ArrayLike]],
    new_name: str,
    new_scores: ArrayLike,
    drift_kl: float | None,
    available: Mapping[str, int],
) -> Verdict:
    """The verdict on the rows scored so far. Nothing is remembered: give all rows again, with those that `wanted` asked for at the end.

    earlier, watch: name -> (scores before, scores now), of the same rows; new_scores: the new task's; available: name -> rows that may be scored of it in all, which
    must be the same at every look, as the aimed bet looks at it. max_forgetting is tested on the mean drop of the i-th rows of all earlier tasks, i up to the rows
    of the shortest; of the others the rows after those count in max_worst_task only. Raises ValueError on scores that are no numbers from 0 to 1, or not as many before as now.
    """
    hypotheses = list(_hypotheses(limits, earlier, watch, new_name, new_scores, available))
    outcomes = _outcomes([_capitals(h, limits, len(hypotheses)) for h in hypotheses], limits.alpha, limits.beta)
    criteria, wanted = [], set()
    for h, outcome in zip(hypotheses, outcomes, strict=True):
        n, needed = len(h.values), None
        if outcome == "undecided":
            needed = _rows_to_decide(h, limits, len(hypotheses))
            wanted |= {name for name in h.needs if n < h.available}
        criteria.append(Criterion(h.kind, h.name, h.allowed, h.observed, n, h.available, outcome, needed))
    if limits.max_drift_kl is not None:
        if drift_kl is None or not math.isfinite(drift_kl):
            raise ValueError(f"gate.max_drift_kl: the drift was not measured ({drift_kl})")
        kept = "keep" if drift_kl <= limits.max_drift_kl else "broken"
        criteria.append(Criterion("max_drift_kl", None, limits.max_drift_kl, drift_kl, 0, 0, kept))
    found = {c.outcome for c in criteria}
    outcome = "reject" if "broken" in found else "undecided" if "undecided" in found else "accept"
    final = frozenset() if outcome == "reject" else frozenset(wanted)
    return Verdict(outcome, scorer, limits.alpha, limits.beta, limits.margin, tuple(criteria), final)


def with_unknown(verdict: Verdict, limits: GateConfig, earlier: Sequence[str], watch: Sequence[str]) -> Verdict:
    """The verdict where some earlier tasks or watch sets could not be compared at all: what a limit says of them is undecided, and so is what would be accepted."""
    missing = [("max_worst_task", name, limits.max_worst_task) for name in earlier] + [
        ("max_general_drop", name, limits.max_general_drop) for name in watch
    ]
    if earlier and not any(c.limit == "max_forgetting" for c in verdict.criteria):
        missing.append(("max_forgetting", None, limits.max_forgetting))
    more = tuple(Criterion(limit, name, allowed, 0.0, 0, 0, "undecided") for limit, name, allowed in missing if allowed is not None)
    outcome = "undecided" if more and verdict.outcome == "accept" else verdict.outcome
    return replace(verdict, criteria=(*verdict.criteria, *more), outcome=outcome)


def sentence(criterion: Mapping[str, Any]) -> str:
    """A criterion, as Verdict.content() has it, in words; scores in points, 0-100."""
    c, allowed = criterion, f"{criterion['limit']} allows {100 * criterion['allowed']:.4g}"
    if not c["rows"] and c["outcome"] == "undecided":
        return f"{c['name'] or 'the earlier tasks'} could not be compared, rows or scores of before are gone ({allowed})"
    if c["limit"] == "max_drift_kl":
        return f"the model moved by {c['observed']:.3g} nats on the new task's prompts (max_drift_kl allows {c['allowed']:.4g})"
    if c["limit"] == "min_new_task":
        said, allowed = f"{c['name']} has {100 * c['observed']:.1f} points", f"min_new_task asks for {100 * c['allowed']:.4g}"
    else:
        verb = "gained" if c["observed"] < 0 else "lost"
        said = f"{c['name'] or 'the earlier tasks together'} {verb} {100 * abs(c['observed']):.1f} points"
    said = f"{said} on {c['rows']} rows ({allowed})"
    return said if c["outcome"] != "undecided" else f"{said}, too few to tell: about {c['rows_to_decide']} would do, there are {c['available']}"


def rows_needed(flip_rate: float, margin: float, family: int, alpha: float = 0.05, beta: float = 0.05, limit: float = 0.0) -> int:
    """Rows of each task with which a drop of limit + margin is called `broken` with 95 %, and one of the limit `keep`. For planning; no verdict depends on it.

    flip_rate: share of rows whose 0/1 score changes, either way (for other scores, the mean of d^2); family: hypotheses in all, of each limit as many as it has tasks.

    The aimed bet wins about when a test of its part of the level, on a fixed number of rows, would reject. With v the variance of d and z the normal quantile, the larger of
        n = 1.16 v (z(1 - level / 2) + z(0.95))^2 / margin^2                                   level = alpha / family
        n = 1.05 v (z(1 - level / 3) + z(0.95))^2 / margin^2 + 1.5 log(3 / level) / margin     level = beta
    The three factors are from simulation (docs/gate.md): 1.16 makes up for the models that pass on the way, with chance beta at most (above 0.05 it cannot), and the last
    term is for rows that hardly ever change, whose sum is far from normal.
    v is at least b (1 - b), b = limit + margin: 0/1 scores cannot drop by b with fewer flips than that.
    """
    if not 0 <= flip_rate <= 1 or not 0 < margin <= 1 or not 0 <= limit <= 1 or family < 1:
        raise ValueError(f"flip_rate {flip_rate}, margin {margin} and limit {limit} are shares, margin above 0, and family {family} is 1 or more")
    return _rows(max(flip_rate, _least_variance(limit + margin)), margin, family, alpha, beta)


# -- what is tested ------------------------------------------------------------------------------------------------------------------


def _hypotheses(limits: GateConfig, earlier: Mapping, watch: Mapping, new_name: str, new_scores: ArrayLike, available: Mapping[str, int]):
    drops = {name: _drops(name, *pair) for name, pair in (earlier | watch).items()}

    def drop(kind: str, name: str, allowed: float) -> _Hypothesis:
        d = drops[name]
        return _Hypothesis(kind, name, allowed, float(d.mean()), d, allowed, -1.0, max(available[name], len(d)), [name])

    if limits.max_forgetting is not None and earlier:
        rows = min(len(drops[name]) for name in earlier)
        mean = np.mean([drops[name][:rows] for name in earlier], axis=0)
        there, short = min(max(available[name], len(drops[name])) for name in earlier), [name for name in earlier if len(drops[name]) == rows]
        yield _Hypothesis(
            "max_forgetting", None, limits.max_forgetting, float(mean.mean()), mean, limits.max_forgetting, -1.0, there, short, len(earlier)
        )
    if limits.max_worst_task is not None:
        yield from (drop("max_worst_task", name, limits.max_worst_task) for name in earlier)
    if limits.max_general_drop is not None:
        yield from (drop("max_general_drop", name, limits.max_general_drop) for name in watch)
    if limits.min_new_task is not None:  # what is missing to a full score must not be more than what may be missing
        s = _scores(new_name, new_scores)
        there = max(available[new_name], len(s))
        yield _Hypothesis("min_new_task", new_name, limits.min_new_task, float(s.mean()), 1 - s, 1 - limits.min_new_task, 0.0, there, [new_name])


def _scores(name: str, scores: ArrayLike) -> NDArray:
    s = np.asarray(scores, dtype=float)  # None becomes nan
    if s.ndim != 1 or not len(s):
        raise ValueError(f"gate: '{name}' has no rows that were scored")
    if not ((s >= 0) & (s <= 1)).all():
        row = int(np.argmin((s >= 0) & (s <= 1)))
        raise ValueError(f"gate: row {row} of '{name}' has the score {s[row]}, which is no number from 0 to 1")
    return s


def _drops(name: str, before: ArrayLike, now: ArrayLike) -> NDArray:
    b, a = _scores(name, before), _scores(name, now)
    if len(b) != len(a):
        raise ValueError(f"gate: '{name}' has {len(b)} scores before and {len(a)} now; they must be of the same rows")
    return b - a


# -- the bets ------------------------------------------------------------------------------------------------------------------------


def _capitals(h: _Hypothesis, limits: GateConfig, family: int) -> tuple[float, float]:
    """log of the most that each bettor ever held: against `the limit is kept`, and against `it is broken by the margin`."""
    beyond = h.limit + limits.margin
    kept = capital(h.values[None] - h.limit, h.limit - h.low, limits.margin, h.available, limits.alpha / family, KEPT)
    broken = capital(beyond - h.values[None], 1 - beyond, limits.margin, h.available, limits.beta, BROKEN)
    return float(kept.max()), float(broken.max())


def capital(x: NDArray, loss: float, margin: float, available: int, level: float, parts: tuple[float, float, float]) -> NDArray:
    """log K_n for each row n. x (gates, n): what a stake of 1 wins, -loss or more; each line is a gate of its own. loss at or below 0: the hypothesis cannot hold.

    available: rows there are in all; 1 / level: what the aimed bet goes for; parts: KEPT or BROKEN.
    """
    top = 0.999 / max(loss, margin)  # below 1 / loss, so that no row takes everything
    halves = max(1, int(math.log2(top / margin)))  # the smallest bet suits a drop of the margin where every row changes
    grid = np.logaddexp.reduce([np.cumsum(np.log1p(top / 2**k * x), 1) for k in range(1, halves + 1)]) - math.log(halves)
    bets = (np.cumsum(np.log1p(top * x), 1), grid, _aimed(x, top, available, level * parts[2]))
    return np.logaddexp.reduce([bet + math.log(part) for bet, part in zip(bets, parts, strict=True)])


def _aimed(x: NDArray, top: float, available: int, level: float) -> NDArray:
    """log capital of the bet that is aimed at 1 / level by the row `available` (STaR-Bets, arXiv 2505.22422).

    With u = log(1 / level) - log K still to be won, r rows left and x of variance v, a stake lambda wins u once sum x = u / lambda + lambda v r / 2. The least such sum
    is at lambda = sqrt(2 u / (v r)): the bet for which the smallest drop suffices. v is the mean of x^2 so far, begun with one row of 1; a wrong v costs rows, never validity.
    """
    gates, n = x.shape
    K, squares, out, t = np.zeros(gates), np.ones(gates), np.empty(x.shape), 0
    while t < n:
        step = min(max(1, min(t, available - t) // REBETS), n - t)
        u = np.maximum(0.0, -math.log(level) - K)
        stake = np.minimum(top, np.sqrt(2 * u / (squares / (t + 1) * (available - t))))
        out[:, t : t + step] = K[:, None] + np.cumsum(np.log1p(stake[:, None] * x[:, t : t + step]), 1)
        K, squares, t = out[:, t + step - 1].copy(), squares + (x[:, t : t + step] ** 2).sum(1), t + step
    return out


def _outcomes(capitals: Sequence[tuple[float, float]], alpha: float, beta: float) -> list[str]:
    """Holm 1979: the largest capital is held to family / alpha, the next to (family - 1) / alpha, and so on to the first that does not reach it."""
    out = ["keep" if broken >= -math.log(beta) else "undecided" for _, broken in capitals]
    for done, i in enumerate(sorted(range(len(capitals)), key=lambda i: -capitals[i][0])):
        if capitals[i][0] < math.log((len(capitals) - done) / alpha):
            break
        out[i] = "broken"
    return out


# -- planning ------------------------------------------------------------------------------------------------------------------------


def _least_variance(mean: float) -> float:
    return max(0.0, mean * (1 - mean))


def _rows(variance: float, margin: float, family: int, alpha: float, beta: float) -> int:
    def of_a_fixed_test(level: float) -> float:
        return variance * (NormalDist().inv_cdf(1 - level) + NormalDist().inv_cdf(SURE)) ** 2 / margin**2

    broken, keep = of_a_fixed_test(alpha / family * KEPT[2]), of_a_fixed_test(beta * BROKEN[2])
    return math.ceil(max(1.16 * broken, 1.05 * keep + 1.5 * math.log(1 / beta / BROKEN[0]) / margin))


def _rows_to_decide(h: _Hypothesis, limits: GateConfig, family: int) -> int:
    """_rows() for the variance seen, and one standard error more, so that few rows that happened to change little do not name too few.

    Where so many have not decided, the drop is likely to lie between limit and limit + margin: at most half the margin from one of them.
    """
    n, squares = len(h.values), (h.values - h.values.mean()) ** 2
    variance = float(squares.mean() + squares.std() / math.sqrt(n))
    if np.allclose(h.values * h.tasks, np.round(h.values * h.tasks)):  # 0/1 scores
        variance = max(variance, _least_variance(h.limit + limits.margin) / h.tasks)
    margin = limits.margin
    while (needed := _rows(variance, margin, family, limits.alpha, limits.beta)) <= n:
        margin /= 2
    return needed
