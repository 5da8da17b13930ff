"""`forgetless export --as gguf`: what transformers reads back is the model, what llama.cpp has to be told is in the file, and other models are refused by name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model_folder, run_config
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from tokenizers.normalizers import NFC
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import forgetless as fl
from forgetless import gguf as writing
from forgetless import models
from forgetless.errors import ConfigError, ForgetlessError
from forgetless.gguf import LLAMA3, SAMPLES, write_gguf
from forgetless.models import BUNDLED

gguf = pytest.importorskip("gguf")

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
SPLITTERS = {
    "gpt-2": BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    "llama-bpe": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    ),
}


def make(folder: Path, pre: str = "gpt-2", *, tied: bool = False, dtype=torch.float32, begins: bool = False, change=None, **settings) -> str:
    """A tiny llama with a byte-level tokenizer. change(the tokenizers library's tokenizer); settings: of the model's config."""
    inner = Tokenizer(tokenizer_models.BPE(ignore_merges=pre == "llama-bpe"))
    inner.pre_tokenizer, inner.decoder = SPLITTERS[pre], decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<bos>", "<eos>"], show_progress=False)
    inner.train_from_iterator([*SAMPLES, "cat red dog green bird blue sits runs flies colour Text Answer :"] * 3, trainer)
    inner.add_tokens([AddedToken("<think>", normalized=False)])
    if begins:
        inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    if change is not None:
        change(inner)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", tie_word_embeddings=tied, **({"vocab_size": len(tokenizer) + 3} | sizes | settings))
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def written(folder: str, out: Path, dtype=torch.float32) -> tuple[torch.nn.Module, object, gguf.GGUFReader]:
    model, tokenizer = models.load(folder, dtype=dtype)
    out.mkdir()
    write_gguf(model, tokenizer, out / "model.gguf", "name")
    return model, tokenizer, gguf.GGUFReader(out / "model.gguf")


def field(file: gguf.GGUFReader, name: str):
    return file.fields[name].contents()


@pytest.mark.parametrize("pre", SPLITTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_reads_back_to_the_bit(tmp_path, pre, dtype):
    tied = pre == "smollm"
    model, tokenizer, file = written(
        make(tmp_path / "m", pre, tied=tied, dtype=dtype, head_dim=16 if pre == "gpt-2" else None), tmp_path / "out", dtype
    )
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    was, now = model.state_dict(), read.state_dict()
    assert was.keys() == now.keys() and all(torch.equal(was[key].float(), now[key]) for key in was)
    assert field(file, "tokenizer.ggml.pre") == pre and ("output.weight" in {t.name for t in file.tensors}) != tied
    ids = torch.tensor([tokenizer("cat red 12").input_ids])
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model.float()(ids).logits, atol=1e-6, rtol=1e-6)
    kind = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    assert {t.tensor_type.name for t in file.tensors if "norm" not in t.name} == {kind}
    assert {t.tensor_type.name for t in file.tensors if "norm" in t.name} == {"F32"}


def test_q_and_k_lie_as_llama_cpp_pairs_them(tmp_path):
    """Row 2 i + j of a head is row i of its j-th half: rotary embeddings turn neighbours there, halves in transformers."""
    model, _, file = written(make(tmp_path / "m"), tmp_path / "out")
    tensors = {t.name: torch.tensor(t.data.copy()) for t in file.tensors}
    for name, heads in (("q", 4), ("k", 2)):
        W = model.get_submodule(f"model.layers.1.self_attn.{name}_proj").weight
        d = len(W) // heads
        for head in range(heads):
            for i in range(d // 2):
                for j in range(2):
                    assert torch.equal(tensors[f"blk.1.attn_{name}.weight"][head * d + 2 * i + j], W[head * d + j * (d // 2) + i])


@pytest.mark.parametrize("begins", [False, True])
def test_the_vocabulary_is_the_tokenizers(tmp_path, begins):
    _, tokenizer, file = written(make(tmp_path / "m", begins=begins), tmp_path / "out")
    tokens, types = field(file, "tokenizer.ggml.tokens"), field(file, "tokenizer.ggml.token_type")
    n = len(tokenizer)
    assert tokens[:n] == tokenizer.convert_ids_to_tokens(range(n)) and tokens[n:] == [f"[PAD{n + i}]" for i in range(3)]
    kinds = {"<bos>": 3, "<eos>": 3, "<think>": 4, f"[PAD{n}]": 5, tokens[50]: 1}
    assert {token: types[tokens.index(token)] for token in kinds} == kinds
    ids = {kind: field(file, f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos", "padding")}
    assert ids == {"bos": 0, "eos": 1, "padding": 1}
    assert [field(file, f"tokenizer.ggml.add_{x}_token") for x in ("bos", "eos")] == [begins, False]
    assert field(file, "tokenizer.chat_template") == tokenizer.chat_template
    read = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    for text in (*SAMPLES, "<think>cat<eos>"):
        assert read(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids


def test_the_keys_of_a_file_by_llama_cpps_own_converter_are_there(tmp_path):
    """The bundled model's: all that describes a llama and its tokenizer."""
    package, name, _ = BUNDLED["smollm2-135m"]
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    oracle = gguf.GGUFReader(Path(spec.submodule_search_locations[0]) / name)
    _, _, file = written(make(tmp_path / "m"), tmp_path / "out")
    theirs, ours = ({k: f.types for k, f in r.fields.items() if k.startswith(("llama.", "tokenizer."))} for r in (oracle, file))
    optional = {"tokenizer.ggml.unknown_token_id"}  # a byte-level vocabulary knows every text; theirs has one all the same
    assert theirs.keys() - ours.keys() <= optional and all(ours[key] == theirs[key] for key in theirs.keys() - optional)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type is linear"),
        ({"attention_bias": True}, "the layers have biases"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"vocab_size": 300}, "tokens, the model 300"),
        ({"change": lambda t: setattr(t, "normalizer", NFC())}, "changes text before it splits it"),
        ({"change": lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True))}, "may have no name for (ByteLevel)"),
        ({"change": lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace())}, "may have no name for (Whitespace)"),
        ({"change": lambda t: setattr(t.model, "ignore_merges", True)}, "splits text as gpt-2, but ignore_merges"),
        ({"change": lambda t: t.add_tokens([AddedToken("<x>", lstrip=True)])}, "the added token '<x>' takes blanks"),
        (
            {"change": lambda t: setattr(t, "post_processor", processors.TemplateProcessing(single="$A <bos>", special_tokens=[("<bos>", 0)]))},
            "puts other tokens round a text",
        ),
    ],
)
def test_what_cannot_be_checked_is_refused_with_the_command_that_may_know_it(tmp_path, settings, said):
    folder = make(tmp_path / "m", **settings)
    with pytest.raises(ConfigError) as error:
        written(folder, tmp_path / "out")
    assert said in str(error.value) and "python convert_hf_to_gguf.py PLAIN_FOLDER" in str(error.value)
    assert not any((tmp_path / "out").iterdir())


