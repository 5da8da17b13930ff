"""Files to tokens: formats, splits that never share a text, answers never cut, the end token learned."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from transformers import AutoTokenizer

from forgetless.batches import Collate, answer_loss
from forgetless.config import TaskConfig
from forgetless.errors import DataError
from forgetless.tasks import Example, Task, TaskStream, carve, load_task, read_rows, sample

ROWS = [{"sentence": f"cat red {i}", "label": ["red", "blue"][i % 2]} for i in range(200)]


@pytest.fixture
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


def write(path, rows):
    text = "".join(json.dumps(r) + "\n" for r in rows) if path.name.endswith("jsonl") else json.dumps(rows)
    path.write_bytes(gzip.compress(text.encode())) if path.suffix == ".gz" else path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.json.gz"])
def test_three_kinds_of_file_hold_the_same_task(tmp_path, name):
    task = load_task(TaskConfig(name="t", data=write(tmp_path / name, ROWS)))
    assert task.labels == ["blue", "red"]
    texts = [{e.text for e in task.split(s)} for s in ("train", "dev", "test")]
    assert sum(map(len, texts)) == 200 and not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    assert all(5 <= len(t) <= 40 for t in texts[1:])


def test_the_cut_depends_on_the_text_alone():
    examples = [Example(r["sentence"], r["label"], i) for i, r in enumerate(ROWS)]
    again = [Example(f"  {e.text.upper()} ", e.answer, 5) for e in reversed(examples)]
    assert {e.text for e in carve(examples, "test")[1]} == {e.text.strip().lower() for e in carve(again, "test")[1]}
    assert carve(examples, "test")[1] != carve(examples, "dev")[1]


def test_limit_takes_the_same_rows_every_time():
    examples = [Example(r["sentence"], r["label"], i) for i, r in enumerate(ROWS)]
    assert sample(examples, 10, 0) == sample(list(reversed(examples)), 10, 0) and sample(examples, 10, 1) != sample(examples, 10, 0)
    assert sample(examples, None, 0) == examples and sample(examples, 1000, 0) == examples


def test_prompt_completion_reads_answer_too_and_columns_rename(tmp_path):
    data = write(tmp_path / "a.jsonl", [{"prompt": "p1", "answer": "a1"}, {"prompt": "p2", "completion": "a2"}])
    rows = read_rows(data, TaskConfig(name="t", data=data, format="prompt_completion"))
    assert [(e.text, e.answer) for e in rows] == [("p1", "a1"), ("p2", "a2")]
    data = write(tmp_path / "b.jsonl", [{"body": "x", "class": "y"}])
    assert read_rows(data, TaskConfig(name="t", data=data, columns={"sentence": "body", "label": "class"}))[0].answer == "y"


def test_overlap_of_train_and_test_is_counted(tmp_path):
    train, test = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", ROWS[:20])
    task = load_task(TaskConfig(name="t", data=train, test=test))
    assert task.overlap == sum(e.text in {x.text for x in task.train} for e in task.test) > 0


def test_the_data_hash_sees_every_row_and_setting(tmp_path):
    data = write(tmp_path / "a.jsonl", ROWS)
    one = load_task(TaskConfig(name="t", data=data)).sha256
    assert load_task(TaskConfig(name="other", data=data)).sha256 == one
    assert load_task(TaskConfig(name="t", data=data, prompt="{sentence}?")).sha256 != one
    assert load_task(TaskConfig(name="t", data=data, limit=100)).sha256 != one
    assert load_task(TaskConfig(name="t", data=write(tmp_path / "b.jsonl", [*ROWS[:-1], {"sentence": "cat red 199", "label": "red"}]))).sha256 != one


# -- tokens --------------------------------------------------------------------------------------------------------------------------


def task(**kw) -> Task:
    defaults = dict(name="t", prompt="Text : {sentence} Answer :", train=[], dev=[], test=[], labels=["red", "blue"])
    return Task(**(defaults | kw))


def test_only_the_answer_and_the_end_token_are_learned(tokenizer):
    row = task().encode(tokenizer, Example("cat sits", "red", 0))
    learned = [t for t in row["labels"] if t != -100]
    assert learned == tokenizer(" red").input_ids + [tokenizer.eos_token_id]
    assert row["input_ids"][-len(learned) :] == learned


@pytest.mark.parametrize(("limit", "kept"), [(dict(max_text_tokens=3), 3), (dict(max_prompt_tokens=8), 4)])
def test_truncation_shortens_the_text_and_never_the_answer_or_the_question(tokenizer, limit, kept):
    long = " ".join(["cat"] * 50)
    row = task(**limit).encode(tokenizer, Example(long, "red", 0))
    text = tokenizer.decode(row["input_ids"])
    assert text == "Text : " + "cat " * kept + "Answer : red <eos>"
    assert sum(t != -100 for t in row["labels"]) == 2


def test_a_free_form_prompt_keeps_its_end(tokenizer):
    t = task(prompt="{sentence}", labels=None, max_prompt_tokens=8)
    ids = t.encode_prompt(tokenizer, " ".join(["cat"] * 50) + " dog")
    assert len(ids) == 8 and tokenizer.decode(ids).endswith("dog")


def test_a_prompt_that_cannot_fit_is_refused(tokenizer):
    with pytest.raises(DataError, match="already 9 tokens"):
        task(prompt="Text : " + "cat " * 5 + "{sentence} Answer :", max_prompt_tokens=8).encode_prompt(tokenizer, "dog")


def test_left_padding_and_positions_do_not_change_the_loss(tiny, tokenizer):
    """A padded batch has the mean loss of its rows, also when pad is eos."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    t = task()
    rows = [
        t.encode(tokenizer, Example(text, label, 0))
        for text, label in (("cat sits", "red"), ("dog runs happy sad calm river", "blue"), ("bird", "red"))
    ]
    batch = Collate(model)(rows)
    loss, _ = answer_loss(model, batch)
    singles = []
    for r in rows:
        out = model(input_ids=torch.tensor([r["input_ids"]]), labels=torch.tensor([r["labels"]]))
        singles.append(float(out.loss.detach()))
    assert float(loss.detach()) == pytest.approx(sum(singles) / 3, rel=1e-5)
    assert float(answer_loss(model, batch, num_items=12)[0].detach()) == pytest.approx(sum(singles) * 2 / 12, rel=1e-5)


