"""Products with matrices of 8 columns or fewer, in C, where FORGETLESS_NATIVE=1 asks for them: a low-rank step is one such product that reads the gradient and one that
writes the weight, and what they cost is reading and writing. On a CPU, in fp32; without the variable, and for any other product, nothing here is used.

thin.c is compiled at the first use by the C compiler at hand (CC, else cc; GCC or clang) for this very processor, and kept in the cache folder under the hash of source,
compiler and processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from .errors import ConfigError
from .fake import is_fake

COLUMNS = 8  # beyond them the libraries' products are as quick
SMALL = 1 << 16  # numbers in the wide matrix below which the call itself is what takes the time
FLAGS = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]


def wanted() -> bool:
    """Does the environment ask for it?"""
    value = os.environ.get("FORGETLESS_NATIVE", "0")
    if value not in ("0", "1", ""):
        raise ConfigError(f"FORGETLESS_NATIVE={value}: 1 compiles and uses the products in C, 0 or nothing does not")
    return value == "1"


@functools.cache
def library() -> ctypes.CDLL | None:
    """thin.c, compiled; None where the environment does not ask for it. Raises ConfigError where it cannot be compiled."""
    if not wanted():
        return None
    from .models import cache_dir

    source = files("forgetless").joinpath("thin.c").read_bytes()
    compiler = shlex.split(os.environ.get("CC") or "cc")
    try:
        about = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
        mark = hashlib.sha256(b"\0".join([source, about, " ".join(FLAGS).encode(), _processor().encode()])).hexdigest()[:16]
        built = cache_dir() / f"thin-{mark}.so"
        try:
            thin = ctypes.CDLL(str(built))
        except OSError:  # not there yet, or damaged
            _compile(compiler, source, built)
            thin = ctypes.CDLL(str(built))
    except (OSError, subprocess.CalledProcessError) as error:
        said = " ".join((getattr(error, "stderr", b"") or b"").decode(errors="replace").split())[:300] or str(error)
        raise ConfigError(
            f"FORGETLESS_NATIVE=1: cannot compile with {shlex.join(compiler)} ({said}); set CC to GCC or clang, or take it out"
        ) from None
    size, pointer = ctypes.c_long, ctypes.c_void_p
    thin.thin_product.argtypes = [size, size, size, pointer, pointer, pointer, ctypes.c_int]
    thin.thin_add.argtypes = [size, size, size, ctypes.c_float, pointer, pointer, pointer, ctypes.c_int]
    return thin


def _compile(compiler: list[str], source: bytes, built: Path) -> None:
    """`built` appears whole or not at all, also where several processes make it."""
    built.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        made = Path(folder) / built.name
        subprocess.run([*compiler, *FLAGS, "-x", "c", "-", "-o", str(made)], input=source, capture_output=True, check=True)
        os.replace(made, built)


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "".join(next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags", "Features"))


def suits(wide: Tensor, columns: int) -> bool:
    """Can the products in C take this wide matrix (m, n) with a thin one of so many columns, and may they?"""
    return (
        columns <= COLUMNS
        and wide.numel() >= SMALL
        and wide.device.type == "cpu"
        and wide.dtype == torch.float32
        and wide.is_contiguous()
        and not (torch.is_grad_enabled() and wide.requires_grad)
        and not is_fake(wide)
        and library() is not None
    )


def product(A: Tensor, B: Tensor) -> Tensor:
    """A B, A (m, n) for which `suits` holds, B (n, r)."""
    (m, n), r = A.shape, B.shape[1]
    B, R = B.contiguous(), A.new_empty(m, r)
    _check(library().thin_product(m, n, r, A.data_ptr(), B.data_ptr(), R.data_ptr(), torch.get_num_threads()))
    return R


def add_product_(C: Tensor, L: Tensor, B: Tensor, alpha: float) -> Tensor:
    """C <- C + alpha L B^T in place, C (m, n) for which `suits` holds, L (m, r), B (n, r)."""
    (m, n), r = C.shape, L.shape[1]
    L, B = L.contiguous(), B.contiguous()
    _check(library().thin_add(m, n, r, alpha, L.data_ptr(), B.data_ptr(), C.data_ptr(), torch.get_num_threads()))
    torch.autograd.graph.increment_version(C)  # what a graph has saved of C is no longer that
    return C


def _check(status: int) -> None:
    if status:
        raise MemoryError("no memory for a thin matrix")
