"""Views of what was decided: the gate's verdict on each model, criterion by criterion, and the history of commits, refusals and rollbacks."""

from __future__ import annotations

from typing import Any

from .numbers import count, fixed, get, mapping, number, objects, percent
from .read import Commit, Run, folder_of
from .scores import named_scorer

OUTCOMES = {"accept": "accepted", "undecided": "undecided", "reject": "refused"}
KEPT = {"keep": "kept", "undecided": "undecided", "broken": "broken"}
SHOWN = 12  # criteria of one verdict: one a task and watch set, so that a hundred tasks would have a hundred


def gate_view(run: Run) -> list[dict[str, Any]]:
    """One verdict a model, in the order they came: {task, outcome, text, settings, criteria, more, examples}."""
    order = {(line.get("kind") == "reject", folder_of(line)): place for place, line in enumerate(run.lineage)}
    judged = [(c, False) for c in run.commits] + [(c, True) for c in run.rejected]
    judged = [pair for pair in judged if mapping(pair[0].metrics.get("gate"))]
    return [verdict(commit, aside) for commit, aside in sorted(judged, key=lambda pair: order.get((pair[1], pair[0].folder), len(order)))]


def verdict(commit: Commit, aside: bool) -> dict[str, Any]:
    gate = mapping(commit.metrics["gate"])
    outcome = str(gate.get("outcome"))
    text = OUTCOMES.get(outcome, outcome)
    if outcome == "undecided":
        text += ", kept aside" if aside else ", accepted"
    criteria = sorted(objects(gate.get("criteria")), key=urgency)
    shown = criteria[: max(SHOWN, sum(c.get("outcome") != "keep" for c in criteria))]
    settings = [f"by {named_scorer(gate['scorer'])}"] if gate.get("scorer") else []
    settings += [f"{name} {value:g}" for name in ("alpha", "beta") if (value := number(gate.get(name))) is not None]
    settings += [f"margin {percent(gate['margin'])} points"] if number(gate.get("margin")) is not None else []
    return {
        "task": commit.task, "title": f"{commit.index + 1}. {commit.task}", "outcome": outcome, "text": text, "aside": f"rejected/{commit.folder}" if aside else None,
        "settings": ", ".join(settings), "counts": counts(criteria), "criteria": [criterion(c, commit.task) for c in shown], "more": len(criteria) - len(shown),
        "examples": [example(str(name), row) for name, rows in mapping(gate.get("examples")).items() for row in objects(rows)],
        "stopped": count(commit.metrics.get("stopped_at")),
    }  # fmt: skip


def counts(criteria: list[dict[str, Any]]) -> str:
    """`1 limit broken, 3 kept`."""
    outcomes = [str(c.get("outcome")) for c in criteria]
    said = [(outcomes.count(outcome), KEPT[outcome]) for outcome in ("broken", "undecided", "keep") if outcome in outcomes]
    return ", ".join(f"{n} {'' if i else 'limit ' if n == 1 else 'limits '}{text}" for i, (n, text) in enumerate(said))


def urgency(criterion: dict[str, Any]) -> tuple[int, float]:
    """Broken before undecided before kept, and then what is nearest to its limit."""
    allowed, observed = number(criterion.get("allowed")) or 0.0, number(criterion.get("observed")) or 0.0
    room = observed - allowed if criterion.get("limit") == "min_new_task" else allowed - observed
    return (["broken", "undecided"].index(outcome) if (outcome := criterion.get("outcome")) in ("broken", "undecided") else 2, room)


