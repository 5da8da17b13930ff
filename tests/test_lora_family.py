"""Methods that train a LoRA adapter a task and differ in what holds it off earlier ones: olora, nlora, inflora, ella, slao. On numbers small enough to check by hand."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model_folder
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import forgetless as fl
from forgetless import models
from forgetless.adapters import adapters, factors, lora_layers
from forgetless.errors import ConfigError
from forgetless.lineage import load_memory
from forgetless.methods import get
from forgetless.methods._statistics import batch_of, encoded, of_product
from forgetless.methods.base import Memory
from forgetless.methods.inflora import keep, leading, recalled
from forgetless.subspace import Subspace
from forgetless.tasks import Example, Task

NAMES = ("olora", "nlora", "inflora", "ella", "slao")


class Two(nn.Module):
    """Two layers of three inputs and two outputs, for adapters to stand on: W = 0."""

    def __init__(self):
        super().__init__()
        self.q, self.v = (nn.Linear(3, 2, bias=False) for _ in "qv")
        for layer in (self.q, self.v):
            nn.init.zeros_(layer.weight)


def begun(name: str, memory: Memory, model: nn.Module | None = None, **options):
    """(method, model with adapters of rank 1 and s = 2), a task being begun."""
    method, model = get(name, lora_rank=1, lora_alpha=2.0, lora_dropout=0.0, lora_modules=["q", "v"], **options), model or Two()
    return method, method.begin_task(model, None, memory)


@torch.no_grad()
def put(model: nn.Module, name: str, A: list[float], B: list[float]) -> None:
    one, other = factors(adapters(model)[name])
    one.copy_(torch.tensor([A]))
    other.copy_(torch.tensor([B]).mT)


def gradients(model: nn.Module, name: str) -> tuple[list, list]:
    A, B = factors(adapters(model)[name])
    return A.grad[0].tolist(), B.grad[:, 0].tolist()


def task_of(*texts: str, answer: str = "red") -> Task:
    rows = [Example(text, answer, i) for i, text in enumerate(texts)]
    return Task("t", "{sentence}", rows, rows, rows)


# -- olora -------------------------------------------------------------------------------------------------------------------------------


def test_olora_s_penalty_is_the_sum_of_the_overlaps_and_of_the_norms():
    memory = Memory()
    method, model = begun("olora", memory, l1=0.5, l2=0.1)
    for name in "qv":
        put(model, name, [3, 0, 4], [0, 0])
    assert method.extra_loss(model, {}, None).item() == pytest.approx(0.1 * (5 + 0 + 5 + 0))  # no earlier task: norms only
    put(model, "q", [1, 0, 0], [1, 1])
    put(model, "v", [0, 1, 0], [1, 1])
    model = method.end_task(model, None, memory)
    method, model = begun("olora", memory, model, l1=0.5, l2=0.1)
    put(model, "q", [0, 2, 2], [0, 0])
    put(model, "v", [5, 0, 0], [0, 0])
    model = method.end_task(model, None, memory)
    assert memory.of("olora")["q"].tolist() == [[1, 0, 0], [0, 2, 2]]  # every A, on top of each other

    method, model = begun("olora", memory, model, l1=0.5, l2=0.1)
    put(model, "q", [-3, 4, 0], [0, 2])
    put(model, "v", [1, -1, 0], [0, 0])
    # q: |-3| + |8|; v: |-1| + |5|; norms: 5 + 2 + sqrt 2 + 0
    loss = method.extra_loss(model, {}, None)
    assert loss.item() == pytest.approx(0.5 * (11 + 6) + 0.1 * (7 + 2**0.5))
    loss.backward()
    A, B = gradients(model, "q")  # signs -, +: 0.5 (-(1, 0, 0) + (0, 2, 2)) + 0.1 A / 5
    assert (*A, *B) == pytest.approx((-0.5 - 0.06, 1 + 0.08, 1, 0, 0.1))
    assert gradients(model, "v")[1] == [0, 0]  # of the norm at 0, no NaN
    assert method.held_bytes() == 2 * 2 * 3 * 4


def test_olora_without_weights_adds_nothing_and_learns_orthogonal_rows():
    method, model = begun("olora", Memory(), l1=0.0, l2=0.0)
    assert method.extra_loss(model, {}, None) is None
    memory = Memory()
    memory.put("olora", {name: torch.tensor([[1.0, 0, 0]]) for name in "qv"})
    method, model = begun("olora", memory)
    put(model, "q", [1, 1, 0], [0, 0])
    opt = torch.optim.SGD(method.param_groups(model)[0]["params"], lr=0.1)
    for _ in range(40):
        opt.zero_grad()
        method.extra_loss(model, {}, None).backward()
        opt.step()
    A = factors(adapters(model)["q"])[0][0].tolist()
    assert abs(A[0]) < 0.06 and A[1:] == [1, 0]  # to within a step


# -- nlora and ella: numbers of the product ----------------------------------------------------------------------------------------------


def test_nlora_s_penalty_is_the_l1_norm_of_the_update_not_of_a_rank_by_rank_product():
    method, model = begun("nlora", Memory(), l1=0.1)
    put(model, "q", [1, -2, 0], [3, -1])  # B A = [[3, -6, 0], [-1, 2, 0]]
    put(model, "v", [1, 1, 1], [0.5, 0])
    loss = method.extra_loss(model, {}, None)
    assert loss.item() == pytest.approx(0.1 * (12 + 1.5))
    (10 * loss).backward()
    A, B = gradients(model, "q")  # B^T sign(B A), sign(B A) A^T
    assert A == [4, -4, 0] and B == [3, -3]
    assert begun("nlora", Memory(), l1=0.0)[0].extra_loss(model, {}, None) is None


def test_ella_s_penalty_is_the_update_times_what_earlier_tasks_have_changed():
    memory = Memory()
    method, model = begun("ella", memory, strength=0.5)
    put(model, "q", [1, 0, 2], [1, 3])
    assert method.extra_loss(model, {}, None) is None  # nothing is past yet
    model = method.end_task(model, None, memory)
    assert memory.of("ella")["q"].tolist() == [[2, 0, 4], [6, 0, 12]] == model.q.weight.tolist()  # s B A, s = 2
    method, model = begun("ella", memory, model, strength=0.5)
    put(model, "q", [-1, 1, 0], [1, 0])
    put(model, "v", [1, 1, 1], [1, 1])  # nothing of v has been changed: free
    loss = method.extra_loss(model, {}, None)  # dW = [[-2, 2, 0], [0, 0, 0]]
    assert loss.item() == pytest.approx(0.5 * (-2 * 2) ** 2)
    loss.backward()
    A, B = gradients(model, "q")  # d/dP = 2 * 0.5 * s^2 * P o W^2 = [[-16, 0, 0], [0, 0, 0]]
    assert A == [-16, 0, 0] and B == [16, 0]
    assert method.held_bytes() == 2 * 6 * 4
    model = method.end_task(model, None, memory)
    assert memory.of("ella")["q"].tolist() == [[0, 2, 4], [6, 0, 12]] == model.q.weight.tolist()  # the sum of both


@pytest.mark.parametrize("name", ["olora", "nlora", "ella"])
def test_a_penalty_is_the_same_under_autocast_and_in_fp64_has_the_gradient_it_says(name):
    memory = Memory()
    memory.put(name, {"q": torch.randn(2, 3, generator=torch.Generator().manual_seed(1))[: 1 if name == "olora" else 2]})
    strength = {"strength": 1.0} if name == "ella" else {"l1": 1.0}
    method, model = begun(name, memory, **strength)
    put(model, "q", [0.1234567, 0.7654321, -1.2345678], [0.3333333, -0.7777777])
    plain = method.extra_loss(model, {}, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(method.extra_loss(model, {}, None), plain)

    method, model = begun(name, memory, Two().double(), **strength)
    put(model, "q", [0.1, 0.7, -1.2], [0.3, -0.7])
    A, B = factors(adapters(model)["q"])
    assert A.dtype == torch.float64
    method.extra_loss(model, {}, None).backward()
    for factor in (A, B) if name != "olora" else (A,):
        for place in range(factor.numel()):
            step = torch.zeros(factor.numel(), dtype=torch.float64)
            step[place] = 1e-6
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    factor.add_(sign * step.view_as(factor))
                    values.append(method.extra_loss(model, {}, None).item())
                    factor.sub_(sign * step.view_as(factor))
            assert factor.grad.flatten()[place].item() == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-6)


@pytest.mark.parametrize("name", ["nlora", "ella"])
def test_the_products_of_all_layers_are_not_alive_at_once(name):
    """What autograd keeps of a layer's penalty are the gradients of its two factors, none as large as the update."""
    memory, kept = Memory(), []
    memory.put(name, {n: torch.ones(2, 3) for n in "qv"})
    method, model = begun(name, memory)
    put(model, "q", [1, 2, 3], [4, 5])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        method.extra_loss(model, {}, None).backward()
    assert {(1, 3), (2, 1)} <= set(kept) and (2, 3) not in kept


