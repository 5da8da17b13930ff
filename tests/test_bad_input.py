"""Every mistake a user can make: the exit status, a message that says what, where and what to do, no traceback, and nothing lost.

Each row of a table is run through the command line twice where that makes sense: against a folder that holds a finished run (every byte must stay) and
against a new one (nothing may be left in it).
"""

from __future__ import annotations

import gzip
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import CHAT, TASKS, make_model_folder, write_task

import forgetless.trainer
from forgetless.config import load_config
from forgetless.lineage import RunFolder, model_sha256
from forgetless.loop import run as learn

TRAIN = {"learning_rate": 1e-3, "max_steps": 6, "per_device_train_batch_size": 4, "bf16": False, "use_cpu": True}


def settings(folder: Path, model: str, tasks=("colour",)) -> dict:
    """A config whose data and output lie in `folder`."""
    return {
        "model": model, "tasks": [write_task(folder / "data", name) for name in tasks], "method": {"name": "gorp"}, "train": dict(TRAIN),
        "evaluate": {"limit": 8}, "output_dir": str(folder / "run"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    """A run of one task, committed."""
    folder = tmp_path_factory.mktemp("finished")
    return learn(settings(folder, tiny)).path


@pytest.fixture
def here(tiny, tmp_path, monkeypatch) -> dict:
    """A config in the working directory, first.yaml; its output_dir does not exist yet."""
    monkeypatch.chdir(tmp_path)
    config = settings(tmp_path, tiny)
    Path("first.yaml").write_text(yaml.safe_dump(config))
    return config


def contents(folder: Path) -> dict[str, bytes | str | None]:
    """Everything below a folder: bytes of files, targets of links, None for folders."""
    return {
        str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))
    }  # fmt: skip


def assert_says(result: tuple[int, str, str], code: int, parts: list[str]) -> None:
    """One clear error on stderr, and nothing on stdout that a script could take for a result."""
    status, out, err = result
    assert status == code, err
    for part in parts:
        assert part in err
    assert "Traceback" not in err and "internal error" not in err and out == ""
    assert err.count("error: ") == 1


# -- mistakes found before the folder is opened -----------------------------------------------------------------------------------------

GOOD = '{"sentence": "cat red", "label": "red"}\n{"sentence": "dog blue", "label": "blue"}\n{"sentence": "bird green", "label": "green"}\n'
CAT = '{"sentence": "cat", "label": '
DATA = ["tasks.0.data=bad.jsonl", "tasks.0.test=null"]
FREE = "tasks.0={name: a, data: bad.jsonl, format: prompt_completion, "
TALK = ["tasks.0={name: a, data: bad.jsonl, format: messages}"]
PAIRS = '{"prompt": "cat", "completion": "red"}\n{"prompt": "dog", "completion": "blue"}\n'
CSV = ["tasks.0.data=bad.csv", "tasks.0.test=null"]
WATCH = "watch=[{name: w, data: bad.jsonl}]"

