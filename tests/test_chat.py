"""Conversations: the tokens of the assistant are learned and no others, the prompt is what inference would see, and no template is guessed about."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import CHAT, make_model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from forgetless.batches import Collate, answer_loss
from forgetless.chat import parse
from forgetless.config import TaskConfig
from forgetless.errors import DataError
from forgetless.evaluation.scorers import score_rows
from forgetless.tasks import Example, Task, load_task, read_rows

TURNS = [("system", "good"), ("user", "cat runs"), ("assistant", "red"), ("user", "dog"), ("assistant", "blue green")]
# the same words as CHAT writes, with the assistant's part marked
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}assistant : {% generation %}{{ m['content'] }} <eos>{% endgeneration %} "
    "{% else %}{{ m['role'] }} : {{ m['content'] }} <eos> {% endif %}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)
# as templates of reasoning models do: of earlier assistant turns nothing is left
FORGETS = CHAT.replace("{{ m['content'] }}", "{% if m['role'] != 'assistant' or loop.last %}{{ m['content'] }}{% endif %}")


def dicts(turns=TURNS):
    return [{"role": role, "content": content} for role, content in turns]


def example(turns=TURNS, row=0) -> Example:
    messages = parse("chat.jsonl, line 1", "messages", dicts(turns))
    return Example("text", messages[-1][1], row, messages, "chat.jsonl, line 1")


def task(**kw) -> Task:
    return Task(**(dict(name="talk", prompt="", train=[], dev=[], test=[], chat=True) | kw))


@pytest.fixture
def tokenizer(chatty):
    return AutoTokenizer.from_pretrained(chatty)


@pytest.fixture
def with_template(tokenizer):
    def make(template):
        tokenizer.chat_template = template
        return tokenizer

    return make


# -- which tokens are learned ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHAT, MARKED], ids=["prefixes", "generation"])
def test_the_assistants_words_and_end_tokens_are_learned_and_no_others(with_template, template):
    tokenizer = with_template(template)
    row = task().encode(tokenizer, example())
    seen = [(tokenizer.decode([i]), label != -100) for i, label in zip(row["input_ids"], row["labels"], strict=True)]
    said = "system : good <eos> user : cat runs <eos> assistant : RED <EOS> user : dog <eos> assistant : BLUE GREEN <EOS>"
    assert seen == [(word.lower(), word.isupper() and word != ":") for word in said.split()]
    assert all(label in (-100, i) for i, label in zip(row["input_ids"], row["labels"], strict=True))


@pytest.mark.parametrize("template", [CHAT, MARKED], ids=["prefixes", "generation"])
def test_the_prompt_is_what_inference_would_see(with_template, template):
    tokenizer = with_template(template)
    prompt, answer = task().encode_prompt(tokenizer, example()), task().encode_answer(tokenizer, example())
    assert prompt == tokenizer.apply_chat_template(dicts()[:-1], add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(answer) == "blue green <eos>" and tokenizer.decode(task().encode_answer(tokenizer, example(), end=False)) == "blue green"
    assert prompt + answer == task().encode(tokenizer, example())["input_ids"]


def test_a_text_is_one_turn_of_the_user(tokenizer):
    assert tokenizer.decode(task().encode_prompt(tokenizer, "cat runs")) == "user : cat runs <eos> assistant :"
    assert task().encode_prompt(tokenizer, "cat") == task().encode_prompt(tokenizer, Example("cat", "red", 0))
    assert tokenizer.decode(task().encode_answer(tokenizer, "red")) == "red <eos>"


@pytest.mark.parametrize("template", [CHAT, MARKED], ids=["prefixes", "generation"])
@pytest.mark.parametrize(("limit", "kept"), [(7, "<eos> user : dog <eos> assistant :"), (11, None), (15, None), (100, None)])
def test_truncation_keeps_the_end_of_the_prompt_and_the_whole_answer(with_template, template, limit, kept):
    tokenizer = with_template(template)
    whole, cut = task().encode(tokenizer, example()), task(max_prompt_tokens=limit).encode(tokenizer, example())
    n = len(cut["input_ids"])
    assert n == min(limit, len(whole["input_ids"]) - 3) + 3 and cut["input_ids"] == whole["input_ids"][-n:]
    assert task(max_prompt_tokens=limit).encode_prompt(tokenizer, example()) == cut["input_ids"][:-3]
    learned = tokenizer.decode([label for label in cut["labels"] if label != -100])
    assert learned == ("blue green <eos>" if limit == 7 else "red <eos> blue green <eos>")
    if kept:
        assert tokenizer.decode(cut["input_ids"]) == f"{kept} blue green <eos>"


def test_an_earlier_turn_that_lost_its_beginning_is_context_and_not_an_answer(tokenizer):
    turns = [("user", "cat"), ("assistant", "red green blue"), ("user", "dog"), ("assistant", "blue")]
    row = task(max_prompt_tokens=8).encode(tokenizer, example(turns))
    assert tokenizer.decode(row["input_ids"]).startswith("blue <eos> user : dog") and [label for label in row["labels"][:-2] if label != -100] == []
    row = task(max_prompt_tokens=11).encode(tokenizer, example(turns))
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "red green blue <eos> blue <eos>"


def test_padding_and_gaps_do_not_change_the_loss(chatty, tokenizer):
    """A padded batch of conversations has the loss of transformers' own, row by row."""
    model = AutoModelForCausalLM.from_pretrained(chatty).eval()
    rows = [task().encode(tokenizer, example(turns)) for turns in (TURNS, TURNS[1:3], [*TURNS, ("user", "bird"), ("assistant", "red")])]
    total = 0.0
    for r in rows:
        out = model(input_ids=torch.tensor([r["input_ids"]]), labels=torch.tensor([r["labels"]]))
        total += float(out.loss.detach()) * sum(label != -100 for label in r["labels"])
    loss, _ = answer_loss(model, Collate(model)(rows))
    assert float(loss.detach()) == pytest.approx(total / sum(label != -100 for r in rows for label in r["labels"]), rel=1e-5)