def test_a_number_of_the_product_has_the_gradients_autograd_finds():
    A, B = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 7), (5, 2)))
    (3 * of_product(B, A, lambda P: (P.abs().sum(), P.sign()))).backward()
    torch.testing.assert_close(torch.autograd.grad(3 * (B @ A).abs().sum(), (A, B)), (A.grad, B.grad))


# -- inflora -----------------------------------------------------------------------------------------------------------------------------


def test_inflora_reads_the_strongest_directions_that_are_not_old():
    H = torch.tensor([[3.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]])  # energies 9, 4, 2, 0
    e = torch.eye(4)
    for given, gram in ((H, False), (H.mT @ H, True)):
        assert leading(given, gram, e[:, :0], 2).abs().mT.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
        torch.testing.assert_close(leading(given, gram, e[:, :1], 2).abs().mT, e[[1, 2]])
        assert leading(given, gram, e[:, :3], 2).shape == (4, 0)  # what is left has no input
        assert leading(given, gram, e[:, [0, 2]], 3).shape == (4, 1)


def test_inflora_reads_nothing_old_where_the_new_is_a_hundredth_of_it():
    """What one projection leaves of H is small beside H, and not beside what is left."""
    g = torch.Generator().manual_seed(0)
    V = torch.linalg.qr(torch.randn(20, 8, generator=g))[0]
    H = 100 * torch.randn(40, 8, generator=g) @ V.mT + torch.randn(40, 20, generator=g)
    for given, gram in ((H, False), (H.mT @ H, True)):
        Q = leading(given, gram, V, 4)
        assert Q.shape == (20, 4) and (V.mT @ Q).norm() < 3e-7
        torch.testing.assert_close(Q.mT @ Q, torch.eye(4), atol=1e-5, rtol=0)


