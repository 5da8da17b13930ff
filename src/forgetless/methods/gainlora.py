"""GainLoRA: a LoRA branch a task with a gate of its own, which is shut for the inputs of earlier tasks (Liang, Chen and Li, NeurIPS 2025, arXiv 2505.15424).

    y = W x + sum over tasks i of g_i s B_i A_i x           A_i (rank x in), B_i (out x rank), s = lora_alpha / lora_rank
    p_0 = the prompt's mean embedding,   p_l = silu(G_l p_{l-1}),   g = |2 sigmoid(G_3 p_2) - 1|         G_1 (h x d), G_2 (d x h), G_3 (1 x d)

One number g_i in [0, 1] a row and task, for all layers. Only the new task's branch and gate learn. So that a new gate says 0 to old inputs, for each l the inputs p_{l-1} of
earlier tasks are kept as a space M_l, and
    before a task    G_1 and G_2 are the last gate's, so that old inputs have the activations that are in M;  G_3 M_3 = 0, and g = 0 as G_3 p_2 = 0
    while it learns  dG_l M_l = 0 for every l, so both stay so;  it is the finished update that is projected, Adam's division and weight decay included
    after it         M_l grows by directions of the task's p_{l-1} until it holds the share `gate_energy` of their energy (as in GPM)
The gate is 0 up to what M leaves out: 1 - gate_energy of the energy of the rows that were there, and what of unseen rows lies elsewhere. Branches of earlier tasks
work on new rows, as their gates say.

Where we depart. The paper puts its gates on the branches of O-LoRA and InfLoRA; here a branch is plain LoRA. p_0 is brought to mean square 1 (ours): embeddings of many
models are so small that every gate would begin near 0. G_3 begins as the leading direction of the new task's p_2 off M_3, as in the released code, so long that its
product with p_2 is four times their cosine; that code divides by both lengths in every step, the paper by none, as here. It also brings each row of a G back to its
length after every projection, which changes what G makes of old inputs; here it is not. Its share rises to 1 over 15 tasks, here it stays. Read of the
paper: its abstract, others' readings of it, and the released trainer, not its text.

Kept: A, B and G_1 ... G_3 of every task, M_1 ... M_3. model/ of each commit is the base model. At test time a row is answered alone, as no two have the same gates.

When not to use it: where tasks' prompts have the same words (a mean of embeddings is all the gate sees, and what old tasks left no room for it cannot tell apart), where many
rows have to be answered fast, or where one plain model is wanted.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..adapters import LoraOptions, adapter_config, adapter_tensors, detach
from ..batches import unwrapped
from ..errors import ConfigError
from ..gates import Branches, Gates, activations, gate, prompts_pooled, put_on, take_off, weighed
from ..protect import Sum
from ..subspace import Constraint, Subspace, extend, project_out, working_dtype
from ._statistics import spaces_report
from .base import Memory
from .inflora import leading
from .lora import PREFIX, LoRA

log = logging.getLogger(__name__)
PLACE = "task_gates"  # the gates' name in the model, and of their spaces in memory
DEPTH = 3  # G_1, G_2, G_3
STEEP = 4.0  # the released code's factor of the cosine: a gate of 0.96 where G_3 points along p_2


class GainLoRAOptions(LoraOptions):
    gate_width: int = Field(100, ge=1)
    """h, the width of the gates' hidden layer. Later tasks must have the first one's."""
    gate_energy: float = Field(0.995, gt=0, le=1)
    """Share of the energy of a task's gate inputs that M must hold after it. More shuts later gates more tightly for old rows and leaves them less to tell new ones by."""


