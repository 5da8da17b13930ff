"""Faults at every call that writes: a commit, a rejection, a rollback, a tag, a gc and a repair, each broken off at its first, second, ... last such call.

    python benchmarks/scripts/faults.py                 # every cell -> benchmarks/results/faults.json; exit 1 where a run was corrupted

One cell is an operation, the number k of a call, and what happens there:
    error    it fails with EIO, the calls after it work
    full     it fails with ENOSPC, and so does whatever needs space after it
    short    of a write half is written, then the disk is full
    cut      the process is gone before it
    torn     of a write half is written, then the process is gone
    data, all, mixed    the power goes after it: of what was not synced is lost the data, data and names, or of each file and folder one or the other at random
The first five happen to a forked process, by a library that stands between it and the disk (tests/faults.c; Linux, and a C compiler). The last three are made from its
log of the whole operation. Then the folder must be readable as it lies, and after a repair be what it was before or what it would have become, byte for byte; from
before, the same operation must lead there.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

from power_cut import LOST, Call, Disk, read_log

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
MODES = {"error": 1, "full": 2, "short": 3, "cut": 4, "torn": 5}
ENDS = ("before", "after", "after, a model to let go", "corrupted")
DIED, RAISED, NOT_REACHED = 77, 3, 4
OF_NO_RUN = {".lock", "timing.jsonl"}  # clocks and processes: not compared


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="so many cells, drawn with seed 0 alike of each operation and kind of fault, in place of all")
    parser.add_argument("--only", default="", help="operations whose name holds this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if "faults" not in os.environ.get("LD_PRELOAD", ""):
        with tempfile.TemporaryDirectory(prefix="forgetless-faults-") as scratch:
            library = compiled(Path(scratch))
            settings = {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
            return subprocess.run([sys.executable, *sys.argv], env=os.environ | settings).returncode
    begun = time.monotonic()
    # in memory where there is such a place: that a sync was asked for counts here, not that it is done
    with tempfile.TemporaryDirectory(prefix="forgetless-faults-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        content = measured(Path(scratch).resolve(), args.sample, args.only)
    content["seconds"] = round(time.monotonic() - begun)
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{content['cells']} cells, {content['corrupted']} corrupted")
    for what in content["problems"][:20]:
        print(f"  {what}")
    return int(content["corrupted"] > 0)


def compiled(folder: Path) -> Path:
    """tests/faults.c as a library. Raises RuntimeError where it cannot be made."""
    if sys.platform != "linux" or not (compiler := shutil.which("cc")):
        raise RuntimeError("needs Linux and a C compiler called cc")
    library = folder / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, ROOT / "tests" / "faults.c", "-ldl"], check=True)
    return library


# -- what is done -----------------------------------------------------------------------------------------------------------------------


@dataclass
class Operation:
    """One thing done to a run's folder, and the folder as it lies before it."""

    name: str
    before: Path
    act: Callable
    rest: Callable | None = None  # what of it may be left to do, where the run is what it would have become but for models that `keep` does not keep
    calls: int = 0
    log: list[Call] = field(default_factory=list)
    states: dict[str, dict[str, str]] = field(default_factory=dict)  # before, after: what each file holds


