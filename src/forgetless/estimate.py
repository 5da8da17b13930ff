"""`forgetless estimate`: bytes, seconds and disk of a run before any is spent, from the model's configuration alone.

The model is built without data (torch's FakeTensorMode), the method plans a task on it, and a training step of the task's longest rows is traced: what autograd keeps
for the backward pass is counted tensor by tensor, each storage once. Of a deep decoder-only model whose blocks are alike only the first two are run.

Of several processes (`world`) the first is planned: its rows of what is shared, all of what is not, and what it sends. What a choice of directions sends is counted
by making one, with what that process would hold, of gradients that are made up.

What is assumed and not known: how much of each layer's inputs earlier tasks have closed (`closed`), the speed of the machine (one product is timed here; of a named
GPU the data sheet's) and of what joins several (`link`), and what the process holds that is no tensor (measured in this process).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import models, shared_model
from .batches import IGNORED, NO_PACKING, forward, is_seq2seq
from .config import RunConfig
from .errors import ConfigError, ForgetlessError, nearest
from .evaluation.drift import RECORDED_TOKENS
from .fake import storage_key
from .methods import get
from .methods.base import Memory, Method
from .models import logical
from .optim import SubspaceAdamW, coordinates
from .optim.released import keep
from .quantised import stand_ins
from .record import resident_bytes
from .subspace import Subspace
from .tasks import Example, Task, load_stream
from .trainer import check_state, eager_pays, training_arguments

log = logging.getLogger(__name__)
CLOSED = 0.16  # of each layer's input directions: gorp after four tasks (benchmarks/results/gorp_ablation_order1.json)
EFFICIENCY = 0.5  # of the speed of a large product that a whole training step reaches
CONTEXT = 600 << 20  # a GPU's own: CUDA's context and libraries
LINK = 50e9  # bytes a second that a process sends: a 400 Gb/s adapter a GPU, from the data sheet
LATENCY = 30e-6  # seconds an exchange takes however little is sent: assumed
GPUS = {  # name: (bytes of memory, FLOP a second of dense products in bf16, and in fp32 without TF32), from the data sheets
    "l4": (24e9, 121e12, 30e12), "a10g": (24e9, 70e12, 31e12), "l40s": (48e9, 362e12, 92e12), "rtx-3090": (24e9, 71e12, 36e12),
    "rtx-4090": (24e9, 165e12, 83e12), "a100-40gb": (40e9, 312e12, 19e12), "a100-80gb": (80e9, 312e12, 19e12), "h100": (80e9, 989e12, 67e12),
    "h200": (141e9, 989e12, 67e12), "b200": (180e9, 2250e12, 75e12), "mi300x": (192e9, 1307e12, 163e12),
}  # fmt: skip


@dataclass
class Rows:
    """Of a task: how many rows are trained on, tokens of a row with its answer (mean, longest), of the longest answer, of all its labels together."""

    name: str
    count: int | None
    mean: float
    tokens: int
    answer: int
    labels: int


@dataclass
class Step:
    """A traced training step: bytes, and numbers in the model and in what learns."""

    weights: int  # while a task trains
    whole: int  # between tasks, where some are quantised meanwhile; else 0
    gradients: int
    aside: int  # bytes of whole weights in files while a task trains
    checkpointed: int  # the optimizer's state, whole
    activations: int  # what autograd keeps for the backward pass, the parameters apart
    optimizer_state: int  # moments, masters, bases
    adapters: int  # what learns beside the model's own parameters
    moments_in_fp32: int  # of the largest tensor, where moments are kept in fewer bits between steps
    method_bases: int
    method_statistics: int
    copy_for_the_weight_leak: int
    parameters: int
    trained: int
    embedded: int  # parameters of embeddings, which multiply nothing
    vocabulary: int
    exchange: int  # of several processes: what they put together before it is sent, or have whole while it computes
    sent: dict[str, float]  # bytes that a process sends in every step, by what they are
    kinds: list[tuple[dict[str, Any], Tensor, int]]  # of a shared model: (group, one of them, how many) of weights for which alike is exchanged


def estimate(
    config: RunConfig, gpu: str | None = None, closed: float = CLOSED, tokens: int | None = None, world: int = 1, link: float = LINK
) -> dict[str, Any]:
    """Bytes, seconds and disk as a dict, by their names. Raises ConfigError for an unknown GPU, a share outside [0, 1), a method that cannot be planned.

    tokens: of a row and its answer together, where the data should not be read. world: processes that train together, of which the first is planned; they share the
    model where the config says `sharding`. link: bytes a second that each can send.
    """
    if gpu is not None and gpu not in GPUS:
        raise ConfigError(f"--gpu {gpu}: not in the list ({', '.join(GPUS)}){nearest(gpu, GPUS)}")
    if not 0 <= closed < 1:
        raise ConfigError(f"--closed {closed:g}: a share of each layer's input directions, at least 0 and below 1")
    if world < 1 or not 0 < link < math.inf:
        raise ConfigError(f"--world {world}, --link {link / 1e9:g}: at least one process, and a rate above 0")
    method = get(config.method.name, **config.method.options)
    if world > 1:
        shared_model.check(config, method)
    method.planned = world, bool(config.sharding) and world > 1
    args = training_arguments(config.train, config.seed, config.output_dir)
    on_gpu = gpu is not None or torch.cuda.is_available() and not args.use_cpu
    path = models.resolve(config.model)
    whole = models.configuration(config.model, path, config.trust_remote_code)
    if config.packing and whole.is_encoder_decoder:
        raise ConfigError(NO_PACKING)
    rows = [Rows(t.name, None, tokens, tokens, min(8, tokens - 1), 0) for t in config.tasks] if tokens else measure_rows(config, path)
    longest = Rows("", None, 0.0, *(max(getattr(r, key) for r in rows) for key in ("tokens", "answer", "labels")))
    try:
        step, spaces = trace(config, method, args, longest, closed, on_gpu, whole)
        # scoring comes after the optimizer has gone, but a CPU's heap keeps what was in small pieces, so what scoring holds comes on top
        scoring = 0 if on_gpu else scoring_bytes(config, whole, step, rows, bool(args.bf16))
    except ForgetlessError:
        raise
    except Exception as error:  # a model or a method that has to look at numbers to do its work, each with its own kind of error
        said = (str(error).strip().splitlines() or [""])[0][:200]
        raise ConfigError(
            f"model '{config.model}' with method {method.name} cannot be planned without its weights ({type(error).__name__}: {said}); forgetless doctor loads them"
        ) from error
    held = ("weights", "adapters", "optimizer_state", "moments_in_fp32", "method_bases", "method_statistics", "copy_for_the_weight_leak")
    peak = {name: getattr(step, name) for name in held}
    # what is kept for the backward pass goes as the gradients come, but its memory is seldom in the pieces that they need
    peak |= {"activations": step.activations, "gradients": step.gradients, "exchange": step.exchange}
    shared = method.planned[1]
    peak |= {
        "scoring": 0 if shared else scoring,
        "process": CONTEXT if on_gpu else resident_bytes(),
    }  # libraries are loaded here and no model: a training process holds as much
    # where they are quantised or shared while a task trains, the weights are whole while it is prepared, merged and scored; those that were shared are put together
    # while what trained them is still there
    beside = sum(peak[name] for name in held) if shared else step.method_bases + step.adapters
    between = (step.whole + max(beside, scoring) + peak["process"]) * bool(step.whole)
    speed = GPUS[gpu][1 if args.bf16 else 2] if gpu else measured_speed(bool(args.bf16), on_gpu)
    counts = {r.name: steps_of(r, args, world) for r in rows}
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    # two operations a parameter and token for the forward pass, two for the gradient of the inputs, two for the gradient of what learns
    multiplied = step.parameters - step.embedded
    work = {r.name: 2 * r.mean * size * (2 * multiplied + min(step.trained, multiplied)) for r in rows}
    sent = exchanges(step, world, link)
    waits = sent["seconds_a_step"] + sent["seconds_a_choice"] / sent["refresh_gap"] if sent else 0.0
    seconds = {name: None if n is None else n * (work[name] / (speed * EFFICIENCY) + waits) for name, n in counts.items()}
    tasks, whole_model = len(config.tasks), step.whole or step.weights
    # the current model always stays, and nobody has tagged another yet; what a method keeps stays of every task
    kept = {"all": tasks, "tagged": 1}.get(config.keep) or min(tasks, int(config.keep.split()[1]))
    first, more, inputs = kept_bytes(config, args, longest, whole)
    disk = {
        # the commits of a routed method share one file: its weights stay as they were
        "models": whole_model * (1 if method.innermost().kind == "routed" else kept),
        "whole_weights": step.aside,
        "spaces": spaces * (tasks + 1) // 2,  # as if they grew evenly up to what the last task finds closed
        "memory": tasks * first + more * tasks * (tasks - 1) // 2, "inputs": tasks * inputs,
    }  # fmt: skip
    disk["checkpoint"] = whole_model - step.aside + step.checkpointed + step.method_statistics if config.checkpoint_every else 0
    assumed = {
        "closed": closed,
        "batch": args.per_device_train_batch_size,
        "tokens": longest.tokens,
        "answer": longest.answer,
        "bf16_autocast": bool(args.bf16),
    }
    found = {
        "model": config.model, "method": method.name, "parameters": step.parameters, "trained_parameters": step.trained,
        "device": gpu or ("cuda" if on_gpu else "cpu"), "assumed": assumed | {"operations_a_second": speed * EFFICIENCY},
        "peak": peak, "peak_bytes": max(sum(peak.values()), between), "between_tasks_bytes": between,
        "steps": counts, "seconds": seconds, "models_kept": kept, "disk": disk, "disk_bytes": sum(disk.values()),
    }  # fmt: skip
    if world > 1:
        found |= {"processes": world, "sharding": config.sharding, "sent": sent}
        found["assumed"] |= {"link_bytes_a_second": link, "seconds_an_exchange": LATENCY}
    if gpu:
        found |= {"gpu_bytes": int(GPUS[gpu][0]), "fits": found["peak_bytes"] < 0.95 * GPUS[gpu][0]}
    return found


# -- the data --------------------------------------------------------------------------------------------------------------------------


def measure_rows(config: RunConfig, path: str) -> list[Rows]:
    """Lengths of up to 200 rows a task, by the model's tokenizer; an answer is all from its first token on, as the head is run."""
    tokenizer, found = models.load_tokenizer(config.model, path, config.trust_remote_code), []
    for task in load_stream(config):
        encoded = [task.encode(tokenizer, e) for e in task.train[:200]]
        lengths = [len(e["input_ids"]) for e in encoded]
        answers = [len(e["labels"]) - next(i for i, label in enumerate(e["labels"]) if label != IGNORED) for e in encoded]
        labels = sum(len(task.encode_answer(tokenizer, label)) - 1 for label in task.labels or ())
        found.append(Rows(task.name, len(task.train), sum(lengths) / len(lengths), max(lengths), max(answers), labels))
    return found