# what is wrong; files to write; overrides; exit status; what the message must contain
BEFORE = [
    # the configuration
    ("unknown key", {}, ["metod=gorp"], 2, ["first.yaml", "unknown key 'metod'", "did you mean 'method'?"]),
    ("unknown key of evaluate", {}, ["evaluate.limt=3"], 2, ["unknown key 'evaluate.limt'", "did you mean 'limit'?"]),
    ("unknown key of a task", {}, ["tasks.0.lables=[a, b]"], 2, ["unknown key 'tasks.0.lables'", "did you mean 'labels'?"]),
    ("key of nothing known", {}, ["zzz=1"], 2, ["unknown key 'zzz'", "known: checkpoint_every, dtype, evaluate"]),
    ("unknown method", {}, ["method=gorb"], 2, ["there is no method 'gorb'", "did you mean 'gorp'?"]),
    ("unknown method option", {}, ["method.rnak=4"], 2, ["method gorp", "unknown option 'rnak'", "did you mean 'rank'?"]),
    ("method option out of range", {}, ["method.energy=1.5"], 2, ["method gorp", "energy", "less than or equal to 1"]),
    ("method option of the wrong type", {}, ["method.rank=many"], 2, ["method gorp", "rank", "integer"]),
    ("method option with a choice", {}, ["method.refresh=lukewarm"], 2, ["refresh", "'cold'", "'svd'"]),
    ("section that is a value", {}, ["train=3"], 2, ["train: must be a section"]),
    ("section that is empty", {}, ["method=null"], 2, ["method: must be a section"]),
    ("text that YAML read as a truth value", {}, ["tasks.0.labels=[yes, no]"], 2, ["tasks.0.labels.0", "True", "quotes"]),
    ("seed below zero", {}, ["seed=-1"], 2, ["seed", "greater than or equal to 0"]),
    ("seed too large for numpy", {}, ["seed=99999999999"], 2, ["seed", "less than or equal to"]),
    ("empty output_dir", {}, ["output_dir=''"], 2, ["output_dir", "at least 1 character"]),
    ("keep", {}, ["keep=last"], 2, ["keep: 'last'", "all, last N"]),
    ("no tasks", {}, ["tasks=[]"], 2, ["tasks", "at least 1"]),
    # overrides
    ("override without a value", {}, ["method.rank"], 2, ["override 'method.rank'", "key=value", "method.rank=4"]),
    ("override without a key", {}, ["=4"], 2, ["override '=4'", "key=value"]),
    ("override that is no YAML", {}, ["method.rank=[4"], 2, ["override 'method.rank=[4'", "not valid YAML"]),
    ("override with an impossible date", {}, ["seed=2024-13-45"], 2, ["override 'seed=2024-13-45'", "not valid YAML"]),
    ("override into a value", {}, ["model.x=1"], 2, ["override 'model.x=1'", "model is a value, not a section"]),
    ("override beyond the list", {}, ["tasks.7.name=x"], 2, ["override 'tasks.7.name=x'", "tasks has 1 entries, numbered from 0"]),
    ("override of an entry that is not there", {}, ["tasks.one=x"], 2, ["override 'tasks.one=x'", "numbered from 0"]),
    # TrainingArguments
    ("unknown TrainingArguments name", {}, ["train.learning_rat=1e-3"], 2, ["train.learning_rat", "TrainingArguments", "did you mean 'learning_rate'?"]),
    ("refused TrainingArguments value", {}, ["train.lr_scheduler_type=zigzag"], 2, ["train", "zigzag"]),
    ("train key of ours", {}, ["train.output_dir=x"], 2, ["train.output_dir", "output_dir at the top level"]),
    ("train key with no use", {}, ["train.save_strategy=steps"], 2, ["train.save_strategy", "take it out"]),
    ("train key that would upload", {}, ["train.push_to_hub=true"], 2, ["train.push_to_hub", "take it out"]),
    ("train number that is text", {}, ["train.learning_rate=abc"], 2, ["train.learning_rate must be a number, at least 0", "'abc'"]),
    ("train number that is no number", {}, ["train.learning_rate=.nan"], 2, ["train.learning_rate", "nan"]),
    ("batches of nothing", {}, ["train.per_device_train_batch_size=0"], 2, ["train.per_device_train_batch_size must be a whole number, at least 1", "got 0"]),
    ("half a step", {}, ["train.max_steps=1.5"], 2, ["train.max_steps must be a whole number", "1.5"]),
    # tasks
    ("task name with a slash", {}, ["tasks.0.name=a/b"], 2, ["tasks.0.name", "'a/b'", "folder name"]),
    ("task name that climbs", {}, ["tasks.0.name=.."], 2, ["tasks.0.name", "'..'", "folder name"]),
    ("task name that climbs further", {}, ["tasks.0.name=a..b"], 2, ["'a..b'", "no '..'"]),
    ("empty task name", {}, ["tasks.0.name=''"], 2, ["tasks.0.name", "''", "folder name"]),
    ("suite and data", {}, ["tasks.0.suite=demo/cities"], 2, ["task 'colour'", "either suite", "or data"]),
    ("neither suite nor data", {}, ["tasks.0.data=null"], 2, ["task 'colour'", "either suite", "or data"]),
    ("unknown suite", {}, ["tasks.0={name: a, suite: dmo/cities}"], 2, ["no suite 'dmo'", "did you mean 'demo'?"]),
    ("unknown task of a suite", {}, ["tasks.0={name: a, suite: demo/citys}"], 2, ["no task 'citys'", "did you mean 'cities'?"]),
    ("suite without a task", {}, ["tasks.0={name: a, suite: demo}"], 2, ["suite 'demo' has no task ''", "cities"]),
    ("unknown suite option", {}, ["tasks.0={name: a, suite: demo/cities, suite_options: {hard: 1}}"], 2, ["task 'a'", "suite_options", "'hard'"]),
    ("suite with the keys of a file", {}, ["tasks.0={name: a, suite: demo/cities, test: x.jsonl}"], 2, ["task 'a'", "test", "suite"]),
    ("prompt without the text", {}, ["tasks.0.prompt='Text:'"], 2, ["tasks.0.prompt", "'Text:'", "must contain {sentence}"]),
    ("prompt with other braces", {}, ["tasks.0.prompt='{sentence} {x}'"], 2, ["tasks.0.prompt", "must contain {sentence}", "{{"]),
    ("prompt of a suite without the text", {}, ["tasks.0={name: a, suite: demo/cities, prompt: 'City:'}"], 2, ["must contain {sentence}"]),
    ("columns the wrong way round", {}, ["tasks.0.columns={text: sentence}"], 2, ["task 'colour'", "columns", "'text'", "sentence, label"]),
    ("label words of free text", {}, [FREE + "label_words: {red: apple}}"], 2, ["task 'a'", "label_words go with format: classification"]),
    ("label words of no label", {}, ["tasks.0.label_words={rde: apple}"], 2, ["task 'colour': label_words: 'rde' is not a label", "did you mean 'red'?"]),
    ("label words that are shared", {}, ["tasks.0.label_words={red: Blue}"], 2, ["label_words: 'red' and 'blue' would share the word 'blue'", "must differ"]),
    ("label words that YAML read as a truth value", {}, ["tasks.0.label_words={red: yes}"], 2, ["tasks.0.label_words.red", "True", "quotes"]),
    ("label words of no label in the data", {"bad.jsonl": GOOD}, [*DATA, "tasks.0.labels=null", "tasks.0.label_words={pink: apple}"], 2,
     ["task 'colour': label_words: 'pink' is not a label", "known: blue, green, red"]),
    ("a prompt round messages", {}, ["tasks.0={name: a, data: x, format: messages, prompt: '{sentence}'}"], 2, ["task 'a': prompt", "the chat template writes the prompt"]),
    ("a text limit of messages", {}, ["tasks.0={name: a, data: x, format: messages, max_text_tokens: 9}"], 2, ["task 'a': max_text_tokens", "messages"]),
    ("columns of messages", {}, ["tasks.0={name: a, data: x, format: messages, columns: {prompt: x}}"], 2, ["'prompt'", "format messages renames messages"]),
    ("format of a suite", {}, ["tasks.0={name: a, suite: demo/cities, format: messages}"], 2, ["task 'a'", "format goes with data", "Take it out"]),
    ("unknown format", {}, ["tasks.0.format=chat"], 2, ["tasks.0.format", "'classification', 'prompt_completion' or 'messages'"]),
    # metrics
    ("unknown metric", {}, ["tasks.0.metric=exact"], 2, ["tasks.0.metric: there is no metric 'exact'", "did you mean 'exact_match'?"]),
    ("choice without labels", {}, [FREE + "metric: choice}"], 2, ["task 'a': metric: choice is among labels", "format: prompt_completion has none", "rouge_l"]),
    ("choice of messages", {}, ["tasks.0={name: a, data: x, format: messages, metric: choice}"], 2, ["task 'a': metric: choice", "format: messages has none"]),
    ("a metric that cannot be imported", {}, ["tasks.0.metric=no_module_here:score"], 2,
     ["task 'colour': metric no_module_here:score: cannot be imported", "working directory", "ModuleNotFoundError"]),
    ("a metric that is no function of its module", {"mine.py": "def score(p, a): return 1"}, ["tasks.0.metric=mine:scor"], 2,
     ["module mine has no function scor", "did you mean 'score'?"]),
    ("a metric that is no share", {"mine2.py": "def score(p, a): return 87"}, ["tasks.0.metric=mine2:score"], 2, ["mine2:score returned 87", "a number from 0 to 1"]),
    ("a metric that raises", {"mine3.py": "def score(p, a): return p['x']"}, ["tasks.0.metric=mine3:score"], 2, ["mine3:score raised TypeError", "on prediction"]),
    ("an answer ROUGE-L cannot read", {"bad.jsonl": PAIRS + '{"prompt": "bird", "completion": "红"}\n'}, [FREE + "test: bad.jsonl, metric: rouge_l}"], 4,
     ["task 'a': metric rouge_l: bad.jsonl, line 3", "a-z and 0-9 only", "exact_match or nll"]),
    ("no token to generate", {}, ["tasks.0.max_new_tokens=0"], 2, ["tasks.0.max_new_tokens", "greater than or equal to 1"]),
    # watch
    ("unknown key of a watch set", {}, ["watch=[{name: w, dta: x}]"], 2, ["unknown key 'watch.0.dta'", "did you mean 'data'?"]),
    ("watch as a section", {}, ["watch={name: w, data: x}"], 2, ["watch", "list"]),
    ("a watch set named as a task", {"bad.jsonl": GOOD}, ["watch=[{name: Colour, data: bad.jsonl}]"], 2, ["watch 0 is named 'Colour'", "names must differ"]),
    ("two watch sets of one name", {}, ["watch=[{name: w, data: x}, {name: W, data: x}]"], 2, ["watch 1 is named 'W'", "names must differ"]),
    ("a limit of a watch set", {}, ["watch=[{name: w, data: x, limit: 3}]"], 2, ["watch 0 ('w'): limit counts training rows", "evaluate.limit"]),
    ("watch data missing", {}, [WATCH], 4, ["task 'w'", "no such data file: bad.jsonl"]),
    ("a bad row of a watch set", {"bad.jsonl": GOOD + "{oops\n"}, [WATCH], 4, ["bad.jsonl, line 4", "not valid JSON"]),
    ("labels of free text", {}, ["tasks.0.format=prompt_completion"], 2, ["task 'colour'", "labels", "classification"]),
    # data
    ("data file missing", {}, ["tasks.0.data=nowhere.jsonl"], 4, ["task 'colour'", "no such data file: nowhere.jsonl"]),
    ("test file missing", {}, ["tasks.0.test=nowhere.jsonl"], 4, ["task 'colour'", "no such data file: nowhere.jsonl"]),
    ("empty file", {"bad.jsonl": ""}, DATA, 4, ["bad.jsonl", "no rows"]),
    ("file of blank lines", {"bad.jsonl": "\n  \n"}, DATA, 4, ["bad.jsonl", "no rows"]),
    ("unknown kind of file", {"bad.xlsx": "PK"}, ["tasks.0.data=bad.xlsx"], 4, ["bad.xlsx", "unknown kind of file", ".jsonl"]),
    ("not text", {"bad.jsonl": b"\xff\xfe\x00"}, DATA, 4, ["bad.jsonl", "UTF-8"]),
    ("not gzip", {"bad.json.gz": b"[]"}, ["tasks.0.data=bad.json.gz"], 4, ["bad.json.gz", "cannot be read"]),
    ("damaged gzip", {"bad.json.gz": gzip.compress(GOOD.encode(), mtime=0)[:12] + b"\xff" * 40}, ["tasks.0.data=bad.json.gz"], 4, ["bad.json.gz", "cannot be read"]),
    ("malformed JSON line", {"bad.jsonl": GOOD + "{oops\n"}, DATA, 4, ["bad.jsonl, line 4", "not valid JSON"]),
    ("malformed JSON line after blank ones", {"bad.jsonl": "\n\n" + GOOD + "{oops\n"}, DATA, 4, ["bad.jsonl, line 6", "not valid JSON"]),
    ("malformed JSON file", {"bad.json": '[\n{"sentence": 1,\n}]'}, ["tasks.0.data=bad.json"], 4, ["bad.json, line 3", "not valid JSON"]),
    ("an object for a list", {"bad.json": "{}"}, ["tasks.0.data=bad.json"], 4, ["bad.json", "a list of rows", "got dict", ".jsonl"]),
    ("a row that is no object", {"bad.jsonl": GOOD + "[1, 2]\n"}, DATA, 4, ["bad.jsonl, line 4", "got list"]),
    ("a row without an answer", {"bad.jsonl": GOOD + '{"sentence": "cat"}\n'}, DATA, 4, ["bad.jsonl, line 4", "no 'label'", "columns: {label: ...}"]),
    ("a column of another name", {"bad.jsonl": '{"sentense": "cat", "label": "red"}\n'}, DATA, 4,
     ["bad.jsonl, line 1", "no 'sentence'", "did you mean 'sentense'?", "columns: {sentence: ...}"]),
    ("an empty answer", {"bad.jsonl": GOOD + '\n{"sentence": "cat", "label": " "}\n'}, DATA, 4, ["bad.jsonl, line 5", "'label' is ' '", "not empty"]),
    ("an answer that is a number with a point", {"bad.jsonl": GOOD + '{"sentence": "cat", "label": 0.5}\n'}, DATA, 4, ["bad.jsonl, line 4", "'label' is 0.5"]),
    ("half a character", {"bad.jsonl": GOOD + '{"sentence": "cat \\ud83d", "label": "red"}\n'}, DATA, 4, ["bad.jsonl, line 4", "'sentence'", "surrogate"]),
    ("a label outside the set", {"bad.jsonl": GOOD + CAT + '"gren"}\n'}, DATA, 4, ["bad.jsonl, line 4", "label 'gren' is outside the set", "did you mean 'green'?"]),
    ("a label outside the set after blank lines", {"bad.jsonl": "\n" + GOOD.replace("\n", "\n\n", 1) + '\n{"sentence": "cat", "label": "gren"}\n'}, DATA, 4,
     ["bad.jsonl, line 7", "'gren'"]),
    ("a label of the test outside the set", {"bad.jsonl": "\n\n" + GOOD + '{"sentence": "cat", "label": "pink"}\n'}, ["tasks.0.test=bad.jsonl"], 4,
     ["bad.jsonl, line 6", "label 'pink'"]),
    ("a label of dev outside the set", {"bad.json": '[{"sentence": "cat", "label": "pink"}]'}, ["tasks.0.dev=bad.json"], 4, ["bad.json, row 1", "label 'pink'"]),
    ("a single label", {"bad.jsonl": GOOD.replace("blue", "red").replace("green", "red")}, [*DATA, "tasks.0.labels=null"], 4,
     ["task 'colour'", "bad.jsonl", "single label ['red']", "prompt_completion"]),
    ("one label twice", {"bad.jsonl": GOOD}, [*DATA, "tasks.0.labels=[red, red]"], 2, ["task 'colour'", "labels", "twice"]),
    # csv and parquet
    ("an empty table", {"bad.csv": ""}, CSV, 4, ["bad.csv", "no rows"]),
    ("a table of a header", {"bad.csv": "sentence,label\n\n"}, CSV, 4, ["bad.csv", "no rows"]),
    ("a table in another encoding", {"bad.csv": "sentence,label\ncat,gr\xfcn\n".encode("latin-1")}, CSV, 4, ["bad.csv, line 2", "UTF-8", "save the file as UTF-8"]),
    ("a table in UTF-16", {"bad.csv": "sentence,label\ncat,red\n".encode("utf-16")}, CSV, 4, ["bad.csv, line 1", "save the file as UTF-8"]),
    ("a field too many", {"bad.csv": "sentence,label\ncat,red\ndog, big,blue\n"}, CSV, 4, ["bad.csv, line 3: 3 fields, where the header names 2", "double quotes"]),
    ("a field too few", {"bad.csv": 'sentence,label\n"a\ncat",red\ndog\n'}, CSV, 4, ["bad.csv, line 4: 1 fields"]),
    ("a quote that does not end", {"bad.csv": 'sentence,label\ncat,red\n"dog,blue\n'}, CSV, 4, ["bad.csv, line 3: not valid CSV"]),
    ("semicolons", {"bad.csv": "sentence;label\ncat;red\n"}, CSV, 4, ["bad.csv, line 1", "separated by ';'", "commas"]),
    ("two columns of one name", {"bad.csv": "sentence,label,label\ncat,red,red\n"}, CSV, 4, ["bad.csv, line 1: two columns are named 'label'"]),
    ("a table without the column", {"bad.csv": "text,label\ncat,red\n"}, CSV, 4, ["bad.csv, line 2: no 'sentence'", "columns: {sentence: ...}"]),
    ("an empty cell", {"bad.csv": "sentence,label\ncat,red\ndog,\n"}, CSV, 4, ["bad.csv, line 3: 'label' is ''", "not empty"]),
    ("a label of a table outside the set", {"bad.csv": "sentence,label\ncat,red\n\ndog,gren\n"}, CSV, 4, ["bad.csv, line 4: label 'gren'", "did you mean 'green'?"]),
    ("no parquet", {"bad.parquet": "PAR0"}, ["tasks.0.data=bad.parquet"], 4, ["bad.parquet: not a parquet file"]),
    ("a parquet file cut short", {"bad.parquet": b"PAR1" + bytes(40)}, ["tasks.0.data=bad.parquet"], 4, ["bad.parquet: not a parquet file"]),
    ("a folder", {}, ["tasks.0.data=data"], 4, ["data is a folder", "hub:data"]),
    ("a hub name that is none", {}, ["tasks.0.data='hub:'"], 2, ["tasks.0.data", "'hub:'", "write hub:OWNER/NAME"]),
    ("a hub name with too many parts", {}, ["tasks.0.data='hub:a/b:c:d:e'"], 2, ["tasks.0.data", "hub:OWNER/NAME:CONFIG:SPLIT"]),
    ("a folder that holds no dataset", {}, ["tasks.0.data='hub:./nowhere'"], 4, ["task 'colour': hub:./nowhere, split train: cannot be loaded"]),
    # conversations
    ("messages that are text", {"bad.jsonl": '{"messages": "cat"}\n'}, TALK, 4, ["bad.jsonl, line 1: 'messages' is 'cat'", "a list of {'role'"]),
    ("messages without the column", {"bad.jsonl": '{"conversations": []}\n'}, TALK, 4, ["bad.jsonl, line 1: no 'messages'", "columns: {messages: ...}"]),
    ("a message in another form", {"bad.jsonl": '\n{"messages": [{"from": "human", "value": "x"}]}\n'}, TALK, 4, ["bad.jsonl, line 2, message 1: no 'role'", "known: from, value"]),
    ("a role that is none", {"bad.jsonl": '{"messages": [{"role": "bot", "content": "x"}]}\n'}, TALK, 4, ["message 1: 'role' is 'bot'", "system, user, assistant"]),
    ("an empty turn", {"bad.jsonl": '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}\n'}, TALK, 4, ["message 2: 'content' is ''"]),
    ("nobody answers", {"bad.jsonl": '{"messages": [{"role": "user", "content": "x"}]}\n'}, TALK, 4, ["bad.jsonl, line 1: no message is the assistant's"]),
    ("too few rows for a test", {"bad.jsonl": '{"prompt": "cat", "completion": "red"}\n'}, ["tasks.0={name: a, data: bad.jsonl, format: prompt_completion}"], 4,
     ["task 'a'", "no test rows", "test file"]),
    ("no dev rows to score", {"bad.jsonl": GOOD}, [*DATA, "evaluate.split=dev"], 2, ["evaluate.split", "task 'colour' has no dev rows"]),
]  # fmt: skip


