"""One of several processes (torchrun) or the only one: trains two tasks in fp64 with each of several methods and saves what came of it. For test_distributed.py.

torchrun --nproc_per_node 2 tests/ddp_child.py MODEL TASKS.json OUT METHODS.json BATCH
"""

import gc
import json
import sys
from functools import partial
from hashlib import sha256
from pathlib import Path

import peft  # noqa: F401
import torch
import transformers.trainer  # noqa: F401

from forgetless import distributed, models, trainer
from forgetless.config import TaskConfig
from forgetless.methods import get
from forgetless.methods.base import Memory
from forgetless.progress import Progress
from forgetless.tasks import TaskStream, load_task
from forgetless.trainer import train_task, training_arguments

BUCKETS: set[bool] = set()  # whether gradients lived in them, where a model was made one of several processes'
made = torch.nn.parallel.DistributedDataParallel.__init__


def noted(model, *given, **settings) -> None:
    BUCKETS.add(settings.get("gradient_as_bucket_view", False))
    made(model, *given, **settings)


torch.nn.parallel.DistributedDataParallel.__init__ = noted
gc.freeze()  # as in conftest.py: or two thirds of the time go into looking through the imports for garbage


def main(model_folder: str, tasks: str, out: str, methods: str, batch: str) -> None:
    trainer.eager_pays = lambda *_: False  # eager attention takes its softmax in fp32, in which fp64's mask of a padded row makes NaN
    train = {
        "learning_rate": 1e-3, "max_steps": 8, "per_device_train_batch_size": int(batch), "gradient_accumulation_steps": 2, "weight_decay": 0.1,
        "bf16": False, "use_cpu": True, "adam_epsilon": 1e-6,  # at 1e-8 the division makes 1e-7 of a rounding of 1e-17 where there is next to no gradient
    }  # fmt: skip
    training_arguments(train, 0, out)  # the process group, where there is one
    stream, load = TaskStream([load_task(TaskConfig(**entry)) for entry in json.loads(tasks)]), partial(models.load, dtype=torch.float64)
    results = {}
    for name, options in json.loads(Path(methods).read_text()).items():
        (model, tokenizer), method, memory, losses = load(model_folder), get(**options), Memory(), []
        method.tokenizer, method.stream, method.load = tokenizer, stream, load
        method.untouched, method.committed = lambda: load(model_folder)[0], lambda task: Path(model_folder)
        for i, task in enumerate(stream):
            torch.manual_seed(i)
            model = method.begin_task(model, task, memory)
            rows = method.train_data(task, memory)
            trained = train_task(model, tokenizer, task, method, rows, method.settings(train, i), i, Progress())
            losses += [s["loss"] for s in trained.steps]
            model = method.end_task(model, task, memory)
        found = {**model.state_dict(), **memory.tensors, "losses": torch.tensor(losses, dtype=torch.float64)}
        results[name] = {"tensors": found, "info": memory.info, "apart": distributed.differ(digest(found, memory.info)), "buckets": sorted(BUCKETS)}
        BUCKETS.clear()
    if distributed.is_main():
        torch.save(results, out)
    distributed.barrier()
    distributed.leave_at_exit()


def digest(tensors: dict[str, torch.Tensor], info: dict) -> str:
    """Of all that a process ends with, to the bit."""
    parts = [key.encode() + t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for key, t in sorted(tensors.items())]
    return sha256(b"".join(parts) + json.dumps(info, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    main(*sys.argv[1:])
