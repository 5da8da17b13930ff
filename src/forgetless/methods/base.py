"""What a method is: the hooks the loop calls, each a no-op by default. One method, one file, one line in the registry.

The order of calls for one task:
    check -> begin_task -> train_data -> settings -> param_groups -> optimizer -> sampler -> [extra_loss, on_step] * steps -> end_task
    -> answering (the loop evaluates; then it commits model and memory)
A task that goes on from a checkpoint has resume_task in place of begin_task.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from .. import distributed
from ..errors import ConfigError, nearest
from ..progress import Progress
from ..subspace import Subspace, working_dtype

if TYPE_CHECKING:
    from ..batches import Encodable
    from ..tasks import Example, Task, TaskStream


@dataclass
class Memory:
    """What a method carries from task to task, saved with each commit as safetensors and JSON, never pickle."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    def spaces(self, kind: str = "") -> dict[str, Subspace]:
        """Module -> its protected space, as `keep` has put it there. kind: for a method that keeps more than one a module."""
        ending = f"{'@' if kind else ''}{kind}.basis"
        # sorted: what is read back from a file comes in another order, and a sum over layers would round otherwise
        names = [key.removesuffix(ending) for key in sorted(self.tensors) if key.endswith(ending) and ("@" in key) == bool(kind)]
        return {name: Subspace(self.tensors[name + ending], self.tensors[name + ending.replace(".basis", ".energy")]) for name in names}

    def of(self, owner: str) -> dict[str, Tensor]:
        """The tensors that a method keeps under its own name, as `put` has put them there: for one that goes beside another and shares its memory."""
        return {key.removeprefix(f"{owner}/"): tensor for key, tensor in self.tensors.items() if key.startswith(f"{owner}/")}

    def put(self, owner: str, tensors: dict[str, Tensor]) -> None:
        """These in place of all that `owner` kept."""
        self.tensors = {key: tensor for key, tensor in self.tensors.items() if not key.startswith(f"{owner}/")}
        self.tensors |= {f"{owner}/{key}": tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}

    def keep(self, spaces: dict[str, Subspace], kind: str = "") -> None:
        for name, space in spaces.items():
            place = f"{name}@{kind}" if kind else name
            self.tensors[f"{place}.basis"], self.tensors[f"{place}.energy"] = space.basis, space.energy


