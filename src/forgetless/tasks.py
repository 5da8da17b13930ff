"""Tasks: from files or a suite to prompts and answers, with train, dev and test kept apart.

Formats: .jsonl, .json, .json.gz. classification: {"sentence", "label"}; prompt_completion: {"prompt", "completion"} ("answer" is read too). The model is trained on
the answer tokens and the end token only; truncation shortens the text, never the answer.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import COLUMNS, RunConfig, TaskConfig
from .errors import ConfigError, DataError, nearest

DEFAULT_PROMPT = "Text: {sentence}\nAnswer:"
CONTENT_FREE = ("N/A", "", "[MASK]")  # Zhao et al. 2021 (arXiv 2102.09690)


@dataclass(frozen=True)
class Example:
    """One row: `text` fills the task's prompt, `answer` is what should follow. row: its number in the source, from 0."""

    text: str
    answer: str
    row: int


@dataclass
class Task:
    """One task of a stream. prompt is a str.format template with {sentence}; labels is None where answers are free text."""

    name: str
    prompt: str
    train: list[Example]
    dev: list[Example]
    test: list[Example]
    labels: list[str] | None = None
    max_text_tokens: int | None = None
    max_prompt_tokens: int = 512
    source: str = ""
    overlap: int = 0  # test texts that also stand in train
    sha256: str = field(default="")

    def __post_init__(self):
        if not self.sha256:
            rows = [[e.text, e.answer] for split in (self.train, self.dev, self.test) for e in (*split, Example("", "", 0))]
            self.sha256 = _sha(json.dumps([self.prompt, self.labels, self.max_text_tokens, self.max_prompt_tokens, rows], ensure_ascii=False))

    def split(self, name: str) -> list[Example]:
        return {"train": self.train, "dev": self.dev, "test": self.test}[name]

    # -- tokens ----------------------------------------------------------------------------------------------------------------------

    def encode_prompt(self, tokenizer, text: str) -> list[int]:
        """Token ids of the prompt with `text` filled in, at most max_prompt_tokens: the text loses its end, or in free-form prompts its beginning."""
        if self.max_text_tokens is not None:
            text = _first_tokens(tokenizer, text, self.max_text_tokens)
        ids = tokenizer(self.prompt.format(sentence=text)).input_ids
        if len(ids) <= self.max_prompt_tokens:
            return ids
        if self.prompt == "{sentence}":
            return ids[-self.max_prompt_tokens :]  # a free-form prompt asks at its end
        keep = len(tokenizer(text, add_special_tokens=False).input_ids)
        while len(ids) > self.max_prompt_tokens and keep > 0:
            keep = max(0, keep - (len(ids) - self.max_prompt_tokens))
            text = _first_tokens(tokenizer, text, keep)
            ids = tokenizer(self.prompt.format(sentence=text)).input_ids
        if len(ids) > self.max_prompt_tokens:
            raise DataError(
                f"task '{self.name}': the prompt without its text is already {len(ids)} tokens; raise max_prompt_tokens ({self.max_prompt_tokens})"
            )
        return ids

    def encode_answer(self, tokenizer, answer: str, end: bool = True, prompt_end: str = "") -> list[int]:
        """Token ids of " answer", with the end token where `end`."""
        free = self.prompt == "{sentence}"  # the user wrote the whole prompt: a space only where neither side has white space
        joined = answer if free and (answer[:1].isspace() or prompt_end.isspace()) else " " + answer
        ids = tokenizer(joined, add_special_tokens=False).input_ids
        return ids + [tokenizer.eos_token_id] if end else ids

    def encode(self, tokenizer, example: Example) -> dict[str, list[int]]:
        """{"input_ids", "labels"} of one training row; labels are -100 on the prompt."""
        prompt, answer = self.encode_prompt(tokenizer, example.text), self.encode_answer(tokenizer, example.answer, prompt_end=example.text[-1:])
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


@dataclass
class TaskStream:
    """The tasks in the order they are learned."""

    tasks: list[Task]

    def __iter__(self):
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, i: int) -> Task:
        return self.tasks[i]


def load_stream(config: RunConfig) -> TaskStream:
    """Read every file of every task, so that the first bad row is found before the first step. Raises DataError, ConfigError."""
    stream = TaskStream([load_task(task, config.seed) for task in config.tasks])
    for task in stream:
        if not task.split(config.evaluate.split):
            raise ConfigError(f"evaluate.split: task '{task.name}' has no {config.evaluate.split} rows; give it a {config.evaluate.split} file")
    return stream


def load_task(config: TaskConfig, seed: int = 0) -> Task:
    if config.suite is not None:
        from . import suites

        try:
            suite = suites.load(config.suite, seed=seed, **config.suite_options)
        except TypeError as error:
            raise ConfigError(f"task '{config.name}': suite_options: {error}") from None
        splits = {name: [Example(r["sentence"], r["label"], i) for i, r in enumerate(getattr(suite, name))] for name in ("train", "dev", "test")}
        task = Task(config.name, config.prompt or suite.prompt, **splits, labels=list(suite.labels), source=suite.source,
                    max_text_tokens=config.max_text_tokens, max_prompt_tokens=config.max_prompt_tokens)  # fmt: skip
    else:
        task = _from_files(config)
    if config.limit is not None and len(task.train) > config.limit:
        task = _replace_train(task, sample(task.train, config.limit, seed))
    for split in ("train", "test"):
        if not task.split(split):
            raise DataError(f"task '{config.name}': no {split} rows; give more data{' or a test file' if split == 'test' else ''}")
    return task


