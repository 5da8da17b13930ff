"""The thin layer on transformers' Trainer: our optimizer, the answer-only loss, the method's hooks, progress, and a stop at the first loss that is no number.

A fresh Trainer a task: optimizer, schedule and data order begin anew, as every task of a stream does. A task goes on from its last checkpoint where there is one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed, native, shared_model
from .batches import IGNORED, Collate, Encoded, answer_loss
from .checkpoint import Checkpoints
from .errors import ConfigError, Diverged, nearest
from .methods.base import Method
from .optim import SubspaceAdamW, coordinates
from .probes import Probe
from .progress import Progress
from .quantised import quantised
from .sharding import is_sharded, local
from .tasks import Task
from .tracking import Tracker

# gentle defaults for one task of a stream; anything in `train:` overrides them
DEFAULTS = {
    "learning_rate": 1e-4, "num_train_epochs": 1, "per_device_train_batch_size": 8, "max_grad_norm": 1.0, "weight_decay": 0.0,
    "lr_scheduler_type": "constant", "logging_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False, "ddp_find_unused_parameters": False,
    "ddp_broadcast_buffers": False,  # rotary frequencies and OSFT's bases: the same in every process, and DDP sends them once
}  # fmt: skip


def training_arguments(train: dict[str, Any], seed: int, output_dir: str, save_steps: int | None = None):
    """TrainingArguments from the config's `train` section, with checkpoints every `save_steps`. Raises ConfigError for an unknown name or a refused value."""
    from transformers import TrainingArguments

    known = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    for key in train:
        if key not in known:
            raise ConfigError(f"train.{key}: TrainingArguments has no such name{nearest(key, known)[:300]}")
    values = DEFAULTS | train
    if "bf16" not in train:
        values["bf16"] = bf16_pays(bool(values.get("use_cpu")))
    own = dict(
        output_dir=output_dir,
        seed=seed,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 500,
        eval_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        use_cpu=values.pop("use_cpu", not torch.cuda.is_available()),
    )
    check_launcher()
    try:
        args = TrainingArguments(**values, **own)
        # accelerate launch may say bf16 or fp16 in the environment, where neither run.yaml nor the scorer would know of it
        args.mixed_precision = "bf16" if args.bf16 else "no"
        _try_schedule(args)
        if args.n_gpu > 1:
            raise ConfigError(f"{args.n_gpu} GPUs are visible and only one process runs: set CUDA_VISIBLE_DEVICES=0")
        return args
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise ConfigError(f"train: TrainingArguments refused it: {' '.join(str(error).split())[:300]}") from None


def check_launcher() -> None:
    """Raises ConfigError where accelerate's configuration asks for what forgetless does not train under."""
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get(name, "no").lower() not in ("no", "false", "0", ""):
            raise ConfigError(
                f"accelerate's configuration sets {name}={os.environ[name]}, which forgetless does not train under; launch without it "
                "(forgetless run: several processes share a model by sharding: fsdp2)"
            )


def _try_schedule(args) -> None:
    """Make the schedule once for nothing, so that what it lacks shows before training. Raises ConfigError for options that `constant` would not read."""
    from transformers import get_scheduler

    for key in ("warmup_steps", "lr_scheduler_kwargs"):
        if args.lr_scheduler_type == "constant" and getattr(args, key):
            raise ConfigError(f"train.{key}: lr_scheduler_type 'constant' does not read it; take it out or choose another, e.g. constant_with_warmup")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(100), 100, args.lr_scheduler_kwargs)


def bf16_pays(use_cpu: bool = False) -> bool:
    """bf16 autocast where the hardware has the instructions (on a CPU with AVX512-BF16 a training step takes about half as long)."""
    if torch.cuda.is_available() and not use_cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)  # before compute capability 8.0 it is emulated, slower than fp32
    return "avx512_bf16" in _cpu_flags() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _cpu_flags() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            return next((line for line in f if line.startswith("flags")), "")
    except OSError:
        return ""


