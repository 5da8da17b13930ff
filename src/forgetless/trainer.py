"""The thin layer on transformers' Trainer: our optimizer, the answer-only loss, the method's hooks, progress, and a stop at the first loss that is no number.

A fresh Trainer a task: optimizer, schedule and data order begin anew, as every task of a stream does.
"""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError, Diverged, nearest
from .methods.base import Method
from .optim import SubspaceAdamW
from .progress import Progress
from .tasks import Task

# gentle defaults for one task of a stream; anything in `train:` overrides them
DEFAULTS = {
    "learning_rate": 1e-4, "num_train_epochs": 1, "per_device_train_batch_size": 8, "max_grad_norm": 1.0, "weight_decay": 0.0,
    "lr_scheduler_type": "constant", "logging_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False,
}  # fmt: skip


def training_arguments(train: dict[str, Any], seed: int, output_dir: str):
    """TrainingArguments from the config's `train` section. Raises ConfigError for an unknown name or a refused value."""
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
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        use_cpu=values.pop("use_cpu", not torch.cuda.is_available()),
    )
    try:
        args = TrainingArguments(**values, **own)
        if args.n_gpu > 1:
            raise ConfigError(f"{args.n_gpu} GPUs are visible and only one process runs: set CUDA_VISIBLE_DEVICES=0")
        return args
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"train: TrainingArguments refused it: {' '.join(str(error).split())[:300]}") from None


def bf16_pays(use_cpu: bool = False) -> bool:
    """bf16 autocast where the hardware has the instructions (on a CPU with AVX512-BF16 a training step takes about half as long)."""
    if torch.cuda.is_available() and not use_cpu:
        return torch.cuda.is_bf16_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and "avx512_bf16" in _cpu_flags()


def _cpu_flags() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next((line for line in f if line.startswith("flags")), "")
    except OSError:
        return ""


@dataclasses.dataclass
class TrainResult:
    """What the loop wants to know of a task's training."""

    optimizer: SubspaceAdamW
    start: dict[Tensor, Tensor]  # each constrained weight as it was
    steps: list[dict[str, Any]]  # loss, learning_rate, update_leak a step
    autocast: bool