def test_inflora_s_share_rises_over_the_tasks():
    assert [get("inflora", tasks=5).share(t) for t in (0, 1, 4, 9)] == pytest.approx([0.95, 0.96, 0.99, 0.99])
    assert [get("inflora", energy=0.9, energy_end=0.98, tasks=2).share(t) for t in (0, 1, 2)] == pytest.approx([0.9, 0.94, 0.94])
    assert [get("inflora", energy=0.8).share(t) for t in (0, 7)] == [0.8, 0.8]


def test_inflora_keeps_the_smaller_half():
    memory, eye = Memory(), torch.eye(4)
    keep(memory, {"a": Subspace(eye[:, :2].contiguous(), torch.ones(2)), "b": Subspace(eye[:, :3].contiguous(), torch.ones(3))})
    assert {key: tuple(t.shape) for key, t in memory.tensors.items() if key.endswith("basis")} == {"a.basis": (4, 2), "b@rest.basis": (4, 1)}
    for name, k in (("a", 2), ("b", 3)):
        V = recalled(memory)[name].basis
        assert torch.equal(get("inflora").protected_inputs(memory)[name], V)
        torch.testing.assert_close(V @ V.mT, torch.diag(torch.tensor([1.0] * k + [0.0] * (4 - k))))
    assert get("inflora").report(memory) == {"modules": 2, "rank_mean": 2.5, "rank_max": 3, "evicted": 0, "share": 0.625, "bytes": 4 * (8 + 4)}
    keep(memory, {"a": Subspace(eye, torch.ones(4))})  # it has grown: the other form takes the place of the old one
    assert not {"a.basis", "a.energy"} & memory.tensors.keys() and recalled(memory)["a"].rank == 4