def scoring_bytes(config: RunConfig, whole: Any, step: Step, rows: list[Rows], bf16: bool) -> int:
    """Of a scored batch: the weights in bf16, which autocast keeps, keys and values, the logits of all labels and their logarithms in fp32."""
    text = whole.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    cast = 2 * (step.parameters - step.embedded) if bf16 and config.dtype == "float32" else 0
    known = max(r.tokens + r.labels for r in rows) * text.num_hidden_layers * 2 * width * (2 if bf16 else 4)
    return cast + config.evaluate.batch_size * (known + max(r.labels for r in rows) * step.vocabulary * 2 * 4)


def steps_of(rows: Rows, args, world: int = 1) -> int | None:
    """Optimizer steps of a task; None where neither max_steps nor the number of rows is known."""
    if args.max_steps > 0:
        return args.max_steps
    if rows.count is None:
        return None
    return math.ceil(args.num_train_epochs * math.ceil(rows.count / (args.per_device_train_batch_size * args.gradient_accumulation_steps * world)))


# -- the step --------------------------------------------------------------------------------------------------------------------------


def trace(config: RunConfig, method: Method, args, rows: Rows, closed: float, on_gpu: bool, whole: Any) -> tuple[Step, int]:
    """A step on the longest rows and the bytes of the spaces a commit keeps. Of a deep decoder-only model whose blocks are alike only the first two are run."""
    plan = partial(plan_blocks, config, method, args, rows, closed, on_gpu)
    depth = getattr(whole.get_text_config(), "num_hidden_layers", 0)
    step, spaces = plan(whole, run=False)
    kept = {}
    for checkpointing in {False, bool(args.gradient_checkpointing)}:
        cuts = [shallow(whole, n) for n in (1, 2)] if not whole.is_encoder_decoder and depth > 2 else [None]
        if all(cuts):
            (one, _), (two, _) = (plan(cut, checkpointing) for cut in cuts)
            if one.parameters + (two.parameters - one.parameters) * (depth - 1) == step.parameters:
                kept[checkpointing] = one.activations + (two.activations - one.activations) * (depth - 1)
                continue
        kept[checkpointing] = plan(whole, checkpointing)[0].activations
    # under checkpointing one block at a time is computed again, and what it keeps is there beside
    again = (kept[False] - kept[True]) // max(depth, 1) if args.gradient_checkpointing else 0
    return dataclasses.replace(step, activations=kept[bool(args.gradient_checkpointing)] + again), spaces