@pytest.mark.parametrize(("files", "overrides", "code", "parts"), [pytest.param(*row[1:], id=row[0]) for row in BEFORE])
def test_a_mistake_is_told_and_costs_nothing(here, finished, forgetless_, files, overrides, code, parts):
    for name, text in files.items():
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_says(forgetless_("run", "first.yaml", "--progress", "none", *overrides), code, parts)
    assert not Path("run").exists()
    shutil.copytree(finished, "run", symlinks=True)
    before = contents(Path("run"))
    assert_says(forgetless_("run", "first.yaml", "--progress", "none", *overrides), code, parts)
    assert contents(Path("run")) == before


def test_two_tasks_of_one_name(here, forgetless_):
    here["tasks"] = [here["tasks"][0], here["tasks"][0] | {"name": "Colour"}]
    Path("first.yaml").write_text(yaml.safe_dump(here))
    assert_says(forgetless_("run", "first.yaml"), 2, ["first.yaml", "tasks 0 and 1", "'Colour'", "must differ"])


@pytest.mark.parametrize("key", ["model", "tasks", "method", "output_dir"])
def test_a_key_left_out(here, forgetless_, key):
    del here[key]
    Path("first.yaml").write_text(yaml.safe_dump(here))
    assert_says(forgetless_("run", "first.yaml"), 2, ["first.yaml", f"'{key}' is missing", "forgetless init"])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        pytest.param(None, ["bad.yaml: no such config file", "forgetless init bad.yaml"], id="missing"),
        pytest.param("model: [1", ["bad.yaml: not valid YAML", "line 1"], id="not YAML"),
        pytest.param("seed: 1\nmethod: gorp\nseed: 2", ["bad.yaml: not valid YAML", "'seed' is given twice", "line 3"], id="a key twice"),
        pytest.param("method: {name: gorp, rank: 4, rank: 8}", ["bad.yaml: not valid YAML", "'rank' is given twice"], id="a key twice inside"),
        pytest.param("seed: 2024-02-31", ["bad.yaml: not valid YAML", "day is out of range"], id="an impossible date"),
        pytest.param(b"\xff\xfe\xfa", ["bad.yaml: not valid YAML"], id="not text"),
        pytest.param("- model: x", ["bad.yaml: a config is a mapping with model, tasks, method and output_dir", "got list"], id="a list"),
        pytest.param("# nothing", ["bad.yaml: a config is a mapping", "empty"], id="empty"),
        pytest.param("1: 2", ["bad.yaml", "'model' is missing"], id="a key that is a number"),
    ],
)
def test_a_config_that_is_none(here, forgetless_, text, parts):
    if text is not None:
        Path("bad.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_says(forgetless_("run", "bad.yaml"), 2, parts)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["run"], ["config", "See: ", "run --help"]),
        (["run", "first.yaml", "--progress", "loud"], ["--progress loud", "rich, json or none"]),
        (["run", "first.yaml", "--fast"], ["--fast", "run --help"]),
        (["ran", "first.yaml"], ["ran", "--help"]),
        (["report"], ["run_dirs", "report --help"]),
        (["init", "first.yaml"], ["first.yaml", "exists already", "--force"]),
        (["init", "first.yaml/below.yaml"], ["first.yaml/below.yaml", "cannot be written"]),
        (["init", "data", "--force"], ["data", "cannot be written"]),
        (["doctor", "nowhere.yaml"], ["nowhere.yaml: no such config file"]),
        (["doctor", "first.yaml", "method.rnak=4"], ["unknown option 'rnak'"]),
    ],
    ids=" ".join,
)
def test_a_command_line_that_cannot_be_read(here, forgetless_, argv, parts):
    before = contents(Path())
    status, out, err = forgetless_(*argv)
    assert status == 2 and out == "" and "Traceback" not in err and "internal error" not in err
    assert all(part in err for part in parts), err
    assert contents(Path()) == before


