"""Methods that go beside another: ewc, lwf, lines, merge. Each by hand on a problem small enough for that, against other people's numbers, and in training."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model_folder, write_task
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import forgetless as fl
from forgetless.batches import answer_logits, answer_loss
from forgetless.config import TaskConfig
from forgetless.errors import ConfigError
from forgetless.lineage import load_memory
from forgetless.methods import get
from forgetless.methods._statistics import batch_of, current
from forgetless.methods.base import Memory
from forgetless.methods.lwf import distillation
from forgetless.methods.merge import cut_of, dropped
from forgetless.tasks import load_task

GOLDEN = json.loads((Path(__file__).parent / "golden" / "beside.json").read_text())  # benchmarks/scripts/golden_beside.py


class Bigram(nn.Module):
    """logits = head(embed(token)): the toy of the golden file, called like a language model."""

    def __init__(self, weights):
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=False)
        (V, D), _ = (w.shape for w in weights)
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
        self.double()
        self.to_point(weights)

    @torch.no_grad()
    def to_point(self, weights):
        for p, w in zip(self.parameters(), weights, strict=True):
            p.copy_(w)

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.head(self.embed(input_ids)))


def task_of(pairs):
    """A task whose rows are pairs of tokens: of the first the second is foretold."""
    return SimpleNamespace(train=pairs, encode=lambda tokenizer, pair: {"input_ids": list(pair), "labels": [-100, pair[1]]})


@pytest.fixture
def toy():
    points = [[torch.tensor(w, dtype=torch.float64) for w in point] for point in GOLDEN["points"]]
    return Bigram(points[0]), points, [task_of(rows) for rows in GOLDEN["rows"]]


@pytest.fixture
def loaded(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)


@pytest.fixture
def tasks(tmp_path):
    return [load_task(TaskConfig(**write_task(tmp_path / "data", name, rows=12))) for name in ("colour", "animal")]


def penalty(method, model, batch):
    """(the method's term of the loss on a batch, its gradients by parameter name)."""
    model.zero_grad()
    _, outputs = answer_loss(model, batch)
    term = method.extra_loss(model, batch, outputs)
    term.backward()
    return term.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def trained(method, model, tokenizer, task, memory, steps=4, rate=1e-2):
    """One task of a few steps, as the Trainer would have it."""
    method.tokenizer = tokenizer
    model = method.begin_task(model, task, memory)
    groups = method.param_groups(model)
    for p in model.parameters():
        p.requires_grad_(False)
    for p in (p for group in groups for p in group["params"]):
        p.requires_grad_(True)
    opt, rows = method.optimizer(groups, lr=rate), [task.encode(tokenizer, row) for row in task.train]
    for step in range(steps):
        model.zero_grad()
        batch = batch_of(model, rows[4 * step % 12 :][:4])
        loss, outputs = answer_loss(model, batch)
        extra = method.extra_loss(model, batch, outputs)
        (loss if extra is None else loss + extra).backward()
        method.on_step(model)
        opt.step()
    for p in model.parameters():
        p.requires_grad_(True)
    return method.end_task(model, task, memory)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# -- ewc -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["full", "online"])
def test_ewc_is_avalanche_s_with_gradients_of_single_rows(form, toy):
    """Its lambda has no half; its rows are taken one by one here, because of larger batches it squares the mean."""
    model, points, tasks = toy
    method, memory = get("ewc", strength=4.0, form=form, answers="given", **({"gamma": 0.5} if form == "online" else {})), Memory()
    for point, task in zip(points[:2], tasks, strict=True):
        method.begin_task(model, task, memory)
        model.to_point(point)
        method.end_task(model, task, memory)
    method.begin_task(model, None, memory)
    model.to_point(points[2])
    value, gradients = penalty(method, model, batch_of(model, [tasks[0].encode(None, (0, 1))]))
    golden = GOLDEN[f"ewc_{form}"]
    assert float(value) == pytest.approx(golden["penalty"], rel=1e-6)
    for found, expected in zip(gradients.values(), golden["gradients"], strict=True):
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_ewc_reaches_the_minimum_of_a_quadratic_problem(toy):
    """L_B = 1/2 |theta - b|^2 beside two old tasks: theta_i = (b_i + lambda sum F_t,i theta_t,i) / (1 + lambda sum F_t,i). In memory: two tensors a weight."""
    model, points, tasks = toy
    method, memory, strength = get("ewc", strength=0.7), Memory(), 0.7
    F = []
    for point, task in zip(points[:2], tasks, strict=True):
        before = {n: memory.of("ewc").get(f"{n}:S", 0.0) for n in ("embed.weight", "head.weight")}
        method.begin_task(model, task, memory)
        model.to_point(point)
        method.end_task(model, task, memory)
        F.append({n: memory.of("ewc")[f"{n}:S"] - before[n] for n in before})
    assert memory.of("ewc").keys() == {f"{n}:{k}" for n in ("embed.weight", "head.weight") for k in "Sc"}
    method.begin_task(model, None, memory)
    assert method.held_bytes() == 2 * sum(p.nbytes for p in model.parameters())
    b = points[2]
    pull = {n: F[0][n] + F[1][n] for n in F[0]}
    way = {n: F[0][n] * points[0][i] + F[1][n] * points[1][i] for i, n in enumerate(pull)}
    model.to_point([(b[i] + strength * way[n]) / (1 + strength * pull[n]) for i, n in enumerate(pull)])
    _, gradients = penalty(method, model, batch_of(model, [tasks[0].encode(None, (0, 1))]))
    for i, (name, p) in enumerate(model.named_parameters()):
        torch.testing.assert_close(gradients[name] + (p - b[i]), torch.zeros_like(p), rtol=0, atol=1e-12)
    direct = sum((F[t][n] * (p - points[t][i]).square()).sum() for t in (0, 1) for i, (n, p) in enumerate(model.named_parameters())).detach()
    assert float(method.extra_loss(model, {}, None).detach()) == pytest.approx(strength / 2 * float(direct), rel=1e-12)  # the constant is there too


def test_ewc_s_fisher_information_is_of_answers_drawn_from_the_model(toy):
    """Of many rows with the same beginning: E_y (d log p(y) / d logits)^2 = p (1 - p), whatever answers the rows have."""
    model, points, _ = toy
    task = task_of([(0, 1)] * 1000)
    found = {}
    for answers in ("sampled", "given"):
        method, memory = get("ewc", on={"name": "seqft", "modules": "linear"}, answers=answers, rows=1000), Memory()
        method.on.param_groups = lambda model: [{"params": [model.head.weight], "names": ["head.weight"]}]
        method.begin_task(model, task, memory)
        method.end_task(model, task, memory)
        found[answers] = memory.of("ewc")["head.weight:S"]
    x = points[0][0][0]
    p = (points[0][1] @ x).softmax(0)
    torch.testing.assert_close(found["sampled"], torch.outer(p * (1 - p), x.square()), rtol=0.1, atol=0.03)
    given = (p - nn.functional.one_hot(torch.tensor(1), 5)).square()
    torch.testing.assert_close(found["given"], torch.outer(given, x.square()), rtol=1e-10, atol=0)


def test_ewc_on_adapters_is_of_the_weight_and_not_of_its_factors(loaded, tasks):
    model, tokenizer = loaded
    method, memory = get("ewc", on="inclora", strength=10.0), Memory()
    trained(method, model, tokenizer, tasks[0], memory)
    kept, theta = memory.of("ewc"), weights(model)
    assert {k.removesuffix(":S") for k in kept if k.endswith(":S")} == {n for n in theta if "q_proj" in n or "v_proj" in n}
    assert all(torch.equal(kept[f"{k.removesuffix(':c')}:c"], theta[k.removesuffix(":c")]) for k in kept if k.endswith(":c"))
    method.begin_task(model, tasks[1], memory)
    batch = batch_of(model, [tasks[1].encode(tokenizer, tasks[1].train[0])])
    assert float(penalty(method, model, batch)[0]) == 0.0  # a new adapter changes nothing yet
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    names = [k.removesuffix(":S") for k in kept if k.endswith(":S")]
    effective = current(model, names)
    expected = 5.0 * sum((kept[f"{n}:S"] * (effective[n] - theta[n]).square()).sum() for n in names)
    value, gradients = penalty(method, model, batch)
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-5) and float(value) > 0
    model.zero_grad()
    expected.backward()
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-5, atol=1e-8)


