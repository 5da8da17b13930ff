"""The command line. Commands only: heavy imports stay inside them, so that --help and a config error cost no torch."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from .errors import ConfigError, DataError, ForgetlessError

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
    from .progress import JsonProgress, Progress, RichProgress

    kinds = {"rich": RichProgress, "json": JsonProgress, "none": Progress}
    if progress not in kinds:
        raise ConfigError(f"--progress {progress}: rich, json or none")
    settings = load_config(config, overrides or [])
    quiet_libraries()
    from .distributed import launched_rank
    from .loop import run as learn
    from .report import write_report
    from .report.terminal import print_matrix, print_watch

    shown = kinds[progress if launched_rank() == 0 else "none"]()
    try:
        result = learn(settings, progress=shown)
    finally:
        shown.close()
    if launched_rank():
        return  # the main process speaks for all
    report = write_report([result.path], result.path / "report.html")
    if as_json:
        print((result.path / "matrix.json").read_text())
        return
    if result.resumed_at == len(settings.tasks):
        print(f"{result.path}: finished already ({result.resumed_at} tasks). Add tasks to the config to go on, or choose another output_dir.")
    for scorer, matrix in result.matrices.items():
        print_matrix(matrix, scorer, settings.method.name)
    if result.watch:
        print_watch(result.watch, settings.tasks[-1].name)
    print(f"model   {result.path / 'model'}\nreport  {report}")


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
    out: Annotated[Path | None, typer.Option("--out", help="Where to write; default: report.html in the first folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the matrices and metrics as JSON instead.")] = False,
) -> None:
    """Write one self-contained HTML report of a run, or of several side by side.

    Example: forgetless report runs/seqft runs/gorp --out compare.html
    """
    from .report import write_report

    if as_json:
        from .report import read_run

        found = {}
        for d in run_dirs:
            read_run(d, d.name)  # says what is wrong with a folder that is no run
            found[str(d)] = json.loads((d / "matrix.json").read_text())
        print(json.dumps(found, indent=1))
        return
    print(write_report(run_dirs, out or run_dirs[0] / "report.html"))


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
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Peak memory, time and disk of a run, from the model's configuration: no weights are loaded.

    Example: forgetless estimate first.yaml model=meta-llama/Llama-3.1-70B --gpu h200 --tokens 1024
    """
    from .config import load_config

    settings = load_config(config, overrides or [])
    quiet_libraries()
    from . import estimate as planner

    found = planner.estimate(settings, gpu, planner.CLOSED if closed is None else closed, tokens)
    print(json.dumps(found, indent=1)) if as_json else planner.show(found)


@app.command("export-lora")
def export_lora(
    trained: Annotated[str, typer.Argument(help="A run's folder (its current model), or a trained model.")],
    out: Annotated[Path, typer.Option("--out", help="The adapter's folder, new or empty.")],
    base: Annotated[str | None, typer.Option("--base", help="The model it was trained from; default: what the run says.")] = None,
    energy: Annotated[float | None, typer.Option("--energy", help="Share of each layer's ||dW||^2 to keep; default: 0.99.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="One rank for every layer instead.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what export.json holds instead of a summary.")] = False,
) -> None:
    """Write what training changed as a LoRA adapter that PEFT loads, and say how much of the change it misses.

    Example: forgetless export-lora runs/first --out adapter --energy 0.99
    """
    quiet_libraries()
    from contextlib import closing

    from . import export
    from .progress import RichProgress

    with closing(RichProgress()) as shown:
        found = export.export_lora(trained, base, out, energy=energy, rank=rank, progress=shown)
    print(json.dumps(found, indent=1)) if as_json else export.show(found, out)


@app.command("export-routed")
def export_routed(
    run: Annotated[Path, typer.Argument(help="The folder of a run with method: routed.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write, which must not exist.")],
) -> None:
    """Write a routed run's base model, one LoRA adapter a task that PEFT loads, and the router.

    Example: forgetless export-routed runs/routed --out set
    """
    quiet_libraries()
    from . import routed

    print(routed.export_routed(run, out))


def quiet_libraries() -> None:
    """Their progress bars and advice would drown ours."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported, which transformers does
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("transformers").setLevel(logging.ERROR)  # before its import: one line about kernels comes from there
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
            "error: the disk is full. What is committed is kept; free some space, and the same command goes on from there. `keep: last 1` keeps fewer models",
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
