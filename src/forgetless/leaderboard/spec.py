"""What a leaderboard is to measure: rows (a method with its settings and trials) x streams x prompts x seeds, read from YAML; and the list of cells that makes.

protocol: clean-v1
model: bundled:smollm2-135m
rows:
  - {row: seqft, method: {name: seqft}, grid: {learning_rate: [2.0e-5, 5.0e-5, 1.0e-4, 2.0e-4]}}
tiers:                      # in the order they are worked through
  - {streams: [order1], seeds: [0, 1, 2]}
"""

from __future__ import annotations

import itertools
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..config import fix_yaml
from ..errors import ConfigError, nearest
from . import protocols
from .protocols import Protocol


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Row(_Strict):
    """One row of the table."""

    row: str
    """Its name in the table: the registry's name first, a peer's ends in "(peer)"."""
    method: dict[str, Any]
    grid: dict[str, list[Any]]
    """Trials: every combination of these values, learning_rate among them; other keys are options of the method."""

    @field_validator("row")
    @classmethod
    def _a_name(cls, row: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][^\n|<>]{0,63}", row):
            raise ValueError(f"row {row!r}: a name begins with a letter or digit, is at most 64 long, and has no line break and none of | < >")
        return row

    @model_validator(mode="after")
    def _complete(self) -> Row:
        if "name" not in self.method:
            raise ValueError(f"row '{self.row}': method has no name")
        if not self.grid.get("learning_rate"):
            raise ValueError(f"row '{self.row}': grid.learning_rate is missing: the learning rates to try, a list")
        if empty := [key for key, values in self.grid.items() if not values]:
            raise ValueError(f"row '{self.row}': grid.{empty[0]} is an empty list")
        return self

    def trials(self) -> list[tuple[dict[str, Any], float]]:
        """[(method, learning rate)], the learning rate varying slowest."""
        rest = {key: values for key, values in self.grid.items() if key != "learning_rate"}
        return [
            (self.method | dict(zip(rest, values, strict=True)), float(rate))
            for rate in self.grid["learning_rate"]
            for values in itertools.product(*rest.values())
        ]


class Tier(_Strict):
    streams: list[str] = Field(min_length=1)
    prompts: list[str] | None = None
    """None: all of the protocol."""
    rows: list[str] | None = None
    """None: all rows of the spec."""
    seeds: list[int] = Field(default_factory=lambda: [0, 1, 2], min_length=1)


class Relearning(_Strict):
    learning_rate: float = Field(default=1e-4, gt=0)
    """One for all rows: adapters are trained at rates too high for whole weights."""
    steps: int = Field(default=16, ge=1)


class Also(_Strict):
    """What is measured beside the scores of the stream's own tasks, in the cells that the first four name (all, where one is absent)."""

    streams: list[str] | None = None
    prompts: list[str] | None = None
    rows: list[str] | None = None
    seeds: list[int] | None = None
    unseen: list[str] = Field(default_factory=list)
    """Tasks that are never trained, as suite/task: scored before the first task and after each."""
    general: list[str] = Field(default_factory=list)
    """lm-eval's tasks, as evaluate.general takes them: before the first task and after the last."""
    relearn: Relearning | None = None
    """Plain training of the stream's first task from the last model (forgetless relearn)."""

    @model_validator(mode="after")
    def _asks(self) -> Also:
        if not self.parts():
            raise ValueError("nothing is asked for: name unseen, general or relearn")
        return self

    def parts(self) -> set[str]:
        """The keys of a cell that hold the answers."""
        return {key for key, asked in (("unseen", self.unseen), ("general", self.general), ("relearning", self.relearn)) if asked}


class Spec(_Strict):
    protocol: str
    model: str = "bundled:smollm2-135m"
    rows: list[Row] = Field(min_length=1)
    tiers: list[Tier] = Field(min_length=1)
    results: Path = Path("benchmarks/results/leaderboard")
    """Where the cells lie, one JSON file each."""
    runs: Path = Path("runs/leaderboard")
    """Where the runs lie while they are at work; their weights go once a cell is written."""
    page: Path | None = None
    """The table to write, in Markdown; pictures lie in img/ beside it."""
    train: dict[str, Any] = Field(default_factory=dict)
    """What this machine needs in the section train and no number depends on, such as {dataloader_num_workers: 2}."""
    also: Also | None = None
    """What else is measured. Cells that lack what is asked of them are done again."""