def criterion(found: dict[str, Any], task: str) -> dict[str, Any]:
    """One limit as text: what it is about, what was allowed, observed, on how many rows, and what it says."""
    limit, name = str(found.get("limit")), found.get("name")
    about = {
        "max_worst_task": f"Drop of {name}",
        "max_forgetting": "Mean drop of the earlier tasks",
        "min_new_task": f"Score of {name or task}, the new task",
        "max_drift_kl": "Drift on the new prompts, nats",
        "max_general_drop": f"Drop of {name}, watched",
    }.get(limit, limit)
    shown = (lambda v: fixed(v, 3)) if limit == "max_drift_kl" else percent
    rows, available, more = (count(found.get(key)) for key in ("rows", "available", "rows_to_decide"))
    outcome = str(found.get("outcome"))
    return {
        "limit": limit, "about": about, "allowed": None if (allowed := shown(found.get("allowed"))) is None else f"{'≥' if limit == 'min_new_task' else '≤'} {allowed}",
        "observed": shown(found.get("observed")), "rows": None if rows is None else f"{rows} of {available or '?'}",
        "decide": f"{more} rows{' of each task' if limit == 'max_forgetting' else ''} would decide" if outcome == "undecided" and more else None,
        "outcome": outcome, "text": KEPT.get(outcome, outcome),
    }  # fmt: skip


def example(name: str, row: dict[str, Any]) -> dict[str, Any]:
    return {"task": name, **{key: row.get(key) for key in ("row", "text", "answer", "before", "after")}}


def gate_summary(verdicts: list[dict[str, Any]]) -> str | None:
    """`3 accepted, 1 refused`; None where there was no gate."""
    texts = [v["text"] for v in verdicts]
    return ", ".join(f"{texts.count(text)} {text.replace(', ', ' and ')}" for text in dict.fromkeys(texts)) or None


def history(run: Run) -> list[dict[str, Any]]:
    """Every line of the lineage, oldest first, and what of it stands now."""
    tags: dict[str, list[str]] = {}
    for tag, folder in run.tags.items():
        tags.setdefault(folder, []).append(tag)
    rows = []
    for place, line in enumerate(run.lineage, 1):
        kind, folder, index = line.get("kind"), folder_of(line), line.get("index")
        number_of = f"{index + 1}. " if isinstance(index, int) else ""
        what = {"reject": "refused", "rollback": "rolled back to"}.get(str(kind), "learned" if kind == "task" else str(kind))
        marks = []
        if kind == "task":
            marks = [*(["current"] if folder == run.current else []), *(["rolled back"] if run.current and folder not in run.head else [])]
            marks += [f"tag {tag}" for tag in sorted(tags.get(folder, []))]
        if kind == "reject":
            marks = [f"kept aside in rejected/{folder}"]
        gate = OUTCOMES.get(str(line.get("gate")), line.get("gate"))
        hashes = [text[:12] if isinstance(text := line.get(key), str) else None for key in ("model_sha256", "hash")]
        rows.append({
            "place": place, "what": what, "kind": kind, "task": f"{number_of}{line.get('task')}", "folder": folder,
            "marks": ", ".join(marks), "gate": None if gate is None else str(gate), "model": hashes[0], "hash": hashes[1],
        })  # fmt: skip
    known = {folder_of(line) for line in run.lineage if line.get("kind") == "reject"}
    for commit in run.rejected:
        if commit.folder not in known:
            outcome = get(commit.metrics.get("gate"), "outcome")
            rows.append({
                "place": None, "what": "refused", "kind": "reject", "task": f"{commit.index + 1}. {commit.task}", "folder": commit.folder, "model": None, "hash": None,
                "marks": f"kept aside in rejected/{commit.folder}, not in the lineage", "gate": OUTCOMES.get(str(outcome)),
            })  # fmt: skip
    return rows


def history_summary(rows: list[dict[str, Any]]) -> str:
    """`4 commits, 1 refusal, 1 rollback`."""
    kinds = [row["what"] for row in rows]
    words = {"learned": ("commit", "commits"), "refused": ("refusal", "refusals"), "rolled back to": ("rollback", "rollbacks")}
    return ", ".join(f"{n} {words[kind][n > 1]}" for kind in words if (n := kinds.count(kind)))
