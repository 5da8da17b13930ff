"""What a config names as "module:attribute": a metric's function, a method's class, looked for in the working directory and on sys.path."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from .errors import ConfigError, nearest


def named(name: str, what: str) -> Any:
    """The callable that "module:attribute" names. what: "function" or "class", for the message. Raises ConfigError."""
    module, _, attribute = name.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever the module does when it is imported
        raise ConfigError(f"cannot be imported from the working directory or sys.path ({type(error).__name__}: {error})") from error
    finally:
        sys.path.remove(here)
    if not callable(getattr(found, attribute, None)):
        known = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"module {module} has no {what} {attribute}{nearest(attribute, known) if known else ''}")
    return getattr(found, attribute)