class GainLoRA(LoRA):
    name = "gainlora"
    summary = "a LoRA branch a task, weighed for each row by a gate that is shut for earlier tasks' inputs"
    paper = "arXiv 2505.15424"
    kind = "routed"
    packs = False
    constrained = True
    extra_forward = (
        "all old branches beside the weights; the mean embedding of each of the task's prompts, before it and after it; rows are answered one by one"
    )
    bytes_a_task = "A and B of every adapted layer, a gate of (2 gate_width + 1) x d numbers, and directions of the gates' inputs"
    Options = GainLoRAOptions

    def __init__(self, /, **options: Any):
        super().__init__(**options)
        self.spaces: dict[str, Subspace] = {}  # M_l, by the names of their G_l
        self.held = 0  # bytes of all old branches and gates
        self.begun = torch.empty(0)  # the new gate's last layer as the task began

    def begin_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        self.go_on(model, memory)
        last = model.get_submodule(PLACE).new[-1]
        M, d = self._space(DEPTH, last).basis, last.shape[1]
        with torch.no_grad():
            direction, length = project_out(torch.randn_like(last) / d**0.5, M), d**0.5
            if task is not None:
                H, gram = self._inputs(model, task)[-1].of
                length = (H.diagonal().sum() if gram else H.square().sum()).div(len(task.train)).sqrt()  # of p_2, in the mean of squares
                leads = leading(H, gram, M, 1).mT  # (0 or 1, d)
                if len(leads):
                    direction = leads
                else:
                    log.warning(
                        "gainlora: the prompts of '%s' are to its gate what earlier tasks' were; it stays shut for them and next to nothing is learned",
                        task.name,
                    )
            last.copy_(direction * (STEEP / length))
            self.begun = last.clone()
        return model

    def resume_task(self, model: nn.Module, task: Any, memory: Memory, state: dict[str, Tensor]) -> nn.Module:
        model = super().resume_task(model, task, memory, state)
        with torch.no_grad():  # the checkpoint brings what it has become; what it leaked is measured from here
            model.get_submodule(PLACE).new[-1].copy_(self.begun)
        return model

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | {"begun": self.begun}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.begun = state["begun"]
        super().load_state_dict(state)

    @torch.no_grad()
    def go_on(self, model: nn.Module, memory: Memory) -> nn.Module:
        self.attach(model)
        kept, names = memory.of(self.name), memory.info.get(self.name, {"tasks": []})["tasks"]
        embedding = model.get_input_embeddings().weight
        on = {"device": embedding.device, "dtype": working_dtype(embedding.dtype)}
        d, h = embedding.shape[1], self.options.gate_width
        old = [tuple(kept[f"{t:02d}/G.{l}"].to(**on) for l in range(1, DEPTH + 1)) for t in range(len(names))]
        if old and old[-1][0].shape != (h, d):
            raise ConfigError(f"method.gate_width: {h}, and the gates of earlier tasks have {old[-1][0].shape[0]}; a new one begins as the last")
        new = [G.clone() for G in old[-1]] if old else [torch.empty(*shape, **on) for shape in ((h, d), (d, h), (1, d))]
        for G in () if old else new:
            nn.init.kaiming_uniform_(G, nonlinearity="relu")  # silu leaves about as much of the mean square
        branches = self._branches(kept, len(names), embedding.device)
        put_on(model, PLACE, Gates(new, old), branches)
        found = memory.spaces()
        self.spaces = {name: found[name] for name in map(_name, range(1, DEPTH + 1)) if name in found}
        self.held = sum(t.nbytes for pair in (*branches.values(), *old) for t in pair)
        return model

    def _space(self, l: int, G: Tensor) -> Subspace:
        return self.spaces.get(_name(l), Subspace.empty(G.shape[1])).to(G)

    def _branches(self, kept: dict[str, Tensor], tasks: int, device: torch.device) -> Branches:
        """Of the first so many tasks, side by side."""
        layers = [key.removeprefix("00/").removesuffix(".lora_A") for key in kept if key.startswith("00/") and key.endswith(".lora_A")]
        scale = self.options.lora_alpha / self.options.lora_rank
        return {
            layer: (
                torch.cat([kept[f"{t:02d}/{layer}.lora_A"] for t in range(tasks)]).to(device),
                torch.cat([scale * kept[f"{t:02d}/{layer}.lora_B"] for t in range(tasks)], 1).to(device),
            )
            for layer in layers
        }

    def _inputs(self, model: nn.Module, task: Any) -> list[Sum]:
        """p_0 ... p_L of the new gate on the task's prompts, in fp64: of a sum of squares in fp32, what is a thousandth of the rest is rounding."""
        G = [matrix.detach() for matrix in model.get_submodule(PLACE).new]
        self.progress.stage(f"{task.name}: the gate's inputs", len(task.train))
        sums = [Sum(torch.empty(0, matrix.shape[1], dtype=torch.float64, device=matrix.device)) for matrix in G]
        prompts = (task.encode_prompt(self.tokenizer, row) for row in task.train)
        for done, p in enumerate(prompts_pooled(model, prompts), 1):
            for total, x in zip(sums, activations(G, p), strict=True):
                total.add(x.double())
            self.progress.advance(done)
        return sums

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        groups = super().param_groups(model)
        for l, G in enumerate(unwrapped(model).get_submodule(PLACE).new, 1):
            space = self._space(l, G)
            groups.append({"params": [G], "names": [f"{PLACE}.new.{l - 1}"]} | ({"constraint": Constraint(inputs=space)} if space.rank else {}))
        return groups

    @torch.no_grad()
    def end_task(self, model: nn.Module, task: Any, memory: Memory) -> nn.Module:
        if task is None:
            raise ConfigError("method gainlora: what a task's inputs are is measured on its prompts; give end_task the task")
        kept, info = memory.of(self.name), memory.info.get(self.name, {"tasks": []})
        number, gates, spaces = len(info["tasks"]), model.get_submodule(PLACE), memory.spaces()
        kept |= {f"{number:02d}/{key.removeprefix(PREFIX).removesuffix('.weight')}": tensor for key, tensor in adapter_tensors(model).items()}
        for l, (G, total) in enumerate(zip(gates.new, self._inputs(model, task), strict=True), 1):
            kept[f"{number:02d}/G.{l}"] = G.detach().clone()
            H, gram = total.of
            known = spaces.get(_name(l), Subspace.empty(G.shape[1])).to(H)
            memory.keep({_name(l): extend(known, H, self.options.gate_energy, gram=gram)[0].to("cpu", G.dtype)})
        memory.put(self.name, kept)
        memory.info[self.name] = {"tasks": [*info["tasks"], task.name], "adapter": adapter_config(model, self.options)}
        take_off(model, PLACE)
        return detach(model, merge=False)

    @torch.no_grad()
    def gates(self, model: nn.Module, prompts: list[list[int]], memory: Memory) -> Tensor:
        """(prompts, tasks): how far each prompt opens the branch of each learned task."""
        kept, tasks = memory.of(self.name), len(memory.info[self.name]["tasks"])
        G = [[kept[f"{t:02d}/G.{l}"] for l in range(1, DEPTH + 1)] for t in range(tasks)]
        p = [x.cpu().to(G[0][0].dtype) for x in prompts_pooled(model, prompts)]
        return torch.stack([torch.cat([gate(of_task, x)[0] for of_task in G]) for x in p]) if p else torch.zeros(0, tasks)

    def answering(self, model: nn.Module, task: Any, rows: list, memory: Memory) -> list[tuple[list[int], AbstractContextManager[nn.Module]]]:
        values = self.gates(model, [task.encode_prompt(self.tokenizer, row) for row in rows], memory)
        device = next(model.parameters()).device
        branches = self._branches(memory.of(self.name), values.shape[1], device)
        return [([place], weighed(model, branches, g)) for place, g in enumerate(values.to(device))]

    def spaced(self, model: nn.Module) -> dict[str, int]:
        d, h = model.get_input_embeddings().weight.shape[1], self.options.gate_width
        return {_name(l): n for l, n in enumerate((d, h, d), 1)}

    def held_bytes(self) -> int:
        return self.held

    def report(self, memory: Memory) -> dict[str, Any] | None:
        return spaces_report(memory.spaces())


def _name(l: int) -> str:
    return f"{PLACE}.{l}"