def test_ewc_goes_on_beside_an_adapter_that_replaces_what_is_kept(loaded, tasks):
    """`lora` puts its adapter of all tasks in the memory: what is beside it stays."""
    model, tokenizer = loaded
    method, memory, sums = get("ewc", on="lora"), Memory(), []
    for task in tasks:
        model = trained(method, model, tokenizer, task, memory)
        sums.append({k: S for k, S in memory.of("ewc").items() if k.endswith(":S")})
    assert all(bool((sums[1][k] >= S).all()) for k, S in sums[0].items()) and sums[0]
    assert any(k.startswith("base_model.model.") for k in memory.tensors)


@pytest.mark.parametrize("name", ["ewc", "lwf"])
@pytest.mark.parametrize("on", [{"name": "gorp", "rank": 8}, {"name": "osft", "protect": "weights"}], ids=["gorp-rank", "osft"])
def test_a_penalty_reaches_weights_whose_gradients_would_be_let_go(name, on, loaded, tasks, tiny):
    """gorp with a rank and osft read a gradient within backward and let it go, unless something adds to it."""
    after = []
    for strength in (0.0, 1e4):
        model, method, memory = AutoModelForCausalLM.from_pretrained(tiny), get(name, on=on, strength=strength), Memory()
        for task in tasks:
            torch.manual_seed(0)
            model = trained(method, model, loaded[1], task, memory)
        assert method.on.whole_gradients and not method.on.releases
        after.append(weights(model))
    moved = [n for n in after[0] if not torch.equal(after[0][n], after[1][n])]
    assert len(moved) >= 14  # every linear layer of both blocks


