"""forgetless in a training loop that is somebody else's: transformers' Trainer and Seq2SeqTrainer, TRL's SFTTrainer, Lightning, Fabric, or a loop of your own.

    method = fl.methods.get("gorp")
    trainer = SFTTrainer(
        model, args, train_dataset=rows,
        optimizer_cls_and_kwargs=fl.optimizer_cls_and_kwargs(method, learning_rate=1e-4),
        callbacks=[fl.ContinualCallback(method, task="tickets", state="runs/first", save_to="states/tickets")],
    )
    trainer.train()

`state` says what is protected: a run's folder, a task's in it, or what an earlier callback has saved. The next Trainer trains the model as this one leaves it, with
state="states/tickets". The optimizer argument alone keeps off what `state` protects, and nothing comes to it. In a loop without callbacks the same by hand:

    learning = fl.ContinualCallback("gorp", task="tickets", state="runs/first", save_to="states/tickets")
    learning.begin(model)
    optimizer = learning.optimizer(learning_rate=1e-4)
    ...                                    # loss.backward(); optimizer.step(); optimizer.zero_grad()
    learning.end()
"""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from . import bits, distributed, foreign
from .errors import ConfigError, Diverged
from .files import sync, sync_tree
from .methods import get
from .methods.base import Memory, Method
from .optim import SubspaceAdamW
from .products import full_precision
from .sharding import is_sharded
from .state import save_memory
from .tasks import Task
from .trainer import check_launcher, finite, learning_groups, make_optimizer, settings_of

# the callback that has begun a task on a model: the model is all that a Trainer tells an optimizer's factory
_begun: weakref.WeakKeyDictionary[nn.Module, weakref.ref[ContinualCallback]] = weakref.WeakKeyDictionary()
SAVED = "forgetless.pt"  # in a Trainer's checkpoint: what the method collects inside a task
CLIP = "_forgetless_max_grad_norm"  # on TrainingArguments within a step: what their max_grad_norm was, also for who goes on with them after an error in it
DEFAULTS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "max_grad_norm": None, "seed": 0}  # where no TrainingArguments say


def optimizer_cls_and_kwargs(
    method: str | Method, *, state: str | Path | Memory | None = None, model: nn.Module | None = None, learning_rate: float | None = None,
    weight_decay: float | None = None, betas: tuple[float, float] | None = None, eps: float | None = None, max_grad_norm: float | None = None,
    precision: str = "fp32_master", optimizer_state: str = "fp32", seed: int | None = None, **options: Any,
) -> tuple[type, dict[str, Any]]:  # fmt: skip
    """What Trainer(optimizer_cls_and_kwargs=...) needs to train with the optimizer of a method, on the weights the method trains; all others are frozen.

    With a ContinualCallback of the same method in the Trainer, what is not given here is as its TrainingArguments say, and `state` is the callback's. Without one
    learning_rate must be given, the rest is as in SubspaceAdamW (no weight decay, no clipping but the Trainer's), and what is learned is not protected later.

    Args:
        method: a registry name with its `options`, or a Method. A method with an option of one of the names here must be given as a Method.
        state: what earlier tasks left: a run's folder, a task's in it, or a state folder.
        model (optional): what will be trained; what does not fit it is then said here, and the Trainer may train no other.
        precision, optimizer_state: as in SubspaceAdamW.

    Raises ConfigError for a method that cannot run in a foreign loop, a state or model that does not fit it; DataError for a state folder that cannot be read.
    """
    method = _method(method, options)
    foreign.check_method(method)
    memory = foreign.recall(state)
    if model is not None and _of(model) is None:
        foreign.check_model(model, method)
        method.check(model)
        foreign.check_memory(memory, method, model, state)
    given = {"learning_rate": learning_rate, "weight_decay": weight_decay, "betas": betas, "eps": eps, "max_grad_norm": max_grad_norm, "seed": seed}
    settings = {key: value for key, value in given.items() if value is not None}
    return Factory, {"method": method, "state": state, "of": model, **settings, "precision": precision, "optimizer_state": optimizer_state}