@pytest.mark.parametrize(("override", "part"), [("tasks.0.data=nowhere.jsonl", "no such data file"), ("model=./nowhere", "no such folder")])
def test_doctor_finds_what_run_would_find(here, forgetless_, override, part):
    assert_says(forgetless_("doctor", "first.yaml", override), 4, [part])
    assert not Path("run").exists()


def test_report_of_no_run(here, forgetless_):
    assert_says(forgetless_("report", "data"), 4, ["data", "run.yaml"])
    assert_says(forgetless_("report", "nowhere", "--json"), 4, ["nowhere", "no such folder"])


# -- the model and its modules -------------------------------------------------------------------------------------------------------------


def no_config(d: Path) -> None:
    (d / "config.json").unlink()


def no_tokenizer(d: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (d / name).unlink()


def broken_config(d: Path) -> None:
    (d / "config.json").write_text('{"model_type": ')


def config_is_a_number(d: Path) -> None:
    (d / "config.json").write_text("3")


def remote_code(d: Path) -> None:
    config = json.loads((d / "config.json").read_text())
    (d / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}))
    (d / "modeling.py").write_text(f"open({str(d / 'ran')!r}, 'w')")


def no_weights(d: Path) -> None:
    (d / "model.safetensors").unlink()


def torn_weights(d: Path) -> None:
    (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-100])