@dataclass(frozen=True)
class Cell:
    """One run: a row on a stream from a prompt with a seed, or one of its trials on the tuning stream."""

    row: str
    stream: str
    prompt: str
    seed: int
    trial: int | None = None
    protocol: str = ""

    @property
    def name(self) -> str:
        if self.trial is not None:
            return f"{self.protocol}/tuning/{folder_of(self.row)}/trial{self.trial}"
        return f"{self.protocol}/{self.stream}-{self.prompt}/{folder_of(self.row)}/seed{self.seed}"


def folder_of(row: str) -> str:
    """
    >>> folder_of("osft, weights 50 %")
    'osft-weights-50'
    """
    return re.sub(r"[^A-Za-z0-9.]+", "-", row).strip("-")


def load_spec(path: str | Path) -> Spec:
    """Read and check a spec against its protocol. Raises ConfigError naming the key."""
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected keys such as protocol, rows and tiers, found {type(found).__name__}")
    try:
        spec = Spec(**fix_yaml(found))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        near = nearest(str(first["loc"][-1]), Spec.model_fields | Row.model_fields | Tier.model_fields) if first["type"] == "extra_forbidden" else ""
        raise ConfigError(f"{path}: {key}: {first['msg'].removeprefix('Value error, ')}{near}") from None
    check(spec, str(path))
    return spec


def check(spec: Spec, where: str) -> None:
    """Raises ConfigError where the spec asks for what its protocol does not have, or gives a row more trials than the others."""
    from ..methods import get

    protocol, names = protocols.get(spec.protocol), [row.row for row in spec.rows]
    folders = [folder_of(name) for name in names]
    for name, folder in zip(names, folders, strict=True):
        if folders.count(folder) > 1:
            raise ConfigError(f"{where}: rows: two rows have the name, or the folder, of '{name}' ({folder})")
    for tier in spec.tiers:
        for key, asked, known in (
            ("streams", tier.streams, protocol.streams), ("prompts", tier.prompts or [], protocol.prompts), ("rows", tier.rows or [], names),
        ):  # fmt: skip
            for name in asked:
                if name not in known:
                    raise ConfigError(f"{where}: tiers: {key}: there is no '{name}'{nearest(name, known)}")
    if also := spec.also:
        for key, asked, known in (
            ("streams", also.streams, protocol.streams),
            ("prompts", also.prompts, protocol.prompts),
            ("rows", also.rows, names),
        ):
            for name in asked or []:
                if name not in known:
                    raise ConfigError(f"{where}: also: {key}: there is no '{name}'{nearest(name, known)}")
        for name in also.unseen:
            if trained := [stream for stream in also.streams or protocol.streams if name in protocol.streams[stream] and _in_a_tier(spec, stream)]:
                raise ConfigError(f"{where}: also: unseen: '{name}' is trained in the stream {trained[0]}; name the streams it is unseen in")
    if set_by_it := sorted({*protocol.train, "learning_rate", "lr_scheduler_kwargs", "num_train_epochs"} & spec.train.keys()):
        raise ConfigError(f"{where}: train.{set_by_it[0]} is the protocol's, or a row's, to say; train is for what no number depends on")
    for row in spec.rows:
        if (n := len(row.trials())) != protocol.trials:
            raise ConfigError(f"{where}: row '{row.row}': its grid makes {n} trials, and {protocol.name} gives every row {protocol.trials}")
        for method, _ in row.trials():
            get(method["name"], **{k: v for k, v in method.items() if k != "name"})


def _in_a_tier(spec: Spec, stream: str) -> bool:
    return any(stream in tier.streams for tier in spec.tiers)


def also_of(spec: Spec, cell: Cell) -> Also | None:
    """What else is measured in a cell. A routed method leaves no one model to be relearned or asked by lm-eval."""
    from ..methods import get

    also = spec.also
    if also is None or cell.trial is not None:
        return None
    wanted = ((also.streams, cell.stream), (also.prompts, cell.prompt), (also.rows, cell.row), (also.seeds, cell.seed))
    if any(names is not None and own not in names for names, own in wanted):
        return None
    method = next(row.method for row in spec.rows if row.row == cell.row)
    if get(method["name"], **{k: v for k, v in method.items() if k != "name"}).kind == "routed":
        return also.model_copy(update={"general": [], "relearn": None}) if also.unseen else None
    return also