def test_ewc_holds_the_weights_that_matter_where_they_were(loaded, tasks, tiny):
    """With a large lambda the second task moves weights of large F less than with none, and those of small F not."""
    moved = []
    for strength in (0.0, 1e6):
        model, method, memory = (
            AutoModelForCausalLM.from_pretrained(tiny),
            get("ewc", on={"name": "seqft", "modules": "linear"}, strength=strength),
            Memory(),
        )
        model = trained(method, model, loaded[1], tasks[0], memory)
        kept, before = memory.of("ewc"), weights(model)
        after = weights(trained(method, model, loaded[1], tasks[1], memory, steps=8, rate=1e-3))
        moved.append(sum(float((kept[f"{n}:S"] * (after[n] - before[n]).square()).sum()) for n in before if f"{n}:S" in kept))
    assert moved[1] < 0.1 * moved[0]


def test_ewc_refuses_what_it_cannot_do(toy, loaded, tasks):
    for bad in ({"strength": -1}, {"gamma": 1.5}, {"form": "sum"}, {"answers": "all"}, {"rows": 0}, {"on": {"rank": 3}}, {"on": "ewc"}):
        with pytest.raises(ConfigError, match="method ewc"):
            get("ewc", **bad)
    with pytest.raises(ConfigError, match="give end_task the task"):
        get("ewc").end_task(toy[0], None, Memory())
    from forgetless.quantised import QuantisedLinear

    model, method = loaded[0], get("ewc", on="inclora")
    method.begin_task(model, tasks[0], Memory())
    layer = QuantisedLinear.__new__(QuantisedLinear)
    nn.Module.__init__(layer)
    model.model.layers[0].extra = layer
    with pytest.raises(ConfigError, match="quantize moves the very weights"):
        method.extra_loss(model, {}, None)


# -- lwf -------------------------------------------------------------------------------------------------------------------------------


def test_lwf_s_loss_by_hand():
    """T = 2: old (1/4, 3/4), new (1/2, 1/2): 4 (1/4 ln 1/2 + 3/4 ln 3/2) = 0.523248; the second position is no answer; gradient T (new - old)."""
    old = torch.tensor([[[0.0, 2 * math.log(3)], [5.0, 1.0]]], dtype=torch.float64)
    new = torch.zeros(1, 2, 2, dtype=torch.float64, requires_grad=True)
    loss = distillation(new, old, torch.tensor([[True, False]]), 2.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.523248, abs=1e-6)
    torch.testing.assert_close(new.grad, torch.tensor([[[0.5, -0.5], [0.0, 0.0]]], dtype=torch.float64))