def a_tensor_missing(d: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(d / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, d / "model.safetensors", {"format": "pt"})


def no_end_token(d: Path) -> None:
    config = json.loads((d / "tokenizer_config.json").read_text())
    (d / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in ("eos_token", "pad_token")}))


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (shutil.rmtree, ["no such folder", "bundled:smollm2-135m"]),
        (no_config, ["no config.json", "bundled:smollm2-135m"]),
        (no_tokenizer, ["tokenizer"]),
        (broken_config, ["config.json is not valid JSON"]),
        (config_is_a_number, ["config.json is not valid JSON"]),
        (remote_code, ["its own Python code", "trust_remote_code: true"]),
        (no_weights, ["cannot be loaded as a language model"]),
        (torn_weights, ["cannot be loaded as a language model"]),
        (a_tensor_missing, ["its weights lack", "model.layers.1.mlp.up_proj.weight"]),
        (no_end_token, ["no end-of-sequence token", "eos_token"]),
    ],
)
def test_a_model_that_cannot_be_used(here, forgetless_, damage, parts):
    shutil.copytree(here["model"], "model")
    damage(Path("model"))
    assert_says(
        forgetless_("run", "first.yaml", f"model={Path('model').resolve()}", "--progress", "none"), 4, [f"model '{Path('model').resolve()}'", *parts]
    )
    assert not Path("run").exists() and not Path("model/ran").exists()


