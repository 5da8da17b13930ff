"""gpm, migu, sara, ogd: methods that train a model's own weights and say which parts of them may change. Small enough to check by hand."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model_folder
from torch import nn
from transformers import AutoModelForCausalLM

import forgetless as fl
from forgetless import models
from forgetless.batches import Collate, answer_loss
from forgetless.errors import ConfigError
from forgetless.methods import get
from forgetless.methods.base import Memory
from forgetless.methods.sara import nuclear_gradient, smallest
from forgetless.optim.constrained import along, combined, constrain_together
from forgetless.tasks import Example, Task


class Toy(nn.Module):
    """A language model of one linear layer: token -> row of `embed` -> `layer` -> `head`."""

    def __init__(self, embed: torch.Tensor, out: int = 4, vocabulary: int | None = None):
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=False)
        self.embed = nn.Embedding.from_pretrained(embed.clone(), freeze=False)
        self.layer = nn.Linear(embed.shape[1], out, bias=False, dtype=embed.dtype)
        self.head = nn.Linear(out, vocabulary or len(embed), bias=False, dtype=embed.dtype)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return SimpleNamespace(logits=self.head(self.layer(self.embed(input_ids))))


class Ids:
    """A task whose rows are token ids already."""

    name = "t"

    def __init__(self, rows: list[list[int]], gap: int | None = None):
        self.train = [{"input_ids": ids, "labels": [-100 if i in (0, gap) else t for i, t in enumerate(ids)]} for ids in rows]

    def encode(self, tokenizer, row):
        return row


def backward(model, ids, mask=None) -> None:
    """The gradient of the next tokens' mean loss, added to what is there."""
    ids = torch.tensor(ids)
    mask = torch.ones_like(ids) if mask is None else torch.tensor(mask)
    logits = model(input_ids=ids, attention_mask=mask).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()


def step(model, method, opt, *micro_batches) -> None:
    """One optimizer step, as a loop of one's own would take it."""
    opt.zero_grad()
    for ids in micro_batches:
        backward(model, ids)
    method.on_step(model)
    opt.step()


def begun(method, model, memory, **settings):
    """The optimizer of a task that has begun."""
    method.begin_task(model, None, memory)
    return method.optimizer(method.param_groups(model), **settings)


# -- gpm -------------------------------------------------------------------------------------------------------------------------------


