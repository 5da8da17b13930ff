"""The registry of methods: name -> "module:Class", one line a method. Nothing is imported until a method is asked for."""

from __future__ import annotations

import importlib

from ..errors import ConfigError, nearest

REGISTRY = {
    "gorp": "gorp:GORP",
    "osft": "osft:OSFT",
    "seqft": "seqft:SeqFT",
    "lora": "lora:LoRA",
    "inclora": "inclora:IncLoRA",
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
