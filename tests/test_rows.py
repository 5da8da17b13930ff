"""Where rows come from: every kind of file holds the same task, a bad row is named by its place, and a dataset on the hub reads as a file does."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys

import datasets
import pytest

from forgetless.config import TaskConfig
from forgetless.errors import DataError
from forgetless.rows import raw_rows
from forgetless.tasks import load_task, read_rows

ROWS = [{"sentence": f"cat, “red” {i}\nor not", "label": ["red", "blue"][i % 2]} for i in range(60)]


def as_csv(rows) -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def write(path, rows=ROWS):
    """`rows` as a file of the kind that the name of `path` says."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return str(path)
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    text = {"csv": as_csv, "json": json.dumps, "jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows)}[kind](rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def places(source):
    return [place.removeprefix(f"{source}, ") for place, _ in raw_rows(source, "t")]


# -- files -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.csv.gz", "a.parquet"])
def test_every_kind_of_file_holds_the_same_task(tmp_path, name):
    one, other = load_task(TaskConfig(name="t", data=write(tmp_path / "first.jsonl"))), load_task(TaskConfig(name="t", data=write(tmp_path / name)))
    assert (one.train, one.dev, one.test, one.labels, one.sha256) == (other.train, other.dev, other.test, other.labels, other.sha256)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_columns_rename_and_a_missing_one_is_named(tmp_path, name):
    data = write(tmp_path / name, [{"body": "x", "class": "y"}])
    assert read_rows(data, TaskConfig(name="t", data=data, columns={"sentence": "body", "label": "class"}))[0].answer == "y"
    with pytest.raises(DataError, match=r"(line [12]|row 1): no 'sentense'; known: body, class\. Rename columns with columns: \{sentence: \.\.\.\}"):
        read_rows(data, TaskConfig(name="t", data=data, columns={"sentence": "sentense"}))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, name):
    write(tmp_path / name)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    assert [row for _, row in raw_rows(str(tmp_path / name), "t")] == ROWS


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "cp1252"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_another_encoding_is_refused_and_the_line_named(tmp_path, name, encoding):
    text = (
        "sentence,label\ncat,red\nDüne,blue\n"
        if name == "a.csv"
        else '{"sentence": "cat", "label": "red"}\n\n{"sentence": "Düne", "label": "blue"}\n'
    )
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match=f"{name}, line {1 if encoding == 'utf-16' else 3}: cannot be read as UTF-8 text .*; save the file as UTF-8"):
        list(raw_rows(str(tmp_path / name), "t"))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_place_is_the_line_an_editor_shows(tmp_path, end):
    (tmp_path / "a.csv").write_bytes(end.join(["", "sentence,label", "cat,red", "", f'"two{end}lines",red', "dog,blue", ""]).encode())
    assert places(str(tmp_path / "a.csv")) == ["line 3", "line 5", "line 7"]
    (tmp_path / "a.jsonl").write_bytes(end.join(['{"a": 1}', "", " ", '{"a": 2}', ""]).encode())
    assert places(str(tmp_path / "a.jsonl")) == ["line 1", "line 4"]


def test_a_field_of_csv_may_be_a_whole_document(tmp_path):
    long = "word " * 60_000  # the csv module's own limit is 128 KiB
    assert next(raw_rows(write(tmp_path / "a.csv", [{"sentence": long, "label": "red"}]), "t"))[1]["sentence"] == long
    assert csv.field_size_limit() == 131072


def test_empty_fields_of_csv_are_a_row_and_not_a_blank_line(tmp_path):
    (tmp_path / "a.csv").write_text("sentence,label\n,\n")
    with pytest.raises(DataError, match="a.csv, line 2: 'sentence' is ''; it must be text that is not empty"):
        read_rows(str(tmp_path / "a.csv"), TaskConfig(name="t", data="a.csv"))


# -- the datasets library ----------------------------------------------------------------------------------------------------------------


def a_dataset(n: int = 30):
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["red", "very blue"])})
    return datasets.Dataset.from_list([{"sentence": f"cat {i}", "label": i % 2} for i in range(n)], features=features)