@dataclasses.dataclass
class TrainResult:
    """What the loop wants to know of a task's training."""

    optimizer: torch.optim.Optimizer
    start: dict[Tensor, Tensor]  # each constrained weight as it was
    steps: list[dict[str, Any]]  # loss, learning_rate, update_leak a step; captured and captured_of_best where directions were chosen
    autocast: bool
    whole: contextlib.ExitStack  # to be closed when the optimizer has gone: quantised weights come back

    def state_bytes(self) -> int:
        """Bytes of the optimizer's tensors, each storage once, with the bases of its constraints where it has some."""
        if isinstance(self.optimizer, SubspaceAdamW):
            return self.optimizer.state_bytes()
        tensors = [t for state in self.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def train_task(
    model: nn.Module, tokenizer, task: Task, method: Method, rows: list, train: dict[str, Any], seed: int, progress: Progress,
    checkpoints: Checkpoints | None = None, precision: str = "fp32_master", packing: bool = False, quantize: str | None = None, optimizer_state: str = "fp32",
    probe: Probe | None = None, tracker: Tracker | None = None, sharding: str | None = None,
) -> TrainResult:  # fmt: skip
    """Train `model` in place on `rows`, from the checkpoint where there is one. Raises Diverged, naming task and step, when the loss stops being finite.

    probe: looks at the model before the first step and after each, and may end the task early. tracker: is told of each step. sharding: the
    processes share the model while it trains (shared_model.py).
    """
    with contextlib.ExitStack() as stack:
        whole = stack.enter_context(contextlib.ExitStack())
        every = checkpoints.every if checkpoints else None
        scratch = str(checkpoints.folder) if every else stack.enter_context(tempfile.TemporaryDirectory(prefix="forgetless-"))
        args = training_arguments(train, seed, scratch, every)
        given, shared = model, None
        if sharding and distributed.world_size() > 1:
            shared = shared_model.Shared(model, args.device.type)
            model = shared.model
        optimizer = prepare(model, method, args, seed, precision, optimizer_state)
        if quantize:
            whole.callback(unfreeze, model)
            aside = checkpoints.folder if checkpoints else whole.enter_context(tempfile.TemporaryDirectory(prefix="forgetless-"))
            whole.enter_context(quantised(model, quantize, Path(aside)))
        start = {p: p.detach().clone() for group in optimizer.param_groups if coordinates.protects(group) for p in group["params"]}
        data = Encoded(task, tokenizer, rows)
        order = method.sampler(rows, args.seed)
        an_epoch = len(data if order is None else order)  # a method's own order may be longer than the rows, or shorter
        if args.dataloader_drop_last and an_epoch < (batch := args.per_device_train_batch_size * args.world_size):
            raise ConfigError(f"task '{task.name}': {an_epoch} rows make no whole batch of {batch}, and train.dataloader_drop_last drops the rest")
        attention, use_cache = model.config._attn_implementation, getattr(model.config, "use_cache", None)
        longest = max(len(data[i]["input_ids"]) for i in range(0, len(data), max(1, len(data) // 50)))
        if args.use_cpu and eager_pays(longest, args.per_device_train_batch_size, packing):
            model.set_attn_implementation("eager")
        log = checkpoints.log if checkpoints else []
        trainer = make_trainer(model, task, method, data, Collate(model, packing), args, optimizer, log, progress, checkpoints, probe, tracker)
        progress.stage(f"{task.name}: training", args.max_steps if args.max_steps > 0 else _steps(an_epoch, args))
        try:
            if checkpoints and checkpoints.trained:  # the Trainer would take a step more
                trainer._load_from_checkpoint(str(checkpoints.path))
                optimizer.load_state_dict(torch.load(checkpoints.path / "optimizer.pt", weights_only=True, map_location="cpu"))
            else:
                trainer.train(resume_from_checkpoint=str(checkpoints.path) if checkpoints and checkpoints.path else None)
        finally:
            model.set_attn_implementation(attention)
            if use_cache is not None:
                model.config.use_cache = use_cache  # the Trainer sets it to False, and the commit would say so
            model.disable_input_require_grads()  # gradient checkpointing leaves a hook a task on the embedding
            # Accelerate leaves its autocast wrapper round model.forward, which would pile up task by task, and a mark that it is there, by which the next task
            # would be trained without one
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            model.__dict__.pop("_is_accelerate_prepared", None)
        if not finite(optimizer):  # the last update came after the last loss
            raise Diverged(
                f"task '{task.name}', step {len(log)}: the weights are no longer finite. The last committed task is kept. {advice(args.learning_rate)}"
            )
        if shared:
            shared.give_back()
        unfreeze(given)
        return TrainResult(optimizer, start, log, bool(args.bf16), whole.pop_all())


def finite(optimizer: torch.optim.Optimizer) -> bool:
    """Is every number of what it trains one?"""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    own = all(bool(torch.isfinite(local(p.detach())).all()) for p in params)
    return all(distributed.gathered([own])) if any(map(is_sharded, params)) else own


def unfreeze(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None
        p.requires_grad_(True)


def prepare(model: nn.Module, method: Method, args, seed: int, precision: str, optimizer_state: str = "fp32") -> torch.optim.Optimizer:
    """The optimizer over the method's groups; everything else is frozen."""
    groups = learning_groups(model, method)
    method.micro_batches = args.gradient_accumulation_steps
    optimizer = make_optimizer(method, groups, **settings_of(args), precision=precision, optimizer_state=optimizer_state, seed=seed)
    if isinstance(optimizer, SubspaceAdamW):
        args.max_grad_norm = 0.0  # the Trainer clips before the projection; this optimizer does after it
    return optimizer


def learning_groups(model: nn.Module, method: Method) -> list[dict[str, Any]]:
    """The method's groups; everything else is frozen. Raises ConfigError where they are empty."""
    groups = method.param_groups(model)
    trained = {p for group in groups for p in group["params"]}
    if not trained:
        raise ConfigError(f"method {method.name}: nothing to train")
    for p in model.parameters():
        p.requires_grad_(p in trained)
    return groups


def settings_of(args) -> dict[str, Any]:
    """What TrainingArguments say to an optimizer."""
    return {
        "lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon, "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
    }  # fmt: skip


def make_optimizer(method: Method, groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """The method's optimizer. settings: as Method.optimizer has them."""
    optimizer = method.optimizer(groups, **settings)
    check_state(optimizer, settings["optimizer_state"], method)
    if hasattr(method, "max_grad_norm"):
        method.max_grad_norm = settings["max_grad_norm"]
    if isinstance(optimizer, SubspaceAdamW):
        native.library()  # what cannot be compiled is said before the first step
        optimizer.track_captured = True
    return optimizer


def check_state(optimizer: torch.optim.Optimizer, optimizer_state: str, method: Method) -> None:
    """Raises ConfigError where the optimizer would not know of `optimizer_state`."""
    if optimizer_state != "fp32" and not isinstance(optimizer, SubspaceAdamW):
        raise ConfigError(
            f"optimizer_state: {optimizer_state} is SubspaceAdamW's, and method {method.name} trains by {type(optimizer).__name__}; take it out"
        )


def make_trainer(
    model: nn.Module, task: Task, method: Method, data: Encoded, collate: Collate, args, optimizer: torch.optim.Optimizer, log: list[dict[str, Any]],
    progress: Progress, checkpoints: Checkpoints | None, probe: Probe | None = None, tracker: Tracker | None = None,
):  # fmt: skip
    """A Trainer that asks the method, logs every step into `log`, and stops at a loss that is no number."""
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from transformers.trainer_pt_utils import LengthGroupedSampler

    from .foreign import add_penalty

    begun = time.perf_counter() - (checkpoints.seconds if checkpoints else 0.0)
    sharded = any(is_sharded(p) for p in model.parameters())

    class Hooks(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            state.save_steps = args.save_steps  # a checkpoint brings the one it was made with
            if probe:
                probe.before(model, log)

        def on_pre_optimizer_step(self, args, state, control, **_):
            if sharded and (penalty := add_penalty(method, model)) is not None:
                trainer.micro_losses.append(float(penalty))
            method.on_step(model)
            self.rate = optimizer.param_groups[0]["lr"]  # at a step's end the schedule has moved on
            optimizer.track_leak = (state.global_step + 1) % 10 == 0 or state.global_step + 1 == state.max_steps

        def on_step_end(self, args, state, control, **_):
            losses, trainer.micro_losses = trainer.micro_losses, []
            loss = distributed.mean(sum(losses), args.device)  # each micro-batch carries its share of the step's answer tokens
            entry = {"step": state.global_step, "loss": loss, "learning_rate": self.rate, "update_leak": getattr(optimizer, "update_leak", None)}
            captured = {key: value for key in ("captured", "captured_of_best") if (value := getattr(optimizer, key, None)) is not None}
            log.append(entry | captured)
            if tracker:
                tracker.log_step(log[-1])
            progress.advance(state.global_step, f"loss {loss:.3f}")
            if probe and probe.after_step(model, log):
                control.should_training_stop = True

        def on_save(self, args, state, control, **_):
            trained = state.global_step >= state.max_steps or control.should_training_stop
            checkpoints.finish(state.global_step, trained, method.state_dict(), log, time.perf_counter() - begun)

    class ByLength(LengthGroupedSampler):
        def set_epoch(self, epoch):  # not from torch's global generator, which a resumed task finds elsewhere
            self.generator = torch.Generator().manual_seed(args.seed + epoch)

    class TaskTrainer(Trainer):
        micro_losses: list[float] = []

        def __init__(self, **given):
            super().__init__(**given)
            if (settings := self.accelerator.ddp_handler) is not None:
                settings.gradient_as_bucket_view = True  # gradients live where they are sent from, once

        def _get_train_sampler(self, *given):
            if (own := method.sampler(data.rows, args.seed)) is not None:
                return own
            sampler = super()._get_train_sampler(*given)
            return ByLength(sampler.batch_size, lengths=sampler.lengths) if isinstance(sampler, LengthGroupedSampler) else sampler

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = answer_loss(model, inputs, num_items_in_batch)
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                loss = loss * self.args.world_size  # the items are counted over all processes, and their gradients averaged
            if num_items_in_batch is not None:
                own, parts = (inputs["labels"] != IGNORED).sum(), self.current_gradient_accumulation_steps
                method.batch_share = (
                    float(own / num_items_in_batch) * parts * (self.args.world_size if self.args.average_tokens_across_devices else 1)
                )
            # a penalty on weights that are sharded is taken once a step, when they and their gradients are at rest
            extra = None if sharded else method.extra_loss(model, inputs, outputs)
            if extra is not None:
                loss = loss + (extra if num_items_in_batch is None else extra / self.current_gradient_accumulation_steps)
            return (loss, outputs) if return_outputs else loss

        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            value = float(loss)
            if not math.isfinite(value):
                raise Diverged(
                    f"task '{task.name}', step {self.state.global_step + 1}: the loss is {value}. The last committed task is kept. "
                    f"{advice(args.learning_rate)}"
                )
            self.micro_losses.append(value)
            return loss

    trainer = (shared_model.trainer_class(TaskTrainer) if sharded else TaskTrainer)(
        model=model,
        args=args,
        train_dataset=data,
        data_collator=collate,
        optimizers=(optimizer, None),
        callbacks=[Hooks()],
    )
    # no processing_class: the Trainer would write the tokenizer's pad token into the model's config, and a model reloaded with it trains another embedding
    trainer.remove_callback(PrinterCallback)
    trainer.model_accepts_loss_kwargs = True  # so that num_items_in_batch makes the loss right under accumulation
    return trainer


def eager_pays(tokens: int, rows: int, packing: bool) -> bool:
    """On a CPU torch 2.13's fused attention is slow backwards: a quarter of a step at 8 x 130 tokens. Beyond some length of a sequence its memory wins."""
    return tokens * (rows if packing else 1) <= 512


def advice(rate: float) -> str:
    return f"Lower train.learning_rate (now {rate:g}); a run that has committed a task needs a new output_dir for that"


def _steps(rows: int, args) -> int:
    batch = args.per_device_train_batch_size * args.world_size
    batches = rows // batch if args.dataloader_drop_last else math.ceil(rows / batch)
    return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))
