"""Products of fp32 matrices on a CPU by the library that is fast there.

torch multiplies fp32 matrices by MKL, which on AMD's processors leaves AVX-512 unused: oneDNN, which torch brings too, takes half the time for the same sum in the
same precision (`python -m forgetless.bench step` counts on it). torch.compile reaches oneDNN by the same operator as this file. Elsewhere, and in any other
dtype, these functions are torch's own. With FORGETLESS_NATIVE=1 thin products are native.py's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from . import native
from .fake import is_fake

SMALL = 1 << 18  # multiplications below which the call itself is what takes the time
BLOCK = 1 << 18  # elements of a product that are added before they leave the cache


@functools.cache
def prefers_onednn() -> bool:
    """Is this a CPU with AVX-512 that MKL does not use, and has torch oneDNN's product?"""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8") and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    except OSError:
        return False


def _suits(A: Tensor, B: Tensor) -> bool:
    return (
        A.device.type == "cpu"
        and A.dtype == B.dtype == torch.float32
        and A.shape[0] * A.shape[1] * B.shape[1] >= SMALL
        and prefers_onednn()
        and not (torch.is_grad_enabled() and (A.requires_grad or B.requires_grad))
        and torch.backends.mkldnn.enabled
    )


def _plain_alike(A: Tensor, *others: Tensor) -> bool:
    """Are the others of A's dtype and device, of nobody's graph, and with data?"""
    return all(B.dtype == A.dtype and B.device == A.device and not (torch.is_grad_enabled() and B.requires_grad) and not is_fake(B) for B in others)


def product(A: Tensor, B: Tensor) -> Tensor:
    """A B, contiguous; A (m, k), B (k, n), in any layout."""
    if native.suits(A, B.shape[1]) and _plain_alike(A, B):
        return native.product(A, B)
    if not _suits(A, B):
        return A @ B
    if A.stride(1) == 1:
        return _linear(A, B.mT)
    # the first factor is slow to read by columns, the second is not
    return _linear(A.contiguous(), B.mT) if A.shape[0] <= B.shape[1] else _linear(B.mT.contiguous(), A).mT.contiguous()


def coarse_product(A: Tensor, B: Tensor) -> Tensor:
    """A B of fp32 matrices, multiplied in bf16 and added up in fp32: each number of it is off by some 2^-8 of the length of A's row. For what only has to be near."""
    A, B = A.bfloat16(), B.bfloat16()
    if A.device.type != "cpu" or not prefers_onednn():
        return (A @ B).float()
    return (_linear(A, B.mT) if A.stride(1) == 1 else _linear(B.mT.contiguous(), A).mT).float()  # MKL's bf16 leaves as much unused as its fp32


def add_product_(C: Tensor, A: Tensor, B: Tensor, alpha: float = 1.0) -> Tensor:
    """C <- C + alpha A B in place, C (m, n), A (m, k), B (k, n): by blocks of rows, so that no product of C's size is written."""
    if native.suits(C, A.shape[1]) and _plain_alike(C, A, B):
        return native.add_product_(C, A, B.mT, alpha)
    if A.shape[1] < 32 or not _suits(A, B):  # a thin product is quicker than reading and writing C, whoever makes it
        return C.addmm_(A, B, alpha=alpha)
    stored = C
    if C.stride(0) < C.stride(1):  # C^T <- C^T + alpha B^T A^T: blocks of rows as they are stored
        stored, A, B = C.mT, B.mT.contiguous(), A.mT
    rows = max(1, BLOCK // stored.shape[1])
    for i in range(0, stored.shape[0], rows):
        stored[i : i + rows].add_(_linear(A[i : i + rows], B.mT), alpha=alpha)
    return C


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T, x (m, k), weight (n, k)."""
    if not (weight.is_contiguous() or weight.mT.is_contiguous()):
        weight = weight.contiguous()  # rows of a wider matrix go to oneDNN's reference loops: a thousand times slower
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """fp32 products as fp32 says, whatever set_float32_matmul_precision or TrainingArguments(tf32=True) allow elsewhere: a projection is no good in TF32.

    A precision that was allowed for all of torch's backends is given back as one of these two.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    if not all(hasattr(backend, "fp32_precision") for backend in backends):  # torch 2.8
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    backends = tuple(backend for backend in backends if backend.fp32_precision not in ("ieee", "none"))
    allowed = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, before in zip(backends, allowed, strict=True):
            backend.fp32_precision = before