def shallow(whole: Any, blocks: int) -> Any | None:
    """The configuration of the same model with so many blocks; None where it cannot be cut."""
    cut = copy.deepcopy(whole)
    text = cut.get_text_config()
    try:
        for key in ("layer_types", "mlp_layer_types"):
            if isinstance(kinds := getattr(text, key, None), list):
                if len(set(kinds)) > 1:
                    return None
                setattr(text, key, kinds[:blocks])
        text.num_hidden_layers = blocks
    except AttributeError:
        return None
    return cut


def plan_blocks(
    config: RunConfig, method: Method, args, rows: Rows, closed: float, on_gpu: bool, shape: Any, checkpointing: bool = False, run: bool = True
) -> tuple[Step, int]:
    """A step, without activations unless it is to be run, and the bytes of the spaces a commit keeps, bases in fp32."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    device = "cuda" if on_gpu and torch.cuda.is_available() else "cpu"  # autocast keeps the same tensors on both
    world, shared = method.planned or (1, False)

    def own(parameters: Iterable[Tensor]) -> int:
        return sum(p.nbytes // p.shape[0] * -(-p.shape[0] // world) if shared and p.ndim else p.nbytes for p in parameters)

    with FakeTensorMode(), unmoved(), contextlib.ExitStack() as stack:
        model = models.without_data(copy.deepcopy(shape), getattr(torch, config.dtype), config.trust_remote_code).train()
        if device == "cpu" and eager_pays(rows.tokens, args.per_device_train_batch_size, config.packing):
            model.set_attn_implementation("eager")  # as the Trainer does
        parameters, embeddings = sum(p.numel() for p in model.parameters()), model.get_input_embeddings().weight
        base, method = list(model.parameters()), again(method)
        method.check(model)
        memory, spaces = Memory(), method.spaced(model)
        guards = method.constrained if spaces is None else bool(spaces)
        spaces = spaces or {}
        most = getattr(method.innermost().options, "max_rank", None) or max(spaces.values(), default=0)
        ranks = {name: min(int(closed * n), most) for name, n in spaces.items()}
        memory.keep({name: Subspace(torch.empty(n, ranks[name]), torch.empty(ranks[name])) for name, n in spaces.items()})
        model = method.begin_task(model, None, memory)
        groups = method.param_groups(model)
        learning = {p for group in groups for p in group["params"]}
        for p in model.parameters():
            p.requires_grad_(p in learning)
        settings = dict(lr=args.learning_rate, weight_decay=args.weight_decay, precision=config.precision, optimizer_state=config.optimizer_state)
        method.micro_batches = args.gradient_accumulation_steps
        optimizer = method.optimizer(groups, **settings)
        stack.callback(keep, model)
        beside = method.innermost().held_bytes()  # an adapter's: only its constrained factors are copied
        held, statistics, trained = method.held_bytes(), method.statistics_bytes(model), sum(p.numel() for p in learning)
        weights, codes, aside = sum(p.nbytes for p in base), 0, 0
        for layer, stand_in in stand_ins(model, config.quantize) if config.quantize else ():
            codes, aside = codes + stand_in.codes.nbytes, aside + layer.weight.nbytes
        ours = isinstance(optimizer, SubspaceAdamW)
        check_state(optimizer, config.optimizer_state, method)
        sizes = (
            [coordinates.numbers(g, p.shape) if coordinates.reduced(g) else p.numel() for g in optimizer.param_groups for p in g["params"]]
            if ours
            else []
        )
        in_fp32 = 8 * max(sizes) if sizes and config.optimizer_state == "8bit" else 0
        guarded = [p for group in groups if coordinates.protects(group) or guards and not beside for p in group["params"]]
        state = optimizer.planned_bytes() if hasattr(optimizer, "planned_bytes") else 8 * trained
        exchange, sent = exchanged(model, method, learning, args)
        kinds = alike(optimizer) if shared and ours else []
        step = Step(
            weights=own(base) if shared else weights - aside + codes, whole=weights if aside or shared else 0, aside=aside,
            gradients=own(learning) if shared else gradient_bytes(optimizer), checkpointed=state, exchange=exchange, sent=sent, kinds=kinds,
            activations=saved_bytes(model, args, rows, device, checkpointing, config.packing) if run else 0,
            optimizer_state=optimizer.planned_bytes(world) if shared else state, moments_in_fp32=in_fp32,
            adapters=own(learning - set(base)), method_bases=held, method_statistics=statistics, copy_for_the_weight_leak=own(guarded),
            parameters=parameters, trained=trained, embedded=embeddings.numel(), vocabulary=embeddings.shape[0],
        )  # fmt: skip
        return step, sum(4 * n * ranks[name] for name, n in spaces.items())


def again(method: Method) -> Method:
    """One like it: what is planned leaves nothing behind."""
    other = type(method)(**method.options.model_dump())
    other.planned = method.planned or (1, False)
    return other


def exchanged(model: nn.Module, method: Method, learning: set[nn.Parameter], args) -> tuple[int, dict[str, float]]:
    """Of several processes: (bytes of what is put together to be sent, or is whole while it computes; bytes that one sends in every step, the optimizer's own apart)."""
    processes, shared = method.planned
    if processes == 1:
        return 0, {}

    def size(parameters: Iterable[Tensor]) -> int:
        return sum(p.nbytes for p in parameters)

    share, gradients = 1 - 1 / processes, size(learning)
    if not shared:  # DistributedDataParallel's buckets are the gradients
        return 0, {"gradients": 2 * share * gradients}
    units = [list(block.parameters()) for block in shared_model.blocks(model)]
    inside = {p for unit in units for p in unit}
    rest = [p for p in model.parameters() if p not in inside]
    # fully_shard has what lies in no block whole for as long as the model computes, a block, the one that is fetched ahead of it, and the gradients of two
    whole = size(rest) + 2 * max(map(size, units), default=0) + 2 * max(size(learning.intersection(unit)) for unit in (rest, *units))
    times = args.gradient_accumulation_steps  # of which each fetches the weights forwards and backwards, and hands its gradients over
    sent = {"weights": 2 * share * size(model.parameters()) * times, "gradients": share * gradients * times}
    return whole, sent | {"statistics": 4 * share * method.sent_each_step(model)}


def alike(optimizer: SubspaceAdamW) -> list[tuple[dict[str, Any], Tensor, int]]:
    """(group, one of them, how many) of the weights for which alike is exchanged."""
    found: dict[Any, tuple[dict[str, Any], Tensor, int]] = {}
    for group in optimizer.param_groups:
        constraint, directions = group["constraint"], group["directions"] or (None, None)
        bases = (*directions, *(() if constraint is None else (constraint.inputs, constraint.outputs, constraint.mask)))
        known = (group["rank"], group["side"], group["flipped"], group["refresh"], constraint is None or constraint.forbid)
        for p in group["params"]:
            key = (*known, p.shape, *(None if B is None else B.shape for B in bases))
            found[key] = (group, p, found[key][2] + 1 if key in found else 1)
    return list(found.values())


def exchanges(step: Step, processes: int, link: float) -> dict[str, Any]:
    """Bytes that a process sends in a step, and in one that chooses directions beside, and the seconds they take if nothing is computed meanwhile. {} for one process."""
    if processes == 1:
        return {}
    found = [(count, *coordinates.sent(group, p.shape, processes)) for group, p, count in step.kinds]
    choices, others = ([sum(count * getattr(one[i], key) for count, *one in found) for key in ("numbers", "exchanges")] for i in (0, 1))
    a_step = step.sent | {"coordinates": 4 * others[0]}
    a_choice, times = 4 * (choices[0] - others[0]), choices[1] - others[1]
    chosen = [(group, count * p.nbytes) for group, p, count in step.kinds if group["rank"] is not None]
    return {
        "a_step": a_step, "a_choice": a_choice, "exchanges_a_choice": times,
        "gradients_gathered_instead": (1 - 1 / processes) * sum(size for _, size in chosen), "refresh_gap": max([group["refresh_gap"] for group, _ in chosen], default=1),
        "seconds_a_step": sum(a_step.values()) / link, "seconds_a_choice": a_choice / link + times * LATENCY,
    }  # fmt: skip


class NoRows(Task):
    """A task of which only the length of its rows is known."""

    def __init__(self, rows: Rows):
        super().__init__(rows.name or "t", "{sentence}", [Example("", "", i) for i in range(4)], [], [])
        self.prompted, self.answered = [0] * (rows.tokens - rows.answer), [0] * rows.answer

    def encode_prompt(self, tokenizer: Any, text: Any) -> list[int]:
        return self.prompted

    def encode(self, tokenizer: Any, example: Any) -> dict[str, list[int]]:
        return {"input_ids": self.prompted + self.answered, "labels": [IGNORED] * len(self.prompted) + self.answered}


def kept_bytes(config: RunConfig, args, rows: Rows, shape: Any) -> tuple[int, int, int]:
    """(bytes of what the method keeps after its first task, what each further task adds, bytes of the inputs that are recorded of a task), in a commit's state/.

    Found by ending two tasks in which nothing was learned; so without spaces, whose size is in the data, and without the rows that replay keeps. (0, 0, ...) for a method
    that has to look at numbers at a task's end.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    task, sizes = NoRows(rows), []
    with FakeTensorMode(), unmoved():
        model = models.without_data(copy.deepcopy(shape), getattr(torch, config.dtype), config.trust_remote_code)
        layers = [logical(m.weight, m).shape for m in models.linear_modules(model).values()] if config.store != "nothing" else []
        method, memory = get(config.method.name, **config.method.options), Memory()
        method.tokenizer = object()  # read by the task alone
        try:
            for _ in range(2):
                method.micro_batches = args.gradient_accumulation_steps
                model = method.end_task(method.begin_task(model, task, memory), task, memory)
                sizes.append(sum(t.nbytes for t in memory.tensors.values()))
        except Exception as error:  # each method's own kind
            log.debug("%s keeps what cannot be planned: %s", method.name, error)
            sizes = [0, 0]
    return sizes[0], sizes[1] - sizes[0], sum(RECORDED_TOKENS * (2 * n + 4 * m) for m, n in layers)


def check_bits(config: RunConfig, method: Method, shape: Any) -> None:
    """Raise ConfigError, before anything is computed, where nothing would stay frozen for `quantize`, or the optimizer does not know `optimizer_state`.

    On a model without data; a method that cannot be planned there is told by its first task.
    """
    if not config.quantize and config.optimizer_state == "fp32":
        return
    args = training_arguments(config.train, config.seed, config.output_dir)
    try:
        plan_blocks(config, method, args, Rows("", None, 0.0, 2, 1, 0), 0.0, False, shape, run=False)
    except ConfigError:
        raise
    except Exception as error:  # of a method or a model that has to look at numbers, each its own kind
        log.debug("%s cannot be planned: %s", method.name, error)


@contextlib.contextmanager
def unmoved() -> Iterator[None]:
    """Modules stay where they are: torch cannot move parameters without data, and PEFT moves each new adapter to where it is already."""
    apply, nn.Module._apply = nn.Module._apply, lambda self, fn, recurse=True: self
    try:
        yield
    finally:
        nn.Module._apply = apply


def gradient_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all gradients at once: those that are let go within backward are as large as what is read of them, the largest of them beside."""
    total, largest = 0, 0
    for group in optimizer.param_groups:
        # of several micro-batches whole gradients wait for a step that chooses directions, in a task's first step all of them
        kept = group.get("rank") is not None and getattr(optimizer, "micro_batches", 1) > 1
        for p in group["params"]:
            released = group.get("release") and not kept
            total += 4 * coordinates.numbers(group, p.shape) if released else p.nbytes
            largest = max(largest, p.nbytes if released and group["rank"] is not None else 0)
    return total + largest


def saved_bytes(model: nn.Module, args, rows: Rows, device: str, checkpointing: bool, packing: bool) -> int:
    """Bytes that autograd keeps for the backward pass of one micro-batch, the model's own tensors apart, each storage once."""
    own = {storage_key(t) for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if storage_key(t) not in own:
            kept[storage_key(t)] = t
        return t

    size, answer = args.per_device_train_batch_size, rows.answer
    ids = torch.zeros(size, rows.tokens - answer if is_seq2seq(model) else rows.tokens, dtype=torch.long)
    batch, read = {"input_ids": ids}, answer + 1  # a position predicts the token after it
    if is_seq2seq(model):
        batch, read = batch | {"decoder_input_ids": torch.zeros(size, answer, dtype=torch.long)}, 0
    elif packing:
        batch = {"input_ids": ids.reshape(1, -1), "position_ids": torch.arange(rows.tokens).repeat(size)[None]}
        read = (torch.arange(size)[:, None] * rows.tokens + torch.arange(rows.tokens - answer - 1, rows.tokens - 1)).reshape(-1)
    if checkpointing:
        model.gradient_checkpointing_enable()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast(device, dtype=torch.bfloat16, enabled=bool(args.bf16)):
        logits = forward(model, batch, logits_to_keep=read).logits
        logits = (logits if packing else logits[:, -answer:]).float()
        nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), torch.zeros(size * answer, dtype=torch.long))
    return sum(t.untyped_storage().nbytes() for t in kept.values())