# -- templates ---------------------------------------------------------------------------------------------------------------------------


def test_a_template_that_rewrites_earlier_turns(with_template):
    """Without {% generation %} there is no telling which tokens are the assistant's; the prompt of a single turn is never rewritten."""
    tokenizer = with_template(FORGETS)
    with pytest.raises(DataError, match=r"task 'talk': chat.jsonl, line 1: .* before message 3 differently once more follows.* put {% generation %}"):
        task().encode(tokenizer, example())
    row = task().encode(tokenizer, example(TURNS[:3]))
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "red <eos>"


def closing(token: str, template: str = CHAT) -> str:
    return template.replace("<eos>", token)


@pytest.mark.parametrize("template", [CHAT, MARKED], ids=["prefixes", "generation"])
def test_a_turn_may_close_with_another_token_than_eos(chatty, with_template, template):
    """As Gemma's <end_of_turn>: it is learned, it ends a generated answer, and eos does not stand in for it."""
    tokenizer = with_template(closing("<turn>", template))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    model = AutoModelForCausalLM.from_pretrained(chatty).eval()
    model.resize_token_embeddings(len(tokenizer))
    t = task()
    assert t.end_token(tokenizer, example()) == turn != tokenizer.eos_token_id and t.encode(tokenizer, example())["labels"][-1] == turn
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    for loud, said, steps in ((turn, "", 0), (tokenizer.eos_token_id, "", 4), (tokenizer.convert_tokens_to_ids("red"), "red red red red", 4)):
        model.lm_head.bias.data.zero_()[loud] = 100.0
        passes.clear()
        (p,) = score_rows(model, tokenizer, t, [example()], ["exact_match"])  # three tokens in the answer, and one more
        assert p.text == said and len(passes) == 2 + steps  # one to see what kind of cache the model has, one over the prompt


@pytest.mark.parametrize(
    "template", [closing("", CHAT), closing("good", CHAT), closing("unheard", CHAT), closing("<eos> bad", CHAT), MARKED.replace(" <eos>", "")]
)
def test_a_template_that_closes_no_turn_is_refused(with_template, template):
    with pytest.raises(DataError, match="line 1: the model's chat template closes an assistant turn with no special token"):
        task().encode(with_template(template), example())


def test_a_mark_that_leaves_the_end_token_out_is_refused(with_template):
    with pytest.raises(DataError, match="leaves out '<eos>', which closes a turn.*put {% endgeneration %} behind it"):
        task().encode(with_template(MARKED.replace(" <eos>{% endgeneration %}", "{% endgeneration %} <eos>")), example())


@pytest.mark.parametrize(
    "template",
    [
        MARKED.replace("m['role'] == 'assistant'", "m['role'] == 'assistant' and loop.last"),  # the last turn only
        MARKED.replace("{% generation %}{{", "{% generation %} {{").replace("content'] }} <eos>", "content'] }} <eos> "),  # white space is no token
    ],
)
def test_marks_are_counted(with_template, template):
    with pytest.raises(DataError, match=r"part marks [01] turns, and 2 are the assistant's"):
        task().encode(with_template(template), example())


