"""The command line. Commands only: heavy imports stay inside them, so that --help and a config error cost no torch."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import ConfigError, DataError, ForgetlessError

if TYPE_CHECKING:
    from .loop import Result
    from .progress import Progress

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
state = {"debug": False}
DISK_FULL = (
    "No space left on device",
    "PytorchStreamWriter failed",
    "unexpected pos",
)  # the system's words, which safetensors passes on, and torch.save's own


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """forgetless: fine-tune a language model on one task after another without forgetting the earlier ones."""
    state["debug"] = debug


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="YAML file; see `forgetless init`.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value on dotted keys, e.g. method.rank=4 tasks.0.data=x.jsonl")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
    progress: Annotated[str, typer.Option(help="rich, json (one object a line on stderr), or none.")] = "rich",
) -> None:
    """Learn the tasks of CONFIG one after another; run it again to resume or to learn tasks added at the end.

    Example: forgetless run first.yaml method.rank=4 output_dir=runs/rank4
    """
    from .config import load_config

    settings = load_config(config, overrides or [])

    def work(shown: Progress) -> Result:
        from .loop import run

        return run(settings, progress=shown)

    learn(work, Path(settings.output_dir), progress, as_json)


@app.command()
def add(
    run_dir: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    name: Annotated[str, typer.Option("--name", help="The new task's name.")],
    data: Annotated[str | None, typer.Option("--data", help="Its rows, as `data` of a task in a config; or give suite=...")] = None,
    options: Annotated[
        list[str] | None, typer.Argument(help="key=value on the new task's keys, e.g. test=t.jsonl train.max_steps=100; also gate.*, probes.*, keep.")
    ] = None,
    discard: Annotated[bool, typer.Option("--discard", help="Take tasks that the run was to learn, and has not, out of it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
    progress: Annotated[str, typer.Option(help="rich, json (one object a line on stderr), or none.")] = "rich",
) -> None:
    """Learn one more task on a finished run. No old data is needed; what of it is still there is measured.

    Example: forgetless add runs/first --data tickets.jsonl --name tickets gate.max_worst_task=0.02
    """

    def work(shown: Progress) -> Result:
        from .adding import add

        return add(run_dir, name, data, options or [], shown, discard)

    learn(work, run_dir, progress, as_json)


def learn(work: Callable[[Progress], Result], run_dir: Path, progress: str, as_json: bool) -> None:
    """Do the work with the progress that was asked for, write the report whatever the gate says, and print the result."""
    from .progress import JsonProgress, Progress, RichProgress

    kinds = {"rich": RichProgress, "json": JsonProgress, "none": Progress}
    if progress not in kinds:
        raise ConfigError(f"--progress {progress}: rich, json or none")
    quiet_libraries()
    from .config import load_config
    from .distributed import launched_rank
    from .errors import GateRejected
    from .evaluation.gate import sentence
    from .report import write_report
    from .report.terminal import print_matrix, print_watch

    shown = kinds[progress if launched_rank() == 0 else "none"]()
    try:
        result = work(shown)
    except GateRejected:
        if launched_rank() == 0 and (run_dir / "matrix.json").is_file():
            write_report([run_dir], run_dir / "report.html")
        raise
    finally:
        shown.close()
    if launched_rank():
        return  # the main process speaks for all
    report = write_report([result.path], result.path / "report.html")
    if as_json:
        print((result.path / "matrix.json").read_text(encoding="utf-8"))
        return
    settings, done = load_config(result.path / "run.yaml"), len(result.matrix.rows)
    if result.held:
        print(f"held    {result.held}")
    if not done:
        return
    if result.resumed_at == len(settings.tasks):
        print(f"{result.path}: finished already ({result.resumed_at} tasks). Add tasks to the config to go on, or choose another output_dir.")
    for scorer, matrix in result.matrices.items():
        print_matrix(matrix, scorer, settings.method.name)
    for task, verdict in result.gate.items():
        if verdict:
            print(
                f"gate    {task}: {verdict['outcome']}" + "".join(f"\n        {sentence(c)}" for c in verdict["criteria"] if c["outcome"] != "keep")
            )
    if result.watch and done:
        print_watch(result.watch, settings.tasks[done - 1].name)
    print(f"model   {result.path / 'model'}\nreport  {report}")


@app.command()
def log(
    run_dir: Annotated[Path, typer.Argument(help="A run's folder.")],
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """What was learned, refused and rolled back in a run, in order.

    Example: forgetless log runs/first
    """
    from . import history
    from .report.terminal import print_log

    entries = history.log(run_dir)
    print(json.dumps(entries, indent=1)) if as_json else print_log(entries)


@app.command()
def verify(
    run_dir: Annotated[Path, typer.Argument(help="A run's folder.")],
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Check every hash of a run, and list what it keeps of each task's data. Exit status 4 where a file is damaged.

    Example: forgetless verify runs/first
    """
    from . import history
    from .report.terminal import print_verify

    found = history.verify(run_dir)
    print(json.dumps(found, indent=1)) if as_json else print_verify(str(run_dir), found)
    if found["damage"]:
        raise DataError(f"{run_dir}: damaged: {found['damage'][0]}. Bring the folder back from a copy")