def test_dev_texts_that_are_trained_are_counted_too_and_a_limit_counts(tmp_path):
    train, dev = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", [{"sentence": f" CAT  red {i}", "label": "red"} for i in range(50)])
    task = load_task(TaskConfig(name="t", data=train, dev=dev))
    trained = {e.text for e in task.train}
    assert task.overlap == 0 and task.overlap_dev == sum(f"cat red {i}" in trained for i in range(50)) > 30
    few = load_task(TaskConfig(name="t", data=train, test=train, limit=10))
    assert few.overlap == 10 and load_task(TaskConfig(name="t", data=train, test=train)).overlap > 100
    said = list(TaskStream([task, few]).warnings())
    assert said == [
        f"task 't': {task.overlap_dev} dev texts also stand in its training rows", "task 't': 10 test texts also stand in its training rows"
    ]  # fmt: skip


def test_a_watch_set_is_all_of_its_data_unless_it_says_otherwise(tmp_path):
    data, test = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", ROWS[:20])
    whole = load_task(TaskConfig(name="w", data=data), watch=True)
    assert (len(whole.train), len(whole.dev), len(whole.test), whole.overlap) == (0, 200, 200, 0)
    some = load_task(TaskConfig(name="w", data=data, test=test), watch=True)
    assert (len(some.train), len(some.dev), len(some.test)) == (0, 200, 20) and some.labels == ["blue", "red"]
    stream = TaskStream([load_task(TaskConfig(name="t", data=data))], [some])
    trained = {e.text for e in stream[0].train}
    for split, n in (("test", sum(e.text in trained for e in some.test)), ("dev", len(trained))):  # only what is scored is warned about
        assert list(stream.warnings(split)) == [f"watch 'w': {n} of its texts also stand in the training rows of task 't'"]


def test_a_label_is_trained_and_scored_as_the_same_tokens(tiny):
    """Also where the whole prompt is the row's own and ends in white space."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows = [Example("cat sits\n", "good", 0)]
    task = Task("t", "{sentence}", rows, rows, rows, labels=["good", "bad"])
    answer = [t for t in task.encode(tokenizer, rows[0])["labels"] if t != -100]
    assert answer == task.encode_answer(tokenizer, "good")


@pytest.mark.parametrize(("labels", "message"), [(["<", ">"], "'<' and '>' are the same tokens"), (["good", " "], "' ' has no tokens")])
def test_labels_the_tokenizer_cannot_tell_apart_are_refused(labels, message, tiny):
    rows = [Example("cat", labels[0], 0)]
    with pytest.raises(DataError, match=message):
        Task("t", "Text : {sentence} Answer :", rows, rows, rows, labels=labels).check(AutoTokenizer.from_pretrained(tiny))