class Factory:
    """How a Trainer calls for an optimizer that wants the whole model, not lists of its parameters: Factory()(model, **kwargs)."""

    def __call__(self, model: nn.Module, *, method: Method, state: Any, of: nn.Module | None, **settings: Any) -> torch.optim.Optimizer:
        if of is not None and of is not model:
            raise ConfigError("optimizer_cls_and_kwargs: the Trainer trains another model than the one given as model=; take model= out")
        learning = _of(model)
        if learning is None:
            foreign.check_alone(method)
            check_launcher()
            learning = ContinualCallback(method, state=state)
            learning.alone = True
            learning.begin(model)
        elif type(learning.method) is not type(method) or learning.method.options != method.options:
            raise ConfigError(
                f"the optimizer is of method {method.name} and the callback of {learning.method.name}, or their options differ; make the method once, "
                f"method = fl.methods.get('{method.name}', ...), and give it to both"
            )
        elif state is not None and not _same(state, learning.state):
            raise ConfigError(f"the optimizer goes on from {_named(state)} and the callback from {_named(learning.state)}; give the callback's, once")
        return learning.optimizer(**settings)


class ContinualCallback(TrainerCallback):
    """One task of a method in a foreign Trainer: adapters and spaces before it, statistics while it trains, merging and what the next task must know after it.

    Args:
        method: a registry name with its `options`, or a Method.
        task: its name, or a forgetless Task, whose rows are then what methods measure at its end; else those of the Trainer's data loader.
        state: what earlier tasks left: a run's folder, a task's in it, a state folder, or the `memory` of an earlier callback. None: this is the first task.
        save_to: the state folder to write at the end, in the format of a run's tasks/NN-name/state. None: what is to be kept is in `memory` only.

    After the task the model is plain again, and `memory` is what the next one needs. update_leak: the largest ||forbidden part|| / ||update|| that was measured
    (every tenth step and the last), None where nothing was protected. A callback is for one task.

    Raises ConfigError for a method that cannot run in a foreign loop, a state that does not fit, a save_to that is there; DataError for a state that cannot be read;
    Diverged at the end where the weights are no longer finite: nothing is saved then.
    """

    def __init__(
        self,
        method: str | Method,
        *,
        task: str | Task = "task",
        state: str | Path | Memory | None = None,
        save_to: str | Path | None = None,
        **options: Any,
    ):
        self.method = _method(method, options)
        foreign.check_method(self.method)
        self.task = task if isinstance(task, Task) else foreign.Given(task)
        self.state, self.memory = state, foreign.recall(state)
        self.save_to = None if save_to is None else Path(save_to)
        if self.save_to is not None and (self.save_to.is_file() or self.save_to.is_dir() and any(self.save_to.iterdir())):
            raise ConfigError(f"save_to {self.save_to}: is there already, and what a task has left is never overwritten; choose another folder")
        self.model: nn.Module | None = None
        self.trained: torch.optim.Optimizer | None = None
        self.alone = self.ended = False
        self.arguments: Any = None  # TrainingArguments, where there are any
        self.update_leak: float | None = None
        self.steps, self.last = 0, -1

    # -- by hand -------------------------------------------------------------------------------------------------------------------------

    def begin(self, model: nn.Module, tokenizer: Any = None, loader: torch.utils.data.DataLoader | None = None) -> nn.Module:
        """Begin the task on `model`, in place, and freeze what does not learn. loader: of the task's rows, for methods that measure some."""
        if self.model is not None:
            raise ConfigError(f"task '{self.task.name}': has begun already; a ContinualCallback is for one task, make another for the next")
        if _of(model) is not None:
            raise ConfigError(
                f"task '{self.task.name}': another task has begun on this model and has not ended; load the model anew, or call its end()"
            )
        foreign.check_model(model, self.method)
        if tokenizer is None and not isinstance(self.task, foreign.Given):
            raise ConfigError(f"task '{self.task.name}': its rows are text, so give begin(model, tokenizer), or the Trainer its processing_class")
        self.method.tokenizer = tokenizer
        self.method.check(model)
        foreign.check_memory(self.memory, self.method, model, self.state)
        if isinstance(self.task, foreign.Given):
            self.task.loader, self.task.model = loader, model
        self.required = [(p, p.requires_grad) for p in model.parameters()]
        with full_precision():
            begun = self.method.begin_task(model, self.task, self.memory)
        self._same_model(begun, model)
        self.groups = learning_groups(model, self.method)
        self.model = model
        if not self.alone:
            _begun[model] = weakref.ref(self)
        return model

    def optimizer(self, learning_rate: float | None = None, *, micro_batches: int | None = None, **settings: Any) -> torch.optim.Optimizer:
        """The optimizer of the task that has begun. settings: betas, eps, weight_decay, max_grad_norm, precision, optimizer_state, seed, as in SubspaceAdamW.

        micro_batches: how many backward passes make a step, where a method is to read gradients within them and let them go (its release_gradients).
        """
        if self.model is None:
            raise ConfigError(f"task '{self.task.name}': call begin(model) before optimizer()")
        a, method = self.arguments, self.method
        said = DEFAULTS if a is None else settings_of(a) | {"seed": a.seed}
        settings = {"precision": "fp32_master", "optimizer_state": "fp32"} | said | settings
        if learning_rate is not None:
            settings["lr"] = learning_rate
        if "lr" not in settings:
            raise ConfigError("optimizer_cls_and_kwargs: give learning_rate; the Trainer's own reaches the optimizer with a ContinualCallback only")
        if settings["optimizer_state"] == "8bit":
            bits.check("optimizer_state", next(self.model.parameters()).device)
        if micro_batches is None and a is not None and not a.fp16:  # fp16's scale would stay in what is read within backward
            micro_batches = a.gradient_accumulation_steps
        method.micro_batches = micro_batches or 1
        method.whole_gradients = method.whole_gradients or micro_batches is None
        optimizer = self.trained = make_optimizer(method, self.groups, **settings)
        self.hooks = [optimizer.register_step_post_hook(self._measure)]
        if not (self.alone and method.name in foreign.COLLECTS):
            self.hooks.append(optimizer.register_step_pre_hook(self._before_step))
        if self.alone and method.innermost().name in foreign.FROM_WEIGHTS:
            optimizer.register_load_state_dict_pre_hook(_refuse_resume)
        return optimizer

    def end(self) -> Memory:
        """Consolidate: merge, extend the spaces, write `save_to`. Returns what the next task needs."""
        if self.trained is None or self.ended:
            raise ConfigError(f"task '{self.task.name}': " + ("has ended already" if self.ended else "end() comes after begin() and optimizer()"))
        if not finite(self.trained):
            raise Diverged(f"task '{self.task.name}', step {self.steps}: the weights are no longer finite; nothing is saved. Lower the learning rate")
        for hook in self.hooks:
            hook.remove()
        with full_precision(), foreign.plainly(self.model):
            self._same_model(self.method.end_task(self.model, self.task, self.memory), self.model)
        for p, required in self.required:
            p.grad = None
            p.requires_grad_(required)
        del _begun[self.model]
        self.ended, self.trained, self.groups = True, None, []
        if self.save_to is not None:
            distributed.on_main(self._save)
        return self.memory

    def _same_model(self, model: nn.Module, given: nn.Module) -> None:
        if model is not given:
            raise ConfigError(f"method {self.method.name}: trains another model object than the loop's; it runs in forgetless only")

    def _save(self) -> None:
        """Beside first, then under its name: a state folder is whole or not there."""
        work = self.save_to.with_name(f".{self.save_to.name}.tmp")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        save_memory(work, self.memory, {})
        said = {"method": self.method.name, "options": self.method.options.model_dump(), "task": self.task.name, "steps": self.steps}
        said |= {"update_leak": self.update_leak, "space": self.method.report(self.memory)}
        (work / "training.json").write_text(json.dumps(said, indent=1, sort_keys=True), encoding="utf-8")
        sync_tree(work)
        if self.save_to.is_dir():
            self.save_to.rmdir()
        work.rename(self.save_to)
        sync(self.save_to.parent)

    # -- a step --------------------------------------------------------------------------------------------------------------------------

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """The method's on_step, when the gradients are there: now, or after the closure that makes them (Lightning's)."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._on_step(optimizer)
            return None

        def with_gradients() -> Any:
            loss = closure()
            self._on_step(optimizer)
            return loss

        return args[:1], {"closure": with_gradients}

    def _on_step(self, optimizer: torch.optim.Optimizer) -> None:
        foreign.add_penalty(self.method, self.model)
        self.method.on_step(self.model)
        self.steps += 1
        optimizer.track_leak = self.steps % 10 == 0 or self.steps == self.last

    def _measure(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        leak = getattr(optimizer, "update_leak", None)
        if leak is not None:
            self.update_leak = max(leak, self.update_leak or 0.0)

    # -- by a Trainer --------------------------------------------------------------------------------------------------------------------

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module, processing_class: Any = None, **_: Any) -> None:
        foreign.check_arguments(args)
        # `accelerate launch --mixed_precision` asks for it past the arguments, and the Trainer has its Accelerator by now
        self.arguments, self.method.autocast = args, bool(args.bf16) or AcceleratorState().mixed_precision == "bf16"
        args.max_grad_norm = args.__dict__.pop(CLIP, args.max_grad_norm)
        # what the method draws is the same whatever was drawn before, and the Trainer's data come in the order they would without it
        set_seed(args.seed)
        self.begin(model, getattr(processing_class, "tokenizer", processing_class))
        set_seed(args.seed)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any, train_dataloader: Any = None, **_: Any) -> None:
        where = f"task '{self.task.name}'"
        if self.ended:
            raise ConfigError(f"{where}: has ended; train the next task with a Trainer and a ContinualCallback of its own")
        if self.model is not model:
            raise ConfigError(f"{where}: the callback must be among callbacks= when the Trainer is made, and the Trainer must train that model")
        if self.trained is None or getattr(optimizer, "optimizer", optimizer) is not self.trained:
            raise ConfigError(
                f"{where}: the Trainer trains by an optimizer of its own; give it optimizer_cls_and_kwargs=fl.optimizer_cls_and_kwargs(method)"
            )
        if args.save_strategy != "no" and any(is_sharded(p) for p in model.parameters()):
            raise ConfigError(
                f"{where}: TrainingArguments.save_strategy: the Trainer would write one process' rows of a sharded model's optimizer; set save_strategy='no', or "
                "save by torch.distributed.checkpoint in a loop of your own"
            )
        if isinstance(self.task, foreign.Given):
            self.task.loader = train_dataloader
        self.last = state.max_steps
        if state.global_step:
            self._resume(Path(args.output_dir) / f"checkpoint-{state.global_step}" / SAVED, state.global_step)

    def _resume(self, file: Path, step: int) -> None:
        if not file.is_file():
            raise ConfigError(f"task '{self.task.name}': goes on from step {step}, and {file} is not there; train it from its beginning")
        saved: dict[str, Tensor] = torch.load(file, weights_only=True, map_location="cpu")
        foreign.give_back(self.method, saved)
        self.steps = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if isinstance(self.trained, SubspaceAdamW):  # the Trainer clips before the projection; this optimizer does after it
            args.__dict__[CLIP], args.max_grad_norm = args.max_grad_norm, 0.0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        args.max_grad_norm = args.__dict__.pop(CLIP, args.max_grad_norm)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if distributed.is_main() and not self.ended:
            torch.save(self.method.state_dict(), Path(args.output_dir) / f"checkpoint-{state.global_step}" / SAVED)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.end()


def _of(model: nn.Module) -> ContinualCallback | None:
    found = _begun.get(model)
    return None if found is None else found()


def _method(method: str | Method, options: dict[str, Any]) -> Method:
    if isinstance(method, str):
        return get(method, **options)
    if options:
        raise ConfigError(f"method {method.name}: is made already, and {', '.join(options)} would be options of it; give them to fl.methods.get")
    return method


def _named(state: Any) -> str:
    return "no state" if state is None else "a Memory" if isinstance(state, Memory) else f"state {state}"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Memory) or isinstance(other, Memory) or other is None:
        return one is other
    return Path(one).resolve() == Path(other).resolve()


def _refuse_resume(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    if any("step" in values for values in state["state"].values()):
        raise ConfigError(
            "what may learn follows from the weights as the task began, which a resumed Trainer no longer has; add the ContinualCallback"
        )