def test_the_classes_of_a_parquet_file_are_their_names(tmp_path):
    a_dataset().to_parquet(tmp_path / "a.parquet")
    assert load_task(TaskConfig(name="t", data=str(tmp_path / "a.parquet"))).labels == ["red", "very blue"]


def test_parquet_leaves_no_copy_of_the_rows_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("load_dataset writes the rows into the user's cache"))
    assert len(list(raw_rows(write(tmp_path / "a.parquet"), "t"))) == 60


@pytest.fixture
def hub(monkeypatch):
    """What load_dataset was asked for; it answers with a_dataset, and knows the splits of CLASSES only."""
    asked = []

    def load_dataset(name, config=None, *, split, revision):
        asked.append((name, config, split, revision))
        if split.split("[")[0] not in ("train", "test", "validation"):
            raise ValueError(f"Unknown split '{split}'. Should be one of ['train', 'test'].\nmore")
        return a_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hub:owner/name", ("owner/name", None, "train", None)),
        ("hub:name", ("name", None, "train", None)),
        ("hub:owner/name:validation", ("owner/name", None, "validation", None)),
        ("hub:owner/name:train[:10%]", ("owner/name", None, "train[:10%]", None)),
        ("hub:owner/name:small:test", ("owner/name", "small", "test", None)),
        ("hub:owner/name:small:test[5:9]", ("owner/name", "small", "test[5:9]", None)),
        ("hub:owner/name@v1.0:small:test", ("owner/name", "small", "test", "v1.0")),
        ("hub:./folder@main", ("./folder", None, "train", "main")),
    ],
)
def test_what_a_hub_source_asks_for(hub, source, asked):
    rows = read_rows(source, TaskConfig(name="t", data=source))
    assert hub == [asked] and rows[1].answer == "very blue" and rows[1].place == f"{source}, split {asked[2]}, row 2"


def test_each_key_asks_for_the_split_of_its_name(hub):
    task = load_task(TaskConfig(name="t", data="hub:a/b", test="hub:a/b", dev="hub:a/b"))
    assert [split for _, _, split, _ in hub] == ["train", "test", "validation"] and task.overlap == task.overlap_dev == 30


def test_a_row_without_a_class_is_named(monkeypatch):
    bad = datasets.Dataset.from_list([{"sentence": "cat", "label": 0}, {"sentence": "dog", "label": -1}], features=a_dataset().features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: bad)
    with pytest.raises(DataError, match="hub:a/b, split train, row 2: 'label' is None"):
        read_rows("hub:a/b", TaskConfig(name="t", data="hub:a/b"))


def test_what_the_library_says_is_one_line(hub):
    with pytest.raises(DataError, match=r"task 't': hub:a/b:tset, split tset: cannot be loaded \(ValueError: Unknown split 'tset'.*\]\.\)$"):
        list(raw_rows("hub:a/b:tset", "t"))


def test_a_folder_in_the_hubs_layout(tmp_path, monkeypatch):
    """The real load_dataset, on files: what a download of a dataset is."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    for split, n in (("train", 30), ("test", 5)):
        a_dataset(n).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    source = f"hub:{tmp_path / 'data'}"
    task = load_task(TaskConfig(name="t", data=source, test=source))
    assert (
        len(task.test) == 5
        and task.labels == ["red", "very blue"]
        and task.overlap == sum(e.text in {x.text for x in task.train} for e in task.test) > 0
    )
    with pytest.raises(DataError, match="task 't': .*data is a folder; name a file in it, or hub:.*data"):
        load_task(TaskConfig(name="t", data=str(tmp_path / "data")))


@pytest.mark.parametrize(("source", "missing"), [("a.parquet", "pyarrow"), ("hub:a/b", "datasets")])
def test_a_missing_library_is_one_message(tmp_path, monkeypatch, source, missing):
    write(tmp_path / "a.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(DataError, match=f"{source}: reading it needs the package datasets, which is not installed. Run: pip install datasets"):
        list(raw_rows(source, "t"))
