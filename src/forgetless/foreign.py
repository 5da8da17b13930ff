"""What a method asks of a training loop that is not ours, for dropin.py: which methods may run in one, on which model, with which state, and the task's rows from there.

Our own Trainer gives a method the batches of a step before the loss, the rows it trains on and their order; a foreign one gives it the model, the optimizer's steps and
its rows. What a method needs beyond that is refused here, before the first step, and says why.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import LoraOptions
from .batches import IGNORED, is_seq2seq
from .errors import ConfigError
from .files import read
from .methods._after import After
from .methods.base import Memory, Method
from .methods.beside import Beside
from .sharding import is_sharded
from .state import load_memory
from .tasks import Example, Task
from .trainer import check_launcher

# whose penalty is a function of the weights alone: its gradient may be added once a step, without the batch
OF_WEIGHTS = ("ewc", "olora", "nlora", "ella")
# whose on_step only collects what end_task reads
COLLECTS = ("gorp",)
# whose hooks do with the rows of each weight that fully_shard leaves to a process
SHARDED = ("seqft", "gorp")
INSTEAD = {
    "fsdp": "take it out, and give the Trainer a model that is sharded already (docs/scaling.md), or use forgetless run with sharding: fsdp2",
    "deepspeed": "its ZeRO optimizers flatten weights and gradients, and the optimizer here needs matrices; take it out, or use forgetless run with sharding: fsdp2",
}
# what may learn follows from the weights as the task began
FROM_WEIGHTS = ("osft", "sara")


def parts(method: Method) -> list[Method]:
    """The method, and those it goes beside."""
    return [method, *(method.inner() if isinstance(method, Beside) else ())]


def check_method(method: Method) -> None:
    """Raises ConfigError where the method cannot run in a foreign loop."""
    for part in parts(method):
        if part.kind == "routed":
            why = "leaves several models, one of which is chosen for each row by forgetless' own evaluation"
        elif _own(part, "train_data") or _own(part, "sampler"):
            why = "trains on rows beside the task's, and a foreign loop reads its own"
        elif _own(part, "extra_loss") and part.name not in OF_WEIGHTS:
            why = "reads the batches of every step beside the loss, which a foreign loop does not show"
        else:
            continue
        raise ConfigError(f"method {part.name}: {why}, so it runs in forgetless only: forgetless run, or fl.run")


def check_alone(method: Method) -> None:
    """Raises ConfigError where the optimizer without its callback would train something else than the method."""
    for part in parts(method):
        o = part.options
        if getattr(o, "use_lora", isinstance(o, LoraOptions)) or getattr(o, "form", None) == "adapter":
            why = "attaches adapters and merges them at the end"
        elif isinstance(part, After):
            why = "works at a task's end"
        else:
            continue
        raise ConfigError(
            f"method {part.name}: {why}, which the callback does: add callbacks=[fl.ContinualCallback(method, ...)] with the same method"
        )


def _own(method: Method, hook: str) -> bool:
    """Does its class have more to say at this hook than Method, or a method that goes beside another, as such?"""
    return getattr(type(method), hook) not in (getattr(Method, hook), getattr(Beside, hook))


def check_model(model: nn.Module, method: Method) -> None:
    """Raises ConfigError for weights that the method cannot train."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    by_hand = "train the adapter's own parameters by optimizers=(fl.SubspaceAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4), None)"
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ConfigError(
            f"method {method.name}: the model carries adapters of PEFT already, and the method trains the weights below them or attaches its own; give it the plain "
            f"model (without get_peft_model and peft_config, or after merge_and_unload), or {by_hand}"
        )
    if getattr(model, "is_quantized", False) or any(not p.is_floating_point() for p in model.parameters()):
        raise ConfigError(
            f"method {method.name}: the model's weights are quantised, and what is learned could not be added to them; load the whole model "
            f"(forgetless run has quantize: 4bit for its frozen layers while a task trains), or put PEFT adapters on it and {by_hand}"
        )
    if any(is_sharded(p) for p in model.parameters()):
        check_sharded(method)


def check_sharded(method: Method) -> None:
    """Raises ConfigError for a method that does more to the weights of a sharded model than train them: between tasks too it has rows of them only."""
    for part in parts(method):
        o = part.options
        if part.name not in SHARDED or getattr(o, "use_lora", False) or getattr(o, "state", "adam") not in ("adam", "galore"):
            raise ConfigError(
                f"method {part.name}: the model's weights are spread over processes (fully_shard), and the method reads whole ones; take "
                f"{' or '.join(SHARDED)} without adapters, or forgetless run with sharding: fsdp2, which has them whole between tasks"
            )


def check_arguments(args: Any) -> None:
    """Raises ConfigError for what TrainingArguments ask of a Trainer that the method's hooks do not go along with."""
    check_launcher()
    for name in ("fsdp", "deepspeed", "torch_compile", "auto_find_batch_size"):
        if getattr(args, name, None):
            raise ConfigError(
                f"TrainingArguments.{name}: forgetless does not train under it in a foreign Trainer; {INSTEAD.get(name, 'take it out')}"
            )
    if args.n_gpu > 1:
        raise ConfigError(f"{args.n_gpu} GPUs are visible and only one process runs: set CUDA_VISIBLE_DEVICES=0, or launch one process for each")


# -- state -------------------------------------------------------------------------------------------------------------------------------


