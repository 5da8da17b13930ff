"""Methods that are an optimizer at heart: BAdam, TreeLoRA, EsaCL, and the states that seqft's Adam may be kept in (GaLore, Fira, APOLLO)."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path

import pytest
import torch
from conftest import make_model_folder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import forgetless as fl
from forgetless.adapters import adapters, factors
from forgetless.batches import answer_loss
from forgetless.errors import ConfigError
from forgetless.methods import get
from forgetless.methods._statistics import batch_of, fisher
from forgetless.methods.base import Memory
from forgetless.methods.esacl import critical, least
from forgetless.methods.treelora import Node, direction, grow
from forgetless.models import linear_modules, logical
from forgetless.optim import SubspaceAdamW
from forgetless.optim.badam import BAdam, sigma_step
from forgetless.optim.scaled import ScaledAdamW
from forgetless.subspace import Constraint
from forgetless.tasks import Example, Task


@pytest.fixture
def loaded(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)


def some_task() -> Task:
    rows = [Example("cat red", "red", 0), Example("dog runs happy", "blue", 1)]
    return Task("t", "{sentence}", rows, rows, rows)


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 30, (4, 12), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.index_fill(1, torch.tensor([0]), -100)}


def learn(model, tokenizer, method, memory, steps=3, **optimizer):
    """One task without the Trainer. Returns the optimizer."""
    method.tokenizer = tokenizer
    method.begin_task(model, some_task(), memory)
    opt = method.optimizer(method.param_groups(model), **{"lr": 1e-2} | optimizer)
    for step in range(steps):
        model.zero_grad()
        loss, outputs = answer_loss(model, batch(step))
        extra = method.extra_loss(model, batch(step), outputs)
        (loss if extra is None else loss + extra).backward()
        method.on_step(model)
        opt.step()
    method.end_task(model, some_task(), memory)
    return opt


# -- BAdam -------------------------------------------------------------------------------------------------------------------------------


def test_badam_s_sigma_step_by_hand():
    """sigma = 1, h = 1.5: sqrt(1 + 0.75^2) = 1.25, less 0.75; and as far up for -h. Positive where the formula as written is 0 in fp32."""
    torch.testing.assert_close(sigma_step(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.5, -1.5, 0.0])), torch.tensor([0.5, 2.0, 2.0]))
    sigma, h = torch.tensor([1e-2]), torch.tensor([1e7])
    assert float(sigma * (1 + (sigma * h / 2) ** 2).sqrt() - sigma**2 * h / 2) == 0.0
    assert float(sigma_step(sigma, h)) == pytest.approx(1e-7, rel=1e-3)  # 1 / h


def test_badam_s_two_steps_by_hand():
    """mu, sigma and the moments, written out; lr is the first step of a weight at sigma_0, and a quarter of it at half of sigma_0."""
    p, q = (torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64)) for _ in range(2))
    opt = BAdam([p, q], lr=0.1, betas=(0.5, 0.5), eps=0.0, sigma=0.5, prior={q: torch.tensor([0.25], dtype=torch.float64)}, seed=7)
    eps = [float(opt.noise(t, i)) for i, t in enumerate((p, q))]
    assert p.item() == 1 + 0.5 * eps[0] and q.item() == 1 + 0.25 * eps[1] and eps[0] != eps[1]
    p.grad, q.grad, opt.evidence = torch.tensor([2.0]).double(), torch.tensor([-2.0]).double(), 3.0
    opt.step()
    assert [float(opt.state[t]["mean"]) for t in (p, q)] == pytest.approx([0.9, 1.025])
    h = 3 * 2 * eps[0]
    assert float(opt.state[p]["sigma"]) == pytest.approx(0.5 * math.sqrt(1 + (0.5 * h / 2) ** 2) - 0.25 * h / 2)
    sigma = float(opt.state[p]["sigma"])
    assert p.item() == pytest.approx(0.9 + sigma * float(opt.noise(p, 0))) and float(opt.noise(p, 0)) != eps[0]
    p.grad = torch.tensor([4.0]).double()
    opt.step()
    m_hat, v_hat = (0.5 * 1.0 + 0.5 * 4) / 0.75, (0.5 * 2.0 + 0.5 * 16) / 0.75  # m = 1 and v = 2 after the first
    assert float(opt.state[p]["mean"]) == pytest.approx(0.9 - 0.1 * (sigma / 0.5) ** 2 * m_hat / math.sqrt(v_hat))
    opt.rest()
    assert torch.equal(p.detach(), opt.state[p]["mean"])


def test_badam_s_precision_grows_by_the_curvature_of_what_it_has_seen():
    """The loss c w^2 / 2, the mean over N terms: after T steps the posterior's precision is 1 / sigma_0^2 + T N c, which sigma's steps have to find without being told."""
    N, c, T, sigma = 50, 2.0, 200, 0.1
    w = torch.nn.Parameter(torch.zeros(4000, dtype=torch.float64))
    opt = BAdam([w], lr=0.0, sigma=sigma)
    opt.evidence = N
    for _ in range(T):
        w.grad = c * w.detach()
        opt.step()
    assert float((opt.state[w]["sigma"].log().mean() * -2).exp()) == pytest.approx(1 / sigma**2 + T * N * c, rel=0.05)


def test_badam_goes_on_from_a_file_where_it_was():
    def run(steps: int, opt, w):
        for _ in range(steps):
            w.grad = torch.full_like(w, 0.1 * (opt.state[w]["step"] + 1))
            opt.step()

    w = torch.nn.Parameter(torch.ones(5))
    opt = BAdam([w], lr=0.1, seed=3)
    run(2, opt, w)
    buffer = io.BytesIO()
    torch.save((opt.state_dict(), w.detach()), buffer)
    buffer.seek(0)
    state, drawn = torch.load(buffer, weights_only=True)
    run(2, opt, w)
    again = torch.nn.Parameter(drawn)
    other = BAdam([again], lr=0.1, seed=3)
    other.load_state_dict(state)
    with torch.no_grad():
        again.copy_(drawn)
    run(2, other, again)
    assert torch.equal(w, again) and torch.equal(opt.state[w]["sigma"], other.state[again]["sigma"])


def test_badam_answers_with_mu_and_leaves_mu_and_sigma_to_the_next_task(loaded):
    model, tokenizer = loaded
    plain = {n: p.detach().clone() for n, p in model.named_parameters()}
    method, memory = get("badam", lora_dropout=0.0, sigma=0.02), Memory()
    opt = learn(model, tokenizer, method, memory)
    assert opt.evidence == 4 * 11  # answer tokens of the last step
    states = {name: opt.state[p] for group in opt.param_groups for name, p in zip(group["names"], group["params"], strict=True)}
    layer = "model.layers.0.self_attn.q_proj"
    A, B = (states[f"{layer}.lora_{letter}"] for letter in "AB")
    found = model.get_parameter(f"{layer}.weight") - plain[f"{layer}.weight"]
    torch.testing.assert_close(found, 4.0 * B["mean"] @ A["mean"], atol=1e-6, rtol=1e-4)  # s = 32 / 8; not of the last draw
    assert torch.equal(memory.tensors[f"base_model.model.{layer}.lora_A.weight"], A["mean"])
    assert torch.equal(memory.of("badam")[f"{layer}.lora_B"], B["sigma"]) and not torch.all(B["sigma"] == 0.02)

    method.begin_task(model, some_task(), memory)
    second = method.optimizer(method.param_groups(model), lr=1e-2)
    p = factors(adapters(model)[layer])[0]
    assert torch.equal(second.state[p]["mean"], A["mean"]) and torch.equal(second.state[p]["sigma"], A["sigma"])
    assert not torch.equal(p, A["mean"])  # it trains on draws


def test_badam_counts_the_answer_tokens_of_all_micro_batches_once():
    method = get("badam")
    method.trained = BAdam([torch.nn.Parameter(torch.ones(1))])
    for _ in range(2):
        method.extra_loss(None, {"labels": torch.tensor([[-100, 4, 5], [-100, -100, 6]])}, None)
    for expected in (6.0, 0.0):
        method.on_step(torch.nn.Linear(1, 1))
        assert method.trained.evidence == expected


def test_badam_s_state_is_an_adapter_that_peft_reads(small_run, tiny):
    from peft import PeftModel

    result = fl.run(small_run("badam", tasks=("colour",)))
    folder = result.path / "tasks" / "00-colour"
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), folder / "state").merge_and_unload()
    for (_, a), (_, b) in zip(merged.named_parameters(), AutoModelForCausalLM.from_pretrained(folder / "model").named_parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_badam_refuses_what_has_no_meaning(loaded):
    with pytest.raises(ConfigError, match="sigma: Input should be greater than 0"):
        get("badam", sigma=0)
    with pytest.raises(ConfigError, match=r"q_prj.*matches no linear layer.*q_proj"):
        get("badam", lora_modules=["q_prj"]).check(loaded[0])
    with pytest.raises(ValueError, match="bfloat16 is rounded by more than its sigma"):
        BAdam([torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))])
    with pytest.raises(ValueError, match="sigma=0 must be positive"):
        BAdam([torch.nn.Parameter(torch.ones(2))], sigma=0)


# -- TreeLoRA ----------------------------------------------------------------------------------------------------------------------------


def distances(*directions: list[float]) -> torch.Tensor:
    X = torch.tensor(directions, dtype=torch.float64)
    return torch.cdist(X, X, p=1)


def groups(node: Node) -> list:
    return sorted(node.tasks) if not node.children else [groups(child) for child in node.children]


def test_treelora_s_tree_finds_groups_of_gradients():
    """At the first layer tasks 0, 2, 4 point one way and 1, 3 the other; at the second 2 stands apart from 0 and 4."""
    first = distances([1, 0, 0.1], [0, 1, 0], [1, 0, 0], [0, 1, 0.1], [1, 0.1, 0])
    second = distances([1, 0], [1, 0], [0, 1], [0, 1], [0.9, 0.1])
    assert groups(grow([first, second], [0, 1, 2, 3, 4])) == [[[0, 4], [2]], [[1], [3]]]
    assert groups(grow([first], [0, 1, 2, 3, 4])) == [[0, 2, 4], [1, 3]]  # one level: leaves of several tasks
    # equal groups, each as far from the mean of all: only the distances between tasks tell them apart
    assert groups(grow([distances([1, 0], [0, 1], [1, 0], [0, 1])], [0, 1, 2, 3])) == [[0, 2], [1, 3]]
    assert groups(grow([distances([1, 0], [1, 0]), distances([1, 0], [0, 1])], [0, 1])) == [[0], [1]]  # alike at the first layer
    assert groups(grow([distances([1, 0], [1, 0])], [0, 1])) == [0, 1] and groups(grow([distances([1, 0])], [0])) == [0]


def test_treelora_s_bound_by_hand():
    method = get("treelora")
    method.steps, method.seen, method.counts = 9, torch.tensor([[1.0], [0.9], [0.0]]), torch.tensor([[4], [2], [0]])
    assert method.bound([0], 0) == pytest.approx(1.0 / 4 - 2 * math.sqrt(math.log(9) / 4))
    assert method.bound([0, 1], 0) == pytest.approx(1.9 / 6 - 2 * math.sqrt(math.log(9) / 6))
    assert method.bound([2], 0) == -math.inf
    method.tree = Node([0, 1, 2], [Node([0, 1], [Node([0]), Node([1])]), Node([2])])
    assert method.pick(0) == 2  # not looked at yet
    method.counts[2], method.seen[2] = 9, 0.9
    assert method.pick(0) == 1  # 0 and 1 together are the least known, and of them 1
    method.options.exploration = 0.0
    assert method.pick(0) == 2  # the nearest so far


@pytest.fixture
def third_task(loaded):
    """(method in its third task, model, {layer: the gradient it is given}): layer by layer the new gradient points the way the second task's did, not the first's."""
    model, tokenizer = loaded
    method, memory = get("treelora", lora_dropout=0.0), Memory()
    learn(model, tokenizer, method, memory)
    generator = torch.Generator().manual_seed(0)
    known = {name: torch.randn(2, X.shape[1], generator=generator) for name, X in memory.of("treelora").items()}
    memory.put("treelora", {name: X / X.abs().sum(1, keepdim=True) for name, X in known.items()})
    method.begin_task(model, some_task(), memory)

    def gradients() -> dict[str, torch.Tensor]:
        for name, layer in adapters(model).items():
            g = 3 * known[name][1] + 0.3 * torch.randn(known[name].shape[1], generator=generator)
            for factor, part in zip(factors(layer), g.split([f.numel() for f in factors(layer)]), strict=True):
                factor.grad = part.reshape(factor.shape).clone()
        return {name: torch.cat([f.grad.reshape(-1) for f in factors(layer)]) for name, layer in adapters(model).items()}

    return method, model, gradients


def test_treelora_pulls_the_gradient_toward_the_picked_task_s(third_task):
    method, model, gradients = third_task
    raw = gradients()
    method.on_step(model)
    for index, (name, layer) in enumerate(adapters(model).items()):
        (task,) = method.counts[:, index].nonzero()[0].tolist()
        turned = torch.cat([f.grad.reshape(-1) for f in factors(layer)])
        torch.testing.assert_close(turned, raw[name] + 0.5 * raw[name].abs().sum() * method.known[name][task])
        assert float(method.seen[task, index]) == pytest.approx(float((direction(raw[name]) - method.known[name][task]).abs().sum() / 2), rel=1e-5)
        assert torch.equal(method.sums[name], raw[name])  # what is kept is the task's own gradient


def test_treelora_s_bandit_settles_on_the_task_of_like_gradients(third_task):
    method, model, gradients = third_task
    method.options.exploration = 0.5
    for _ in range(40):
        gradients()
        method.on_step(model)
    assert method.counts.sum(0).tolist() == [40] * len(method.layers)
    assert int(method.counts[1].min()) > 30 and int(method.counts[0].min()) > 0
    buffer, resumed = io.BytesIO(), get("treelora", exploration=0.5)
    torch.save(method.state_dict(), buffer)
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert [resumed.bound([task], layer) for task in (0, 1) for layer in range(4)] == [
        method.bound([task], layer) for task in (0, 1) for layer in range(4)
    ]


def test_treelora_keeps_the_mean_direction_of_real_gradients(loaded):
    model, tokenizer = loaded
    method, memory, seen = get("treelora", lora_dropout=0.0), Memory(), []
    on_step = method.on_step
    method.on_step = lambda model: seen.append({n: [f.grad.clone() for f in factors(x)] for n, x in adapters(model).items()}) or on_step(model)
    learn(model, tokenizer, method, memory)
    learn(model, tokenizer, method, memory)
    for name, kept in memory.of("treelora").items():
        assert kept.shape[0] == 2
        for row, steps in zip(kept, (seen[:3], seen[3:]), strict=True):
            total = sum(torch.cat([g.reshape(-1) for g in step[name]]) for step in steps)
            torch.testing.assert_close(row, total / total.abs().sum())
        assert f"base_model.model.{name}.lora_A.weight" in memory.tensors


def test_treelora_without_a_pull_is_lora(loaded):
    model, tokenizer = loaded
    ends = []
    for options in ({"name": "lora"}, {"name": "treelora", "reg": 0.0}):
        mine, memory = copy.deepcopy(model), Memory()
        for _ in range(2):
            torch.manual_seed(0)
            learn(mine, tokenizer, get(**options, lora_dropout=0.0), memory)
        ends.append(mine.state_dict())
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_treelora_refuses_bad_options(loaded):
    with pytest.raises(ConfigError, match="reg: Input should be greater than or equal to 0"):
        get("treelora", reg=-1)
    with pytest.raises(ConfigError, match=r"q_prj.*matches no linear layer.*q_proj"):
        get("treelora", lora_modules=["q_prj"]).check(loaded[0])


# -- EsaCL -------------------------------------------------------------------------------------------------------------------------------


def test_esacl_s_mask_by_hand():
    """s = F W^2: [[1, 0.04], [9, 0.01]]. Of four weights half; then of the three that are free a third, which is not the least of all."""
    W, F = torch.tensor([[1.0, 2.0], [3.0, -0.1]]), torch.tensor([[1.0, 0.01], [1.0, 1.0]])
    assert least(F * W**2, None, 0.5).tolist() == [[False, True], [False, True]]
    assert least(F * W**2, torch.tensor([[True, True], [True, False]]), 0.34).tolist() == [[False, True], [False, False]]
    assert not least(F * W**2, torch.zeros(2, 2, dtype=torch.bool), 0.5).any()


def test_esacl_steps_aside_toward_higher_loss_and_back():
    """g = (3, 4) of length 5 over two tensors together, rho = 0.5: W + (0.3, 0.4). The next step is taken from W."""
    method = get("esacl", rho=0.5)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(1, 1, bias=False) for name in "ab"}).double()
    a, b = model["a"].weight, model["b"].weight
    opt = method.optimizer([{"params": [a, b], "names": ["a.weight", "b.weight"]}], lr=0.1, betas=(0.0, 0.0), eps=0.0)
    for weight in (a, b):
        torch.nn.init.ones_(weight)
    a.grad, b.grad = torch.tensor([[3.0]]).double(), torch.tensor([[4.0]]).double()
    method.on_step(model)
    opt.step()
    assert (a.item(), b.item()) == pytest.approx((0.9 + 0.3, 0.9 + 0.4))
    assert {name: W.item() for name, W in method.state_dict().items()} == pytest.approx({"a.weight": 0.9, "b.weight": 0.9})
    a.grad, b.grad = torch.tensor([[-1.0]]).double(), torch.tensor([[2.0]]).double()
    method.on_step(model)
    assert (a.item(), b.item()) == pytest.approx((0.9, 0.9)) and not method.state_dict()
    opt.step()
    assert (a.item(), b.item()) == pytest.approx((1.0 - 0.5 / 5**0.5, 0.8 + 1.0 / 5**0.5))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_esacl_what_is_pruned_is_zero_and_only_that_is_trained_by_the_next_task(kind, tmp_path):
    folder = make_model_folder(tmp_path / "m", kind=kind)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    method, memory, flat = get("esacl", prune=0.25, rows=2), Memory(), {}
    end = method.end_task
    method.end_task = lambda *given: flat.update(method.flat) or end(*given)
    learn(model, tokenizer, method, memory, lr=1e-3)
    first = {name: (logical(m.weight, m).detach().clone(), memory.of("esacl")[name]) for name, m in method.layers(model).items()}
    for W, free in first.values():
        assert int(free.sum()) == W.numel() // 4 and torch.equal(W == 0, free)
    for name, (W, free) in first.items():  # and what is left is W, not the place aside of it where its last gradient was to be taken
        assert torch.equal(W[~free], logical(flat[f"{name}.weight"], model.get_submodule(name))[~free])
    learn(model, tokenizer, method, memory, lr=1e-3, weight_decay=0.1)
    for name, layer in method.layers(model).items():
        (W, free), again, now = first[name], memory.of("esacl")[name], logical(layer.weight, layer).detach()
        assert torch.equal(now[~free], W[~free])  # closed: to the bit
        assert int(again.sum()) == int(free.sum()) // 4 and not (again & ~free).any()
        assert torch.equal(now == 0, again)  # what was pruned once and is kept now has learned
    assert method.report(memory)["share"] == pytest.approx(1 - 1 / 16, abs=0.01)


def test_esacl_prunes_what_the_task_needs_least(loaded):
    """Without the pruned weights the loss changes by little; without as many of the others by much."""
    model, tokenizer = loaded
    method, memory, task = get("esacl", modules=r".*layers\.0\.mlp\.down_proj", prune=0.3, rho=0.0, critical=1.0), Memory(), some_task()
    trained, end = [], method.end_task
    method.end_task = lambda model, *given: trained.append(copy.deepcopy(model)) or end(model, *given)
    learn(model, tokenizer, method, memory, steps=20, lr=1e-3)
    (name,), (whole,) = method.layers(model), trained
    W, rows = whole.get_parameter(f"{name}.weight"), [task.encode(tokenizer, row) for row in task.train]
    s = fisher(whole, rows, [f"{name}.weight"], answers="given")[f"{name}.weight"] * W.detach() ** 2
    assert torch.equal(memory.of("esacl")[name], least(s, None, 0.3))

    @torch.no_grad()
    def loss(mask: torch.Tensor) -> float:
        kept = W.detach().clone()
        W.masked_fill_(mask, 0)
        total = sum(float(answer_loss(whole.eval(), batch_of(whole, [row]))[0]) for row in rows)
        W.copy_(kept)
        return total

    base = loss(torch.zeros_like(s, dtype=torch.bool))
    assert 0 < abs(loss(least(s, None, 0.3)) - base) < 0.2 * abs(loss(least(-s, None, 0.3)) - base)


def test_esacl_looks_at_the_rows_of_largest_error(loaded):
    model, tokenizer = loaded
    task = some_task()
    rows = [task.encode(tokenizer, row) for row in task.train] + [{"input_ids": [4, 5, 6, 7], "labels": [-100, 5, 6, 7]}]
    errors = []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        p = model.eval()(ids).logits[0].softmax(-1)[:-1][labels[1:] != -100].detach()
        errors.append(float(((p - torch.nn.functional.one_hot(labels[1:][labels[1:] != -100], p.shape[1])) ** 2).sum()))
    worst = max(range(3), key=errors.__getitem__)
    assert critical(model, rows, 0.4) == [rows[worst]] and critical(model, rows, 1.0) == rows and critical(model, rows, 0.01) == [rows[worst]]


def test_esacl_says_when_nothing_is_left(loaded):
    memory = Memory()
    memory.put("esacl", {"model.layers.0.mlp.down_proj": torch.zeros(32, 48, dtype=torch.bool)})
    with pytest.raises(ConfigError, match="no weight is left for another task"):
        get("esacl").begin_task(loaded[0], None, memory)
    for options, message in (
        ({"prune": 1.0}, "prune: Input should be less than 1"),
        ({"modules": ["q_prj"]}, "q_prj.*matches no linear layer.*q_proj"),
    ):
        with pytest.raises(ConfigError, match=message):
            get("esacl", **options).check(loaded[0])


# -- seqft's states: GaLore, Fira, APOLLO --------------------------------------------------------------------------------------------------


def scaled(W: torch.nn.Parameter, form: str | None, **options) -> ScaledAdamW:
    settings = {"lr": 0.1, "betas": (0.0, 0.0), "eps": 0.0} | {
        key: options.pop(key) for key in ("lr", "betas", "eps", "weight_decay", "max_grad_norm") if key in options
    }
    return ScaledAdamW([{"params": [W], "form": form, "rank": 1, "refresh": "svd", "refresh_gap": 1000, "moments": "keep"} | options], **settings)


def stepped(opt: ScaledAdamW, *gradients: list[list[float]]) -> list[torch.Tensor]:
    """The changes of the one weight, step by step."""
    (W,) = opt.param_groups[0]["params"]
    moved = []
    for G in gradients:
        before, W.grad = W.detach().clone(), torch.tensor(G, dtype=W.dtype)
        opt.step()
        moved.append(W.detach() - before)
    return moved


G1 = [[3.0, 1.0], [1.0, 1.0], [1.0, 3.0]]  # strongest direction q = (1, 1) / sqrt 2: R = (4, 2, 4) / sqrt 2, beside it (1, -1), (0, 0), (-1, 1)
G2 = [[5.0, -1.0], [1.0, 1.0], [-1.0, 5.0]]  # the same R, and three times as much beside it


def test_fira_s_step_on_a_3_by_2_matrix_by_hand():
    """Without memory (betas 0) Adam's step in the coordinates is N = sign(R) = 1, so phi_i = 1 / |R_i| = sqrt 2 / (4, 2, 4)."""
    W = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    one, two = stepped(scaled(W, "fira"), G1, G2)
    root, beside = 0.5**0.5, torch.tensor([[1.0, -1.0], [0.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(one, -0.1 * (root + 2**0.5 / 4 * beside), atol=1e-8, rtol=0)
    # three times the norm, sqrt 2 / 2, of the step before; it may grow by a hundredth
    torch.testing.assert_close(two, -0.1 * (root + 1.01 * 2**0.5 / 4 * beside), atol=1e-8, rtol=0)


def test_apollo_s_step_on_a_3_by_2_matrix_by_hand():
    """P = (1, 0)^T: R is G's first column. Row i of G moves by 1 / |R_i|; as a whole (mini) by ||N|| / ||R|| = sqrt 3 / sqrt 11. A step may grow by a hundredth in norm."""
    G, H = torch.tensor(G1, dtype=torch.float64), torch.tensor([[3.0, 9.0], [1.0, 1.0], [1.0, 9.0]], dtype=torch.float64)
    for form, phi in (("apollo", torch.tensor([[1 / 3], [1.0], [1.0]], dtype=torch.float64)), ("apollo-mini", (3 / 11) ** 0.5)):
        W = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
        opt = scaled(W, form, scale=4.0)
        opt.projection = lambda *_: torch.tensor([[1.0], [0.0]], dtype=torch.float64)
        one, two = stepped(opt, G1, H.tolist())
        torch.testing.assert_close(one, -0.1 * 2 * phi * G, atol=1e-7, rtol=0)
        torch.testing.assert_close(two, -0.1 * 2 * phi * H * 1.01 * (phi * G).norm() / (phi * H).norm(), atol=1e-7, rtol=0)


def test_what_is_clipped_in_the_coordinates_is_clipped_beside_them():
    """Adam's step and phi times the rest do not depend on the gradient's length, however it came by it."""
    for form in ("fira", "apollo", "apollo-mini"):
        ends = []
        for norm in (None, 0.01):
            W = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
            stepped(scaled(W, form, max_grad_norm=norm), G1)
            ends.append(W.detach())
        torch.testing.assert_close(ends[0], ends[1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("form", ["fira", "apollo", "apollo-mini"])
def test_a_weight_stored_in_out_learns_as_one_stored_out_in(form):
    for shape, side in (((5, 3), "inputs"), ((3, 5), "outputs")):
        W, T = (torch.nn.Parameter(torch.linspace(-1, 1, 15).reshape(shape).clone()) for _ in range(2))
        T = torch.nn.Parameter(T.detach().mT.contiguous())
        ours = [scaled(W, form, side=side), scaled(T, form, side=side, transposed=True)]
        G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        stepped(ours[0], G.tolist(), (2 * G).tolist())
        stepped(ours[1], G.mT.tolist(), (2 * G).mT.tolist())
        torch.testing.assert_close(W.detach(), T.detach().mT, atol=1e-6, rtol=0)


def test_where_the_coordinates_hold_the_whole_gradient_fira_is_adamw():
    """A matrix of one column: Q is 1 or -1, nothing is beside it. With an eps that counts, where torch has it."""
    W, T = (torch.nn.Parameter(torch.ones(3, 1, dtype=torch.float64)) for _ in range(2))
    ours, theirs = scaled(W, "fira", betas=(0.9, 0.99), eps=0.5), torch.optim.AdamW([T], lr=0.1, betas=(0.9, 0.99), eps=0.5, weight_decay=0.0)
    for t in range(4):
        T.grad = gradient(T.shape, t).double()
        stepped(ours, T.grad.tolist())
        theirs.step()
        torch.testing.assert_close(W, T, atol=1e-12, rtol=0)


def test_decay_pulls_toward_the_start():
    W = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
    opt = scaled(W, "apollo", weight_decay=0.5, eps=1e-12)
    (one, two) = stepped(opt, G1, [[0.0, 0.0]] * 3)
    torch.testing.assert_close(two, -0.1 * 0.5 * one)


def gradient(shape: torch.Size, t: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(t)) * 1.5**t  # so that the limit is at work


PEERS = {  # form, rank, scale, steps between refreshes, as recorded
    "fira": ("fira", 2, 1.0, 3), "apollo-channel": ("apollo", 2, 1.0, 3), "apollo-tensor": ("apollo-mini", 1, 128.0, 3),
}  # fmt: skip
SHAPES = {"tall": ((5, 3), "inputs"), "wide": ((3, 5), "outputs")}
GOLDEN = Path(__file__).parent / "golden" / "scaled_adamw.safetensors"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PEERS)
def test_the_authors_packages_take_the_same_steps(name, shape):
    """tests/golden/scaled_adamw.safetensors: five steps of fira 1.0.2 and apollo_torch 1.0.3 with a tiny eps (which they add before the bias correction). Fira's wide matrix has
    one choice of directions: with kept moments the free sign of a singular vector matters at a second one, and the SVD of a transpose may give the other."""
    golden = load_file(GOLDEN)
    (form, rank, scale, gap), (size, side) = PEERS[name], SHAPES[shape]
    W = torch.nn.Parameter(torch.linspace(-1, 1, 15).reshape(size).clone())
    gap = 1000 if (name, shape) == ("fira", "wide") else gap
    opt = scaled(W, form, side=side, rank=rank, scale=scale, refresh_gap=gap, lr=1e-2, betas=(0.9, 0.999), eps=1e-12)
    for t in range(5):
        opt.projection = lambda *_, t=t: golden[f"{name}/{shape}/P{t}"]
        W.grad = gradient(W.shape, t)
        opt.step()
        torch.testing.assert_close(W.detach(), golden[f"{name}/{shape}/{t}"], atol=5e-7, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PEERS)
def test_the_golden_steps_are_the_authors_packages(name, shape):
    golden, (_, rank, scale, gap) = load_file(GOLDEN), PEERS[name]
    W = torch.nn.Parameter(torch.linspace(-1, 1, 15).reshape(SHAPES[shape][0]).clone())
    if name == "fira":
        fira = pytest.importorskip("fira.fira_adamw", reason="fira is not installed; its golden file is tested above")
        group = {"params": [W], "rank": rank, "update_proj_gap": 1000 if shape == "wide" else gap, "alpha": 1.0, "proj_type": "std"}
        opt = fira.AdamW([group], lr=1e-2, eps=1e-12, no_deprecation_warning=True)
    else:
        apollo = pytest.importorskip("apollo_torch.apollo", reason="apollo_torch is not installed; its golden file is tested above")
        group = {
            "params": [W],
            "rank": rank,
            "proj": "random",
            "scale_type": name.split("-")[1],
            "scale": scale,
            "update_proj_gap": gap,
            "proj_type": "std",
        }
        opt = apollo.AdamW([group], lr=1e-2, eps=1e-12)
    for t in range(5):
        W.grad = gradient(W.shape, t)
        opt.step()
        torch.testing.assert_close(W.detach(), golden[f"{name}/{shape}/{t}"], atol=1e-6, rtol=0)


def test_apollo_s_projection_is_of_variance_1_over_r_and_drawn_anew_at_each_gap():
    W = torch.nn.Parameter(torch.zeros(400, 300))
    opt = scaled(W, "apollo", rank=16, refresh_gap=2, eps=1e-8)
    (group,) = opt.param_groups
    drawn = []
    for _ in range(4):
        drawn.append(opt.projection(group, W, 0, 300))
        W.grad = torch.ones(400, 300)
        opt.step()
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[2], drawn[3]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].shape == (300, 16) and float(drawn[0].var()) == pytest.approx(1 / 16, rel=0.05)
    assert set(opt.state[W]) == {"step", "exp_avg", "exp_avg_sq", "updates", "beside"}  # P is not among them


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_seqft_s_low_rank_states_are_on_the_shorter_side_of_linear_layers_alone(kind, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model_folder(tmp_path / "m", kind=kind))
    bytes_of = {}
    for state in ("adam", "galore", "fira", "apollo", "apollo-mini"):
        method = get("seqft", state=state, **({} if state == "adam" else {"rank": 1 if "mini" in state else 4}))
        groups = method.param_groups(model)
        assert sorted(n for g in groups for n in g["names"]) == sorted(n for n, _ in model.named_parameters())
        opt = method.optimizer(groups, lr=1e-3)
        assert type(opt) is (SubspaceAdamW if state in ("adam", "galore") else ScaledAdamW)
        bytes_of[state] = opt.planned_bytes()
        if state == "adam":
            continue
        low = {n for g in groups if g.get("rank") for n in g["names"]}
        assert low == {f"{name}.weight" for name in linear_modules(model)}
        answer_loss(model, batch())[0].backward()
        opt.step()
        for group in opt.param_groups:
            for p in group["params"] if group["rank"] is not None else ():
                assert opt.state[p]["exp_avg"].numel() == max(p.shape) * group["rank"]
        model.zero_grad()
    assert bytes_of["adam"] > bytes_of["fira"] > bytes_of["galore"] > bytes_of["apollo"] > bytes_of["apollo-mini"]


def test_seqft_s_galore_is_the_low_rank_adam_that_galore_torch_agrees_with(loaded):
    """tests/test_optim.py holds that one to galore_torch's numbers."""
    method = get("seqft", state="galore", rank=4, gap=50, scale=0.25, modules=["gate_proj"])
    (group,) = method.param_groups(loaded[0])
    assert {key: group[key] for key in ("rank", "refresh_gap", "scale", "side", "refresh", "moments")} == {
        "rank": 4, "refresh_gap": 50, "scale": 0.25, "side": "inputs", "refresh": "svd", "moments": "keep"
    }  # fmt: skip
    (group,) = get("seqft", state="apollo-mini", modules=["down_proj"]).param_groups(loaded[0])
    assert (group["rank"], group["refresh_gap"], group["scale"], group["side"]) == (1, 200, 128.0, "outputs")


def test_low_rank_options_need_a_low_rank_state():
    with pytest.raises(ConfigError, match="rank and scale belong to a low-rank state; add state: galore, fira, apollo or apollo-mini"):
        get("seqft", rank=4, scale=2.0)
    with pytest.raises(ConfigError, match="state: Input should be 'adam', 'galore', 'fira', 'apollo' or 'apollo-mini'"):
        get("seqft", state="sgd")
    W = torch.nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="form='adam'; one of None, fira, apollo, apollo-mini"):
        scaled(W, "adam")
    for options in ({"rank": None}, {"side": "both"}, {"constraint": Constraint(inputs=torch.eye(2)[:, :1])}, {"release": True}):
        with pytest.raises(ValueError, match="needs a rank and one side, and goes with no constraint"):
            scaled(W, "fira", **options)
