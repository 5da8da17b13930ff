"""A method that goes beside another: `on` says which weights train and how, this one adds a penalty, rows, or a step at the task's end.

    method: {name: replay, rate: 0.05, on: {name: gorp}}        # and so on: `on` may itself be a method that goes beside another

Every hook is the inner method's, unless a subclass has more to say and calls it through super(). Both share one memory; what is kept there under the name of
this method (Memory.put) is its own.
"""

from __future__ import annotations

from typing import Any

from pydantic import field_validator
from torch import Tensor, nn

from ..errors import ConfigError
from .base import Memory, Method, Options


class BesideOptions(Options):
    on: dict[str, Any] = {"name": "seqft"}
    """The method it goes beside, as the section `method` would have it: {name: gorp, rank: 8}, or only a name."""

    @field_validator("on", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


def _inner(name: str) -> property:
    """Kept by the innermost method alone, so that all see the same."""
    return property(lambda self: getattr(self.on, name), lambda self, value: setattr(self.on, name, value))


class Beside(Method):
    Options = BesideOptions
    adds_to_gradients = False  # a penalty does: the method it goes beside may then let no gradient go within backward

    tokenizer, stream, untouched, committed, load = map(_inner, ("tokenizer", "stream", "untouched", "committed", "load"))
    batch_share, packs, autocast = _inner("batch_share"), _inner("packs"), _inner("autocast")
    scratch, progress, micro_batches, max_grad_norm = _inner("scratch"), _inner("progress"), _inner("micro_batches"), _inner("max_grad_norm")
    merge_leak, whole_gradients = _inner("merge_leak"), _inner("whole_gradients")
    planned = _inner("planned")
    kind, constrained = _inner("kind"), _inner("constrained")

    def __init__(self, /, **options: Any):
        from . import get

        super().__init__(**options)
        given = dict(self.options.on)
        name = given.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError(f"method {self.name}: on: names the method it goes beside, as in on: {{name: gorp}}; got {self.options.on!r}")
        self.on = get(name, **given)
        if any(part.name == self.name for part in self.inner()):
            raise ConfigError(f"method {self.name}: on: has {self.name} in it again; once is enough")
        self.options.on = {"name": name, **self.on.options.model_dump()}  # every default spelt out, for run.yaml
        self.whole_gradients = self.whole_gradients or self.adds_to_gradients
        for own in ("needs_old_data", "needs_task_id", "needs_whole_weights", "needs_models"):
            setattr(self, own, getattr(type(self), own) or getattr(self.on, own))
        allowed = ("nothing", "prompts", "rows")
        self.stores = max(type(self).stores, self.on.stores, key=allowed.index)

    def inner(self) -> list[Method]:
        """The methods it goes beside, the nearest first."""
        return [self.on, *(self.on.inner() if isinstance(self.on, Beside) else ())]

    def innermost(self) -> Method:
        return self.on.innermost()

    def refuse(self, names: tuple[str, ...], why: str, kind: str | None = None) -> None:
        """Raise ConfigError where a method of these names, or of this kind, is among those it goes beside."""
        for part in self.inner():
            if part.name in names or (kind is not None and part.kind == kind):
                raise ConfigError(f"method {self.name}: not on: {part.name}: {why}; put another method under on:")

    # -- a task ----------------------------------------------------------------------------------------------------------------------

    def check(self, model: nn.Module) -> None:
        self.on.check(model)

    def begin_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        return self.on.begin_task(model, task, memory)

    def resume_task(self, model: nn.Module, task: Any, memory: Memory, state: dict[str, Tensor]) -> nn.Module:
        inner = {key.removeprefix("on/"): value for key, value in state.items() if key.startswith("on/")}
        model = self.on.resume_task(model, task, memory, inner)
        self.load_state_dict({key: value for key, value in state.items() if not key.startswith("on/")})
        return model

    def protect(self, model: nn.Module, prompts: list[list[int]], memory: Memory, advance: Any = None) -> None:
        self.on.protect(model, prompts, memory, advance)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        return self.on.param_groups(model)

    def optimizer(self, groups: list[dict[str, Any]], **settings: Any) -> Any:
        return self.on.optimizer(groups, **settings)

    def train_data(self, task: Any, memory: Memory) -> list:
        return self.on.train_data(task, memory)

    def settings(self, train: dict[str, Any], index: int) -> dict[str, Any]:
        return self.on.settings(train, index)

    def sampler(self, rows: list, seed: int) -> Any:
        return self.on.sampler(rows, seed)

    def extra_loss(self, model: nn.Module, inputs: dict[str, Tensor], outputs: Any) -> Tensor | None:
        return self.on.extra_loss(model, inputs, outputs)

    def on_step(self, model: nn.Module) -> None:
        self.on.on_step(model)

    def state_dict(self) -> dict[str, Tensor]:
        """Of the inner method, under "on/"; a subclass adds its own."""
        return {f"on/{key}": value for key, value in self.on.state_dict().items()}

    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        return self.on.end_task(model, task, memory)

    def answering(self, model: nn.Module, task: Any, rows: list, memory: Memory) -> list:
        return self.on.answering(model, task, rows, memory)

    # -- planning and the record -----------------------------------------------------------------------------------------------------

    def spaced(self, model: nn.Module) -> dict[str, int] | None:
        return self.on.spaced(model)

    def statistics_bytes(self, model: nn.Module) -> int:
        return self.on.statistics_bytes(model)

    def sent_each_step(self, model: nn.Module) -> int:
        return self.on.sent_each_step(model)

    def held_bytes(self) -> int:
        return self.on.held_bytes()

    def protected_inputs(self, memory: Memory) -> dict[str, Tensor]:
        return self.on.protected_inputs(memory)

    def report(self, memory: Memory) -> dict[str, Any] | None:
        return self.on.report(memory)


def add(penalty: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two terms of the loss, either of which may not be there."""
    return penalty if other is None else other if penalty is None else penalty + other