def embedding(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# inputs 3 e1, 2 e2, e3 and 5 e4: reading tokens 0, 1, 2 once each gives R R^T = diag(9, 4, 1, 0)
SPECTRUM = ([3.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 5.0])


@pytest.mark.parametrize(("threshold", "rank"), [(0.6, 1), (0.64, 1), (0.65, 2), (0.92, 2), (0.93, 3), (1.0, 3)])
def test_gpm_holds_the_share_of_energy_and_no_direction_more(threshold, rank):
    """9 / 14 = 0.643, 13 / 14 = 0.929. Inputs brought to one length would be a third each."""
    method, memory = get("gpm", threshold=threshold), Memory()
    method.end_task(Toy(embedding(*SPECTRUM)), Ids([[0, 1, 2]]), memory)
    V = memory.spaces()["layer"].basis
    torch.testing.assert_close(V @ V.mT, torch.diag(torch.tensor([1.0] * rank + [0.0] * (4 - rank), dtype=torch.float64)))
    assert method.report(memory)["share"] == rank / 4


def test_gpm_counts_what_the_space_holds_already_and_asks_more_of_each_task():
    """Second task: R R^T = diag(18, 0, 2, 25), of which e1 and e2 hold 18 / 45 = 0.4; with e4 it is 43 / 45 = 0.956."""
    model, memory = Toy(embedding(*SPECTRUM)), Memory()
    rows = Ids([[0, 1, 2]]), Ids([[0, 0, 2, 2, 3]])
    get("gpm", threshold=0.9, increment=0.05).end_task(model, rows[0], memory)
    second = copy.deepcopy(memory)
    get("gpm", threshold=0.9, increment=0.05).end_task(model, rows[1], second)  # 0.95
    assert second.spaces()["layer"].basis[2].abs().max() < 1e-12 and second.spaces()["layer"].rank == 3
    third = copy.deepcopy(memory)
    get("gpm", threshold=0.9, increment=0.06).end_task(model, rows[1], third)  # 0.96
    assert third.spaces()["layer"].rank == 4 and third.info["gpm"] == {"tasks": 2}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_gpm_layers_answer_old_inputs_as_before(kind, tmp_path):
    """After AdamW with weight decay: on what the space holds to 1e-5 of what they answered, elsewhere not."""
    model, tokenizer = models.load(make_model_folder(tmp_path / "m", kind=kind))
    rows = [Example("cat red", "red", 0), Example("dog runs happy", "blue", 1)]
    task, memory, method = Task("t", "{sentence}", rows, rows, rows), Memory(), get("gpm", threshold=0.99)
    method.tokenizer = tokenizer
    method.begin_task(model, task, memory)
    method.end_task(model, task, memory)
    method.begin_task(model, task, memory)
    before = {n: models.logical(m.weight, m).detach().clone() for n, m in models.linear_modules(model).items()}
    opt = method.optimizer(method.param_groups(model), lr=1e-2, weight_decay=0.1)
    ids = torch.randint(2, 30, (4, 8), generator=torch.Generator().manual_seed(0))
    for _ in range(20):
        opt.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        opt.step()
    for name, module in models.linear_modules(model).items():
        V, D = method.protected_inputs(memory)[name], models.logical(module.weight, module).detach() - before[name]
        assert (D @ V).norm() < 1e-5 * (before[name] @ V).norm() < D.norm(), name


def test_gpm_protects_prompts_before_the_first_task_and_freezes_all_else(small_run, tmp_path, tiny):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "cat sits"}) + "\n")
    result = fl.run(small_run("gpm", tasks=("colour",), protect_from=str(tmp_path / "prompts.jsonl")))
    events = [json.loads(line) for line in (result.path / "timing.jsonl").read_text().splitlines()]
    assert 0 < events[-1]["update_leak"] < 1e-5
    base, after = AutoModelForCausalLM.from_pretrained(tiny), AutoModelForCausalLM.from_pretrained(result.path / "model")
    assert {n.split(".")[-2][-4:] for (n, a), b in zip(base.named_parameters(), after.parameters(), strict=True) if not torch.equal(a, b)} == {"proj"}


@pytest.mark.parametrize("options", [{"threshold": 0}, {"threshold": 1.5}, {"increment": -0.1}, {"samples": 0}])
def test_gpm_refuses_what_means_nothing(options):
    with pytest.raises(ConfigError, match=f"method gpm: {next(iter(options))}"):
        get("gpm", **options)


# -- migu ------------------------------------------------------------------------------------------------------------------------------

ONE_LEARNED = {"migu": {"tasks": 1}}
# |h| is the first column where token 0 is read, the second where token 1 is
COLUMNS = torch.tensor([[1, -9, 3, 7, -5, 6, 4, 8, -2, 10], [-6, 5, 9, 1, -8, 2, 10, 3, 7, 4]], dtype=torch.float64).mT


def toy_of_ten() -> Toy:
    torch.manual_seed(0)
    model = Toy(embedding([1.0, 0], [0, 1.0]), out=10)
    with torch.no_grad():
        model.layer.weight.copy_(COLUMNS)
    return model


@pytest.mark.parametrize(
    ("micro_batches", "moved"),
    [
        ([[[0, 0]]], {1, 7, 9}),  # 9, 8, 10
        ([[[1, 1]]], {2, 4, 6}),  # 9, 8, 10
        ([[[0, 1]]], {1, 6, 9}),  # 7 14 12 8 13 8 14 11 9 14
        ([[[0, 0, 1]]], {1, 7, 9}),  # 8 23 15 15 18 14 18 19 11 24
        ([[[0, 0]], [[1, 1]]], {1, 6, 9}),  # as the third, where neither micro-batch alone would say so
    ],
)
def test_migu_moves_the_rows_of_the_three_largest_of_ten_outputs(micro_batches, moved):
    model, method = toy_of_ten(), get("migu")
    opt = begun(method, model, Memory(info=ONE_LEARNED), lr=1e-2)
    step(model, method, opt, *micro_batches)
    assert set((model.layer.weight != COLUMNS).any(1).nonzero()[:, 0].tolist()) == moved
    assert opt.param_groups[0]["constraint"].mask is None and not method.sums["layer"].any()  # until the next step


