"""`forgetless export`: what a run has learned, in a folder of its own that other software loads with nothing of ours.

    plain    the model, as transformers reads it
    lora     what training changed, as an adapter that PEFT loads on the model it started from (delta.py)
    routed   of method routed: the base model, an adapter a task, the router (routed.py)
    prompt   of method prompt: the base model, and a prompt-tuning adapter a task that PEFT loads
    gguf     the model in one file for llama.cpp, llama family only (gguf.py)

Every file of the commit is hashed before it is read, and a whole model once more after it is written, so what is exported is what was committed. The folder is written
beside its place and renamed: it is there whole, or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from . import delta, models
from .config import RunConfig, load_config
from .errors import ConfigError, DataError
from .files import sync_tree
from .lineage import GONE, RunFolder, folder_of, task_of
from .methods import get
from .methods.base import Memory, Method
from .methods.beside import Beside
from .progress import Progress
from .state import model_sha256

FORMS = ("plain", "lora", "routed", "prompt", "gguf")
# method of kind routed -> the form that holds what it leaves
FORM_OF = {"routed": "routed", "prompt": "prompt"}
WHOLE_MODEL = ("plain", "lora", "gguf")

LOADING = {  # of everything but a plain model, whose card says it already
    "lora": "An adapter for the model that the run began with: `peft.PeftModel.from_pretrained(base, FOLDER)`. `export.json` says how much of the change it misses.",
    "gguf": '`llama-cli -m model.gguf`, or `transformers.AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file="model.gguf")`.',
    "routed": "`forgetless.routed.load_routed(FOLDER)` has the router too. Without forgetless: `base/` is a model that transformers loads, each folder of "
    "`adapters/` an adapter that PEFT loads on it.",
    "prompt": "`base/` is a model that transformers loads, each folder of `prompts/` the prompt of one task: `peft.PeftModel.from_pretrained(base, PROMPT)`. "
    "Answer rows one by one, or padded on the right.",
}


@dataclass
class Commit:
    """A committed task of a run, whose files are what was committed."""

    run: RunFolder
    name: str  # of its folder under tasks/
    line: dict[str, Any]

    @classmethod
    def of(cls, run: Path, task: str | None = None) -> Commit:
        """The current commit, or that of a task, tag or folder's name. Raises ConfigError for an unknown one, DataError where its model was let go or a file is damaged."""
        folder = RunFolder(run, lock=False)
        if not folder.current:
            known = (run / "run.yaml").is_file()
            raise ConfigError(
                f"{run}: {'this run has not learned a task yet' if known else 'not the folder of a run that has learned a task'}; there is nothing to export"
            )
        folder.committed()  # a damaged lineage is named as such
        name = folder.current if task is None else folder.find(task)
        at = folder.path / "tasks" / name
        if not (at / "model").is_dir() or (at / GONE).exists():
            kept = [x for x in folder.folders() if (folder.path / "tasks" / x / "model").is_dir()]
            raise DataError(f"{run}: the model of {name} is not there, `keep` has let it go. Kept: {', '.join(kept) or 'none'}")
        line = next(x for x in folder.lineage() if x["kind"] == "task" and folder_of(x) == name)
        folder.check_files([line])
        return cls(folder, name, line)

    @cached_property
    def config(self) -> RunConfig:
        return load_config(self.run.path / "run.yaml")

    @cached_property
    def method(self) -> Method:
        return get(self.config.method.name, **self.config.method.options)

    @property
    def model(self) -> Path:
        return self.run.path / "tasks" / self.name / "model"

    @property
    def is_current(self) -> bool:
        return self.name == self.run.current

    @cached_property
    def memory(self) -> Memory:
        return self.run.memory(self.name)

    def load(self, folder: Path) -> tuple[torch.nn.Module, Any]:
        """The model in `folder`, which has to be this commit's, and its tokenizer. Raises DataError where it is not."""
        dtype = getattr(torch, self.config.dtype)
        model, tokenizer = models.load(str(folder), trust_remote_code=self.config.trust_remote_code, dtype=dtype)
        if model_sha256(model) != self.line["model_sha256"]:
            raise DataError(
                f"{self.model}: does not load as the model that was committed (model_sha256 differs from lineage.jsonl); nothing was exported. "
                f"`forgetless verify {self.run.path}` looks at every file"
            )
        return model, tokenizer