def operations(scratch: Path) -> Iterator[Operation]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from forgetless.config import load_config
    from forgetless.lineage import RunFolder
    from forgetless.methods.base import Memory
    from forgetless.record import config_sha256, write_config

    torch.set_num_threads(1)
    torch.manual_seed(0)
    llama = AutoConfig.for_model(
        "llama", vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    models = [AutoModelForCausalLM.from_config(llama) for _ in range(3)]
    tokenizer = make_tokenizer(PreTrainedTokenizerFast)
    tasks = ("colour", "animal", "mood")
    config = load_config({"model": "m", "tasks": [{"name": t, "data": f"{t}.jsonl"} for t in tasks], "method": "seqft", "output_dir": "run"})

    def content(index: int) -> tuple:
        task, scores = tasks[index], {"choice": [1.0] * (index + 1)}
        memory = Memory({"base_model.model.seen": torch.full((4, 4), float(index))}, {"tasks": index + 1, "adapter_config": {}})
        metrics = {"task": task, "index": index, "scores": scores, "n": {task: 1}, "failures": {}, "watch": {}, "protection": {}, "steps": []}
        predictions = [{"row": 0, "task": task, "score": {"choice": 1.0}, "answer": "é\u2028", "prediction": {"choice": "é"}}]
        entry = {"data_sha256": "0" * 64, "config_sha256": config_sha256(config), "scores": scores}
        return index, task, models[index], tokenizer, memory, {"layer": torch.ones(2, 2)}, metrics, predictions, entry

    def commit(index: int, keep: str = "all") -> Callable:
        return lambda folder: folder.commit(*content(index), keep, {"name": tasks[index]})

    def let_go(folder) -> None:
        folder.let_go("last 1")

    def made(name: str, *steps: Callable) -> Path:
        path = scratch / "before" / name
        with RunFolder(path) as folder:
            write_config(folder, config)
            folder.repair()
            for step in steps:
                step(folder)
            folder.restore_timing()
        return path

    two = made("two", commit(0), commit(1))
    yield Operation("first commit", made("none"), commit(0))
    yield Operation("commit", made("one", commit(0)), commit(1))
    yield Operation("commit, keep: last 1", two, commit(2, "last 1"), let_go)
    yield Operation("commit after a rollback", made("back", commit(0), commit(1), lambda f: f.rollback("colour")), commit(1))
    yield Operation("reject", two, lambda folder: folder.reject(*content(2), settings={"name": tasks[2]}))
    yield Operation("rollback", two, lambda folder: folder.rollback("colour"))
    yield Operation("tag", two, lambda folder: folder.tag("animal", "good"))
    yield Operation("gc", made("three", *map(commit, range(3)), lambda f: f.reject(*content(2), settings={"name": tasks[2]})), let_go, let_go)
    yield Operation("repair", interrupted(two, made("all", *map(commit, range(3)))), lambda folder: None)


def interrupted(two: Path, three: Path) -> Path:
    """Three tasks as a kill left them right after `current` was replaced, with what another one left of a rejection."""
    path = three.with_name("interrupted")
    shutil.copytree(three, path, symlinks=True)
    shutil.copy(two / "lineage.jsonl", path)
    shutil.copy(two / "timing.jsonl", path)
    (path / "model").unlink()
    (path / "model").symlink_to(os.readlink(two / "model"))
    shutil.copytree(path / "tasks" / "02-mood", path / "rejected" / ".02-mood")
    (path / ".current.tmp").write_text("02-m")
    return path


def make_tokenizer(wrapper):
    from tokenizers import Tokenizer, models

    return wrapper(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "red": 1}, unk_token="<unk>")), unk_token="<unk>")


def perform(operation: Operation, path: Path) -> None:
    """As the commands do it: locked, repaired, done."""
    from forgetless.lineage import RunFolder

    with RunFolder(path) as folder:
        folder.repair()
        operation.act(folder)


# -- what must be true, meanwhile and afterwards ----------------------------------------------------------------------------------------


def order(operation: Operation) -> list[str]:
    """Where the log has something put in its place before it was synced, the line of a commit written before `current` was sure to be there, or a model in use deleted."""
    disk, out = Disk(operation.before), []
    for call in operation.log:
        parts = Path(call.b).parts
        if call.op == "rename" and not any(part.startswith(".") for part in parts):
            out += [f"{call.b} is put in its place, and {x or call.b} not synced" for x in disk.unsynced(disk.find(call.a))]
            if call.b == "current":
                out += [
                    f"current is replaced, and {x} not synced"
                    for room in ("tasks", "rejected")
                    if room in disk.root.now
                    for x in disk.unsynced(disk.find(room), room)
                ]
        if call.op == "write" and call.a == "lineage.jsonl" and disk.root.now.get("current") is not disk.root.safe.get("current"):
            out.append("the line is written, and current not synced")
        if call.op == "unlink" and disk.root.safe.get("model") == str(Path(call.a).parent):
            out.append(f"{call.a} is deleted, and `model` may lead there")
        disk.apply(call)
    if disk.held() != snapshot(operation.before.parent / "recorded", {}):
        out.append("the log does not tell all that was written")
    # what was deleted may come back: a repair deletes it again
    gone = {x.removesuffix(".gone") for x in disk.held() if x.endswith("/model.gone")}
    left = [x for x in disk.unsynced() if x not in gone | OF_NO_RUN and not any(part.startswith(".") for part in Path(x).parts)]
    return out + [f"{x} not synced at the end" for x in left]