@pytest.fixture
def loaded(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)


def inputs_of(model, tokenizer, task) -> dict[str, torch.Tensor]:
    """The inputs (tokens, in) of every layer on the task's rows."""
    seen: dict[str, list[torch.Tensor]] = {}
    layers = models.linear_modules(model)
    handles = [
        m.register_forward_pre_hook(lambda m, args, n=n: seen.setdefault(n, []).append(args[0].detach().flatten(0, -2))) for n, m in layers.items()
    ]
    for row in encoded(tokenizer, task, None):
        model(**{k: v for k, v in batch_of(model.eval(), [row]).items() if k != "labels"})
    for handle in handles:
        handle.remove()
    return {n: torch.cat(xs) for n, xs in seen.items()}


OLD = task_of("cat red apple stone", "dog green river")
NEW = task_of("bird blue flies happy", "sad runs calm", answer="no maybe good")


def learned(model, tokenizer, method, memory, task, steps=5):
    """The model after the task, and each layer's weight before it."""
    method.tokenizer = tokenizer
    before = {n: m.weight.detach().clone() for n, m in models.linear_modules(model).items()}
    model = method.begin_task(model, task, memory)
    opt = method.optimizer(method.param_groups(model), lr=1e-2)
    for _ in range(steps):
        model.zero_grad()
        loss = model(**batch_of(model, encoded(tokenizer, task, None))).loss
        extra = method.extra_loss(model, {}, None)
        (loss if extra is None else loss + extra).backward()
        opt.step()
    return method.end_task(model, task, memory), before


@pytest.mark.parametrize(("kind", "energy"), [("llama", 1.0), ("gpt2", 1.0), ("t5", 1.0), ("llama", 0.9)])
def test_inflora_leaves_the_answers_to_old_inputs_as_they_are(kind, energy, tmp_path):
    model, tokenizer = models.load(make_model_folder(tmp_path / "m", kind=kind))
    method, memory = get("inflora", energy=energy, lora_dropout=0.0), Memory()
    model, before = learned(model, tokenizer, method, memory, OLD)
    assert method.merge_leak is None  # nothing was old yet
    first = {n: models.linear_modules(model)[n].weight.detach() - W for n, W in before.items()}
    X = inputs_of(model, tokenizer, OLD)
    V = method.protected_inputs(memory)
    trained = list(V)
    assert trained and {n for n, D in first.items() if D.norm() > 0} == set(trained)
    model, before = learned(model, tokenizer, method, memory, NEW)
    assert 0 < method.merge_leak["leak"] <= method.merge_leak["bound"]
    for n in trained:
        layer = models.linear_modules(model)[n]
        D = models.logical((layer.weight - before[n]).detach(), layer)
        inside = X[n] @ V[n] @ V[n].mT
        assert inside.norm() ** 2 >= (energy - 1e-4) * X[n].norm() ** 2  # V does hold the old inputs
        assert D.norm() > 0.01 and (X[n] @ D.mT).norm() > (0 if energy == 1 else 1e-4)
        assert (inside @ D.mT).norm() < 1e-5 * D.norm() * X[n].norm()
        if energy == 1:
            assert (X[n] @ D.mT).norm() < 1e-5 * D.norm() * X[n].norm()


def test_inflora_s_a_spans_the_task_s_inputs_and_only_b_learns(loaded):
    model, tokenizer = loaded
    method, memory = get("inflora", lora_rank=3, lora_dropout=0.0), Memory()
    name = "model.layers.0.self_attn.q_proj"
    X = inputs_of(model, tokenizer, OLD)[name]
    method.tokenizer = tokenizer
    model = method.begin_task(model, OLD, memory)
    A, B = factors(adapters(model)[name])
    top = torch.linalg.svd(X.double())[2][:3]
    torch.testing.assert_close((3**0.5 * A).double().abs() @ top.abs().mT, top.abs() @ top.abs().mT, atol=1e-4, rtol=0)  # but for signs
    torch.testing.assert_close(A @ A.mT, torch.eye(3) / 3)
    assert not B.any() and torch.equal(A, factors(adapters(model)[name.replace("q_proj", "v_proj")])[0])  # which reads the same inputs
    assert method.report(memory) is None and method.protected_inputs(memory) == {}
    groups = method.param_groups(model)
    assert all(n.endswith("lora_B") for n in groups[0]["names"]) and not any(p is A for p in groups[0]["params"])
    assert method.held_bytes() == 4 * 3 * 32 * 4 and method.spaced(model) == {n: 32 for n in adapters(model)}


