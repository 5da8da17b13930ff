"""transformers' Trainer on a model that transformers has sharded as it loaded it, for test_sharding.py.

torchrun --nproc_per_node 2 tests/shared_trainer_child.py MODEL TASKS.json OUT BATCH         alone: the same on a plain model
"""

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import forgetless as fl
from forgetless import batches, models
from forgetless.config import TaskConfig
from forgetless.sharding import is_sharded, whole
from forgetless.tasks import load_task


def trained(model_folder: str, entry: dict, out: str, batch: int, method: Any, state: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """({weight: as trained}, memory) of one task in transformers' Trainer."""
    model, tokenizer = models.load(model_folder, dtype=torch.float64)
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        from transformers.distributed import DistributedConfig

        sharded = DistributedConfig(fsdp_size=processes)
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64, distributed_config=sharded)
        assert all(is_sharded(p) for p in model.parameters())
    task = load_task(TaskConfig(**entry))
    args = TrainingArguments(
        output_dir=out + ".trainer", per_device_train_batch_size=batch, max_steps=5, learning_rate=1e-3, weight_decay=0.1, adam_epsilon=1e-6, save_strategy="no",
        report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, remove_unused_columns=False, lr_scheduler_type="constant",
    )  # fmt: skip
    learning = fl.ContinualCallback(method, task=entry["name"], state=state)
    trainer = Trainer(
        model, args, train_dataset=batches.Encoded(task, tokenizer, task.train), data_collator=batches.Collate(model), callbacks=[learning],
        optimizer_cls_and_kwargs=fl.optimizer_cls_and_kwargs(method),
    )  # fmt: skip
    trainer.train()
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}, learning.memory


def main(model_folder: str, tasks: str, out: str, batch: str) -> None:
    found = {}
    for name, options in (("seqft", {}), ("gorp", {"energy": 0.5}), ("gorp", {"energy": 0.5, "rank": 3, "refresh": "svd", "refresh_gap": 2})):
        state = None
        for entry in json.loads(tasks):
            weights, state = trained(model_folder, entry, out, int(batch), fl.methods.get(name, **options), state)
            found |= {f"{name}{len(options)}/{entry['name']}/{key}": W for key, W in weights.items()}
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(found, out)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