def test_lwf_is_avalanche_s_times_the_square_of_the_temperature(toy):
    model, points, tasks = toy
    method, memory = get("lwf"), Memory()
    method.begin_task(model, tasks[0], memory)
    model.to_point(points[0])
    method.end_task(model, tasks[0], memory)
    method.begin_task(model, tasks[1], memory)
    model.to_point(points[1])
    value, gradients = penalty(method, model, batch_of(model, [tasks[1].encode(None, row) for row in tasks[1].train]))
    assert float(value) == pytest.approx(4 * GOLDEN["lwf"]["loss"], rel=1e-6)
    for found, expected in zip(gradients.values(), GOLDEN["lwf"]["gradients"], strict=True):
        torch.testing.assert_close(found, 4 * torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-8)


ON = [{"name": "seqft"}, {"name": "inclora"}, {"name": "lora"}, {"name": "osft", "form": "adapter"}, {"name": "gorp", "use_lora": True}]


@pytest.mark.parametrize(
    ("kind", "on"), [("llama", on) for on in ON] + [("gpt2", {"name": "inclora"}), ("t5", {"name": "inclora"}), ("t5", {"name": "seqft"})]
)
def test_lwf_is_zero_at_the_start_of_a_task_and_then_the_distance_to_the_last_model(kind, on, tasks, tmp_path):
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    model = auto.from_pretrained(folder := make_model_folder(tmp_path / "m", kind=kind))
    tokenizer, method, memory = AutoTokenizer.from_pretrained(folder), get("lwf", on=on, strength=3.0), Memory()
    model = trained(method, model, tokenizer, tasks[0], memory)
    last = copy.deepcopy(model).eval()
    method.begin_task(model, tasks[1], memory)
    batch = batch_of(model, [tasks[1].encode(tokenizer, row) for row in tasks[1].train[:3]])
    model.eval()  # without dropout
    value, gradients = penalty(method, model, batch)
    assert abs(float(value)) < 1e-6 and gradients and all(float(g.abs().max()) < 1e-5 for g in gradients.values())
    with torch.no_grad():
        for p in (p for group in method.param_groups(model) for p in group["params"]):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    value, _ = penalty(method, model, batch)
    (new, target, _), (old, _, _) = answer_logits(model, batch), answer_logits(last, batch)
    seen = target != -100
    P, Q = ((z[seen] / 2).softmax(-1) for z in (old, new))
    expected = 3 * 4 * (P * (P / Q).log()).sum() / seen.sum()
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-3) and float(value) > 1e-4


def test_lwf_holds_a_second_set_of_nothing_but_what_learns(loaded, tasks):
    model, tokenizer = loaded
    for on, expected in (("seqft", sum(p.nbytes for p in model.parameters())), ("inclora", None)):
        method, memory = get("lwf", on=on, first_task=True), Memory()
        method.begin_task(model, tasks[0], memory)
        expected = expected or sum(p.nbytes for n, p in model.named_parameters() if "lora_" in n)
        assert method.held_bytes() == expected
        model = method.end_task(model, tasks[0], memory)
        assert method.held_bytes() == 0


def test_lwf_leaves_the_first_task_alone_unless_it_is_told_not_to(loaded, tasks):
    model, _ = loaded
    for first_task in (False, True):
        method = get("lwf", first_task=first_task)
        method.begin_task(model, tasks[0], Memory())
        assert bool(method.old) is first_task


@pytest.mark.parametrize("bf16", [False, True])
def test_lwf_in_a_run_begins_at_zero_and_keeps_the_mode(bf16, small_run, monkeypatch):
    """The old model is run as the new one is: under autocast too, or its answers would differ from the start."""
    import forgetless.methods.lwf as lwf

    seen = []
    monkeypatch.setattr(lwf, "distillation", lambda *a: seen.append(distillation(*a)) or seen[-1])
    config = small_run({"name": "lwf"}, tasks=("colour", "animal"))
    fl.run(config | {"train": config["train"] | {"bf16": bf16}})
    losses = [float(loss.detach()) for loss in seen]
    assert len(losses) == 6 and abs(losses[0]) < 1e-6 < 1e-4 < min(losses[1:])


def test_lwf_runs_the_old_model_without_dropout_and_leaves_the_mode_as_it_was(loaded, tasks):
    model, tokenizer = loaded
    method = get("lwf", first_task=True)
    method.begin_task(model, tasks[0], Memory())
    modes = []
    model.model.layers[1].register_forward_pre_hook(lambda module, args: modes.append((module.training, torch.is_grad_enabled())))
    model.train()
    penalty(method, model, batch_of(model, [tasks[0].encode(tokenizer, tasks[0].train[0])]))
    assert modes == [(True, True), (False, False)] and model.training