def test_a_template_that_is_missing_or_refuses(with_template):
    with pytest.raises(DataError, match="format: messages needs a chat template, and this model's tokenizer has none"):
        task().encode_prompt(with_template(None), "cat")
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHAT
    with pytest.raises(DataError, match=r"task 'talk': chat.jsonl, line 1: .*refuses the conversation \(TemplateError: System role not supported\)"):
        task(train=[example(TURNS[1:]), example()]).check(with_template(refuses))
    task(train=[example(TURNS[1:])]).check(with_template(refuses))


def test_a_token_that_would_reach_across_the_end_of_the_prompt_is_cut_in_two():
    """The prompt ends in a line break, the answer begins with one, and the vocabulary has a token of two: the prompt's tokens stay what they are at inference."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = {c: i for i, c in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ"])}
    inner = Tokenizer(models.BPE(vocab=letters, merges=[("Ċ", "Ċ")]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] + '\n' + m['content'] + '<eos>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'a\n' }}{% endif %}"
    )
    turns = [("user", "x"), ("assistant", "\ny"), ("user", "z"), ("assistant", "\nw")]
    prompt = task().encode_prompt(tokenizer, example(turns))
    assert tokenizer.convert_ids_to_tokens(prompt[-3:]) == ["Ċ", "a", "Ċ"] and tokenizer.decode(prompt) == "u\nx<eos>\na\n\ny<eos>\nu\nz<eos>\na\n"
    row = task().encode(tokenizer, example(turns))
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "\ny<eos>\nw<eos>"
    assert row["input_ids"][: len(prompt)] == prompt and "ĊĊ" not in tokenizer.convert_ids_to_tokens(row["input_ids"])
    plain = task().encode(tokenizer, example([("user", "x\n\n"), ("assistant", "y")]))
    assert "ĊĊ" in tokenizer.convert_ids_to_tokens(plain["input_ids"])  # elsewhere the vocabulary is used as it is


# -- rows --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("cat", "'messages' is 'cat'; it must be a list of"),
        ([], "'messages' is '[]'; it must be a list of"),
        (["cat"], "message 1: expected {'role': ..., 'content': ...}, got str"),
        ([{"from": "human", "value": "x"}], "message 1: no 'role'; known: from, value"),
        ([{"role": "user"}], "message 1: no 'content'"),
        ([{"role": "human", "content": "x"}], "message 1: 'role' is 'human'; one of: system, user, assistant"),
        ([*dicts(TURNS[:2]), {"role": "assistant", "content": " "}], "message 3: 'content' is ' '; it must be text that is not empty"),
        ([*dicts(TURNS[:2]), {"role": "assistant", "content": None}], "message 3: 'content' is None"),
        ([*dicts(TURNS[:2]), {"role": "assistant", "content": "x", "tool_calls": [{}]}], "message 3: it calls tools"),
        ([{"role": "user", "content": "a \ud83d"}], "message 1: 'content' holds half a character"),
        (dicts(TURNS[:2]), "no message is the assistant's"),
        (dicts(TURNS[2:3]), "the conversation begins with the assistant"),
    ],
)
def test_a_bad_conversation_is_named(value, said):
    with pytest.raises(DataError) as error:
        parse("chat.jsonl, line 7", "messages", value)
    assert str(error.value).startswith("chat.jsonl, line 7") and said in str(error.value)


def test_rows_of_conversations(tmp_path):
    conversations = [dicts([("user", f"cat {i}"), ("assistant", f"red {i}"), ("user", "thanks")]) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"talk": c}) + "\n" for c in conversations))
    config = TaskConfig(name="t", data=str(tmp_path / "a.jsonl"), format="messages", columns={"messages": "talk"})
    row = read_rows(config.data, config)[3]
    assert (row.text, row.answer, row.row) == ("user: cat 3", "red 3", 3)
    assert row.messages == (("user", "cat 3"), ("assistant", "red 3"))  # what follows the last answer is dropped
    t = load_task(config)
    assert t.chat and t.labels is None and t.own_metric == "exact_match"


def test_the_hash_sees_every_turn(tmp_path):
    """Two conversations whose transcripts are the same text are still two."""
    one, other = [("user", "a\nassistant: b"), ("assistant", "c")], [("user", "a"), ("assistant", "b"), ("assistant", "c")]
    assert example(one).messages != example(other).messages
    assert task(train=[example(one)]).sha256 != task(train=[example(other)]).sha256


def test_the_model_folder_keeps_the_template(tmp_path):
    assert AutoTokenizer.from_pretrained(make_model_folder(tmp_path / "m", chat_template=CHAT)).chat_template == CHAT