@app.command()
def rollback(
    run_dir: Annotated[Path, typer.Argument(help="A run's folder.")],
    to: Annotated[str, typer.Option("--to", help="A task, a tag, or a folder's name as `forgetless log` shows it.")],
) -> None:
    """Make the model of an earlier task the current one. Nothing is deleted, and going forward again is a rollback too.

    Example: forgetless rollback runs/first --to cities
    """
    from . import history
    from .report import write_report

    line = history.rollback(run_dir, to)
    write_report([run_dir], run_dir / "report.html")
    print(f"{run_dir}: current is {line['to']}; model {run_dir / 'model'}")


@app.command()
def tag(
    run_dir: Annotated[Path, typer.Argument(help="A run's folder.")],
    task: Annotated[str, typer.Argument(help="A task, or a folder's name as `forgetless log` shows it.")],
    name: Annotated[str | None, typer.Argument(help="The tag; without it, with --remove, all of the commit's tags go.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the commit's tags away.")] = False,
) -> None:
    """Name a commit, so that `keep: tagged` keeps its model and `rollback --to` finds it.

    Example: forgetless tag runs/first cities in-production
    """
    from . import history

    if (name is None) != remove:
        raise ConfigError("tag: give a name, or --remove")
    tags = history.tag(run_dir, task, name)
    print("\n".join(f"{t}  {folder}" for t, folder in tags.items()) or "no tags")