class Options(BaseModel):
    """Base of every method's options: unknown ones are errors; the docstring under a field is what `forgetless methods NAME` says of it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Method:
    """A continual-learning method. Subclasses set `name`, `Options`, and override the hooks they need."""

    name = ""
    summary = ""  # one line for `forgetless methods`
    paper = ""
    kind = "plain"  # what it leaves: plain, a model | adapter, a model and its adapter | routed, several, one of which is chosen at test time
    constrained = False  # does it promise that updates stay out of a protected space?
    needs_old_data = False  # does it read rows of earlier tasks, from their files or from what it has kept?
    stores = "nothing"  # of a task's data: nothing | prompts | rows. A run whose `store` allows less is refused
    needs_models = False  # does it answer with models of earlier tasks, which `keep` must not let go?
    needs_task_id = False  # must it be told which task a row belongs to when it answers?
    extra_forward = ""  # what it computes on rows beside a plain training step, before and after a task too, in a few words
    bytes_a_task = (
        "none"  # what its memory grows by with every task, in a few words; what it holds whatever the number of tasks comes after a semicolon
    )

    Options: type[Options] = Options
    tokenizer: Any = None  # of the run, set by the loop before the first hook, for methods that read a task's rows themselves
    stream: TaskStream | None = None  # likewise: all tasks of the run
    untouched: Callable[[], nn.Module] | None = None  # likewise: loads the model as it was before the first task
    committed: Callable[[str], Path] | None = None  # likewise: the folder of the model that was committed with a task, by the task's name
    load: Callable[[str], tuple[nn.Module, Any]] | None = None  # likewise: a model and its tokenizer from a folder, as the run loads them
    autocast: bool = False  # likewise: are its rows trained on, and scored, under bf16 autocast?
    batch_share = 1.0  # set before extra_loss(): a mean over the micro-batch's answer tokens times this is its share of the mean over all of a step's
    packs = True  # can it train on `packing`'s rows, several in one sequence?
    needs_whole_weights = False  # can its penalty not be taken where `quantize` keeps frozen weights in few bits?
    whole_gradients = False  # set where something beside this method reads p.grad or adds to it: no gradient may be let go within backward
    scratch: Path | None = (
        None  # likewise: a folder for what the task in progress would rather not compute again; gone with the commit, None where nothing is kept
    )
    merge_leak: dict[str, Any] | None = (
        None  # set by end_task of a method that trains beside the weights and adds the result to them: as weight_leak gives it
    )
    micro_batches: int = 1  # set before optimizer(): how many backward passes make a step
    planned: tuple[int, bool] | None = None  # set where a task is only planned: as if so many processes trained it, and did they share the model?
    progress: Progress = Progress()  # likewise: stage and advance for what takes long; silent where nobody has set one

    def __init__(self, /, **options: Any):
        try:
            self.options = self.Options(**options)
        except ValidationError as error:
            raise ConfigError(f"method {self.name}: " + "; ".join(self._explain(e) for e in error.errors())) from None

    def _explain(self, error: Any) -> str:
        key = ".".join(str(part) for part in error["loc"])
        if error["type"] == "extra_forbidden":
            return f"unknown option '{key}'{nearest(key, self.Options.model_fields)}"
        return f"{key}{': ' if key else ''}{error['msg'].removeprefix('Value error, ')}"

    @property
    def processes(self) -> int:
        """How many train together."""
        return self.planned[0] if self.planned else distributed.world_size()

    def innermost(self) -> Method:
        """The method that says which weights train: itself, unless it goes beside another."""
        return self

    def check(self, model: nn.Module) -> None:
        """Before anything begins, on the plain model: raise ConfigError where the options match no module."""
        self.param_groups(model)

    def begin_task(self, model: nn.Module, task: Task | None, memory: Memory) -> nn.Module:
        """Once a task, never again on resume: wrap, decompose, attach, measure. Returns the model to train."""
        return model

    def resume_task(self, model: nn.Module, task: Task | None, memory: Memory, state: dict[str, Tensor]) -> nn.Module:
        """In place of begin_task on the model of the last commit, when the task goes on from a checkpoint: the same structure, nothing drawn or measured anew.

        state: what state_dict() gave. Weights are loaded into the returned model afterwards.
        """
        self.load_state_dict(state)
        return model

    def protect(self, model: nn.Module, prompts: list[list[int]], memory: Memory, advance: Any = None) -> None:
        """Before the first task: protect the input spaces of `prompts` (token ids), kept in `memory`. advance(done) is called after each prompt."""
        raise ConfigError(
            f"protect_from: method {self.name} keeps no protected input space; take protect_from out, or choose a method that has one, such as gorp"
        )

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Groups for SubspaceAdamW. Parameters in none of them stay bit-identical."""
        raise NotImplementedError

    def optimizer(self, groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
        """The optimizer of one task. settings: lr, betas, eps, weight_decay, max_grad_norm, precision, optimizer_state, seed. Any but a SubspaceAdamW is clipped by the Trainer."""
        from ..optim import SubspaceAdamW

        return SubspaceAdamW(groups, **settings)

    def train_data(self, task: Task, memory: Memory) -> list[Encodable]:
        """The rows to train on: the task's, and others that are encoded already, {"input_ids", "labels"}."""
        return task.train

    def settings(self, train: dict[str, Any], index: int) -> dict[str, Any]:
        """The config's section `train` for the index-th task of the stream, from 0."""
        return train

    def sampler(self, rows: list[Encodable], seed: int) -> torch.utils.data.Sampler[int] | None:
        """The order in which a task's rows are trained on, where it matters; set_epoch(epoch) is called before each epoch. None: shuffled."""
        return None

    def extra_loss(self, model: nn.Module, inputs: dict[str, Tensor], outputs: Any) -> Tensor | None:
        """A term added to the loss of each micro-batch."""
        return None

    def on_step(self, model: nn.Module) -> None:
        """Called before each optimizer step, when p.grad holds the whole raw gradient (None where the optimizer's group releases it): after every set of backward passes
        whose gradients are not thrown away."""

    def state_dict(self) -> dict[str, Tensor]:
        """What changes inside a task (sketches, generators): saved with a checkpoint, given back on resume."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of state_dict."""

    def end_task(self, model: nn.Module, task: Task | None, memory: Memory) -> nn.Module:
        """Merge, extend spaces, update `memory` in place. Returns the model to evaluate and commit."""
        return model

    def answering(
        self, model: nn.Module, task: Task, rows: list[Example], memory: Memory
    ) -> list[tuple[list[int], AbstractContextManager[nn.Module]]]:
        """Which model answers which of `rows`, rows of `task`: (their places, a context that gives the model). For methods that choose at test time."""
        return [(list(range(len(rows))), nullcontext(model))]

    def spaced(self, model: nn.Module) -> dict[str, int] | None:
        """For planning (`forgetless estimate`, on a model whose tensors have no data): module name -> dimension of the space that grows with the tasks, as
        Memory.spaces() will hold it. None: the method does not say."""
        return None

    def statistics_bytes(self, model: nn.Module) -> int:
        """Most bytes of what on_step collects while a task trains, beside the optimizer's state."""
        return 0

    def sent_each_step(self, model: nn.Module) -> int:
        """For planning: numbers that on_step and a penalty sum over, or gather from, processes which share the model, as a ring hands them round: a sum counts twice."""
        return 0

    def held_bytes(self) -> int:
        """Bytes of fixed bases that the method keeps outside the optimizer while a task trains."""
        return 0

    def protected_inputs(self, memory: Memory) -> dict[str, Tensor]:
        """Module name -> basis V (in, k) of the input directions that are protected now, for the record of coverage."""
        return {}

    def report(self, memory: Memory) -> dict[str, Any] | None:
        """Numbers about what is protected, for the record: {modules, rank_mean, rank_max, share, ...}."""
        return None


def clip_factor(gradients: list[Tensor], max_norm: float | None, norms: list[Tensor] | tuple = ()) -> float:
    """min(1, max_norm / global norm): how much clipping would shrink these gradients, and others of which only the norms are left."""
    if not max_norm or not (gradients or norms):
        return 1.0
    exact = [t.to(working_dtype(t.dtype)) for t in gradients]
    norms = [*norms, *(torch._foreach_norm(exact) if exact else ())]
    dtype = torch.promote_types(norms[0].dtype, torch.float32)
    norm = float(torch.linalg.vector_norm(torch.stack([n.to(dtype) for n in norms])))
    return min(1.0, max_norm / (norm + 1e-6))
