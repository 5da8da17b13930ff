"""Products by the library that is fast on this CPU: the same numbers as torch's, in every layout; and fp32 that stays fp32 within a step."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from forgetless import Constraint, SubspaceAdamW, native, products
from forgetless.errors import ConfigError
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
    assert same is C
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


# -- products in C -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Where the products in C are compiled, once for all tests that only use them."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def in_c(monkeypatch, compiled):
    """FORGETLESS_NATIVE=1, compiled away from the user's cache, and how often it was called."""
    if not shutil.which(os.environ.get("CC") or "cc"):
        pytest.skip("no C compiler")
    monkeypatch.setenv("FORGETLESS_NATIVE", "1")
    monkeypatch.setenv("FORGETLESS_CACHE", str(compiled))
    monkeypatch.setattr(native, "SMALL", 0)
    native.library.cache_clear()
    calls = []
    for name in ("product", "add_product_"):
        real = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
    yield calls
    native.library.cache_clear()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("r", [1, 3, 4, 6, 7, 8])
@pytest.mark.parametrize("m, n", [(1, 1), (1, 40), (7, 15), (6, 16), (33, 50), (64, 96), (301, 129)])
def test_thin_products_in_c_are_the_products(in_c, m, n, r, threads):
    draw, before = torch.Generator().manual_seed(m * n + r), torch.get_num_threads()
    A, B, L, C = (torch.randn(*shape, generator=draw) for shape in ((m, n), (n, r), (m, r), (m, n)))
    torch.set_num_threads(threads)
    try:
        torch.testing.assert_close(product(A, B).double(), A.double() @ B.double(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(product(A, B.mT.contiguous().mT).double(), A.double() @ B.double(), rtol=1e-5, atol=1e-4)
        expected = C.double() - 0.5 * L.double() @ B.double().mT
        assert add_product_(C, L, B.mT, alpha=-0.5) is C
        torch.testing.assert_close(C.double(), expected, rtol=1e-5, atol=1e-4)
    finally:
        torch.set_num_threads(before)
    assert in_c == ["product", "product", "add_product_"]
    assert [p.suffix for p in Path(os.environ["FORGETLESS_CACHE"]).iterdir()] == [".so"]  # whole, and nothing beside it


def test_what_c_does_not_take_goes_where_it_went(in_c):
    A, B = torch.randn(40, 30), torch.randn(30, 4)
    for a, b in ((A.double(), B.double()), (A.bfloat16(), B.bfloat16()), (A.mT.contiguous().mT, B), (A, torch.randn(30, 9)), (A[:, :20], B[:20])):
        torch.testing.assert_close(product(a, b), a @ b, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-5, atol=1e-4)
    A.requires_grad_(True)
    assert product(A, B).requires_grad and product(torch.randn(40, 30), B.clone().requires_grad_(True)).requires_grad
    assert in_c == []
    with torch.no_grad():
        product(A, B)
    assert in_c == ["product"]


def test_tensors_without_data_and_graphs_that_have_saved_the_weight(in_c):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        A, B = torch.empty(40, 30), torch.empty(30, 4)
        assert product(A, B).shape == (40, 4) and add_product_(A, torch.empty(40, 4), B.mT) is A
    assert in_c == []
    C, x = torch.randn(40, 30), torch.ones(30, requires_grad=True)
    y = (C @ x).sum()
    add_product_(C, torch.randn(40, 4), torch.randn(4, 30))
    assert in_c == ["add_product_"]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_damaged_library_is_made_again(in_c, monkeypatch, tmp_path):
    product(torch.randn(40, 30), torch.randn(30, 4))
    (built,) = Path(os.environ["FORGETLESS_CACHE"]).iterdir()
    damaged = tmp_path / "another" / built.name
    damaged.parent.mkdir()
    damaged.write_bytes(b"no library")
    monkeypatch.setenv("FORGETLESS_CACHE", str(damaged.parent))
    native.library.cache_clear()
    assert native.library() is not None and damaged.read_bytes() == built.read_bytes()


@pytest.mark.parametrize("side", ["inputs", "outputs", "both"])
def test_low_rank_steps_in_c_are_the_same_steps_and_leak_nothing(in_c, side, monkeypatch):
    V, steps = torch.linalg.qr(torch.randn(48, 5, generator=torch.Generator().manual_seed(0)))[0].contiguous(), []
    constraint = Constraint(outputs=V) if side == "outputs" else Constraint(inputs=V)
    for value in ("1", "0"):
        monkeypatch.setenv("FORGETLESS_NATIVE", value)
        native.library.cache_clear()
        W = torch.nn.Parameter(torch.zeros(48, 48))
        optimizer = SubspaceAdamW([{"params": [W], "rank": 4, "side": side, "constraint": constraint, "refresh_gap": 3}], lr=1e-2)
        for t in range(7):
            W.grad = torch.randn(48, 48, generator=torch.Generator().manual_seed(t))
            optimizer.step()
        steps.append(W.detach().clone())
        D = W.detach() if side != "outputs" else W.detach().mT
        assert float((D @ V).norm() / D.norm()) < 1e-5
    assert "add_product_" in in_c and float((steps[0] - steps[1]).norm() / steps[1].norm()) < 1e-2


def test_no_compiler_and_a_value_that_means_nothing_are_said(monkeypatch, tmp_path):
    monkeypatch.setenv("FORGETLESS_CACHE", str(tmp_path))
    for env, says in (
        ({"CC": "no-such-compiler"}, "cannot compile with no-such-compiler"),
        ({"FORGETLESS_NATIVE": "yes"}, "FORGETLESS_NATIVE=yes: 1 compiles"),
    ):
        native.library.cache_clear()
        with monkeypatch.context() as patch, pytest.raises(ConfigError, match=says):
            for key, value in ({"FORGETLESS_NATIVE": "1"} | env).items():
                patch.setenv(key, value)
            native.library()
    native.library.cache_clear()