def recall(state: str | Path | Memory | None) -> Memory:
    """The memory that `state` names: the folder of a run (its current task's), of a task in it, or a bare state folder; a Memory, which is copied. None: an empty one."""
    if state is None:
        return Memory()
    if isinstance(state, Memory):
        return Memory(dict(state.tensors), copy.deepcopy(state.info))
    folder = Path(state)
    if current := read(folder / "current").strip():
        folder = folder / "tasks" / current
    return load_memory(folder / "state" if (folder / "state").is_dir() else folder)


def check_memory(memory: Memory, method: Method, model: nn.Module, state: Any) -> None:
    """Raises ConfigError where the method would find nothing of what it protects in `memory`, read from `state`, or spaces of another model."""
    wanted = method.spaced(model) or {}
    if state is None or not wanted:
        return
    held = {key.removesuffix(".basis").partition("@")[0]: len(V) for key, V in memory.tensors.items() if key.endswith(".basis")}
    where = "state" if isinstance(state, Memory) else f"state {state}"
    if not any(name in held for name in wanted):
        found = f"of other layers ({', '.join(list(held)[:2])})" if held else "of no layer"
        raise ConfigError(f"{where}: holds protected spaces {found}, and method {method.name} would protect nothing; is it of this model and method?")
    for name, size in wanted.items():
        if held.get(name, size) != size:
            raise ConfigError(f"{where}: the space of {name} has {held[name]} dimensions, and the layer here {size}; it is of another model")


def give_back(method: Method, state: dict[str, Tensor]) -> None:
    """What state_dict() gave, to a method that has begun its task already."""
    if isinstance(method, Beside):
        give_back(method.on, {key.removeprefix("on/"): value for key, value in state.items() if key.startswith("on/")})
    method.load_state_dict({key: value for key, value in state.items() if not key.startswith("on/")})


# -- while it trains ---------------------------------------------------------------------------------------------------------------------


def add_penalty(method: Method, model: nn.Module) -> Tensor | None:
    """Add the gradient of the method's penalty to those that the loop has made: once a step, as large as it is in our own Trainer over all micro-batches. Returns it."""
    with torch.enable_grad():
        penalty = method.extra_loss(model, {}, None)
        if penalty is None:
            return None
        learning = [p for p in model.parameters() if p.requires_grad]
        for p, g in zip(learning, torch.autograd.grad(penalty, learning, allow_unused=True), strict=True):
            if g is not None:
                p.grad = g if p.grad is None else p.grad.add_(g)
    return penalty.detach()


@contextlib.contextmanager
def plainly(model: nn.Module) -> Iterator[None]:
    """While open, the model is read without the autocast that Accelerate has put round its forward: a method's measurements for the next task ask for it themselves, or not."""
    original, wrapper = model.__dict__.get("_original_forward"), model.__dict__.get("forward")
    if original is not None and wrapper is not None:
        model.forward = original
    try:
        yield
    finally:
        if original is not None and wrapper is not None:
            model.forward = wrapper


class Given(Task):
    """The task of a foreign loop: its name, and its training rows as the loop's own data loader reads them, for methods that measure some at the task's end."""

    loader: torch.utils.data.DataLoader | None = None  # the loop's, once it is known
    model: nn.Module | None = None

    def __init__(self, name: str):
        super().__init__(name, "{sentence}", [], [], [], sha256="-")

    @property
    def train(self) -> list[Example]:
        """One for each row of the loader's dataset; `encode` reads it."""
        if self.loader is None:
            raise ConfigError(
                f"task '{self.name}': the method reads rows of the task where the training loop has given none; "
                "give the callback task= a forgetless Task, or begin(..., loader=) the loop's data loader"
            )
        try:
            return [Example(str(i), "", i) for i in range(len(self.loader.dataset))]
        except TypeError:
            raise ConfigError(
                f"task '{self.name}': the method reads rows of the task, and an IterableDataset gives none by number; give the callback task= a forgetless Task"
            ) from None

    @train.setter
    def train(self, rows: list[Example]) -> None: ...

    def encode(self, tokenizer: Any, example: Example) -> dict[str, list[int]]:
        """A row as our own Trainer has it; of several packed into one, one."""
        batch = self.loader.collate_fn([self.loader.dataset[example.row]])
        rows = encoded_rows(batch, is_seq2seq(self.model))
        return rows[example.row % len(rows)]


def encoded_rows(batch: dict[str, Tensor], seq2seq: bool) -> list[dict[str, list[int]]]:
    """{"input_ids", "labels"} of each row of a collated batch of one: without padding, a packed one cut where its positions begin again.

    >>> batch = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "position_ids": torch.tensor([[0, 1, 0, 1]]), "labels": torch.tensor([[5, 6, -100, 8]])}
    >>> encoded_rows(batch, seq2seq=False)
    [{'input_ids': [5, 6], 'labels': [-100, 6]}, {'input_ids': [7, 8], 'labels': [-100, 8]}]
    """
    ids, mask, positions = batch["input_ids"][0], batch.get("attention_mask"), batch.get("position_ids")
    if seq2seq:
        answer = [t for t in batch["labels"][0].tolist() if t != IGNORED]
        prompt = (ids if mask is None else ids[mask[0].bool()]).tolist()
        return [{"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}]
    labels = batch["labels"][0] if "labels" in batch else ids
    if mask is not None and mask.shape == batch["input_ids"].shape:
        real = mask[0].bool()
        ids, labels, positions = ids[real], labels[real], None
    cuts = [0] if positions is None else [0, *(i for i in range(1, len(ids)) if int(positions[0, i]) == 0)]
    return [
        {"input_ids": ids[a:b].tolist(), "labels": [IGNORED, *labels[a + 1 : b].tolist()]}  # nothing foretells a first token
        for a, b in zip(cuts, [*cuts[1:], len(ids)], strict=True)
    ]