def test_lwf_refuses_bad_values():
    for bad in ({"strength": -1}, {"temperature": 0}, {"on": "lwf"}, {"first_task": "perhaps"}):
        with pytest.raises(ConfigError, match="method lwf"):
            get("lwf", **bad)


@pytest.mark.parametrize("name", ["ewc", "lwf"])
@pytest.mark.parametrize("on", ["seqft", "inclora", "osft"])
def test_what_later_tasks_hold_is_planned_in_the_first(name, on, loaded, tasks):
    model, tokenizer = loaded
    method, memory = get(name, on=on), Memory()
    method.begin_task(model, tasks[0], memory)
    planned, method.tokenizer = method.statistics_bytes(model), tokenizer
    assert method.held_bytes() == 0 < planned
    model = method.end_task(model, tasks[0], memory)
    method.begin_task(model, tasks[1], memory)
    assert (method.held_bytes(), method.statistics_bytes(model)) == (planned, 0)


def test_methods_go_beside_one_another(small_run):
    """ewc over lwf over inclora: both penalties are added, each keeps its own, and what is left is a plain model."""
    method = {"name": "ewc", "strength": 1e4, "on": {"name": "lwf", "on": {"name": "inclora", "lora_rank": 4}}}
    result = fl.run(small_run(method, tasks=("colour", "animal")))
    memory = load_memory(result.path / "tasks" / "01-animal" / "state")
    assert memory.info["ewc"]["tasks"] == memory.info["lwf"]["tasks"] == 2 and memory.of("ewc") and not memory.of("lwf")
    one = get("ewc", **{k: v for k, v in method.items() if k != "name"})
    assert [m.name for m in one.inner()] == ["lwf", "inclora"] and one.whole_gradients and one.inner()[1].whole_gradients


@pytest.mark.parametrize("outer", ["ewc", "lwf"])
def test_nested_penalties_are_their_sum(outer, loaded, tasks):
    model, tokenizer = loaded
    options = {"name": "lwf", "on": {"name": "ewc", "strength": 1e4}} if outer == "lwf" else {"name": "ewc", "strength": 1e4, "on": "lwf"}
    both, memory = get(**options), Memory()
    model = trained(both, model, tokenizer, tasks[0], memory)
    last = copy.deepcopy(model).eval()
    both.begin_task(model, tasks[1], memory)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    batch = batch_of(model, [tasks[1].encode(tokenizer, tasks[1].train[0])])
    whole, _ = penalty(both, model, batch)
    kept = memory.of("ewc")
    with torch.no_grad():
        alone = 5e3 * sum((kept[f"{n}:S"] * (p - kept[f"{n}:c"]).square()).sum() for n, p in model.named_parameters())
        (new, target, _), (old, _, _) = answer_logits(model, batch), answer_logits(last, batch)
        lwf = distillation(new, old, target != -100, 2.0)
    assert float(lwf) > 1e-3 and float(alone) > 1e-3 and float(whole) == pytest.approx(float(lwf + alone), rel=1e-4)


# -- lines -----------------------------------------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """Blocks of one linear layer each in stacks, and a head outside them."""

    def __init__(self, **stacks: int):
        super().__init__()
        for name, blocks in stacks.items():
            part = nn.Module()
            part.block = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(3, 3)}) for _ in range(blocks))
            setattr(self, name, part)
        self.head = nn.Linear(3, 2)


def settled(method, model, moves, memory=None, task=None):
    """A task that adds moves[name] to each weight; every weight's change after it, by name."""
    before, memory = weights(model), Memory() if memory is None else memory
    model = method.begin_task(model, task, memory)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(moves[name] if isinstance(moves, dict) else moves)
    model = method.end_task(model, task, memory)
    return {name: p - before[name] for name, p in weights(model).items()}