TALKS = [{"messages": [{"role": "user", "content": f"cat {w}"}, {"role": "assistant", "content": w}]} for w in ("red", "blue", "green")]


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        pytest.param(None, ["format: messages needs a chat template", "this model's tokenizer has none"], id="none"),
        pytest.param("{{ raise_exception('no') if messages|length > 2 else '' }}" + CHAT, ["task 'talk': talk.jsonl, line 4", "TemplateError: no"], id="refuses a row"),
        pytest.param(CHAT.replace(" <eos>", ""), ["task 'talk': talk.jsonl, line", "closes an assistant turn with no special token"], id="closes no turn"),
        pytest.param("{{ 'bad' if messages|length > 2 and not add_generation_prompt else '' }}" + CHAT,
                     ["task 'talk': talk.jsonl, line", "differently once more follows", "{% generation %}"], id="rewrites"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["tasks", "watch"])
def test_a_chat_template_that_cannot_be_used(here, forgetless_, template, parts, where):
    """Found before the first step, in every row, of what is trained and of what is only watched."""
    last = {"messages": [*TALKS[0]["messages"], *TALKS[1]["messages"]]}
    Path("talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*TALKS, last]))
    model = make_model_folder(Path("model").resolve(), chat_template=template)
    entry = {"name": "talk", "data": "talk.jsonl", "test": "talk.jsonl", "format": "messages"}
    Path("first.yaml").write_text(yaml.safe_dump(here | {"model": model, where: [entry]}))
    assert_says(forgetless_("run", "first.yaml", "--progress", "none"), 4, parts)
    assert not Path("run").exists()


def test_a_bundled_model_that_is_none(here, forgetless_):
    assert_says(
        forgetless_("run", "first.yaml", "model=bundled:smollm2-135", "--progress", "none"),
        2,
        ["bundled:smollm2-135", "did you mean 'smollm2-135m'?"],
    )
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("{name: gorp, full_modules: .*q_porj}", ["method.full_modules", "'.*q_porj'", "matches no linear layer", "q_proj", "whole dotted name"]),
        ("{name: gorp, full_modules: [query]}", ["method.full_modules", "Nearest:", "q_proj"]),
        ("{name: seqft, modules: .*q_porj}", ["method.modules", "'.*q_porj'", "q_proj"]),
        ("{name: gorp, full_modules: model.embed_tokens}", ["matches no linear layer"]),
        ("{name: gorp, full_modules: '*q_proj'}", ["method.full_modules", "'*q_proj'", "not a regular expression"]),
    ],
)
def test_no_module_matched(here, forgetless_, method, parts):
    assert_says(forgetless_("run", "first.yaml", f"method={method}", "--progress", "none"), 2, parts)
    assert not Path("run").exists()
    assert_says(forgetless_("doctor", "first.yaml", f"method={method}"), 2, parts)


def test_a_tied_embedding_is_refused(here, forgetless_, tmp_path):
    model = make_model_folder(tmp_path / "tied", tied=True)
    method = "method={name: gorp, full_modules: lm_head|model.embed_tokens}"
    parts = ["method.full_modules", "lm_head", "model.embed_tokens", "shares its weight", "untie"]
    assert_says(forgetless_("run", "first.yaml", f"model={model}", method, "--progress", "none"), 2, parts)
    assert not Path("run").exists()


# -- the output folder ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "named"),
    [
        pytest.param({"thesis.tex": "x"}, "thesis.tex", id="a file of another name"),
        pytest.param({"thesis.tex": "x", "run.yaml": "a: 1", ".lock": "pid 7"}, "thesis.tex", id="a file among names of ours"),
        pytest.param({"run.yaml": "steps: [a]"}, "run.yaml", id="another program's run.yaml"),
        pytest.param({"run.yaml": "steps: [a]", "tasks/mine/data.bin": "x"}, "tasks/mine", id="another program's tasks"),
        pytest.param({"tasks/todo.txt": "x"}, "tasks/todo.txt", id="a list of tasks"),
        pytest.param({".lock": "", "tasks/todo.txt": "x"}, "tasks/todo.txt", id="a list of tasks and a lock"),
        pytest.param({"model/config.json": "{}"}, "model", id="a model folder"),
        pytest.param({".lock": "", "model/config.json": "{}"}, "model", id="a model folder and a lock"),
    ],
)
def test_a_foreign_folder_is_not_touched(here, forgetless_, files, named):
    for name, text in files.items():
        Path("run", name).parent.mkdir(parents=True, exist_ok=True)
        Path("run", name).write_text(text)
    before = contents(Path("run"))
    assert_says(
        forgetless_("run", "first.yaml", "--progress", "none"), 2, ["output_dir", "run", named, "Nothing was touched", "choose another folder"]
    )
    assert contents(Path("run")) == before