def test_migu_leaves_the_first_task_free_and_takes_its_hooks_away():
    model, method, memory = toy_of_ten(), get("migu"), Memory()

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    step(model, method, begun(method, model, memory, lr=1e-2), [[0, 1]])
    assert (model.layer.weight != COLUMNS).any(1).all() and hooks() == 0
    method.end_task(model, None, memory)
    assert memory.tensors == {} and memory.info == ONE_LEARNED
    method.begin_task(model, None, memory)
    assert hooks() == 3
    method.resume_task(model, None, memory, {})  # once, however often
    assert hooks() == 3
    method.end_task(model, None, memory)
    assert hooks() == 0 and memory.info == {"migu": {"tasks": 2}}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("precision", [None, "fp32_master", "stochastic_rounding", "plain"])
def test_migu_masked_rows_stay_to_the_bit_whatever_momentum_and_decay_say(kind, precision, tmp_path):
    """The first step moves other rows than the second: those have momentum, and are away from where weight decay pulls them."""
    dtype = torch.bfloat16 if precision else torch.float32
    model, _ = models.load(make_model_folder(tmp_path / "m", kind=kind, dtype=dtype), dtype=dtype)
    method = get("migu")
    opt = begun(method, model, Memory(info=ONE_LEARNED), lr=1e-2, weight_decay=0.1, precision=precision or "plain")
    weight = {n: m for n, m in method.layers(model).items()}
    moved = []
    for seed in range(2):
        start = {n: m.weight.detach().clone() for n, m in weight.items()}
        ids = torch.randint(2, 30, (2, 5), generator=torch.Generator().manual_seed(seed))
        opt.zero_grad()
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        method.on_step(model)
        opt.step()
        moved.append({n: (models.logical(m.weight, m) != models.logical(start[n], m)).any(1) for n, m in weight.items()})
    for name, module in weight.items():
        out = models.logical(module.weight, module).shape[0]
        assert all(int(rows[name].sum()) <= round(0.3 * out) for rows in moved)
    assert sum(int((first & ~second).sum()) for first, second in zip(*(m.values() for m in moved), strict=True)) > 10
    assert sum(int(rows.sum()) for rows in moved[1].values()) > 0.9 * sum(round(0.3 * len(rows)) for rows in moved[1].values())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_migu_counts_no_padding_and_no_block_that_is_computed_again(kind, tmp_path):
    """Two rows padded to one batch give the sums of each alone, under gradient checkpointing too; what is read without gradients gives nothing."""
    model, _ = models.load(make_model_folder(tmp_path / "m", kind=kind), dtype=torch.float64)
    collate, rows = (
        Collate(model),
        [{"input_ids": [5, 6, 7, 8, 9, 1], "labels": [-100] * 4 + [9, 1]}, {"input_ids": [7, 5, 1], "labels": [-100, 5, 1]}],
    )

    def sums(*batches, checkpointing=False):
        method = get("migu")
        method.begin_task(model.train(), None, Memory(info=ONE_LEARNED))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for batch in batches:
            answer_loss(model, collate(batch))[0].backward()
            if checkpointing:
                with torch.no_grad():
                    answer_loss(model, collate(batch))
        model.gradient_checkpointing_disable()
        found = {name: n.clone() for name, n in method.sums.items()}
        method.end_task(model, None, Memory())
        return found

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    alone, together, again = sums(rows[:1], rows[1:]), sums(rows), sums(rows, checkpointing=True)
    assert all(n.sum() > 0 for n in alone.values())
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-9, atol=0, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(again[name], alone[name], rtol=1e-9, atol=0)