def test_inflora_says_where_old_inputs_leave_too_little(loaded, caplog):
    model, tokenizer = loaded
    method, memory = get("inflora", energy=1.0), Memory()
    model, _ = learned(model, tokenizer, method, memory, OLD)
    caplog.clear()
    model = method.begin_task(model, OLD, memory)  # the same rows again: all that a layer near the input reads of them is old
    assert "fewer than lora_rank 8 directions" in caplog.text
    assert not factors(adapters(model)["model.layers.0.self_attn.q_proj"])[0].any()


def test_inflora_normalises_inputs_where_told_to(loaded):
    model, tokenizer = loaded
    ranks = {}
    for normalise in (False, True):
        method = get("inflora", normalise=normalise, lora_modules=["down_proj"])
        method.tokenizer = tokenizer
        sums, _ = method.inputs(model, OLD)
        (H, gram), *_ = (s.of for s in sums.values())
        ranks[normalise] = H.norm(dim=1)
    assert not gram and ranks[True].tolist() == pytest.approx([1.0] * len(ranks[True])) and ranks[False].std() > 1e-6


def test_inflora_protects_prompts_before_the_first_task(loaded):
    model, tokenizer = loaded
    method, memory = get("inflora", energy=1.0), Memory()
    prompts = [tokenizer(e.text).input_ids for e in OLD.train]
    method.protect(model, prompts, memory)
    X = inputs_of(model, tokenizer, task_of(*(e.text for e in OLD.train)))["model.layers.0.self_attn.q_proj"]
    model, before = learned(model, tokenizer, method, memory, NEW)
    D = (model.model.layers[0].self_attn.q_proj.weight - before["model.layers.0.self_attn.q_proj"]).detach()
    assert D.norm() > 0.01 and method.merge_leak["leak"] <= method.merge_leak["bound"]
    assert (X[:3] @ D.mT).norm() < 1e-5 * D.norm() * X.norm()  # the first row's words; its answer was no prompt


# -- slao --------------------------------------------------------------------------------------------------------------------------------


def test_slao_s_merged_b_over_three_tasks():
    memory, model = Memory(), Two()
    served = []
    for t, (A, B) in enumerate([([3, 0, 4], [1, 0]), ([0, 2, 0], [0, 2]), ([0, 0, -5], [4, 4])], 1):
        method, model = begun("slao", memory, model)
        one, other = (factor.detach().clone() for factor in factors(adapters(model)["q"]))
        if t == 1:
            assert not other.any()
        else:  # begins at the last A, made orthonormal and not turned round, and at the last B, not the merged one
            assert one[0].tolist() == pytest.approx({2: [0.6, 0, 0.8], 3: [0, 1, 0]}[t])
            assert other[:, 0].tolist() == {2: [1, 0], 3: [0, 2]}[t]
            assert not model.q.get_base_layer().weight.any()  # W_0 again
        put(model, "q", A, B)
        model = method.end_task(model, None, memory)
        merged = memory.tensors["base_model.model.q.lora_B.weight"][:, 0].tolist()
        served.append((merged, model.q.weight.tolist()))
    # B1 = (1, 0); B2 = B1 + ((0, 2) - B1) / sqrt 2; B3 = B2 + ((4, 4) - B2) / sqrt 3
    B2 = (1 - 2**-0.5, 2 * 2**-0.5)
    B3 = [b + (4 - b) / 3**0.5 for b in B2]
    for (merged, W), B, A in zip(served, ([1, 0], B2, B3), ([3, 0, 4], [0, 2, 0], [0, 0, -5]), strict=True):
        assert merged == pytest.approx(B)
        assert sum(W, []) == pytest.approx([2 * b * a for b in B for a in A], abs=1e-5)  # what is served: s B_merge A_t on W_0 = 0
    assert memory.of("slao")["q.B"][:, 0].tolist() == [4, 4] and memory.info["tasks"] == 3