def test_output_dir_is_a_file(here, forgetless_):
    Path("run").write_text("x")
    assert_says(forgetless_("run", "first.yaml", "--progress", "none"), 2, ["output_dir", "is a file"])
    assert_says(forgetless_("run", "first.yaml", "--progress", "none", "output_dir=run/below"), 2, ["output_dir run/below", "cannot be written"])
    assert Path("run").read_text() == "x"


def test_a_run_locked_by_another_process(here, finished, forgetless_):
    shutil.copytree(finished, "run", symlinks=True)
    before = contents(Path("run"))
    held = "import sys; from forgetless.lineage import RunFolder; f = RunFolder('run'); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        assert_says(
            forgetless_("run", "first.yaml", "--progress", "none"),
            2,
            ["output_dir", f"is running there (pid {other.pid} on {socket.gethostname()})", "wait for it"],
        )
        other.communicate()
    after = contents(Path("run"))
    assert (
        json.loads(after.pop(".lock")) == {"pid": other.pid, "host": socket.gethostname()} and before.pop(".lock") == b""
    )  # it ended without unlocking
    assert after == before
    assert forgetless_("run", "first.yaml", "--progress", "none")[0] == 0
    assert contents(Path("run"))[".lock"] == b""


def test_a_folder_where_nothing_began_is_left_as_it_was(here, forgetless_):
    """The model is read after the folder is locked; an error there leaves no trace, neither of the folder nor in it."""
    assert forgetless_("run", "first.yaml", "--progress", "none", "model=./nowhere")[0] == 4
    assert not Path("run").exists()
    Path("run").mkdir()
    assert forgetless_("run", "first.yaml", "--progress", "none", "model=./nowhere")[0] == 4
    assert list(Path("run").iterdir()) == []


# -- a run that goes on --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.learning_rate=1e-2"], ["train", "learning_rate", "0.001", "0.01"]),
        (["method.rank=4"], ["method", "rank"]),
        (["method=seqft"], ["method", "gorp", "seqft"]),
        (["seed=1"], ["seed: 0", "seed: 1"]),
        (["evaluate.limit=9"], ["evaluate", "limit"]),
        (["model=elsewhere"], ["model", "elsewhere"]),
        (["tasks.0.name=color"], ["tasks.0 ('colour', already learned)", "another name"]),
        (["tasks.0.prompt='{sentence} :'"], ["tasks.0 ('colour', already learned)", "other data or another prompt"]),
        (["tasks.0.data=data/other.jsonl"], ["tasks.0 ('colour', already learned)", "other data or another prompt"]),
    ],
    ids=lambda v: v[0] if "=" in v[0] else "",
)
def test_a_changed_run_is_refused_and_the_key_named(here, finished, forgetless_, overrides, parts):
    lines = Path("data/colour.jsonl").read_text().splitlines(keepends=True)
    Path("data/other.jsonl").write_text("".join(lines[:-1]))
    shutil.copytree(finished, "run", symlinks=True)
    before = contents(Path("run"))
    assert_says(forgetless_("run", "first.yaml", "--progress", "none", *overrides), 2, ["output_dir", *parts])
    assert contents(Path("run")) == before


def test_a_learned_task_left_out_is_refused(here, finished, forgetless_, tmp_path):
    here["tasks"] = [write_task(tmp_path / "data", "animal"), *here["tasks"]]
    Path("first.yaml").write_text(yaml.safe_dump(here))
    shutil.copytree(finished, "run", symlinks=True)
    before = contents(Path("run"))
    assert_says(
        forgetless_("run", "first.yaml", "--progress", "none"),
        2,
        ["tasks.0 ('colour', already learned)", "only tasks after the learned ones may change"],
    )
    assert contents(Path("run")) == before


def no_run_yaml(run: Path) -> None:
    (run / "run.yaml").unlink()


def lineage_of_something_else(run: Path) -> None:
    (run / "lineage.jsonl").write_text('"hello"\n')


def unknown_current(run: Path) -> None:
    (run / "current").write_text("07-nothing\n")


def no_task_folder(run: Path) -> None:
    shutil.rmtree(run / "tasks" / "00-colour")


def no_metrics(run: Path) -> None:
    (run / "tasks" / "00-colour" / "metrics.json").unlink()


def torn_metrics(run: Path) -> None:
    (run / "tasks" / "00-colour" / "metrics.json").write_text("{")


@pytest.mark.parametrize("damage", [no_run_yaml, lineage_of_something_else, unknown_current, no_task_folder, no_metrics, torn_metrics])
def test_a_damaged_run_is_said_to_be_damaged(here, finished, forgetless_, damage):
    shutil.copytree(finished, "run", symlinks=True)
    damage(Path("run"))
    before = contents(Path("run"))
    assert_says(forgetless_("run", "first.yaml", "--progress", "none"), 4, [str(Path("run").resolve()), "damaged"])
    assert contents(Path("run")) == before


def test_the_link_to_the_model_replaced_by_a_copy_is_not_deleted(here, finished, forgetless_):
    """cp -rL makes a folder of it; whatever somebody did in there is theirs."""
    shutil.copytree(finished, "run")
    before = contents(Path("run"))
    assert_says(forgetless_("run", "first.yaml", "--progress", "none"), 2, ["output_dir", "model", "move it away"])
    assert contents(Path("run")) == before