def export(
    source: str | Path, out: str | Path, form: str | None = None, task: str | None = None, *,
    base: str | None = None, energy: float | None = None, rank: int | None = None, progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write what a run has learned into the folder `out`, new or empty.

    source: a run's folder; for lora with `base` also any trained model. form: one of FORMS; None: what the run's method leaves, plain as a rule. task: a task, tag or
    folder's name, whose commit is exported instead of the current one. energy, rank: of lora, see delta.write_adapter. Returns {"as", "out", "bytes", "files": {path: bytes}}, and
    of a run {"task", "folder", "model_sha256"}; of lora also what its export.json holds.

    Raises ConfigError for bad arguments and for what the form cannot hold, DataError where a file is not what was committed.
    """
    source, out, progress = Path(source), Path(out), progress or Progress()
    if form is not None and form not in FORMS:
        raise ConfigError(f"--as {form}: one of {', '.join(FORMS)}")
    how = delta.chosen(energy, rank)
    _refuse_occupied(out)
    if form == "lora" and task is None and not (source / "current").is_file() and not (source / "run.yaml").is_file():
        return _lora_of_models(str(source), base, out, how, progress)
    if out.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{out}: lies in the run's own folder; name one outside it")
    commit = Commit.of(source, task)
    form = form or _left_by(commit)
    _refuse_misfit(form, commit, task)
    if form != "lora" and (base, energy, rank) != (None, None, None):
        raise ConfigError(f"--base, --energy and --rank are of --as lora; an export as {form} has none of them")
    found: dict[str, Any] = {}
    with _written(out) as work:
        if form == "plain":
            _copy(commit.model, work)
            commit.load(work)
        elif form == "lora":
            commit.load(commit.model)
            own = commit.memory if commit.method.kind == "adapter" and energy is None and rank is None and base is None else None
            trust = commit.config.trust_remote_code
            found = delta.write_adapter(work, str(commit.model), base or commit.config.model, how, own=own, trust=trust, progress=progress)
        elif form == "gguf":
            from .gguf import write_gguf

            write_gguf(*commit.load(commit.model), work / "model.gguf", f"{source.resolve().name}-{commit.line['task']}")
        elif form == "routed":
            from .routed import export_routed

            export_routed(source, work / "set")
            commit.load(work / "set" / "base")
            for path in (work / "set").iterdir():
                path.rename(work / path.name)
            (work / "set").rmdir()
        else:
            _copy(commit.model, work / "base")
            model, _ = commit.load(work / "base")
            _write_prompts(commit, model, work / "prompts")
        if commit.is_current:  # the card tells of the run as it stands
            (work / "README.md").write_text(_card(source, form), encoding="utf-8")
        files = _sizes(work)
    trained = f"{source} ({commit.name})"
    about = {"as": form, "task": commit.line["task"], "folder": commit.name, "model_sha256": commit.line["model_sha256"]}
    return {"trained": trained, **found, **about, "out": str(out), "files": files, "bytes": sum(files.values())}


def _left_by(commit: Commit) -> str:
    return next((FORM_OF[name] for name in _names(commit.method) if name in FORM_OF), "plain")


def _names(method: Method) -> list[str]:
    """Of a method and those it goes beside."""
    return [method.name, *(part.name for part in (method.inner() if isinstance(method, Beside) else ()))]


def _refuse_misfit(form: str, commit: Commit, task: str | None) -> None:
    """Raise ConfigError where `form` does not hold what the run's method leaves."""
    method, names = commit.method, _names(commit.method)
    only = next((name for name, its in FORM_OF.items() if its == form), None)
    if only is not None and only not in names:
        raise ConfigError(f"--as {form}: {commit.run.path} was trained by {method.name}, which leaves no {form} set; --as plain is the model")
    if form == "routed" and task is not None:
        raise ConfigError("--as routed: the set has every task's increment; leave --task out")
    if method.kind != "routed" or form not in WHOLE_MODEL:
        return
    if "per_task" in names:
        if task is None:
            known = ", ".join(map(task_of, commit.run.committed()))
            raise ConfigError(f"method per_task leaves a model a task, and only you know which is wanted; name one with --task: {known}")
        return
    fits = next((FORM_OF[name] for name in names if name in FORM_OF), None)
    if fits is not None:
        raise ConfigError(
            f"--as {form}: method {method.name} leaves the weights as they were, what it has learned is beside them; export it --as {fits}"
        )
    if "gainlora" in names:
        raise ConfigError(
            "method gainlora cannot be exported: its branches are weighed for each row by gates that read the prompt, which no format that PEFT, transformers or "
            "llama.cpp load has a place for, and the weights alone are the untouched model's. Keep the run's folder, which has all of it in state/; of the methods "
            "that choose by the prompt, routed can be exported"
        )
    raise ConfigError(f"method {method.name} leaves several models to choose among (kind: routed), and --as {form} holds one")


def _refuse_occupied(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(
            f"{out}: exists already{' and is not empty' if out.is_dir() else ' and is a file'}; name another folder. Nothing was touched"
        )


def _lora_of_models(trained: str, base: str | None, out: Path, how: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """The difference of two models that no run knows of."""
    if base is None:
        raise ConfigError(f"{trained}: not a run's folder, so it does not say what it was trained from; name that model with --base")
    with _written(out) as work:
        found = delta.write_adapter(work, trained, base, how, progress=progress)
        files = _sizes(work)
    return {"trained": trained, **found, "as": "lora", "out": str(out), "files": files, "bytes": sum(files.values())}


@contextmanager
def _written(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which takes its place when all went well."""
    final = Path(os.path.abspath(out))
    work = final.with_name(f".{final.name}.tmp")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)  # of an export that was killed
        work.mkdir()
        yield work
        sync_tree(work)
        work.replace(final)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror or error}); name another folder") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """The bytes, never links: what becomes of the run must not reach the copy, nor the other way round."""
    for file in sorted(p for p in source.rglob("*") if p.is_file()):
        to = target / file.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, to)


def _card(run: Path, form: str) -> str:
    """The run's model card, and how to load what lies beside it."""
    from .report.card import model_card

    whole = model_card(run)
    if form == "plain":
        return whole
    card, loading, _ = whole.partition("## How to load\n")
    if form in ("lora", "prompt"):
        card = card.replace("library_name: transformers", "library_name: peft", 1)
    return f"{card}{loading}\n{LOADING[form]}\n"


def _sizes(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def _write_prompts(commit: Commit, model: torch.nn.Module, folder: Path) -> None:
    """A PEFT adapter for each learned task: [P_k, ..., P_1] as the vectors of its prompt tuning."""
    from peft import PromptTuningConfig
    from safetensors.torch import save_file

    kept, names = commit.memory.of("prompt"), commit.memory.info["prompt"]["tasks"]
    for number, task in enumerate(names):
        P = torch.cat([kept[f"{k:02d}"] for k in reversed(range(number + 1))])
        at = folder / f"{number:02d}-{task}"
        PromptTuningConfig(
            task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM", num_virtual_tokens=len(P), token_dim=P.shape[1],
            num_transformer_submodules=1, inference_mode=True, base_model_name_or_path=commit.config.model,
        ).save_pretrained(str(at))  # fmt: skip
        save_file({"prompt_embeddings": P.contiguous()}, at / "adapter_model.safetensors", metadata={"format": "pt"})


def show(found: dict[str, Any]) -> None:
    """The summary, for people."""
    out = found["out"]
    auto = "AutoModelForCausalLM"
    if found["as"] == "plain" and json.loads(Path(out, "config.json").read_text(encoding="utf-8")).get("is_encoder_decoder"):
        auto = "AutoModelForSeq2SeqLM"
    if found["as"] == "lora":
        delta.show(found, Path(out))
        return
    print(f"{found['trained']} as {found['as']}: {len(found['files'])} files, {found['bytes']:,} bytes in {out}")
    print(f"model   {found['model_sha256']}, as it was committed")
    use = {
        "plain": f'transformers.{auto}.from_pretrained("{out}")',
        "gguf": f'llama-cli -m {out}/model.gguf, or transformers.{auto}.from_pretrained("{out}", gguf_file="model.gguf")',
        "routed": f'forgetless.routed.load_routed("{out}"); each of {out}/adapters alone: peft.PeftModel.from_pretrained(base, adapter)',
        "prompt": f"peft.PeftModel.from_pretrained(base, prompt) with base from {out}/base and prompt one of {out}/prompts",
    }[found["as"]]
    print(f"load    {use}")
