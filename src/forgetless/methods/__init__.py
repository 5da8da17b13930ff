"""The registry of methods: name -> "module:Class", one line a method. Nothing is imported until a method is asked for."""

from __future__ import annotations

import importlib

from ..errors import ConfigError, nearest

REGISTRY = {
    # the two papers
    "gorp": "gorp:GORP",
    "osft": "osft:OSFT",
    # nothing protected
    "seqft": "seqft:SeqFT",
    "lora": "lora:LoRA",
    "inclora": "inclora:IncLoRA",
    # updates held off what earlier tasks used
    "gpm": "gpm:GPM",
    "ogd": "ogd:OGD",
    "inflora": "inflora:InfLoRA",
    # few weights at a time
    "migu": "migu:MIGU",
    "sara": "sara:SaRA",
    "esacl": "esacl:EsaCL",
    # adapters that avoid, merge or follow earlier ones
    "olora": "olora:OLoRA",
    "nlora": "nlora:NLoRA",
    "ella": "ella:ELLA",
    "slao": "slao:SLAO",
    "treelora": "treelora:TreeLoRA",
    "badam": "badam:BAdam",
    # beside another method
    "ewc": "ewc:EWC",
    "lwf": "lwf:LwF",
    "replay": "replay:Replay",
    "lines": "lines:LiNeS",
    "merge": "merge:Merge",
    # chosen at test time
    "routed": "routed:Routed",
    "gainlora": "gainlora:GainLoRA",
    "prompt": "prompt:Prompt",
    # upper bounds
    "mtl": "mtl:MTL",
    "per_task": "per_task:PerTask",
}


def get_class(name: str):
    """The class of a method: of the registry, or "module:Class" of your own. Raises ConfigError with the nearest name."""
    if ":" in name:
        return _own(name)
    if name not in REGISTRY:
        raise ConfigError(f"there is no method '{name}'{nearest(name, REGISTRY)}")
    module, _, cls = REGISTRY[name].partition(":")
    return getattr(importlib.import_module(f".{module}", __name__), cls)


def _own(name: str):
    from ..importing import named
    from .base import Method

    try:
        cls = named(name, "class")
    except ConfigError as error:
        raise ConfigError(f"method {name}: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise ConfigError(f"method {name}: is not a subclass of forgetless.Method")
    return cls


def get(name: str, **options):
    """A method ready to use: `get("gorp", rank=8).param_groups(model)`. Raises ConfigError for an unknown name, option or value."""
    return get_class(name)(**options)
