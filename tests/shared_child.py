"""ddp_child.py with a model that the processes share: torchrun --nproc_per_node 2 tests/shared_child.py MODEL TASKS.json OUT METHODS.json BATCH"""

import sys
from functools import partial

import ddp_child

from forgetless import shared_model


class Counted(shared_model.Shared):
    made = 0

    def __init__(self, *args):
        super().__init__(*args)
        Counted.made += 1


if __name__ == "__main__":  # and not where pytest looks for doctests in it
    shared_model.Shared = Counted
    ddp_child.train_task = partial(ddp_child.train_task, sharding="fsdp2")
    ddp_child.main(*sys.argv[1:])
    assert Counted.made, "no model was shared"
