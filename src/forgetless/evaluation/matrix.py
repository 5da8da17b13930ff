"""The accuracy matrix and its metrics. a[i][j]: score on task j after training task i; row -1 is the untouched model. Scores are 0-1, macro over tasks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

Row = list[float | None]


@dataclass
class AccuracyMatrix:
    """rows[i][j] in 0-1 or None where not measured; rows may be fewer than tasks while a run is unfinished. before: row -1, None where not measured.

    >>> m = AccuracyMatrix(["a", "b"], [[0.9, None], [0.7, 0.8]])
    >>> m.average_accuracy(), round(m.backward_transfer(), 3), round(m.forgetting(), 3)
    (0.75, -0.2, 0.2)
    """

    tasks: list[str]
    rows: list[Row] = field(default_factory=list)
    before: Row | None = None

    def _last(self) -> list[tuple[int, float]]:
        """(j, a[T-1][j]) over the tasks trained so far that were measured."""
        if not self.rows:
            return []
        return [(j, a) for j, a in enumerate(self.rows[-1][: len(self.rows)]) if a is not None]

    def average_accuracy(self) -> float | None:
        """AA = mean_j a[T-1][j] over the tasks trained so far."""
        return _mean([a for _, a in self._last()])

    def backward_transfer(self) -> float | None:
        """BWT = mean over j < T-1 of a[T-1][j] - a[j][j]; negative is forgetting. None with fewer than two tasks."""
        return _mean([a - self.rows[j][j] for j, a in self._last() if j < len(self.rows) - 1 and self.rows[j][j] is not None])

    def _forgotten(self) -> list[float]:
        earlier = range(len(self.rows) - 1)
        known = [([self.rows[i][j] for i in earlier if i >= j and self.rows[i][j] is not None], a) for j, a in self._last()]
        return [max(scores) - a for scores, a in known if scores]

    def forgetting(self) -> float | None:
        """F = mean over j < T-1 of max_{j <= i < T-1} a[i][j] - a[T-1][j]."""
        return _mean(self._forgotten())

    def worst_forgetting(self) -> float | None:
        """The task that lost most: max over j instead of the mean."""
        return max(self._forgotten(), default=None)

    def learning_accuracy(self) -> float | None:
        """LA = mean_j a[j][j]: how well each task was learned when its turn came."""
        return _mean([row[i] for i, row in enumerate(self.rows) if row[i] is not None])

    def intransigence(self, single_task: Row) -> float | None:
        """mean_j (single_task_j - a[j][j]), where the score of a model trained on task j alone is known."""
        return _mean([s - row[i] for i, (row, s) in enumerate(zip(self.rows, single_task, strict=False)) if row[i] is not None and s is not None])

    def forward_transfer(self) -> float | None:
        """FWT = mean over j >= 1 of a[j-1][j] - a[-1][j] (GEM, arXiv 1706.08840). None unless unseen tasks and the untouched model were measured."""
        if self.before is None:
            return None
        pairs = [(self.rows[j - 1][j], self.before[j]) for j in range(1, len(self.rows)) if j < len(self.tasks)]
        return _mean([a - b for a, b in pairs if a is not None and b is not None])

    def metrics(self) -> dict[str, float | None]:
        names = ("average_accuracy", "backward_transfer", "forgetting", "worst_forgetting", "learning_accuracy", "forward_transfer")
        return {name: getattr(self, name)() for name in names}


def wilson(p: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % Wilson interval of a share p of n rows. For the mean of scores between 0 and 1 it is too wide, never too narrow: none varies more than yes and no.

    >>> [round(x, 3) for x in wilson(0.5, 100)]
    [0.404, 0.596]
    """
    if n == 0:
        return (0.0, 1.0)
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n)))


def paired_bootstrap(a: list[float], b: list[float], draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """(difference, low, high): mean(a - b) over the same rows and its 95 % bootstrap interval."""
    import numpy as np

    d = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    means = np.random.default_rng(seed).choice(d, size=(draws, len(d))).mean(1)
    return float(d.mean()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