def snapshot(path: Path, without=OF_NO_RUN) -> dict[str, str]:
    """What each file holds, and where each link leads."""
    found = {}
    for p in sorted(path.rglob("*")):
        if p.is_symlink():
            found[p.relative_to(path).as_posix()] = f"-> {os.readlink(p)}"
        elif p.is_file() and p.relative_to(path).as_posix() not in without:
            found[p.relative_to(path).as_posix()] = hashlib.sha256(p.read_bytes()).hexdigest()
    return found


def differences(found: dict[str, str], wanted: dict[str, str]) -> str:
    names = [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
    return ", ".join(f"{name} ({'too much' if name not in wanted else 'missing' if name not in found else 'other'})" for name in names[:4])


def judge(operation: Operation, path: Path) -> str:
    """before or after: which of them the folder is, once repaired. Raises AssertionError, or whatever the library raises, where it is neither."""
    from forgetless.history import verify
    from forgetless.lineage import RunFolder, chain_damage

    reader = RunFolder(path, lock=False)
    lines = [line["hash"] for line in reader.lineage()]
    known = {state: (operation.before.parent / f"{operation.name} {state}.hashes").read_text().split() for state in ("before", "after")}
    assert lines in known.values(), f"a reader sees {len(lines)} lines, of neither state"
    assert not chain_damage(reader.lineage())
    reader.check_files(reader.lines())
    for name in reader.committed():
        reader.metrics(name), reader.memory(name), reader.recorded(name)
    if (path / "model").is_symlink():
        folder = (path / "model").resolve().parent
        assert folder.name in reader.folders() and (folder / "model").is_dir() and not (folder / "model.gone").exists(), (
            "model leads to no whole model"
        )
    with RunFolder(path) as folder:
        folder.repair()
    assert not (damage := verify(path)["damage"]), f"after the repair verify says {damage[0]}"
    found, before, after = snapshot(path), operation.states["before"], operation.states["after"]
    if found == after:
        return "after"
    end = "before"
    if found != before:
        of, of_before, of_after = parts(found), parts(before), parts(after)
        whole = of[""] == of_after[""] and all(of[x] in (of_before[x], of_after[x]) for x in {**of, **of_after})
        assert operation.rest and whole, f"neither before nor after: {differences(found, before)}; {differences(found, after)}"
        operation, end = replace(operation, act=operation.rest), "after, a model to let go"
    perform(operation, path)
    assert snapshot(path) == after, f"done again it is not the same: {differences(snapshot(path), after)}"
    return end


def parts(found: dict[str, str]) -> dict[str, dict[str, str]]:
    """By commit and rejection; the rest under ""."""
    out: dict[str, dict[str, str]] = defaultdict(dict)
    for name, content in found.items():
        out["/".join(name.split("/")[:2]) if name.startswith(("tasks/", "rejected/")) else ""][name] = content
    return out


# -- the cells ---------------------------------------------------------------------------------------------------------------------------


def measured(scratch: Path, sample: int | None, only: str) -> dict:
    library = ctypes.CDLL(None)
    library.faults_count.restype = ctypes.c_long
    library.faults_arm.argtypes = [ctypes.c_long, ctypes.c_int]
    if library.faults_trap():
        raise RuntimeError("this kernel does not let a process trap its own system calls (seccomp)")
    done = [op for op in operations(scratch) if only in op.name]
    found = {op.name: record(op, library) for op in done}
    cells = [(op, mode, k) for op in done for mode in (*MODES, *LOST) for k in places(op, mode)]
    if sample:
        turns: Counter = Counter()
        random.Random(0).shuffle(cells)
        drawn = []
        for op, mode, k in cells:
            turns[op.name, mode] += 1
            drawn.append((turns[op.name, mode], len(drawn), (op, mode, k)))
        cells = [cell for *_, cell in sorted(drawn, key=lambda d: d[:2])[:sample]]  # of each operation and kind of fault one, then another of each
    outcomes, problems = Counter(), [f"{op.name}: {what}" for op in done for what in found[op.name]["order"]]
    corrupted = len(problems)
    for number, (op, mode, k) in enumerate(cells):
        if number % 250 == 0:
            print(f"{number} of {len(cells)} cells, {corrupted} corrupted", flush=True)
        path = op.before.parent / "cell"
        shutil.rmtree(path, ignore_errors=True)
        try:
            lose(op, mode, k, path) if mode in LOST else strike(op, mode, k, path, library)
            outcomes[op.name, mode, judge(op, path)] += 1
        except Exception as error:
            corrupted += 1
            call = next((f"{c.op} {c.b or c.a}" for c in op.log if c.number == k), "a call that fails")
            problems.append(f"{op.name}, {mode} at {k} of {op.calls} ({call}): {type(error).__name__}: {error}")
            outcomes[op.name, mode, "corrupted"] += 1
    for op in done:
        kept = [(mode, {end: outcomes[op.name, mode, end] for end in ENDS if outcomes[op.name, mode, end]}) for mode in (*MODES, *LOST)]
        found[op.name] |= {"cells": {mode: ends for mode, ends in kept if ends}}
    # what these call to write is theirs to choose
    versions = {name: version(name).partition("+")[0] for name in ("torch", "transformers", "safetensors", "tokenizers")}
    versions |= {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    return {
        "command": "python benchmarks/scripts/faults.py" + (f" --sample {sample}" if sample else "") + (f" --only {only!r}" if only else ""),
        "environment": versions, "cells": len(cells), "corrupted": corrupted, "problems": problems, "operations": found,
    }  # fmt: skip


def record(op: Operation, library: ctypes.CDLL) -> dict:
    """Do it once unharmed, with the library's log of it, and note what the folder is before and after."""
    from forgetless.lineage import RunFolder

    path = op.before.parent / "recorded"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(op.before, path, symlinks=True)
    with tempfile.TemporaryFile(dir=op.before.parent.parent) as log:
        library.faults_watch(os.fsencode(path), log.fileno())
        perform(op, path)
        op.calls = library.faults_count()
        library.faults_watch(b"", -1)
        log.seek(0)
        op.log = read_log(log.read(), path)
    op.states = {"before": snapshot(op.before), "after": snapshot(path)}
    for state, where in (("before", op.before), ("after", path)):
        hashes = [line["hash"] for line in RunFolder(where, lock=False).lineage()]
        (op.before.parent / f"{op.name} {state}.hashes").write_text(" ".join(hashes))
    return {"calls": op.calls, "kinds": dict(sorted(Counter(call.op for call in op.log).items())), "order": order(op)}


def places(op: Operation, mode: str) -> list[int]:
    """The calls at which `mode` is something else than another one."""
    if mode in ("short", "torn"):
        return [call.number for call in op.log if call.op == "write" and len(call.data) > 1]
    if mode in LOST:
        return sorted({call.number for call in op.log})
    return list(range(1, op.calls + 1))


def strike(op: Operation, mode: str, k: int, path: Path, library: ctypes.CDLL) -> None:
    """Do it in a process to which `mode` happens at its k-th call."""
    shutil.copytree(op.before, path, symlinks=True)
    if (child := os.fork()) == 0:
        code = RAISED
        try:
            library.faults_watch(os.fsencode(path), -1)
            library.faults_arm(k, MODES[mode])
            with contextlib.suppress(Exception):
                perform(op, path)
                code = 0
            code = code if library.faults_fired() else NOT_REACHED
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, RAISED) if mode in ("error", "full", "short") else code == DIED, f"the process ended with {code}"
    if code == 0:  # it says that all is well
        assert differences(snapshot(path), op.states["after"]) == "", "the fault was passed over in silence"


def lose(op: Operation, lost: str, k: int, path: Path) -> None:
    """The folder as the power cut after the k-th call leaves it."""
    disk = Disk(op.before)
    for call in op.log:
        if call.number <= k:
            disk.apply(call)
    disk.write(path, lost, random.Random(k))


if __name__ == "__main__":
    sys.exit(main())