def test_migu_counts_no_padding_of_labels_that_the_model_shifts_itself(tmp_path):
    """As a foreign collator has them: no decoder_input_ids. The same sums as of our own batch, whose second answer is two tokens shorter."""
    model, _ = models.load(make_model_folder(tmp_path / "m", kind="t5"), dtype=torch.float64)
    rows = [{"input_ids": [5, 6, 7, 8, 9, 4, 1], "labels": [-100] * 4 + [9, 4, 1]}, {"input_ids": [7, 8, 6, 1], "labels": [-100] * 3 + [1]}]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    own, found = Collate(model)(rows), []
    for batch in (own, {key: own[key] for key in ("input_ids", "attention_mask", "labels")}):
        method = get("migu")
        method.begin_task(model.train(), None, Memory(info=ONE_LEARNED))
        model(**batch)
        found.append({name: n.clone() for name, n in method.sums.items()})
        method.end_task(model, None, Memory())
    assert (own["labels"] == -100).any()
    for name, n in found[0].items():
        torch.testing.assert_close(found[1][name], n, rtol=1e-9, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_migu_is_seen_in_a_run_from_the_second_task_on(small_run, tiny):
    """Of one step a task: in the first every row moves, in the second three of ten. The record speaks of no leak over a task."""
    config = small_run("migu", tasks=("colour", "animal"))
    config["train"]["max_steps"] = 1
    result = fl.run(config)
    weights = [{n: p.detach() for n, p in AutoModelForCausalLM.from_pretrained(f).named_parameters() if "proj" in n}
               for f in (tiny, *(result.path / "tasks" / t / "model" for t in ("00-colour", "01-animal")))]  # fmt: skip
    shares = [sum(int((b[n] != a[n]).any(1).sum()) for n in a) / sum(len(W) for W in a.values()) for a, b in zip(weights, weights[1:], strict=False)]
    assert shares[0] > 0.99 and shares[1] == pytest.approx(0.3, abs=0.02)
    events = [json.loads(line) for line in (result.path / "timing.jsonl").read_text().splitlines()]
    assert events[-1]["weight_leak"] is None and events[-1]["update_leak"] == 0.0


def test_migu_refuses_a_compensation_that_would_bring_a_masked_row_what_an_earlier_step_lost():
    model = toy_of_ten().to(torch.bfloat16)
    with pytest.raises(ConfigError, match="method migu: precision: kahan"):
        begun(get("migu"), model, Memory(), precision="kahan")
    begun(get("migu"), toy_of_ten(), Memory(), precision="kahan")  # nothing is lost of fp64 weights


@pytest.mark.parametrize("share", [0, 1.2])
def test_migu_refuses_what_means_nothing(share):
    with pytest.raises(ConfigError, match="method migu: share"):
        get("migu", share=share)


# -- sara ------------------------------------------------------------------------------------------------------------------------------


def toy_of_eight() -> Toy:
    torch.manual_seed(0)
    model = Toy(embedding([1.0, 2.0], [-1.0, 1.0]), out=4)
    with torch.no_grad():
        model.layer.weight.copy_(torch.tensor([[0.5, -0.1], [0.2, 0.9], [-0.3, 0.8], [0.7, -0.6]]))
    return model


def moved(model, start) -> list[list[int]]:
    return (model.layer.weight != start).nonzero().tolist()


@pytest.mark.parametrize(
    ("share", "chosen"), [(0.25, [[0, 1], [1, 0]]), (0.4, [[0, 1], [1, 0], [2, 0]]), (0.01, [[0, 1]]), (0.5, [[0, 0], [0, 1], [1, 0], [2, 0]])]
)
def test_sara_trains_the_smallest_weights_and_no_other_bit(share, chosen):
    """0.1, 0.2, 0.3, 0.5 are the smallest in magnitude; with momentum and weight decay."""
    model, method = toy_of_eight(), get("sara", share=share)
    start = model.layer.weight.detach().clone()
    opt = begun(method, model, Memory(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        step(model, method, opt, [[0, 1, 0, 0, 1]])
    assert moved(model, start) == chosen
    method.end_task(model, None, Memory())
    # what has grown is not among the smallest of the next task, though it was trained
    with torch.no_grad():
        model.layer.weight[0, 1] = -1.5
    start = model.layer.weight.detach().clone()
    step(model, method, begun(method, model, Memory(), lr=1e-2), [[0, 1, 0, 0, 1]])
    assert [0, 1] not in moved(model, start) and len(moved(model, start)) == len(chosen)


def test_sara_takes_of_equal_weights_those_that_come_first():
    W = torch.tensor([[1.0, -1.0, 0.5], [1.0, 2.0, -1.0]])
    for k, want in ((1, [2]), (2, [0, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 5]), (6, [0, 1, 2, 3, 4, 5])):
        assert smallest(W, k / 6).flatten().nonzero()[:, 0].tolist() == want


def test_sara_draws_its_change_to_low_rank():
    """D = U diag(3, 2) V^T has the gradient U V^T, whatever the singular values, and nothing along those that are 0. Closed form, and autograd's."""
    U, V = (torch.linalg.qr(torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(n)))[0] for n in (5, 3))
    D = (U * torch.tensor([3.0, 2.0])) @ V.mT
    torch.testing.assert_close(nuclear_gradient(D), U @ V.mT)
    assert nuclear_gradient(torch.zeros(5, 3)).abs().max() == 0
    D = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    torch.testing.assert_close(nuclear_gradient(D.detach()), torch.autograd.grad(torch.linalg.matrix_norm(D, "nuc"), D)[0])


def test_sara_adds_the_penalty_of_the_change_since_the_task_began():
    model, method = toy_of_eight(), get("sara", share=0.5, nuclear=0.3)
    method.begin_task(model, None, Memory())
    with torch.no_grad():
        model.layer.weight[0, 1] -= 0.01  # a change of one number: its norm is |0.01|, its gradient -1 there
    backward(model, [[0, 1, 0]])
    before = model.layer.weight.grad.clone()
    method.on_step(model)
    expected = torch.zeros(4, 2, dtype=torch.float64)
    expected[0, 1] = -0.3
    torch.testing.assert_close(model.layer.weight.grad - before, expected)
    other = get("sara", share=0.5)
    other.begin_task(model, None, Memory())
    assert method.held_bytes() == 4 * 2 * 8 and other.held_bytes() == 0
    other.on_step(model)
    torch.testing.assert_close(model.layer.weight.grad - before, expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sara_moves_the_share_of_every_matrix(kind, dtype, tmp_path):
    model, _ = models.load(make_model_folder(tmp_path / "m", kind=kind, dtype=dtype), dtype=dtype)
    method = get("sara", share=0.1)
    opt, start = begun(method, model, Memory(), lr=0.1, weight_decay=0.1), copy.deepcopy(model.state_dict())
    ids = torch.randint(2, 30, (2, 5), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        opt.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        opt.step()
    layers = {f"{name}.weight" for name in method.layers(model)}
    for name, W in model.state_dict().items():
        changed = torch.ne(W, start[name])
        if name in layers:
            assert 0 < int(changed.sum()) <= round(0.1 * W.numel())
            assert start[name][changed].abs().max() <= start[name].abs().flatten().kthvalue(round(0.1 * W.numel())).values
        else:
            assert not changed.any()


@pytest.mark.parametrize("options", [{"share": 0}, {"share": 1.2}, {"nuclear": -1}])
def test_sara_refuses_what_means_nothing(options):
    with pytest.raises(ConfigError, match=f"method sara: {next(iter(options))}"):
        get("sara", **options)


# -- ogd -------------------------------------------------------------------------------------------------------------------------------


def directions(memory: Memory) -> torch.Tensor:
    """B (k, all): what is kept of the answers' gradients, the tensors one after another."""
    return torch.cat([B.flatten(1) for B in memory.of("ogd").values()], 1).double()


def vector(model, memory: Memory) -> torch.Tensor:
    parameters = dict(model.named_parameters())
    return torch.cat([parameters[name].detach().flatten() for name in memory.of("ogd")]).double()


def learned(method, model, memory, task, tokenizer=None):
    method.tokenizer = tokenizer
    method.begin_task(model, task, memory)
    method.end_task(model, task, memory)


def toy_of_logits() -> Toy:
    torch.manual_seed(0)
    return Toy(torch.randn(6, 5, dtype=torch.float64), out=4)


def test_ogd_keeps_the_gradient_of_the_answers_logit_and_not_of_its_loss():
    """f_y = head[y] W x, so that grad f_y = head[y] x^T; of two answer tokens, with another between them, their sum. Orthonormalised in the order of the rows."""
    model, memory = toy_of_logits(), Memory()
    learned(get("ogd", modules="layer"), model, memory, Ids([[0, 1], [0, 1, 5, 2]], gap=2))
    E, H = model.embed.weight.detach(), model.head.weight.detach()
    first = torch.outer(H[1], E[0])
    second = first + torch.outer(H[2], E[5])
    u = first / first.norm()
    v = second - (second * u).sum() * u
    kept = memory.of("ogd")["layer.weight"]
    torch.testing.assert_close(kept, torch.stack([u, v / v.norm()]))
    assert get("ogd").report(memory) == {"modules": 1, "rank_mean": 2, "rank_max": 2, "share": 2 / 20, "bytes": 2 * 20 * 8}


def test_ogd_keeps_nothing_twice():
    model, memory, method = toy_of_logits(), Memory(), get("ogd")
    learned(method, model, memory, Ids([[0, 1, 2], [3, 4], [0, 1, 2]]))
    assert len(directions(memory)) == 2
    learned(method, model, memory, Ids([[3, 4], [5, 5]]))
    B = directions(memory)
    torch.testing.assert_close(B @ B.mT, torch.eye(3, dtype=torch.float64))
    assert method.report(memory)["bytes"] == 3 * sum(p.numel() for p in model.parameters()) * 8


def test_ogd_answers_of_a_linear_model_stay_and_others_do_not():
    """Linear in what is trained, so that first order is all there is."""
    model, memory, method, old = toy_of_logits(), Memory(), get("ogd", modules="layer"), [[0, 1], [2, 3, 4]]

    def answers() -> torch.Tensor:
        with torch.no_grad():
            logits = [model(input_ids=torch.tensor([ids])).logits[0] for ids in old]
        return torch.stack([logits[0][0, 1], logits[1][0, 3] + logits[1][1, 4], logits[0][0, 2]])

    learned(method, model, memory, Ids(old))
    opt, before = begun(method, model, memory, lr=1e-2, weight_decay=0.1, max_grad_norm=1.0), answers()
    for _ in range(20):
        step(model, method, opt, [[5, 4, 3, 0, 1]])
    change = (answers() - before).abs()
    assert change[:2].max() < 1e-12 and change[2] > 1e-2


@pytest.mark.parametrize(("name", "factor"), [("ogd", 100), ("seqft", 10)])
def test_ogd_answers_of_any_model_change_in_second_order_only(name, factor, tmp_path):
    """A tenth of the step, a hundredth of the change; a tenth without."""
    rows = [Example("cat red", "red", 0)]
    task, ids = Task("t", "{sentence}", rows, rows, rows), torch.randint(2, 30, (2, 6), generator=torch.Generator().manual_seed(0))
    folder, changes = make_model_folder(tmp_path / "m"), []
    for lr in (1e-4, 1e-5):
        model, tokenizer = models.load(folder, dtype=torch.float64)
        memory, row = Memory(), task.encode(tokenizer, rows[0])
        learned(get("ogd"), model, memory, task, tokenizer)
        opt = begun(get(name), model, memory, lr=lr)
        place = [i for i, label in enumerate(row["labels"]) if label != -100]

        def answer(model=model, row=row, place=place) -> float:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            return float(sum(logits[i - 1, row["labels"][i]] for i in place))

        before = answer()
        model(input_ids=ids, labels=ids).loss.backward()
        opt.step()
        changes.append(abs(answer() - before))
    assert 0.7 * factor < changes[0] / changes[1] < 1.4 * factor


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize(
    ("dtype", "keep_in", "bound"), [("float32", "fp32", 1e-5), ("float64", "fp32", 1e-10), ("float64", "bf16", 1e-10), ("bfloat16", "fp32", 1e-5)]
)
def test_ogd_leaks_nothing_in_fifty_steps_with_decay_and_clipping(kind, dtype, keep_in, bound, tmp_path):
    """Of what is kept, as it is kept; of a bf16 weight its master."""
    dtype = getattr(torch, dtype)
    model, tokenizer = models.load(make_model_folder(tmp_path / "m", kind=kind, dtype=dtype), dtype=dtype)
    rows = [Example("cat red", "red", 0), Example("dog runs happy", "blue", 1)]
    memory, method = Memory(), get("ogd", keep_in=keep_in)
    learned(method, model, memory, Task("t", "{sentence}", rows, rows, rows), tokenizer)
    assert {t.dtype for t in memory.tensors.values()} == {
        torch.bfloat16 if keep_in == "bf16" else torch.float64 if dtype == torch.float64 else torch.float32
    }
    opt, start, B = begun(method, model, memory, lr=1e-3, weight_decay=0.1, max_grad_norm=1.0), vector(model, memory), directions(memory)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20 if kind == "t5" else 50):  # its steps are long
        ids = torch.randint(2, 30, (2, 6), generator=generator)
        opt.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        opt.step()
    parameters = dict(model.named_parameters())
    end = torch.cat([opt.state[parameters[n]].get("master", parameters[n]).detach().flatten().double() for n in memory.of("ogd")])
    d = end - start
    assert len(B) == 2 and (B @ d).norm() / d.norm() < bound and d.norm() > 0.05


def test_constrain_together_is_the_projection_of_one_long_vector():
    """SGD, two tensors, three directions that are neither orthogonal nor of length 1: against the projection written out."""
    g = torch.Generator().manual_seed(0)
    W, b = (nn.Parameter(torch.randn(*shape, generator=g, dtype=torch.float64)) for shape in ((4, 3), (5,)))
    B = torch.randn(3, 17, generator=g, dtype=torch.float64)
    opt = torch.optim.SGD([W, b], lr=0.1)
    handle = constrain_together(opt, {W: B[:, :12].reshape(3, 4, 3), b: B[:, 12:]})
    W.grad, start, G = torch.randn(4, 3, generator=g, dtype=torch.float64), torch.cat([W.detach().flatten(), b.detach()]), None
    for with_b in (True, False):  # a tensor without a gradient takes its part in the projection
        b.grad = torch.randn(5, generator=g, dtype=torch.float64) if with_b else None
        G = torch.cat([W.grad.flatten(), b.grad if with_b else torch.zeros(5, dtype=torch.float64)])
        opt.step()
        start = start - 0.1 * (G - B.mT @ torch.linalg.solve(B @ B.mT, B @ G))
        torch.testing.assert_close(torch.cat([W.detach().flatten(), b.detach()]), start)
    handle.remove()
    opt.step()
    torch.testing.assert_close(W.detach().flatten(), (start[:12] - 0.1 * W.grad.flatten()))


def test_constrain_together_in_pieces_is_the_same(monkeypatch):
    B, d = (torch.randn(*shape, generator=torch.Generator().manual_seed(1)) for shape in ((3, 7, 5), (7, 5)))
    whole = along(B, d), combined(B, torch.arange(3.0), torch.float32)
    monkeypatch.setattr("forgetless.optim.constrained.BLOCK", 10)
    torch.testing.assert_close((along(B, d), combined(B, torch.arange(3.0), torch.float32)), whole)
    torch.testing.assert_close(whole, (B.flatten(1) @ d.flatten(), torch.einsum("kij,k->ij", B, torch.arange(3.0))))


@pytest.mark.parametrize(
    ("bases", "said"),
    [
        (lambda W, b: {torch.zeros(2): torch.ones(1, 2)}, "not among"),
        (lambda W, b: {W: torch.ones(1, 2, 3)}, "must be"),
        (lambda W, b: {W: torch.ones(2, 2, 2), b: torch.ones(1, 3)}, "the same for all"),
        (lambda W, b: {W: torch.ones(2, 2, 2)}, "depend on each other"),
        (lambda W, b: {W: torch.zeros(1, 2, 2)}, "depend on each other"),
    ],
)
def test_constrain_together_refuses_what_means_nothing(bases, said):
    W, b = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=said):
        constrain_together(torch.optim.SGD([W, b], lr=0.1), bases(W, b))


@pytest.mark.parametrize("options", [{"samples": 0}, {"keep_in": "fp16"}])
def test_ogd_refuses_what_means_nothing(options):
    with pytest.raises(ConfigError, match=f"method ogd: {next(iter(options))}"):
        get("ogd", **options)


# -- all -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpm", "migu", "sara", "ogd"])
def test_no_module_matched_names_the_nearest(name, tiny):
    with pytest.raises(ConfigError, match=r"q_prj.*matches no linear layer.*q_proj"):
        get(name, modules=["q_prj"]).check(AutoModelForCausalLM.from_pretrained(tiny))