def sample(rows: Sequence[Example], limit: int | None, seed: int) -> list[Example]:
    """At most `limit` rows, the same for the same seed and file, in their order there."""
    if limit is None or len(rows) <= limit:
        return list(rows)
    chosen = sorted(rows, key=lambda e: _sha(f"{seed}\0{e.text}\0{e.answer}\0{e.row}"))[:limit]
    return sorted(chosen, key=lambda e: e.row)


# -- files ---------------------------------------------------------------------------------------------------------------------------


def _from_files(config: TaskConfig) -> Task:
    where = f"task '{config.name}'"
    template = config.prompt or (DEFAULT_PROMPT if config.format == "classification" else "{sentence}")
    train_all = read_rows(config.data, config)
    labels = None
    if config.format == "classification":
        labels = config.labels or sorted({e.answer for e in train_all})
        if len(labels) < 2:
            raise DataError(
                f"{where}: {config.data} has the single label {labels}; a classification task needs two or more (or format: prompt_completion)"
            )
        _check_labels(train_all, labels, config.data, config.name)
    if config.test is not None:
        rest, test = train_all, read_rows(config.test, config)
        if labels:
            _check_labels(test, labels, config.test, config.name)
    else:
        rest, test = carve(train_all, "test")
    if config.dev is not None:
        train, dev = rest, read_rows(config.dev, config)
        if labels:
            _check_labels(dev, labels, config.dev, config.name)
    else:
        train, dev = carve(rest, "dev")
    seen = {_normal(e.text) for e in train}
    overlap = sum(_normal(e.text) in seen for e in test)
    return Task(config.name, template, train, dev, test, labels=labels, source=str(config.data), overlap=overlap,
                max_text_tokens=config.max_text_tokens, max_prompt_tokens=config.max_prompt_tokens)  # fmt: skip


def read_rows(path: str, config: TaskConfig) -> list[Example]:
    """Rows of one file; a bad one is fatal and named by file and line (or row, in a JSON list)."""
    text_key, answer_key = COLUMNS[config.format]
    text_column, answer_column = config.columns.get(text_key, text_key), config.columns.get(answer_key, answer_key)
    examples = []
    for place, row in _raw_rows(path, config.name):
        if not isinstance(row, dict):
            raise DataError(f"{place}: expected an object such as {{{text_key!r}: ..., {answer_key!r}: ...}}, got {type(row).__name__}")
        if answer_key == "completion" and answer_column not in row and "answer" in row:
            row = row | {answer_column: row["answer"]}
        for key, column in ((text_key, text_column), (answer_key, answer_column)):
            if column not in row:
                raise DataError(f"{place}: no '{column}'{nearest(column, row)}. Rename columns with columns: {{{key}: ...}}")
            if not isinstance(row[column], (str, int)) or isinstance(row[column], bool) or not str(row[column]).strip():
                raise DataError(f"{place}: '{column}' is {row[column]!r}; it must be text that is not empty")
            if any("\ud800" <= c <= "\udfff" for c in str(row[column])):
                raise DataError(f"{place}: '{column}' holds half a character (a lone surrogate, often an emoji cut in two); mend or drop the row")
        examples.append(
            Example(
                str(row[text_column]),
                str(row[answer_column]).strip() if config.format == "classification" else str(row[answer_column]),
                len(examples),
            )
        )
    if not examples:
        raise DataError(f"{path}: the file has no rows (task '{config.name}')")
    return examples


def _raw_rows(path: str, task: str) -> Iterable[tuple[str, Any]]:
    file = Path(path)
    if not file.is_file():
        raise DataError(f"task '{task}': no such data file: {path}")
    try:
        text = gzip.decompress(file.read_bytes()).decode("utf-8") if file.suffix == ".gz" else file.read_text(encoding="utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    name = file.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    yield f"{path}, line {number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}, line {number}: not valid JSON ({error.msg})") from None
    elif name.endswith(".json"):
        try:
            rows = json.loads(text) if text.strip() else []
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
        if not isinstance(rows, list):
            raise DataError(f"{path}: expected a list of rows, got {type(rows).__name__}; one object a line goes into a .jsonl file")
        for number, row in enumerate(rows, 1):
            yield f"{path}, row {number}", row
    else:
        raise DataError(f"{path}: unknown kind of file; .jsonl, .json and .json.gz are read")


def _check_labels(examples: list[Example], labels: list[str], path: str, task: str) -> None:
    bad = next((e for e in examples if e.answer not in labels), None)
    if bad is not None:
        place, _ = next(itertools.islice(_raw_rows(path, task), bad.row, None))  # read again: rows are numbered without the blank lines
        raise DataError(f"{place}: label {bad.answer!r} is outside the set{nearest(bad.answer, labels)}")


def carve(rows: list[Example], split: str) -> tuple[list[Example], list[Example]]:
    """(rest, carved): 10 % of the rows by hash of the text, so that copies of a text stay together and the cut does not depend on order."""
    carved = [e for e in rows if int(_sha(f"{split}\0{_normal(e.text)}")[:8], 16) % 10 == 0]
    if not carved and len(rows) > 1 and split == "test":
        carved = [min(rows, key=lambda e: _sha(f"{split}\0{_normal(e.text)}"))]
    out = {_normal(e.text) for e in carved}
    return [e for e in rows if _normal(e.text) not in out], carved


def _replace_train(task: Task, train: list[Example]) -> Task:
    import dataclasses

    return dataclasses.replace(task, train=train, sha256="")


def _first_tokens(tokenizer, text: str, n: int) -> str:
    """The text up to the end of its n-th token."""
    if tokenizer.is_fast:
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        return text if len(offsets) <= n else (text[: offsets[n - 1][1]] if n else "")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return text if len(ids) <= n else tokenizer.decode(ids[:n])


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