def cells(spec: Spec) -> list[Cell]:
    """The cells of the table in the order they are worked through: seed by seed, so that an interrupted queue compares."""
    protocol = protocols.get(spec.protocol)
    found = [
        Cell(row, stream, prompt, seed, protocol=spec.protocol)
        for tier in spec.tiers
        for stream in tier.streams
        for seed in tier.seeds
        for prompt in tier.prompts or protocol.prompts
        for row in tier.rows or [row.row for row in spec.rows]
    ]
    return list(dict.fromkeys(found))


def trials(spec: Spec) -> list[Cell]:
    """The cells of the tuning stream: every row's first trial first. None where a row brings its settings."""
    protocol = protocols.get(spec.protocol)
    if not protocol.tuning:
        return []
    tuned = {name for tier in spec.tiers for name in tier.rows or [row.row for row in spec.rows]}
    first = Cell("", "tuning", protocol.tuning_prompt, protocol.tuning_seed, protocol=spec.protocol)
    return [replace(first, row=row.row, trial=i) for i in range(protocol.trials) for row in spec.rows if row.row in tuned]


def run_config(spec: Spec, cell: Cell, method: dict[str, Any], rate: float, output_dir: Path, data: Path) -> dict[str, Any]:
    """The config of a cell's run. data: where the files of the tuning stream lie."""
    from ..methods import get

    protocol = protocols.get(spec.protocol)
    train = protocol.train | {"learning_rate": rate} | spec.train
    if protocol.final_rate_share is not None:
        train["lr_scheduler_kwargs"] = {"lr_end": rate * protocol.final_rate_share, "power": 1.0}
    if cell.trial is None:
        names, limit = protocol.streams[cell.stream], protocol.test_rows
        entries = [{"name": name.partition("/")[2], "suite": name, "suite_options": protocol.prompts[cell.prompt]} for name in names]
    else:
        names, limit = protocol.tuning, protocol.tuning_rows
        entries = [tuning_entry(protocol, name, data) for name in names]
    for name, entry in zip(names, entries, strict=True):
        shared = {"max_text_tokens": protocol.max_text_tokens, "max_prompt_tokens": protocol.max_prompt_tokens, "limit": protocol.limit}
        entry |= {key: value for key, value in shared.items() if value is not None} | (
            {"train": own} if (own := protocol.each_task.get(name)) else {}
        )
    options = {k: v for k, v in method.items() if k != "name"}
    stores = get(method["name"], **options).stores
    config = {
        "model": spec.model, "tasks": entries, "method": method, "train": train, "seed": cell.seed, "keep": "last 1",
        "store": "rows" if stores == "rows" else "prompts",
        "evaluate": {"split": "test", "limit": limit, "scorers": list(protocol.scorers)}, "output_dir": str(output_dir),
    }  # fmt: skip
    if also := also_of(spec, cell):
        cut = {key: entries[0][key] for key in ("max_text_tokens", "max_prompt_tokens") if key in entries[0]}
        unseen = [{"name": name.partition("/")[2], "suite": name, "suite_options": protocol.prompts[cell.prompt]} | cut for name in also.unseen]
        config |= {"watch": unseen} if unseen else {}
        config["evaluate"] |= {"general": also.general} if also.general else {}
    return config


def tuning_entry(protocol: Protocol, name: str, data: Path) -> dict[str, Any]:
    """A task of the tuning stream, from files that hold dev rows alone: settings are chosen on rows that no cell of the table trains on or is scored on."""
    from .. import suites

    suite, short = suites.load(name, **protocol.prompts[protocol.tuning_prompt]), name.replace("/", "-")
    cut, files = len(suite.dev) * 4 // 5, {}
    data.mkdir(parents=True, exist_ok=True)
    for part, rows in (("data", suite.dev[:cut]), ("test", suite.dev[cut:])):
        file = data / f"{short}-{part}.jsonl"
        text = "".join(json.dumps({"sentence": row["sentence"], "label": row["label"]}) + "\n" for row in rows)
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            beside = file.with_suffix(f".{os.getpid()}")  # another process may be at it too
            beside.write_text(text, encoding="utf-8", newline="\n")
            beside.replace(file)
        files[part] = str(file)
    return {"name": name.partition("/")[2], **files, "labels": list(suite.labels), "prompt": suite.prompt}