@app.command()
def gc(
    run_dir: Annotated[Path, typer.Argument(help="A run's folder.")],
    keep: Annotated[str, typer.Option("--keep", help="Which models stay: all, 'last N', or tagged. The current one always does.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Delete models that are not kept, and what was interrupted. What is needed to go on, and all scores, stay.

    Example: forgetless gc runs/first --keep 'last 2' --dry-run
    """
    from . import history

    found = history.collect(run_dir, keep, dry_run)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for place in found["let_go"]:
        print(f"{'would delete' if dry_run else 'deleted'} the model of {place}")
    print(
        f"{found['bytes'] / 1e6:.1f} MB {'would be' if dry_run else ''} freed; models kept: {', '.join(found['kept']) or 'none'}".replace("  ", " ")
    )


@app.command()
def diff(
    run_dir: Annotated[Path, typer.Argument(help="A run's folder.")],
    a: Annotated[str, typer.Argument(help="A task, a tag, or a folder's name as `forgetless log` shows it.")],
    b: Annotated[str | None, typer.Argument(help="The same; default: the current commit.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """What changed between two commits: scores, with 95 % intervals over the same rows, and the weights that moved most.

    Example: forgetless diff runs/first cities polarity
    """
    from . import history
    from .report.terminal import print_diff

    found = history.diff(run_dir, a, b)
    print(json.dumps(found, indent=1)) if as_json else print_diff(found)


@app.command()
def compare(
    run_dir: Annotated[Path, typer.Argument(help="A run's folder.")],
    prompts: Annotated[str, typer.Argument(help="A data file with the column `prompt`.")],
    out: Annotated[Path, typer.Option("--out", help="The JSON Lines file to write, new.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 256,
) -> None:
    """Answers of the untouched model and of the run's current one to the same prompts, side by side in a file for a judge.

    Example: forgetless compare runs/first prompts.jsonl --out answers.jsonl
    """
    quiet_libraries()
    from contextlib import closing

    from .evaluation import compare as comparing
    from .progress import RichProgress

    with closing(RichProgress()) as shown:
        lines = comparing.compare(run_dir, prompts, out, max_new_tokens, shown)
    same = sum(line["before"] == line["after"] for line in lines)
    print(f"{out}: {len(lines)} prompts, {same} answered in the same words")


@app.command()
def relearn(
    run_dir: Annotated[Path, typer.Argument(help="A run's folder.")],
    task: Annotated[str | None, typer.Option("--task", help="One earlier task; default: each of them.")] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Most steps, of 8 rows each; it is scored after 0, 1, 2, 4, ... of them.")] = 16,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", min=0.0, help="Default: the run's.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """In how many steps of plain training an earlier task comes back, beside the untouched model: what was buried, not lost. Written to relearning.json.

    Example: forgetless relearn runs/first --task cities
    """
    quiet_libraries()
    from contextlib import closing

    from .evaluation import relearn as relearning
    from .progress import RichProgress
    from .report.terminal import print_relearning

    with closing(RichProgress()) as shown:
        found = relearning.relearn(run_dir, task, steps, learning_rate, shown)
    print(json.dumps(found, indent=1)) if as_json else print_relearning(found)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method: what it does, when not to use it, its options.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A list of objects with name, summary, paper, constrained, options and more.")] = False,
) -> None:
    """List the methods and what each needs; with NAME, one method and its options.

    Example: forgetless methods gorp
    """
    from .methods import catalogue

    rows = catalogue.rows([name] if name else None)
    if as_json:
        print(json.dumps(rows, indent=1))
    elif name:
        print(catalogue.page(rows[0]))
    else:
        print(catalogue.listing(rows))


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write the config.")] = Path("first.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a small working config with every choice in its comments.

    Example: forgetless init first.yaml && forgetless run first.yaml
    """
    from importlib.resources import files

    if path.exists() and not force:
        raise ConfigError(f"{path}: exists already; --force overwrites it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files("forgetless").joinpath("first.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); name another file") from None
    print(f"wrote {path}. Next: forgetless run {path}")


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(help="One run folder, or several to compare.")],
    out: Annotated[Path | None, typer.Option("--out", help="Where to write; default: report.html, report.md or card.md in the first folder.")] = None,
    form: Annotated[
        str, typer.Option("--format", help="html, md (tables for a pull request), or card (a Hugging Face model card of one run).")
    ] = "html",
    as_json: Annotated[bool, typer.Option("--json", help="Print the matrices and metrics as JSON instead.")] = False,
) -> None:
    """Write one self-contained HTML report of a run, or of several side by side; or the same as Markdown, or a model card.

    Example: forgetless report runs/seqft runs/gorp --out compare.html
    """
    from .report import read_run, write_card, write_markdown, write_report

    names = {"html": "report.html", "md": "report.md", "card": "card.md"}
    if form not in names:
        raise ConfigError(f"--format {form}: html, md or card")
    if form == "card" and len(run_dirs) > 1:
        raise ConfigError(f"--format card: a model card is of one run, {len(run_dirs)} were given; use --format md to compare them")
    if as_json:
        for d in run_dirs:
            read_run(d)  # says what is wrong with a folder that is no run
        print(json.dumps({str(d): json.loads((d / "matrix.json").read_text(encoding="utf-8")) for d in run_dirs}, indent=1))
        return
    out = out or run_dirs[0] / names[form]
    print(write_card(run_dirs[0], out) if form == "card" else {"html": write_report, "md": write_markdown}[form](run_dirs, out))


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="A config to check: model, modules, bytes, tasks.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as for run.")] = None,
    truncation: Annotated[
        bool, typer.Option("--truncation", help="Instead: the loss on dev rows without the weakest singular directions. Takes minutes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Versions and hardware; with a config also what the method would train, the bytes it would hold, and every task's rows.

    Example: forgetless doctor first.yaml method.rank=4
    """
    from .config import load_config

    if truncation and config is None:
        raise ConfigError("doctor --truncation needs a config, for its model and its dev rows: forgetless doctor --truncation first.yaml")
    settings = load_config(config, overrides or []) if config is not None else None
    quiet_libraries()
    if truncation:
        from contextlib import closing

        from .progress import RichProgress
        from .truncation import measure, show_truncation

        with closing(RichProgress()) as shown:
            found = measure(settings, shown)
        print(json.dumps(found, indent=1)) if as_json else show_truncation(found)
        return
    from .doctor import examine, show

    found = examine(settings)
    print(json.dumps(found, indent=1)) if as_json else show(found)


@app.command()
def estimate(
    config: Annotated[Path, typer.Argument(help="The config of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as for run.")] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="Plan for this GPU, such as h100, a100-80gb, l4, rtx-4090; default: this machine.")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", min=2, help="Tokens of a row with its answer; default: the longest in the data.")] = None,
    closed: Annotated[
        float | None, typer.Option("--closed", help="Share of each layer's input directions that earlier tasks have closed; default: 0.16.")
    ] = None,
    world: Annotated[int, typer.Option("--world", min=1, help="Processes that train together; the first is planned, and what it sends.")] = 1,
    link: Annotated[
        float | None, typer.Option("--link", help="GB a second that a process can send; default: 50, a 400 Gb/s adapter's data sheet.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Peak memory, time and disk of a run, from the model's configuration: no weights are loaded.

    Example: forgetless estimate first.yaml model=meta-llama/Llama-3.1-70B --gpu h200 --tokens 1024
    Example: forgetless estimate first.yaml model=meta-llama/Llama-3.1-70B sharding=fsdp2 --world 64 --gpu h200 --tokens 1024
    """
    from .config import load_config

    settings = load_config(config, overrides or [])
    quiet_libraries()
    from . import estimate as planner

    if link is not None and world == 1:
        raise ConfigError("--link is how fast several processes can send; give --world too")
    found = planner.estimate(settings, gpu, planner.CLOSED if closed is None else closed, tokens, world, planner.LINK if link is None else link * 1e9)
    print(json.dumps(found, indent=1)) if as_json else planner.show(found)


@app.command()
def leaderboard(
    spec: Annotated[Path, typer.Argument(help="YAML file: rows, streams, prompts, seeds under a protocol; see docs/leaderboard_how.md.")],
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Runs at once, one thread each; default: one a core, on a GPU one.")] = None,
    only: Annotated[str, typer.Option("--only", help="Only cells whose names hold this, such as order1-bare/gorp.")] = "",
    tune: Annotated[bool, typer.Option("--tune", help="Only the trials on the tuning stream.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Run nothing: write the page from the cells that are there.")] = False,
    again: Annotated[
        Path | None, typer.Option("--again", help="Run cells that are there once more, into this folder, and say how each differs.")
    ] = None,
    pictures: Annotated[
        bool | None, typer.Option("--pictures/--no-pictures", help="The page's pictures; default: where matplotlib is installed.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what is there and what is missing as JSON on stdout; with --table nothing is run first.")
    ] = False,
) -> None:
    """Measure methods side by side: every missing cell of SPEC in a process of its own. Started again, it goes on; finished cells are never run again.

    Example: forgetless leaderboard benchmarks/leaderboards/standard_cl.yaml --workers 2 --only order1
    """
    quiet_libraries()
    from .leaderboard import show, work
    from .leaderboard.spec import load_spec

    asked, done = load_spec(spec), True

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if again is not None:
        found = work.repeat(asked, again, workers or work.default_workers(), only, say)
        for cell in found:
            told = "every row as before" if cell["same_rows"] else f"{cell['difference']:+.4f} [{cell['low']:+.4f}, {cell['high']:+.4f}]"
            print(json.dumps(cell) if as_json else f"{cell['cell']}: {told}")
        return
    if not table:
        done = work.work_through(asked, workers or work.default_workers(), only, tune, say)
    show.show(asked, pictures, as_json)
    if not done:
        raise DataError("not all cells that were asked for are there; the lines above say which, and the same command goes on")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run's folder; with --as lora and --base also any trained model.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write, new or empty.")],
    task: Annotated[str | None, typer.Option("--task", help="The model as committed with this task (or tag); default: the current one.")] = None,
    form: Annotated[
        str | None, typer.Option("--as", help="plain, lora, gguf, routed or prompt; default: what the method leaves, plain as a rule.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="lora: the model it was trained from; default: what the run says.")] = None,
    energy: Annotated[float | None, typer.Option("--energy", help="lora: share of each layer's ||dW||^2 to keep; default: 0.99.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="lora: one rank for every layer instead.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write what a run has learned into a folder that other software loads: the model, a LoRA adapter, a GGUF file.

    Example: forgetless export runs/first --out model && forgetless export runs/first --out adapter --as lora --rank 16
    """
    quiet_libraries()
    from contextlib import closing

    from . import export as exporting
    from .progress import RichProgress

    with closing(RichProgress()) as shown:
        found = exporting.export(run, out, form, task, base=base, energy=energy, rank=rank, progress=shown)
    print(json.dumps(found, indent=1)) if as_json else exporting.show(found)


@app.command("export-lora", hidden=True)
def export_lora(
    trained: Annotated[Path, typer.Argument(help="A run's folder (its current model), or a trained model.")],
    out: Annotated[Path, typer.Option("--out", help="The adapter's folder, new or empty.")],
    base: Annotated[str | None, typer.Option("--base", help="The model it was trained from; default: what the run says.")] = None,
    energy: Annotated[float | None, typer.Option("--energy", help="Share of each layer's ||dW||^2 to keep; default: 0.99.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="One rank for every layer instead.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """The same as export --as lora.

    Example: forgetless export-lora runs/first --out adapter --energy 0.99
    """
    export(trained, out, None, "lora", base, energy, rank, as_json)


@app.command("export-routed", hidden=True)
def export_routed(
    run: Annotated[Path, typer.Argument(help="The folder of a run with method: routed.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write, new or empty.")],
) -> None:
    """The same as export --as routed.

    Example: forgetless export-routed runs/routed --out set
    """
    export(run, out, None, "routed")


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face hub.")],
    yes: Annotated[bool, typer.Option("--yes", help="Upload. Without it nothing leaves this machine, and what would is listed.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private; one that is public already is refused.")] = False,
    task: Annotated[str | None, typer.Option("--task", help="The model as committed with this task (or tag); default: the current one.")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="The branch to upload to; default: main.")] = None,
    form: Annotated[str | None, typer.Option("--as", help="As for export.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was or would be uploaded as JSON.")] = False,
) -> None:
    """Upload an export and its model card to the Hugging Face hub; without --yes only list the files, the bytes and where they would go.

    Example: forgetless push runs/first me/my-model --private
    """
    quiet_libraries()
    from contextlib import closing

    from . import hub
    from .progress import RichProgress

    with closing(RichProgress()) as shown:
        plan = hub.push(run, repo_id, yes, private=private, task=task, form=form, revision=revision, progress=shown)
    print(json.dumps(plan, indent=1)) if as_json else hub.show(plan)


def quiet_libraries() -> None:
    """Their progress bars and advice would drown ours."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported, which transformers does
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("transformers", "bitsandbytes"):  # before their imports: a line each about kernels comes from there
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as hf

    hf.set_verbosity_error()
    hf.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch|transformers|accelerate")


def main() -> None:
    """Entry point: one clear message and the exit status of DESIGN for every error a user can cause."""
    try:
        code = app(standalone_mode=False) or 0  # typer returns the status of an Exit, 130 after Ctrl-C
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if state["debug"]:
            traceback.print_exc()
        code = explain(error) if os.environ.get("WORLD_SIZE", "1") == "1" else explain_rank(error)
    if code == 130:
        print("\ninterrupted; run the same command again to resume", file=sys.stderr)
    sys.exit(code)


def explain_rank(error: Exception) -> int:
    """As explain, for one of several processes: which of them speaks, and the cause before its echoes."""
    import time

    from .distributed import lost_contact

    rank = os.environ.get("RANK", "0")
    if lost_contact(error):
        time.sleep(3)  # the process that failed first is the one to be read first, and to end the job
        print(f"rank {rank}: lost contact with another process; the error above this line is why", file=sys.stderr)
        return 1
    print(f"rank {rank}:", end=" ", file=sys.stderr)
    return explain(error)


def explain(error: Exception) -> int:
    """The message on stderr; returns the exit status."""
    if any(text in str(error) for text in DISK_FULL):
        print(
            "error: the disk is full. What is committed is kept; free some space and give the same command again (a run goes on from there; `keep: last 1` keeps fewer models)",
            file=sys.stderr,
        )
        return DataError.exit_code
    if isinstance(error, ForgetlessError):
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
        message, context = error.format_message(), getattr(error, "ctx", None)
        help_asked = message.startswith("Usage:")  # the bare command
        print(message if help_asked else f"error: {message}" + (f" See: {context.command_path} --help" if context else ""), file=sys.stderr)
        return 2
    print(
        f"internal error: {type(error).__name__}: {error}\nThis is a defect of forgetless; run again with `forgetless --debug ...` for the traceback",
        file=sys.stderr,
    )
    return 1