def test_slao_s_orthonormal_rows_keep_span_and_direction():
    from forgetless.methods.slao import orthonormal_rows

    A = torch.tensor([[-2.0, 0, 0], [-1, 3, 0]])
    assert orthonormal_rows(A).tolist() == [[-1, 0, 0], [0, 1, 0]]
    A = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    Q = orthonormal_rows(A)
    torch.testing.assert_close(Q @ Q.mT, torch.eye(4))
    torch.testing.assert_close(A @ Q.mT @ Q, A)
    assert ((A @ Q.mT).diagonal() > 0).all()


def test_slao_s_state_is_an_adapter_for_peft_that_gives_what_is_served(small_run, tiny):
    from peft import PeftModel

    result = fl.run(small_run("slao", tasks=("colour", "animal")))
    served = AutoModelForCausalLM.from_pretrained(result.path / "model").eval()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), result.path / "tasks" / "01-animal" / "state").eval()
    ids = torch.arange(2, 12)[None]
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids).logits, served(ids).logits, atol=1e-5, rtol=1e-5)
    assert load_memory(result.path / "tasks" / "01-animal" / "state").info["tasks"] == 2


# -- all of them -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_two_tasks_on_conv1d_and_on_an_encoder_decoder(name, kind, tmp_path):
    """Memory and model are exact about what a task has changed: plain layers, nothing of an adapter left, the second task's change in the weights."""
    model, tokenizer = models.load(make_model_folder(tmp_path / "m", kind=kind))
    method, memory = get(name, lora_dropout=0.0), Memory()
    for task in (OLD, NEW):
        model, before = learned(model, tokenizer, method, memory, task, steps=3)
        assert not adapters(model) and not hasattr(model, "peft_config")
        changed = {n for n, m in models.linear_modules(model).items() if not torch.equal(m.weight, before[n])}
        assert changed == set(lora_layers(model, None))
        for n, kept in memory.of(name).items() if name in ("olora", "ella") else ():
            m, k = models.logical(models.linear_modules(model)[n].weight, models.linear_modules(model)[n]).shape
            assert kept.shape == ((m, k) if name == "ella" else (8 if task is OLD else 16, k))


@pytest.mark.parametrize("name", NAMES)
def test_a_method_that_goes_beside_shares_the_memory(name, loaded):
    """What another keeps in the same memory is not taken for one's own, and is left where it is at the beginning of a task and on resume."""
    model, tokenizer = loaded
    memory, method = Memory(), get(name)
    method.tokenizer = tokenizer
    memory.put("other", {"x": torch.ones(1)})
    model = method.end_task(method.begin_task(model, OLD, memory), OLD, memory)
    model = method.resume_task(model, OLD, memory, method.state_dict())
    method.end_task(model, OLD, memory)
    assert memory.of("other")["x"].item() == 1


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("olora", {"l1": -1}, "l1: Input should be greater than or equal to 0"), ("olora", {"l2": float("nan")}, "l2: Input should be"),
        ("nlora", {"l1": float("inf")}, "l1: Input should be a finite number"), ("ella", {"strength": -1}, "strength: Input should be greater"),
        ("inflora", {"energy": 0}, "energy: Input should be greater than 0"), ("inflora", {"energy": 1.5}, "energy: Input should be less"),
        ("inflora", {"energy": 0.9, "energy_end": 0.5, "tasks": 3}, "energy_end 0.5 is below energy 0.9"),
        ("inflora", {"energy_end": 0.99}, "give tasks"), ("inflora", {"tasks": 0}, "tasks: Input should be greater"),
        ("ella", {"lambda": 1}, "unknown option 'lambda'"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(name, options, said):
    with pytest.raises(ConfigError, match=f"method {name}: .*{said}"):
        get(name, **options)


def test_slao_refuses_a_rank_no_rows_of_which_are_orthonormal(loaded):
    get("slao", lora_rank=32).check(loaded[0])
    with pytest.raises(ConfigError, match="lora_rank 33: model.layers.0.self_attn.q_proj has 32 inputs"):
        get("slao", lora_rank=33).check(loaded[0])
