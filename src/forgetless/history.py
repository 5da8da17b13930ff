"""What a run's folder can tell and undo: its log, whether every byte is what was written, what moved between two commits, rolling back, letting models go.

Each function reads the folder alone: no data, no configuration but run.yaml, and weights only where two commits are compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from .adding import read_run, standing_config
from .config import RunConfig, check_keep
from .errors import ConfigError, DataError
from .evaluation.matrix import paired_bootstrap
from .files import canonical, lines_of, read, text_sha256, write_atomic
from .lineage import GONE, RunFolder, branches, chain_damage, folder_of, read_manifest
from .methods import get
from .record import measured_in, write_matrix

MODULES = 10  # of those that changed most, so many are shown


def log(run_dir: str | Path) -> list[dict[str, Any]]:
    """One entry a line of the lineage: number, kind, task, folder, hash, whether it is on the road to the current model, its scores (first scorer), verdict, tags, bytes."""
    first = read_run(run_dir).scorers[0]
    folder = RunFolder(run_dir, lock=False)
    done, tags, entries = folder.committed(), folder.tags(), []
    for number, line in enumerate(folder.lineage(), 1):
        name = folder_of(line)
        place = folder.path / ("rejected" if line["kind"] == "reject" else "tasks") / name
        scorer = next((s for s in (first, *line.get("scores", {})) if s in line.get("scores", {})), None)
        entries.append(
            {
                "number": number, "kind": line["kind"], "task": line["task"], "folder": name, "hash": line["hash"],
                "current": line["kind"] == "task" and name == folder.current, "on_the_way": line["kind"] == "task" and name in done,
                "scorer": scorer, "scores": line.get("scores", {}).get(scorer, []), "gate": line.get("gate"),
                "tags": sorted(t for t, f in tags.items() if f == name) if line["kind"] == "task" else [],
                "model": line["kind"] != "rollback" and (place / "model").is_dir() and not (place / GONE).exists(),
                "bytes": _own_bytes(place) if line["kind"] != "rollback" else 0,
            }
        )  # fmt: skip
    return entries


def _own_bytes(folder: Path) -> int:
    """On disk, of the files that no other commit shares."""
    return sum(s.st_size for p in folder.rglob("*") if p.is_file() and (s := p.stat()).st_nlink == 1) if folder.is_dir() else 0


def verify(run_dir: str | Path) -> dict[str, Any]:
    """{"damage": sentences that begin with the file, "commits", "files", "bytes" checked, "let_go": models that `keep` deleted, "stored": what is kept of each task's data}.

    Every line's hash and parent, `current`, and every byte of every commit and rejection that is still there. Raises DataError only where the folder is no run.
    """
    config, folder = read_run(run_dir), RunFolder(run_dir, lock=False)
    found: dict[str, Any] = {"damage": [], "commits": 0, "files": 0, "bytes": 0, "let_go": [], "stored": {}}
    lines: list[dict[str, Any]] = []
    try:
        lines = folder.lineage()
        done = folder.committed()
    except DataError as error:
        return found | {"damage": [*chain_damage(lines), str(error).removeprefix(f"{folder.path}: damaged: ").partition(". Bring the folder")[0]]}
    damage = found["damage"]
    damage += chain_damage(lines) + folder.lost(lines)
    # the hashes are over what a line means; the last may be half written, or to come
    if not damage and not "".join(canonical(line) + "\n" for line in lines).startswith(read(folder.path / "lineage.jsonl")):
        damage.append("lineage.jsonl: says what was written, in other bytes; the next command that writes to the run mends it")
    if lines and done != branches(lines)[1]:
        damage.append(f"current: says {folder.current or 'nothing'}, and lineage.jsonl ends at {(branches(lines)[1] or ['nothing'])[-1]}")
    for line in lines:
        if line["kind"] == "rollback":
            continue
        place = folder.path / ("tasks" if line["kind"] == "task" else "rejected") / folder_of(line)
        harm = folder.damage(line) or _damage_without_hashes(place, line, config)
        damage += harm
        files = read_manifest(place)
        found["commits"] += 1
        found["files"] += len(files)
        found["bytes"] += sum(entry["bytes"] for path, entry in files.items() if (place / path).is_file())
        if (place / GONE).exists():
            found["let_go"].append(place.relative_to(folder.path).as_posix())
        if not harm:
            found["stored"][place.relative_to(folder.path).as_posix()] = stored_of(place, config)
    watched = next((line["watch_scores_sha256"] for line in reversed(lines) if "watch_scores_sha256" in line), None)
    if watched and text_sha256(read(folder.path / "watch_scores.json")) != watched:
        damage.append("watch_scores.json: is not what was written before the first task")
    if done and not folder.model_is_current():
        damage.append("model: does not point to the current task's model; the next command that writes to the run mends it")
    return found


def _damage_without_hashes(place: Path, line: dict[str, Any], config: RunConfig) -> list[str]:
    """Of a commit of a version that hashed no files: is its model the one that the line knows?"""
    if "files_sha256" in line or not (place / "model").is_dir() or (place / GONE).exists():
        return []
    from . import models
    from .state import model_sha256

    try:
        model, _ = models.load(str(place / "model"), trust_remote_code=config.trust_remote_code, dtype="auto")
    except Exception as error:  # whatever the damage makes of it
        return [f"tasks/{place.name}/model: cannot be read ({' '.join(str(error).split())[:100]})"]
    return [] if model_sha256(model) == line["model_sha256"] else [f"tasks/{place.name}/model: is not the model that was committed"]


def stored_of(place: Path, config: RunConfig) -> list[str]:
    """What a commit keeps of its task's data, in words, from what lies in its folder."""
    lines = list(map(json.loads, lines_of(read(place / "predictions.jsonl"))))
    worded = sum("prediction" in line for line in lines)
    kept = [f"the right answers and the model's words of {worded} scored rows (predictions.jsonl)"] if worded else []
    if len(lines) > worded:
        kept.append(f"numbers and scores of {len(lines) - worded} rows, no words (predictions.jsonl)")
    metrics = json.loads(read(place / "metrics.json") or "{}")
    if examples := sum(map(len, metrics.get("gate", {}).get("examples", {}).values())):
        kept.append(f"{examples} rows as examples of what the gate refused (metrics.json)")
    method = get(config.method.name, **config.method.options)
    if method.stores != "nothing":
        kept.append(f"{method.stores} that method {method.name} reads again (state/)")
    state = place / "state"
    if (state / "inputs.safetensors").is_file():
        kept.append("a few input vectors of each layer on its prompts (state/inputs.safetensors), derived from its data")
    if read_header(state / "method.safetensors"):
        kept.append("what the method remembers, such as spaces and statistics (state/method.safetensors), derived from its data")
    return [*kept, "a model that was trained on it"]


def read_header(file: Path) -> list[str]:
    """The names of a safetensors file's tensors; empty where there is none."""
    from safetensors import safe_open

    if not file.is_file():
        return []
    try:
        with safe_open(file, "pt") as f:
            return list(f.keys())
    except Exception:  # damaged, which the hashes say
        return []


def rollback(run_dir: str | Path, to: str) -> dict[str, Any]:
    """Make an earlier commit (task, tag or folder name) the current one, and matrix.json that commit's; returns the lineage line."""
    read_run(run_dir)
    with RunFolder(run_dir) as folder:
        folder.repair()
        left = folder.committed()
        line = folder.rollback(to)
        config, written = standing_config(run_dir, left), read(folder.path / "run.yaml")
        if config != read_run(run_dir):  # of the branch that was left
            versions = written.partition("\n")[0] + "\n" if written.startswith("#") else ""
            write_atomic(folder.path / "run.yaml", versions + yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True))
        write_matrix(folder, measured_in(folder))
        return line