def test_another_architecture_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="the model is a Qwen3ForCausalLM"):
        written(make_model_folder(tmp_path / "m", kind="qwen3"), tmp_path / "out")


def test_a_file_that_does_not_read_back_does_not_count(tmp_path, monkeypatch):
    folder = make(tmp_path / "m")
    monkeypatch.setattr(writing, "_as_llama_cpp", lambda key, W, config: W)
    with pytest.raises(ForgetlessError, match=r"4 tensors do not read back as they were, model.layers.0.self_attn.q_proj.weight among them"):
        written(folder, tmp_path / "out")


def swap(entries: list) -> None:
    entries[60:62] = reversed(entries[60:62])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda words: swap(words["tokens"]), "the vocabulary does not read back"),
        (lambda words: swap(words["merges"]), "the merges do not read back"),
        (lambda words: words["types"].__setitem__(words["tokens"].index("<think>"), gguf.TokenType.NORMAL), "the tokens of .*<think>.* read back as"),
    ],
)
def test_a_vocabulary_that_does_not_read_back_does_not_count(tmp_path, monkeypatch, change, said):
    folder, right = make(tmp_path / "m"), writing._vocabulary

    def wrong(*args):
        words = right(*args)
        change(words)
        return words

    monkeypatch.setattr(writing, "_vocabulary", wrong)
    with pytest.raises(ForgetlessError, match=said):
        written(folder, tmp_path / "out")


def test_the_command(tmp_path, monkeypatch, forgetless_):
    run = fl.run(run_config(make(tmp_path / "m"), tmp_path, "seqft", ("colour",))).path
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        status, _, err = forgetless_("export", "run", "--out", "out", "--as", "gguf")
        assert status == 2 and "the package gguf. Run: pip install" in err and not Path("out").exists()
    status, out, _ = forgetless_("export", "run", "--out", "out", "--as", "gguf")
    assert status == 0 and "llama-cli -m out/model.gguf" in out and {p.name for p in Path("out").iterdir()} == {"README.md", "model.gguf"}
    read = AutoModelForCausalLM.from_pretrained("out", gguf_file="model.gguf", dtype=torch.float32)
    trained = models.load(str(run / "model"))[0]
    assert all(torch.equal(a, b) for a, b in zip(read.state_dict().values(), trained.state_dict().values(), strict=True))
    assert field(gguf.GGUFReader("out/model.gguf"), "general.name") == "run-colour"