def train_task(
    model: nn.Module, tokenizer, task: Task, method: Method, rows: list, train: dict[str, Any], seed: int, progress: Progress
) -> TrainResult:
    """Train `model` in place on `rows`. Raises Diverged, naming task and step, when the loss stops being finite."""
    from transformers import Trainer, TrainerCallback

    with tempfile.TemporaryDirectory(prefix="forgetless-") as scratch:
        args = training_arguments(train, seed, scratch)
        groups = method.param_groups(model)
        trained = {p for group in groups for p in group["params"]}
        if not trained:
            raise ConfigError(f"method {method.name}: nothing to train")
        for p in model.parameters():
            p.requires_grad_(p in trained)
        optimizer = SubspaceAdamW(groups, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon,
                                  weight_decay=args.weight_decay, max_grad_norm=args.max_grad_norm, seed=seed)  # fmt: skip
        if hasattr(method, "max_grad_norm"):
            method.max_grad_norm = args.max_grad_norm
        args.max_grad_norm = 0.0  # the Trainer clips before the projection; the optimizer does after it
        start = {
            p: p.detach().clone() for g in optimizer.param_groups if g["constraint"] is not None and not g["constraint"].empty for p in g["params"]
        }
        log: list[dict[str, Any]] = []
        attention = model.config._attn_implementation

        class Hooks(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **_):
                method.on_step(model)
                optimizer.track_leak = (state.global_step + 1) % 10 == 0 or state.global_step + 1 == state.max_steps

            def on_step_end(self, args, state, control, **_):
                losses, trainer.micro_losses = trainer.micro_losses, []
                loss = sum(losses)  # each micro-batch carries its share: of the step's answer tokens, or 1 / accumulation steps
                log.append(
                    {"step": state.global_step, "loss": loss, "learning_rate": optimizer.param_groups[0]["lr"], "update_leak": optimizer.update_leak}
                )
                progress.advance(state.global_step, f"loss {loss:.3f}")

        class TaskTrainer(Trainer):
            micro_losses: list[float] = []

            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                loss, outputs = answer_loss(model, inputs, num_items_in_batch)
                extra = method.extra_loss(model, inputs, outputs)
                loss = loss if extra is None else loss + extra
                return (loss, outputs) if return_outputs else loss

            def training_step(self, model, inputs, num_items_in_batch=None):
                loss = super().training_step(model, inputs, num_items_in_batch)
                value = float(loss)
                if not torch.isfinite(torch.tensor(value)):
                    raise Diverged(
                        f"task '{task.name}', step {self.state.global_step + 1}: the loss is {value}. The last committed task is kept. "
                        f"{advice(args.learning_rate)}"
                    )
                self.micro_losses.append(value)
                return loss

        data = Encoded(task, tokenizer, rows)
        if args.use_cpu and max(len(data[i]["input_ids"]) for i in range(0, len(data), max(1, len(data) // 50))) <= 512:
            # torch 2.13's fused attention is slow backwards on a CPU: a quarter of a step at 8 x 130 tokens. Beyond some length its memory would win
            model.set_attn_implementation("eager")
        trainer = TaskTrainer(
            model=model,
            args=args,
            train_dataset=data,
            data_collator=Collate(),
            optimizers=(optimizer, None),
            callbacks=[Hooks()],
            processing_class=tokenizer,
        )
        from transformers.trainer_callback import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        trainer.model_accepts_loss_kwargs = True  # so that num_items_in_batch makes the loss right under accumulation
        steps = args.max_steps if args.max_steps > 0 else _steps(len(data), args)
        progress.stage(f"{task.name}: training", steps)
        try:
            trainer.train()
        finally:
            model.set_attn_implementation(attention)
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # else each task would leave its autocast wrapper round model.forward
    if not all(bool(torch.isfinite(p).all()) for p in trained):  # the last update came after the last loss
        raise Diverged(
            f"task '{task.name}', step {len(log)}: the weights are no longer finite. The last committed task is kept. {advice(args.learning_rate)}"
        )
    for p in model.parameters():
        p.grad = None
        p.requires_grad_(True)
    return TrainResult(optimizer, start, log, bool(args.bf16))


def advice(rate: float) -> str:
    return f"Lower train.learning_rate (now {rate:g}); a run that has committed a task needs a new output_dir for that"


def answer_loss(model: nn.Module, inputs: dict[str, Tensor], num_items: Tensor | int | None = None) -> tuple[Tensor, Any]:
    """Mean cross-entropy of the answer tokens: sum over them / num_items (all answer tokens of the optimizer step), or / their own number.

    Rows are padded on the left, so answers end together and the head runs over the last few positions only.
    """
    labels = inputs["labels"]  # (B, L)
    answer = labels.shape[1] - int((labels != -100).any(0).nonzero()[0])  # from the first to the end: a conversation's answers have gaps
    keep = answer + 1  # position t predicts token t + 1
    outputs = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        position_ids=inputs["position_ids"],
        logits_to_keep=keep,
        use_cache=False,
    )
    logits, target = outputs.logits[:, -keep:-1].float(), labels[:, -answer:]
    loss = nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1), ignore_index=-100, reduction="sum")
    return loss / (num_items if num_items is not None else (labels != -100).sum()), outputs


class Encoded(torch.utils.data.Dataset):
    """Rows tokenised when they are asked for: 40 steps of 8 need not read 5,000."""

    def __init__(self, task: Task, tokenizer, rows: list):
        self.task, self.tokenizer, self.rows = task, tokenizer, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        return self.task.encode(self.tokenizer, self.rows[i])


class Collate:
    """Left-padded batches; padding is masked by position, never by id (pad may be eos)."""

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        length = max(len(r["input_ids"]) for r in rows)
        batch = {"input_ids": torch.zeros(len(rows), length, dtype=torch.long), "labels": torch.full((len(rows), length), -100)}
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for i, r in enumerate(rows):
            n = len(r["input_ids"])
            batch["input_ids"][i, -n:], batch["labels"][i, -n:], mask[i, -n:] = torch.tensor(r["input_ids"]), torch.tensor(r["labels"]), 1
        return batch | {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


def _steps(rows: int, args) -> int:
    import math

    batches = math.ceil(rows / args.per_device_train_batch_size)
    return math.ceil(batches / args.gradient_accumulation_steps) * math.ceil(args.num_train_epochs)