def tag(run_dir: str | Path, name: str, tag: str | None) -> dict[str, str]:
    """Give a commit a tag, or with None take its tags away; returns all tags."""
    read_run(run_dir)
    with RunFolder(run_dir) as folder:
        folder.repair()
        folder.tag(name, tag)
        return folder.tags()


def collect(run_dir: str | Path, keep: str, dry_run: bool = False) -> dict[str, Any]:
    """Delete the models that `keep` (all | last N | tagged) does not keep, and what was interrupted: {"let_go": folders, "bytes" freed, "kept": folders}."""
    try:
        check_keep(keep)
    except ValueError as error:
        raise ConfigError(f"--keep {error}") from None
    method = read_run(run_dir).method
    if keep != "all" and get(method.name, **method.options).needs_models:
        raise ConfigError(f"{run_dir}: method {method.name} answers with the model of every task; none may go (keep: all)")
    with RunFolder(run_dir) as folder:
        folder.repair()
        gone = folder.going(keep)
        freed = sum(_own_bytes(place / "model") for place in gone)
        if not dry_run:
            folder.let_go(keep)
        places = [folder.path / "tasks" / name for name in folder.folders()] + sorted((folder.path / "rejected").glob("[!.]*"))
        kept = [p.relative_to(folder.path).as_posix() for p in places if p not in gone and (p / "model").is_dir()]
        return {"let_go": [p.relative_to(folder.path).as_posix() for p in gone], "bytes": freed, "kept": kept, "dry_run": dry_run}