def test_lines_scales_of_four_blocks():
    """alpha 0.4, beta 0.6: 0.4, 0.6, 0.8, 1.0, and outside 0.4. Given both, 0.1 + 0.3 l / 3."""
    model = Blocks(decoder=4).double()
    for options, expected in (({"alpha": 0.4}, (0.4, 0.6, 0.8, 1.0)), ({"alpha": 0.1, "beta": 0.3}, (0.1, 0.2, 0.3, 0.4))):
        change = settled(get("lines", **options), model, 2.0)
        for name, d in change.items():
            share = expected[int(name.split(".")[2])] if "block" in name else expected[0]
            torch.testing.assert_close(d, torch.full_like(d, 2.0 * share), rtol=0, atol=1e-12)
    one = settled(get("lines", alpha=0.25), Blocks(decoder=1).double(), 1.0)
    assert {n: float(d.mean()) for n, d in one.items()} == pytest.approx({n: 1.0 if "block" in n else 0.25 for n in one})


def test_lines_counts_the_depth_of_each_stack():
    change = settled(get("lines", alpha=0.0), Blocks(encoder=3, decoder=2).double(), 1.0)
    found = {n.removesuffix(".up.weight"): float(d.mean()) for n, d in change.items() if n.endswith("up.weight")}
    expected = {"encoder.block.0": 0.0, "encoder.block.1": 0.5, "encoder.block.2": 1.0, "decoder.block.0": 0.0, "decoder.block.1": 1.0}
    assert found == pytest.approx(expected)


def test_lines_is_exact_where_all_or_nothing_is_kept(loaded):
    model, _ = loaded
    with_lines, without = copy.deepcopy(model), copy.deepcopy(model)
    settled(get("lines", alpha=1.0), with_lines, 0.1)
    settled(get("seqft"), without, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(with_lines.parameters(), without.parameters(), strict=True))
    none = settled(get("lines", alpha=0.0), model, 0.1)
    assert all(bool((d == 0).all()) == ("layers.1" not in n) for n, d in none.items())


@pytest.mark.parametrize("on", ["inclora", "lora", "seqft"])
def test_lines_takes_the_change_of_one_task_from_the_last_commit(on, loaded, tasks, tiny):
    """Also of an adapter that goes on from task to task: what is committed is the scaled weight, and the next task begins there."""
    plain, model = (AutoModelForCausalLM.from_pretrained(tiny) for _ in range(2))
    base, tokenizer = weights(model), loaded[1]
    torch.manual_seed(0)
    whole = weights(trained(get(on), plain, tokenizer, tasks[0], Memory()))
    torch.manual_seed(0)
    method, memory = get("lines", on=on, alpha=0.5), Memory()
    model = trained(method, model, tokenizer, tasks[0], memory)
    after = weights(model)
    name = "model.layers.{}.self_attn.q_proj.weight"
    torch.testing.assert_close(
        after[name.format(0)] - base[name.format(0)], 0.5 * (whole[name.format(0)] - base[name.format(0)]), rtol=1e-3, atol=1e-7
    )
    assert torch.equal(after[name.format(1)], whole[name.format(1)])
    assert method.kind == "plain" and "adapter_config" not in memory.info and not method.start
    method.begin_task(model, tasks[1], memory)
    begun = {n: p.detach() for n, p in current(model, [name.format(0), name.format(1)]).items()}
    for n, p in begun.items():
        torch.testing.assert_close(p, after[n], rtol=0, atol=1e-7)
        torch.testing.assert_close(method.start[n], after[n], rtol=0, atol=1e-7)


def test_lines_keeps_protected_spaces_protected(loaded, tasks):
    """A scaled change that is permitted is permitted: dW V is as good as zero after it."""
    model, tokenizer = loaded
    method, memory = get("lines", on={"name": "gorp", "energy": 0.5}), Memory()
    model = trained(method, model, tokenizer, tasks[0], memory)
    spaces, before = {n: s.basis.clone() for n, s in memory.spaces().items()}, weights(model)
    after = weights(trained(method, model, tokenizer, tasks[1], memory))
    for name, V in spaces.items():
        D = after[f"{name}.weight"] - before[f"{name}.weight"]
        assert V.shape[1] and float(torch.linalg.norm(D @ V)) < 1e-5 * float(torch.linalg.norm(D)) + 1e-6