def test_a_row_the_model_has_no_positions_for(here, forgetless_, tmp_path):
    """Refused before anything is trained, not at the step that meets it; the same row is fine where the prompt is cut shorter."""
    entry = here["tasks"][0]
    rows = Path(entry["data"]).read_text().splitlines()
    rows[17] = json.dumps({"sentence": "apple " * 70, "label": json.loads(rows[17])["label"]})
    (tmp_path / "long.jsonl").write_text("\n".join(rows) + "\n")
    here["tasks"][0] = entry | {"data": str(tmp_path / "long.jsonl")}
    Path("first.yaml").write_text(yaml.safe_dump(here))
    parts = ["task 'colour'", "long.jsonl, line 18", "76 tokens with its answer and the model takes 64", "max_prompt_tokens (512)"]
    assert_says(forgetless_("run", "first.yaml", "--progress", "none"), 4, parts)
    assert not Path("run/current").exists()
    assert forgetless_("run", "first.yaml", "--progress", "none", "tasks.0.max_prompt_tokens=40")[0] == 0


# -- a loss that is no number --------------------------------------------------------------------------------------------------------------


def test_a_diverged_task_leaves_the_ones_before_it(here, tiny, forgetless_, tmp_path, monkeypatch):
    """Exit 5 names task and step; the last good model is there, loads, and the run goes on from it."""
    from transformers import AutoModelForCausalLM

    here["tasks"].append(write_task(tmp_path / "data", "animal"))
    Path("first.yaml").write_text(yaml.safe_dump(here))
    whole = learn(here | {"output_dir": str(tmp_path / "whole")})
    calls, real = [], forgetless.trainer.answer_loss

    def nan_in_the_second_task(*args):
        calls.append(1)
        loss, outputs = real(*args)
        return (loss * math.nan if len(calls) == TRAIN["max_steps"] + 3 else loss), outputs

    with monkeypatch.context() as patch:
        patch.setattr(forgetless.trainer, "answer_loss", nan_in_the_second_task)
        assert_says(
            forgetless_("run", "first.yaml", "--progress", "none"),
            5,
            ["task 'animal', step 3", "nan", "last committed task is kept", "train.learning_rate"],
        )
    assert Path("run/current").read_text() == "00-colour\n"
    assert contents(Path("run/tasks/00-colour")).keys() == contents(whole.path / "tasks/00-colour").keys()
    assert [p.name for p in Path("run/tasks").iterdir()] == ["00-colour"]
    (line,) = map(json.loads, Path("run/lineage.jsonl").read_text().splitlines())
    assert model_sha256(AutoModelForCausalLM.from_pretrained("run/model")) == line["model_sha256"]
    assert forgetless_("run", "first.yaml", "--progress", "none")[0] == 0
    assert Path("run/lineage.jsonl").read_text() == (whole.path / "lineage.jsonl").read_text()


def test_a_learning_rate_that_explodes(here, forgetless_):
    assert_says(forgetless_("run", "first.yaml", "--progress", "none", "train.learning_rate=1e30"), 5, ["task 'colour', step", "loss is", "1e+30"])
    assert not Path("run/current").exists() and list(Path("run/tasks").iterdir()) == []
    assert forgetless_("run", "first.yaml", "--progress", "none")[0] == 0  # nothing is committed: the rate may change


# -- a real process ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "code", "parts"),
    [
        (["run", "first.yaml", "metod=gorp"], 2, ["error: first.yaml: unknown key 'metod'; did you mean 'method'?"]),
        (["run", "first.yaml", "tasks.0.data=nowhere.jsonl"], 4, ["error: task 'colour': no such data file: nowhere.jsonl"]),
        (["--debug", "run", "nowhere.yaml"], 2, ["Traceback", "ConfigError", "nowhere.yaml: no such config file"]),
    ],
    ids=["config", "data", "debug"],
)
def test_the_status_reaches_the_shell(here, argv, code, parts):
    ran = subprocess.run([sys.executable, "-m", "forgetless", *argv], capture_output=True, text=True, timeout=120)
    assert ran.returncode == code and ran.stdout == ""
    assert all(part in ran.stderr for part in parts)
    assert ("Traceback" in ran.stderr) == ("--debug" in argv)
    assert not Path("run").exists()


def test_the_fixture_is_the_run_the_configs_describe(here, finished):
    """Else a byte-identical folder would prove nothing: unharmed, the same config says that it is finished."""
    shutil.copytree(finished, "run", symlinks=True)
    assert load_config("first.yaml").tasks[0].name in TASKS
    folder = RunFolder("run")
    assert folder.committed() == ["00-colour"]
    folder.close()
    assert learn(here).resumed_at == 1


def test_a_stranger_beside_a_run_of_ours_is_left_alone(here, finished, forgetless_):
    """A .DS_Store, nohup.out or half-written report must not lock anybody out of a run; only tasks/ and model are ever cleaned."""
    shutil.copytree(finished, "run", symlinks=True)
    for name in (".DS_Store", "nohup.out", ".report.html.tmp"):
        Path("run", name).write_text("x")
    assert forgetless_("run", "first.yaml", "--progress", "none")[0] == 0
    assert Path("run", "nohup.out").read_text() == "x"


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 15296 vs 15192")],
    ids=["commit", "checkpoint"],
)
def test_a_full_disk_is_said_and_the_same_command_goes_on(error, here, forgetless_, tmp_path, monkeypatch):
    """As safetensors and torch.save word it; tried by hand on a file system of 600, 900 and 1200 kB."""
    here["tasks"].append(write_task(tmp_path / "data", "animal"))
    Path("first.yaml").write_text(yaml.safe_dump(here))
    calls, save = [], forgetless.lineage.save_memory

    def full(*args):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(forgetless.lineage, "save_memory", full)
        assert_says(forgetless_("run", "first.yaml", "--progress", "none"), 4, ["the disk is full", "keep: last 1"])
    assert Path("run/current").read_text() == "00-colour\n"
    assert forgetless_("run", "first.yaml", "--progress", "none")[0] == 0
    assert Path("run/current").read_text() == "01-animal\n"