def diff(run_dir: str | Path, a: str, b: str | None = None) -> dict[str, Any]:
    """What changed from commit `a` to `b` (default: the current one): {"a", "b", "scores": [...], "modules": [...], "weights": whole change or None}.

    scores: of each task and watch set that both have scored, by scorer: before, after, and where rows were noted their number, how many flipped each way, and the 95 %
    paired bootstrap interval of the difference. modules: ||W_b - W_a|| / ||W_a|| of the MODULES that changed most; None where one of the models was let go.
    """
    read_run(run_dir)
    folder = RunFolder(run_dir, lock=False)
    names = [folder.find(a), folder.find(b) if b else folder.current]
    if names[0] == names[1]:
        raise ConfigError(f"{run_dir}: {a} and {b or 'the current commit'} are the same, {names[0]}; name two commits")
    scorers, rows_of = list(folder.metrics(names[0])["scores"]), [_scored_rows(folder, name) for name in names]
    scored = {name: _rows(folder, name) for name in names}
    scores = []
    for task in (t for t in scored[names[0]] if t in scored[names[1]] and rows_of[0].get(t) == rows_of[1].get(t)):
        for scorer in scorers:
            x, y = (scored[name][task].get(scorer, {}) for name in names)
            if not (rows := sorted(x.keys() & y.keys())):
                continue
            before, after = [x[r] for r in rows], [y[r] for r in rows]
            change, low, high = paired_bootstrap(after, before)
            scores.append(
                {
                    "name": task, "scorer": scorer, "before": sum(before) / len(rows), "after": sum(after) / len(rows), "change": change, "ci95": [low, high],
                    "rows": len(rows), "worse": sum(v < u for u, v in zip(before, after, strict=True)), "better": sum(v > u for u, v in zip(before, after, strict=True)),
                }
            )  # fmt: skip
    return {"a": names[0], "b": names[1], "scores": scores, **_weights(*(folder.path / "tasks" / name for name in names))}


def _scored_rows(folder: RunFolder, name: str) -> dict[str, str]:
    """{task: hash of its scored rows} on the way to a commit: a task that was learned twice may have been scored on other rows."""
    lines = {folder_of(line): line for line in folder.lineage() if line["kind"] == "task"}
    return {lines[x]["task"]: lines[x].get("scored_sha256", lines[x]["data_sha256"]) for x in branches(folder.lineage())[0][name]}


def _rows(folder: RunFolder, name: str) -> dict[str, dict[str, dict[int, float]]]:
    """{task or watch set: {scorer: {row: score}}} as they were scored at a commit."""
    out: dict[str, dict[str, dict[int, float]]] = {}
    for line in map(json.loads, lines_of(read(folder.path / "tasks" / name / "predictions.jsonl"))):
        for scorer, value in line["score"].items():
            if value is not None:
                out.setdefault(line["task"], {}).setdefault(scorer, {})[line["row"]] = value
    return out


def _weights(a: Path, b: Path) -> dict[str, Any]:
    """Tensor by tensor from the files, so that two models of any size compare in the memory of one matrix."""
    from safetensors import safe_open

    if not all((p / "model").is_dir() and not (p / GONE).exists() for p in (a, b)):
        return {"modules": None, "weights": None}
    files = [{key: f for f in sorted((p / "model").glob("*.safetensors")) for key in read_header(f)} for p in (a, b)]
    changed, moved, size = [], 0.0, 0.0
    for key in files[0].keys() & files[1].keys():
        with safe_open(files[0][key], "pt") as f, safe_open(files[1][key], "pt") as g:
            x, y = f.get_tensor(key).double(), g.get_tensor(key).double()
        if x.shape != y.shape:
            continue
        change, norm = float((y - x).norm()), float(x.norm())
        moved, size = moved + change**2, size + norm**2
        if change:
            changed.append({"name": key, "change": change / max(norm, 1e-30)})
    changed.sort(key=lambda m: (-m["change"], m["name"]))
    return {"modules": changed[:MODULES], "changed": len(changed), "weights": (moved / size) ** 0.5 if size else 0.0}