def test_lines_and_merge_refuse_bad_values():
    for name, bad in (("lines", {"alpha": -0.1}), ("lines", {"on": "lines"}), ("merge", {"rule": "slerp"}), ("merge", {"start": "first"}), ("merge", {"keep": 0}),
                      ("merge", {"drop": 1.0}), ("merge", {"rate": 0}), ("merge", {"scale": 0})):  # fmt: skip
        with pytest.raises(ConfigError, match=f"method {name}"):
            get(name, **bad)
    with pytest.raises(ConfigError, match="plain sequential training"):
        get("merge", rule="arithmetic", start="merged")
    for name in ("lines", "merge"):
        with pytest.raises(ConfigError, match="leaves several models"):
            get(name, on="routed").check(nn.Linear(2, 2))


# -- merge -----------------------------------------------------------------------------------------------------------------------------


class Numbers(nn.Module):
    """A model of one weight."""

    def __init__(self, values):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values, dtype=torch.float64))


def merged(vectors, base=None, **options):
    """(what is committed after each task, what each began from), where task i adds vectors[i] to what it begins from."""
    model, method, memory = Numbers(base or [0.0] * len(vectors[0])), get("merge", **options), Memory()
    committed, begun = [], []
    for tau in vectors:
        model = method.begin_task(model, None, memory)
        begun.append(model.w.detach().tolist())
        with torch.no_grad():
            model.w.add_(torch.tensor(tau, dtype=torch.float64))
        model = method.end_task(model, None, memory)
        committed.append(model.w.detach().tolist())
    return committed, begun


def test_merge_rules_by_hand():
    """Three tasks on one weight, theta_0 = 10: +6, then -3, then +9."""
    taus = [[6.0], [-3.0], [9.0]]

    def of(**options):
        return [[row[0] for row in rows] for rows in merged(taus, [10.0], **options)]

    assert of(rule="average") == [[16.0, 14.5, pytest.approx(14.5 + 9 / 3)], [10.0, 16.0, 14.5]]
    assert of(rule="average", start="last") == [[16.0, 14.5, pytest.approx((16 + 13 + 22) / 3)], [10.0, 16.0, 13.0]]
    assert of(rule="average", start="pretrained") == [[16.0, 11.5, pytest.approx(14.0)], [10.0, 10.0, 10.0]]
    assert of(rule="ema", rate=0.25) == [[11.5, 10.75, 13.0], [10.0, 11.5, 10.75]]
    assert of(rule="arithmetic", scale=0.5) == [[13.0, 11.5, 16.0], [10.0, 10.0, 10.0]]
    assert of(rule="arithmetic", start="last", scale=0.5) == [[13.0, 11.5, 16.0], [10.0, 16.0, 13.0]]
    assert of(rule="magmax") == [[16.0, 16.0, 22.0], [10.0, 16.0, 13.0]]  # 6, 3, 12 from theta_0
    assert of(rule="magmax", start="pretrained") == [[16.0, 16.0, 19.0], [10.0, 10.0, 10.0]]
    assert of(rule="ties", keep=1.0) == [[16.0, 16.0, 17.5], [10.0, 10.0, 10.0]]  # 6; 6 (the sum is +3); (6 + 9) / 2
    assert of(rule="dare", drop=0.0) == [[16.0, 13.0, 22.0], [10.0, 10.0, 10.0]]


def test_magmax_takes_of_each_entry_the_largest_change():
    """Signs are kept; 2 and -2 are alike in size, so the earlier one stays."""
    committed, _ = merged([[1.0, -4.0, 2.0, 0.0], [-3.0, 1.0, -2.0, 0.5]], rule="magmax", start="pretrained", scale=0.5)
    assert committed[-1] == [-1.5, -2.0, 1.0, 0.25]


def test_ties_on_a_worked_example():
    """Two vectors of ten entries, keep 0.4: each keeps its four largest; then signs by the sum, then the mean of those that agree."""
    a = [5.0, -4.0, 3.0, 2.5, 0.1, -0.2, 0.3, 0.0, 0.1, -0.1]
    b = [3.0, 6.0, -2.0, 0.2, 0.4, 0.1, 0.1, -5.0, 0.0, 0.2]
    #    5,3   -4,6  3,-2   2.5,-                     -,-5
    committed, _ = merged([a, b], rule="ties", keep=0.4)
    assert committed[-1] == [4.0, 6.0, 3.0, 2.5, 0.0, 0.0, 0.0, -5.0, 0.0, 0.0]


def test_ties_is_mergekit_s():
    committed, _ = merged(GOLDEN["vectors"], rule="ties")
    assert committed[-1] == pytest.approx(GOLDEN["ties"], abs=1e-12)


