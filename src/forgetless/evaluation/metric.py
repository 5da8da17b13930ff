"""A task's own metric: what the scorer `metric` measures, one number from 0 to 1 a row, higher is better.

choice, exact_match   as in scorers.py
rouge_l               ROUGE-L F-measure of the generated answer, by the package rouge-score, without stemming. It reads a-z and 0-9 only
nll                   exp(mean log-probability of the answer's tokens, end token included), nothing generated: 1 / perplexity of the answer
module:function       function(prediction, answer) of the user's, on the generated answer
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ..errors import ConfigError, DataError
from ..importing import named


def generates(name: str) -> bool:
    """Does this metric need a generated answer?"""
    return name not in ("choice", "nll")


def check(task: Any, rows: list) -> None:
    """Refuse, before anything is trained, a metric of `task` that cannot score its `rows`. Raises ConfigError, or DataError for a missing package or a row."""
    where, name = f"task '{task.name}': metric {task.own_metric}", task.own_metric
    if name == "choice" and not task.labels:
        raise ConfigError(f"{where}: the task has no labels to choose among; use exact_match, rouge_l or nll")
    try:
        if name == "rouge_l":
            _rouge()
            bad = next((e for e in rows if not re.search("[a-z0-9]", e.answer.lower())), None)
            if bad is not None:
                place = bad.place or f"row {bad.row}"
                raise DataError(
                    f"{place}: ROUGE-L reads a-z and 0-9 only, so the answer {bad.answer[:40]!r} could never score; use exact_match or nll"
                )
        elif ":" in name:
            score(name, rows[0].answer, rows[0].answer)
    except (ConfigError, DataError) as error:
        raise type(error)(f"{where}: {error}") from error


def score(name: str, prediction: str, answer: str) -> float:
    """The metric `name`, one that generates, of one generated answer; white space round both texts does not count."""
    prediction, answer = prediction.strip(), answer.strip()
    if name == "rouge_l":
        return _rouge().score(answer, prediction)["rougeL"].fmeasure
    try:
        value = function(name)(prediction, answer)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{name} raised {type(error).__name__}: {error}, on prediction {prediction[:80]!r} and answer {answer[:80]!r}") from error
    if not isinstance(value, numbers.Real) or not 0 <= value <= 1 or math.isnan(value):
        raise ConfigError(
            f"{name} returned {value!r} on prediction {prediction[:80]!r} and answer {answer[:80]!r}; it must return a number from 0 to 1"
        )
    return float(value)


@lru_cache
def function(name: str) -> Callable[[str, str], float]:
    """The function that "module:function" names, looked for in the working directory and on sys.path."""
    return named(name, "function")


@lru_cache
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise DataError("it needs the package rouge-score, which is not installed. Run: pip install 'forgetless[eval]'") from None
    return RougeScorer(["rougeL"])