# -- the machine -----------------------------------------------------------------------------------------------------------------------


def measured_speed(bf16: bool, on_gpu: bool) -> float:
    """Operations a second of a large product here, in the dtype of training."""
    device, n = ("cuda", 8192) if on_gpu else ("cpu", 1024)
    A = torch.randn(n, n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    times = []
    for _ in range(10):
        begun = time.perf_counter()
        A @ A
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return 2 * n**3 / min(times)


# -- for people ------------------------------------------------------------------------------------------------------------------------


def show(found: dict[str, Any]) -> None:
    assumed, gb = found["assumed"], 1e9
    print(f"model    {found['model']}: {found['parameters']:,} parameters, {found['trained_parameters']:,} of them trained by {found['method']}")
    print(
        f"assumed  {assumed['batch']} rows of {assumed['tokens']} tokens, {assumed['answer']} of them the answer; bf16 autocast {'on' if assumed['bf16_autocast'] else 'off'}"
    )
    print(f"         {assumed['closed']:.0%} of each layer's input directions closed by earlier tasks, where the method closes any")
    for name, value in found["peak"].items():
        if value:
            print(f"  {name.replace('_', ' '):<28}{value / gb:8.2f} GB")
    fits = "" if "fits" not in found else f", {'fits' if found['fits'] else 'does not fit'} a {found['device']} of {found['gpu_bytes'] / gb:.0f} GB"
    if found["peak_bytes"] > sum(found["peak"].values()):
        print(
            f"  between tasks, all weights whole: {found['between_tasks_bytes'] / gb:.2f} GB, the most there is; {sum(found['peak'].values()) / gb:.2f} GB in training"
        )
    print(f"peak     {found['peak_bytes'] / gb:.2f} GB{fits}")
    if sent := found.get("sent"):
        step = ", ".join(f"{name} {value / gb:.3g} GB" for name, value in sent["a_step"].items() if value)
        rate = f"at {assumed['link_bytes_a_second'] / gb:g} GB/s"
        print(
            f"sent     by each of {found['processes']} processes in a step: {step}; {sent['seconds_a_step']:.3g} s {rate} if nothing is computed meanwhile"
        )
        if sent["a_choice"]:
            instead = sent["gradients_gathered_instead"]
            print(
                f"         every {sent['refresh_gap']} steps to choose directions: {sent['a_choice'] / gb:.3g} GB in {sent['exchanges_a_choice']:,} exchanges, "
                f"{sent['seconds_a_choice']:.3g} s; the gradients themselves are {instead / gb:.3g} GB"
            )
    for name, seconds in found["seconds"].items():
        said = (
            "give max_steps, or the data, for a time" if seconds is None else f"{found['steps'][name]} steps, about {duration(seconds)} of training"
        )
        print(f"task     {name}: {said}")
    parts = ", ".join(f"{name} {value / gb:.2f} GB" for name, value in found["disk"].items() if value)
    print(f"disk     {found['disk_bytes'] / gb:.2f} GB: {parts} ({found['models_kept']} versions kept)")


def duration(seconds: float) -> str:
    """Seconds in the unit people would use.

    >>> duration(40), duration(400), duration(8000)
    ('40 s', '7 min', '2.2 h')
    """
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
