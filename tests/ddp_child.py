"""One of several processes (torchrun) or the only one: trains two tasks in fp64 with each of several methods and saves what came of it. For test_distributed.py.

torchrun --nproc_per_node 2 tests/ddp_child.py MODEL TASKS.json OUT METHODS.json BATCH
"""

import gc
import json
import sys

import peft  # noqa: F401
import torch
import transformers.trainer  # noqa: F401

from forgetless import distributed, models
from forgetless.config import TaskConfig
from forgetless.methods import get
from forgetless.methods.base import Memory
from forgetless.progress import Progress
from forgetless.tasks import load_task
from forgetless.trainer import train_task, training_arguments

gc.freeze()  # as in conftest.py: or two thirds of the time go into looking through the imports for garbage


def main(model_folder: str, tasks: str, out: str, methods: str, batch: str) -> None:
    train = {
        "learning_rate": 1e-3, "max_steps": 12, "per_device_train_batch_size": int(batch), "gradient_accumulation_steps": 2, "weight_decay": 0.1,
        "bf16": False, "use_cpu": True,
    }  # fmt: skip
    training_arguments(train, 0, out)  # the process group, where there is one
    results = {}
    for name, options in json.loads(methods).items():
        model, tokenizer = models.load(model_folder, dtype=torch.float64)
        method, memory, losses = get(**options), Memory(), []
        for i, entry in enumerate(json.loads(tasks)):
            torch.manual_seed(i)
            method.tokenizer, task = tokenizer, load_task(TaskConfig(**entry))
            model = method.begin_task(model, task, memory)
            trained = train_task(model, tokenizer, task, method, method.train_data(task, memory), train, i, Progress())
            losses += [s["loss"] for s in trained.steps]
            model = method.end_task(model, task, memory)
        results[name] = {**model.state_dict(), **memory.tensors, "losses": torch.tensor(losses, dtype=torch.float64)}
    if distributed.is_main():
        torch.save(results, out)
    distributed.barrier()
    distributed.leave_at_exit()


if __name__ == "__main__":
    main(*sys.argv[1:])
