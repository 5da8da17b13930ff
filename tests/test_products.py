"""Products by the library that is fast on this CPU: the same numbers as torch's, in every layout; and fp32 that stays fp32 within a step."""

from __future__ import annotations

import pytest
import torch

from forgetless import Constraint, SubspaceAdamW, products
from forgetless.optim.constrained import constrain
from forgetless.products import BLOCK, add_product_, full_precision, product

available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture(params=["onednn", "torch"])
def library(request, monkeypatch):
    if request.param == "onednn" and not available:
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "prefers_onednn", lambda: request.param == "onednn")
    return request.param


def laid_out(rows: int, columns: int, how: str, seed: int) -> torch.Tensor:
    """A seeded matrix (rows, columns), stored as `how` says."""
    draw = torch.Generator().manual_seed(seed)
    if how == "transposed":
        return torch.randn(columns, rows, generator=draw).mT
    if how == "columns of a wider one":
        return torch.randn(rows, columns + 5, generator=draw)[:, 2 : columns + 2]
    if how == "rows of a taller one, transposed":
        return torch.randn(columns, rows + 3, generator=draw).mT[2 : rows + 2]
    return torch.randn(rows, columns, generator=draw)


LAYOUTS = ("plain", "transposed", "columns of a wider one", "rows of a taller one, transposed")


@pytest.mark.parametrize("a", LAYOUTS)
@pytest.mark.parametrize("b", LAYOUTS)
@pytest.mark.parametrize("shape", [(90, 70, 80), (300, 128, 8), (8, 128, 300)])
def test_a_product_is_the_product_in_every_layout(library, shape, a, b):
    m, k, n = shape
    A, B = laid_out(m, k, a, 0), laid_out(k, n, b, 1)
    found = product(A, B)
    assert found.shape == (m, n) and found.is_contiguous()
    torch.testing.assert_close(found.double(), A.double() @ B.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("k", [8, 64])
def test_a_product_is_added_in_blocks(library, k, transposed):
    m, n = 3 * BLOCK // 300 // 2, 300  # one block and a half, and a remainder
    C = laid_out(m, n, "transposed" if transposed else "plain", 0)
    A, B, before = laid_out(m, k, "plain", 1), laid_out(k, n, "transposed", 2), C.double()
    same = add_product_(C, A, B, alpha=-0.5)
    assert same.data_ptr() == C.data_ptr()
    torch.testing.assert_close(C.double(), before - 0.5 * A.double() @ B.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_nothing_times_something_is_nothing(library, shape):
    m, k, n = shape
    assert torch.equal(product(torch.ones(m, k), torch.ones(k, n)), torch.zeros(m, n))


def test_other_dtypes_and_wanted_gradients_are_torchs_own(library):
    A, B = torch.randn(200, 100, dtype=torch.float64), torch.randn(100, 200, dtype=torch.float64)
    assert torch.equal(product(A, B), A @ B)
    W = torch.randn(100, 200, requires_grad=True)
    product(A.float(), W).sum().backward()
    torch.testing.assert_close(W.grad, A.float().sum(0)[:, None].expand(100, 200), rtol=1e-4, atol=1e-4)


# -- what the user allowed elsewhere ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tf32():
    """As TrainingArguments(tf32=True) leaves it, and as it was afterwards."""
    backend = torch.backends.cuda.matmul
    before, backend.fp32_precision = backend.fp32_precision, "tf32"
    yield backend
    backend.fp32_precision = before


def spied(monkeypatch, seen: list[str]) -> None:
    restrict = Constraint.restrict_

    def spy(self, D):
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return restrict(self, D)

    monkeypatch.setattr(Constraint, "restrict_", spy)


@pytest.mark.parametrize("make", ["ours", "constrained"])
def test_a_step_projects_in_full_precision_and_gives_back_what_was_allowed(tf32, monkeypatch, make):
    W = torch.nn.Parameter(torch.ones(4, 3))
    constraint = Constraint(inputs=torch.eye(3)[:, :1])
    if make == "ours":
        optimizer = SubspaceAdamW([{"params": [W], "constraint": constraint}], lr=0.1)
    else:
        optimizer = torch.optim.SGD([W], lr=0.1)
        constrain(optimizer, {W: constraint})
    seen: list[str] = []
    spied(monkeypatch, seen)
    W.grad = torch.ones(4, 3)
    optimizer.step()
    assert seen and set(seen) == {"ieee"}
    assert tf32.fp32_precision == "tf32"


def test_full_precision_ends_with_an_error_too(tf32):
    with pytest.raises(KeyError), full_precision():
        raise KeyError
    assert tf32.fp32_precision == "tf32"


def test_an_older_torch_has_one_setting_for_all(monkeypatch):
    class Old:
        pass

    monkeypatch.setattr(torch.backends.mkldnn, "matmul", Old())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_task_begins_resumes_protects_and_ends_in_full_precision(tf32, monkeypatch, small_run, tmp_path):
    import forgetless as fl
    from forgetless.errors import Diverged
    from forgetless.methods import get_class

    method, seen = get_class("osft"), {}

    def spied_on(hook: str, real):
        def spy(self, *args, **kwargs):
            seen.setdefault(hook, set()).add(tf32.fp32_precision)
            return real(self, *args, **kwargs)

        return spy

    for hook in ("begin_task", "resume_task", "protect", "end_task"):
        monkeypatch.setattr(method, hook, spied_on(hook, getattr(method, hook)))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "cat sits"}\n{"prompt": "red apple"}\n')
    config = small_run({"name": "osft", "protect": "both"}, tasks=("colour",), protect_from=str(prompts), checkpoint_every=2)
    step, steps = SubspaceAdamW.step, []

    def fail(self, *args):
        steps.append(1)
        if len(steps) == 4:
            raise Diverged("as if killed")
        return step(self, *args)

    monkeypatch.setattr(SubspaceAdamW, "step", fail)
    with pytest.raises(Diverged):
        fl.run(config)
    fl.run(config)
    assert seen == {hook: {"ieee"} for hook in ("begin_task", "resume_task", "protect", "end_task")} and tf32.fp32_precision == "tf32"
