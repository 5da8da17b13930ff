"""A model of the llama family as one GGUF file, for llama.cpp and what is built on it.

llama.cpp's own converter, convert_hf_to_gguf.py, is a script of its repository and in no package that its authors publish. This is the small part of it that a run of the
llama family needs, on llama.cpp's own writer library (the package gguf). Everything else is refused by name, with the command of that script.

    tensors      in the dtype they are committed in (fp32, bf16 or fp16), norms in fp32. llama.cpp pairs the rows of a head's rotary embedding next to each other,
                 transformers half a head apart: q and k are permuted
    tokenizer    byte-level BPE whose way of splitting text llama.cpp has under a name (SPLITS), found by what the tokenizer does, not by what it is called

Read back with transformers before it counts as written: every weight to the bit, the vocabulary, and the token ids of texts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import ConfigError, ForgetlessError

INSTALL = "pip install 'gguf>=0.17'"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip
# (steps of the pre-tokenizer, ignore_merges) -> llama.cpp's name of it
SPLITS = {
    (("ByteLevel", True),): ("gpt-2", False),
    (("Digits",), ("ByteLevel", True)): ("smollm", False),
    (("Split", LLAMA3), ("ByteLevel", False)): ("llama-bpe", True),
}
SAMPLES = (
    "Hello world", "  two  spaces, a\ttab\n\nand lines \n ", "1 12 123 1234567 3.14 a1b22", "I've told her they'll be WE'RE", "def f(x):\n    return x**2 != 1",
    "Grüße, 你好 мир कुछ", "😀👩‍👩‍👧 é e\u0301", "", "...!!??--==(){}[]<>",
)  # fmt: skip


def write_gguf(model: nn.Module, tokenizer: Any, file: Path, name: str) -> None:
    """Write `model` and its tokenizer into `file`. name: general.name in it.

    Raises ConfigError for a model or tokenizer that is not of the family, or without the package gguf; ForgetlessError where what was written does not read back the same.
    """
    try:
        import gguf
    except ImportError:
        raise ConfigError(f"--as gguf needs llama.cpp's writer, the package gguf. Run: {INSTALL}") from None
    _check_model(model)
    words = _vocabulary(tokenizer, model)
    writer = gguf.GGUFWriter(file, "llama")
    _add_config(writer, model, name)
    _add_vocabulary(writer, words, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    for key, tensor in model.named_parameters():  # a tied head is not among them, and llama.cpp takes the embedding then
        to = names.get_name(key, try_suffixes=(".weight", ".bias"))
        kind = _kind(tensor, gguf)
        data = _as_llama_cpp(key, tensor.detach(), model.config).float().numpy()
        writer.add_tensor(to, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _read_back(file, model, tokenizer)


def _kind(tensor: Tensor, gguf: Any) -> Any:
    kinds = {torch.bfloat16: gguf.GGMLQuantizationType.BF16, torch.float16: gguf.GGMLQuantizationType.F16}
    return gguf.GGMLQuantizationType.F32 if tensor.ndim == 1 else kinds.get(tensor.dtype, gguf.GGMLQuantizationType.F32)


def _other(what: str) -> ConfigError:
    return ConfigError(
        f"--as gguf writes models of the llama family whose every part it can check; here {what}. llama.cpp's own converter may know it: export the model "
        f"--as plain, and in a checkout of llama.cpp run: python convert_hf_to_gguf.py PLAIN_FOLDER --outfile model.gguf --outtype auto"
    )


def _check_model(model: nn.Module) -> None:
    c = model.config
    if type(model).__name__ != "LlamaForCausalLM":
        raise _other(f"the model is a {type(model).__name__}")
    rope = c.rope_parameters or {}
    for odd, what in (
        (rope.get("rope_type", "default") != "default", f"rope_type is {rope.get('rope_type')}"),
        (c.hidden_act != "silu", f"hidden_act is {c.hidden_act}"),
        (c.attention_bias or c.mlp_bias, "the layers have biases"),
        (any(p.dtype == torch.float64 for p in model.parameters()), "weights are float64"),
    ):
        if odd:
            raise _other(what)


def _add_config(writer: Any, model: nn.Module, name: str) -> None:
    import gguf

    c = model.config
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    writer.add_type("model")
    writer.add_name(name)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    types = {torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16, torch.float16: gguf.LlamaFileType.MOSTLY_F16}
    writer.add_file_type(types.get(model.dtype, gguf.LlamaFileType.ALL_F32))


def _as_llama_cpp(key: str, W: Tensor, config: Any) -> Tensor:
    """q and k: within each head, row i of the first half and row i of the second next to each other."""
    heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}.get(".".join(key.split(".")[-2:]))
    if heads is None:
        return W
    return W.reshape(heads, 2, W.shape[0] // heads // 2, W.shape[1]).transpose(1, 2).reshape(W.shape)


def _vocabulary(tokenizer: Any, model: nn.Module) -> dict[str, Any]:
    """{"pre", "merges", "tokens", "types"} of a byte-level BPE tokenizer. Raises ConfigError for any other."""
    import gguf

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _other(f"the tokenizer is a {type(tokenizer).__name__}, of the slow kind")
    described = json.loads(backend.to_str())
    inner, pre = described["model"], described["pre_tokenizer"]
    steps = tuple(map(_step, pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre or {}]))
    name, ignore_merges = SPLITS.get(steps, (None, None))
    plain = inner["type"] == "BPE" and not any(
        inner.get(key) for key in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    )
    odd = [token["content"] for token in described["added_tokens"] if token["lstrip"] or token["rstrip"] or token["single_word"]]
    for wrong, what in (
        (not plain, f"the tokenizer is a {inner['type']} model that is not plain byte-level BPE"),
        (name is None, f"the tokenizer splits text in a way that llama.cpp may have no name for ({', '.join(str(step[0]) for step in steps)})"),
        (
            name is not None and bool(inner.get("ignore_merges")) != ignore_merges,
            f"the tokenizer splits text as {name}, but ignore_merges is not as there",
        ),
        (described["normalizer"] is not None, "the tokenizer changes text before it splits it (normalizer)"),
        (bool(odd), f"the added token '{''.join(odd[:1])}' takes blanks or whole words"),
        (len(tokenizer) > model.config.vocab_size, f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}"),
    ):
        if wrong:
            raise _other(what)
    added = {token["id"]: token for token in described["added_tokens"]}
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    tokens, types = [], []
    for number in range(model.config.vocab_size):
        if number not in by_id:
            kind = gguf.TokenType.UNUSED
        elif number in added:
            kind = gguf.TokenType.CONTROL if added[number]["special"] else gguf.TokenType.USER_DEFINED
        else:
            kind = gguf.TokenType.NORMAL
        tokens.append(by_id.get(number, f"[PAD{number}]"))
        types.append(kind)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in inner["merges"]]
    return {"pre": name, "merges": merges, "tokens": tokens, "types": types}


def _step(step: dict[str, Any]) -> tuple:
    """What a step of a pre-tokenizer does; trim_offsets is about positions in the text, not about tokens."""
    if step.get("type") == "ByteLevel" and not step["add_prefix_space"]:
        return "ByteLevel", step["use_regex"]
    if step.get("type") == "Digits" and step["individual_digits"]:
        return ("Digits",)
    if step.get("type") == "Split" and step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]:
        return "Split", step["pattern"]["Regex"]
    return (step.get("type", "none"), None, None)


def _add_vocabulary(writer: Any, words: dict[str, Any], tokenizer: Any) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words["pre"])
    writer.add_token_list(words["tokens"])
    writer.add_token_types(words["types"])
    writer.add_token_merges(words["merges"])
    for kind in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{kind}_token_id")
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    begins, ends = _around(tokenizer)
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(ends)
    writer.add_add_space_prefix(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _around(tokenizer: Any) -> tuple[bool, bool]:
    """Does the tokenizer put its first and its last token round a text? Raises ConfigError where it puts anything else there."""
    bare, whole = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    for begins in (False, True):
        for ends in (False, True):
            if whole == [tokenizer.bos_token_id] * begins + bare + [tokenizer.eos_token_id] * ends:
                return begins, ends
    raise _other("the tokenizer puts other tokens round a text than its first and last")


def _read_back(file: Path, model: nn.Module, tokenizer: Any) -> None:
    """Raise ForgetlessError unless transformers reads from the file what was to be written."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        read = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
        words = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except Exception as error:
        raise ForgetlessError(f"gguf: transformers cannot read what was written ({' '.join(str(error).split())[:200]})") from error
    written, found = model.state_dict(), read.state_dict()
    wrong = [key for key in {**written, **found} if key not in found or key not in written or not torch.equal(written[key].float(), found[key])]
    if wrong:
        raise ForgetlessError(f"gguf: {len(wrong)} tensors do not read back as they were, {wrong[0]} among them")
    for key in (
        "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings", "vocab_size",
        "head_dim", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
    ):  # fmt: skip
        was, now = (_in_fp32(getattr(m.config, key)) for m in (model, read))
        if was != now:
            raise ForgetlessError(f"gguf: {key} reads back as {now}, and was {was}")
    # the file only names the way of splitting, and transformers does not know every name: what it splits by is put in its place
    words.backend_tokenizer.pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    was, now = tokenizer.get_vocab(), words.get_vocab()
    numbers = set(was.values())
    if was != {token: number for token, number in now.items() if number in numbers}:  # it may hold fewer than the model has rows
        raise ForgetlessError("gguf: the vocabulary does not read back as it was")
    was, now = (json.loads(t.backend_tokenizer.to_str())["model"]["merges"] for t in (tokenizer, words))
    if was != now:
        raise ForgetlessError("gguf: the merges do not read back as they were")
    for text in (*SAMPLES, "".join(tokenizer.get_added_vocab())):
        was, now = (t(text, add_special_tokens=False).input_ids for t in (tokenizer, words))
        if was != now:
            raise ForgetlessError(f"gguf: the tokens of {text!r} read back as {now}, and were {was}")


def _in_fp32(value: Any) -> Any:
    """GGUF keeps numbers in fp32."""
    if isinstance(value, dict):
        return {key: _in_fp32(v) for key, v in value.items()}
    return float(np.float32(value)) if isinstance(value, float) else value
