"""A model that several processes share while a task trains (`sharding: fsdp2`): torch's fully_shard over its blocks, whole again between tasks.

While a task trains each process holds its rows of every weight, of the gradients and of the optimizer's state; a block's weights are whole only while it computes. Before
and after (decompositions, merging, scoring, the commit) each process holds the whole model, as without sharding: a rank needs room for the weights once, and for nothing
else that is as large. Checkpoints hold whole tensors, gathered one after another, so that a task goes on in any number of processes.

Not by Accelerate's FSDP plugin, which wants an accelerator and is passed over on a CPU, and shards a model for good.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import distributed
from .errors import ConfigError
from .sharding import gathered, gathered_state, local, rows_of, whole

if TYPE_CHECKING:
    from .config import RunConfig
    from .methods.base import Method

# methods whose every hook knows that a weight's rows may lie in several processes
METHODS = ("seqft", "gorp", "osft", "gpm", "lora", "inclora", "olora", "ewc", "replay")
WEIGHTS = "model.safetensors"


def check(config: RunConfig, method: Method) -> None:
    """Raises ConfigError where `sharding` is asked for beside what does not go with it."""
    from .adapters import LoraOptions
    from .methods.beside import Beside

    if not config.sharding:
        return
    parts = [method, *(method.inner() if isinstance(method, Beside) else ())]
    for part in parts:
        if part.name not in METHODS:
            raise ConfigError(
                f"sharding: {config.sharding}: method {part.name} reads whole weights or gradients while it trains; take sharding out (each process then "
                f"holds the whole model), or use one of {', '.join(METHODS)}"
            )
    options = method.innermost().options
    if getattr(options, "state", "adam") not in ("adam", "galore"):
        raise ConfigError(f"sharding: {config.sharding}: method seqft with state: {options.state} reads whole gradients; use adam or galore")
    adapts = getattr(options, "use_lora", isinstance(options, LoraOptions)) or getattr(options, "form", None) == "adapter"
    if adapts and any(part.name == "ewc" for part in parts):
        raise ConfigError(f"sharding: {config.sharding}: method ewc holds the weights themselves; put a method without adapters under on:")
    asked = {"quantize": config.quantize, "optimizer_state: 8bit": config.optimizer_state == "8bit", "probes.every": config.probes.every}
    for key, wanted in asked.items():
        if wanted:
            raise ConfigError(f"sharding: {config.sharding}: {key} needs whole weights in every process while it trains; take one of them out")


class Shared:
    """`model` is the twin that trains: the same modules with parameters of its own, of which each process has some rows. The given model is empty until give_back."""

    def __init__(self, model: nn.Module, device: str):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.given = model
        own = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
        self.model: Any = copy.deepcopy(model, own | {id(b): b for b in model.buffers()})
        mesh = init_device_mesh(device, (distributed.world_size(),))
        for block in blocks(self.model):
            fully_shard(block, mesh=mesh)
        # what is in no block too, so that after a forward pass no parameter is whole: penalties and our optimizer read what model.parameters() gives
        fully_shard(self.model, mesh=mesh, reshard_after_forward=True)
        for p in model.parameters():
            p.data = p.data.new_empty(0)

    @torch.no_grad()
    def give_back(self) -> None:
        """The given model has all weights again, as trained; one is gathered after another, and every process must call."""
        trained = dict(self.model.named_parameters())
        for name, p in self.given.named_parameters():
            p.data = whole(trained[name].detach()).clone()


def blocks(model: nn.Module) -> list[nn.Module]:
    """What is sharded as one: the elements of the outermost lists of layers."""
    found: list[nn.Module] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not (inside and name.startswith(inside)):
            inside += (name + ".",)
            found += [child for child in module if not isinstance(child, (nn.ModuleList, nn.ModuleDict))]
    return found


def trainer_class(base: type) -> type:
    """The Trainer `base` for a model that is sharded already: it does not wrap the model, and its checkpoints hold whole tensors, written by the first process."""

    class SharedTrainer(base):
        def train(self, *args: Any, **options: Any) -> Any:
            # autocast and nothing else: Accelerate would put DistributedDataParallel round it, and leaves alone what it has prepared
            self.accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=True)
            self.model._is_accelerate_prepared = True
            return super().train(*args, **options)

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            from safetensors.torch import save_file

            state = self.model.state_dict()
            names = {name for name, _ in self.model.named_parameters()} | {name for name, _ in self.model.named_buffers() if name in state}
            tensors = gathered({name: state[name] for name in sorted(names)})  # a tied weight once
            if self.args.should_save:
                Path(output_dir).mkdir(parents=True, exist_ok=True)
                save_file({name: t.contiguous() for name, t in tensors.items()}, Path(output_dir) / WEIGHTS)

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            state = gathered_state(self.optimizer.optimizer)
            if self.args.should_save:
                torch.save(state, Path(output_dir) / "optimizer.pt")
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
            load(self.model, Path(resume_from_checkpoint) / WEIGHTS)

    return SharedTrainer


@torch.no_grad()
def load(model: nn.Module, file: Path) -> None:
    """Own rows of the weights in `file`, which holds whole ones, into a sharded model."""
    from safetensors import safe_open

    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with safe_open(file, framework="pt") as saved:
        for name in saved.offset_keys():
            local(tensors[name]).copy_(rows_of(tensors[name]).own(saved.get_tensor(name)))