def test_ties_trims_all_weights_together(loaded):
    """The paper keeps the largest entries of the whole vector: a weight that hardly moved keeps none."""
    model, _ = loaded
    small = {n: 1e-6 * torch.randn_like(p) for n, p in model.named_parameters()}
    name = "model.layers.1.mlp.up_proj.weight"
    change = settled(get("merge", rule="ties", keep=0.01), model, small | {name: torch.randn_like(small[name])})
    assert all(bool((d == 0).all()) == (n != name) for n, d in change.items())
    count, whole = int((change[name] != 0).sum()), sum(p.numel() for p in model.parameters())
    assert count == int(0.01 * whole)


def test_cut_of_is_the_kth_largest():
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        vectors = [torch.randn(7, 11, generator=g, dtype=dtype), torch.randn(50, generator=g, dtype=dtype), torch.zeros(3, dtype=dtype)]
        sizes = torch.cat([v.abs().flatten() for v in vectors]).sort(descending=True).values
        for share in (0.001, 0.2, 0.5, 1.0):
            assert cut_of(vectors, share) == float(sizes[max(1, int(share * len(sizes))) - 1])


def test_dare_keeps_the_mean_and_drops_what_it_says():
    tau = torch.full((200, 500), 0.3, dtype=torch.float64)
    found = dropped(tau, 0.9, torch.Generator().manual_seed(0))
    assert found.unique().tolist() == pytest.approx([0.0, 3.0])
    assert float(found.mean()) == pytest.approx(0.3, rel=0.02) and float((found == 0).double().mean()) == pytest.approx(0.9, abs=0.005)
    one, two, other = (dropped(tau, 0.9, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    model, seeds, method = Numbers([0.0] * 100), [], get("merge", rule="dare")
    for seed in (3, 4):  # the loop sets one a task, also before it goes on with one
        torch.manual_seed(seed)
        method.begin_task(model, None, Memory())
        seeds.append(method.seed)
        torch.manual_seed(seed)
        method.resume_task(model, None, Memory(), {})
        seeds.append(method.seed)
    assert seeds == [3, 3, 4, 4]


@pytest.mark.parametrize("rule", ["average", "ema", "arithmetic", "dare", "magmax", "ties"])
@pytest.mark.parametrize("start", ["pretrained", "last", "merged"])
def test_merge_memory_does_not_grow(rule, start):
    model, method, memory = (
        Numbers([1.0, 2.0]),
        get("merge", rule=rule, start=start, **({} if rule in ("average", "ema") else {"scale": 0.5})),
        Memory(),
    )
    kept = []
    for _ in range(3):
        settled(method, model, 1.0, memory)
        kept.append({k: (t.dtype, t.shape) for k, t in memory.tensors.items()})
    assert kept[0] == kept[1] == kept[2]
    assert len(kept[0]) == {"magmax": 2, "ties": 5}.get(rule, start == "pretrained") + (start == "last")


@pytest.mark.parametrize("options", [{"rule": "average", "start": "last"}, {"rule": "ties", "keep": 1.0}, {"rule": "dare"}])
@pytest.mark.parametrize("on", ["inclora", "lora"])
def test_merge_beside_adapters_begins_where_it_says(options, on, loaded, tasks):
    model, tokenizer = loaded
    base = weights(model)
    method, memory = get("merge", on=on, **options), Memory()
    ends = []
    end = method.on.end_task
    method.on.end_task = lambda *a: ends.append(weights(out := end(*a))) or out
    model = trained(method, model, tokenizer, tasks[0], memory)
    method.begin_task(model, tasks[1], memory)
    names = [n for n in base if "q_proj" in n or "v_proj" in n]
    expected = ends[0] if options.get("start") == "last" else base
    for n, p in current(model, names).items():
        torch.testing.assert_close(p.detach(), expected[n], rtol=0, atol=1e-6)
    assert set(method.start) == set(names)


def test_merge_says_which_rules_keep_a_promise():
    on = {"name": "gorp"}
    assert get("merge", on=on).constrained and get("merge", on=on, rule="ema").constrained and not get("merge").constrained
    assert (
        not any(get("merge", on=on, rule=rule).constrained for rule in ("ties", "magmax", "dare"))
        and not get("merge", on=on, start="last").constrained
    )
