"""A weight cut at its k-th singular direction, kept in a file by the hash of the weight, so that a task that is resumed does not decompose the model again."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import torch
from torch import Tensor

from .fake import is_fake
from .subspace import split, tolerance

log = logging.getLogger(__name__)
NAMES = ("U_high", "U_low", "V_high", "V_low")
Split = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


def cached_split(W: Tensor, k: int, folder: Path | None) -> Split:
    """subspace.split(W, k), from a file in `folder` where one is there that fits W; otherwise it is made, and written. No folder: no file.

    A file that is cut short, or of other weights under this name, is said to be so and made again.
    """
    if is_fake(W):
        (m, n), R = W.shape, min(W.shape)
        low_U, low_V = (W.new_empty(side, R - k) if side == R else None for side in (m, n))
        return W.new_empty(m, k), low_U, W.new_empty(n, k), low_V
    if folder is None:
        return split(W, k)
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    path = folder / f"{fingerprint(W, k)}.safetensors"
    if path.is_file():
        try:
            found = load_file(path)
            parts = tuple(
                None if name not in found else found[name].to(W, copy=True) for name in NAMES
            )  # safetensors leaves tensors where products round otherwise
            if fits(W, k, parts):
                return parts
            reason = "is of other weights"
        except (SafetensorError, OSError) as error:
            reason = f"cannot be read ({error})"
        log.warning("the cached decomposition %s %s; it is made again", path, reason)
    parts = split(W, k)
    folder.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    save_file({name: B.contiguous() for name, B in zip(NAMES, parts, strict=True) if B is not None}, beside)
    beside.replace(path)
    return parts


def fingerprint(W: Tensor, k: int) -> str:
    """Hash of a weight's values, shape and dtype, and of k."""
    content = hashlib.sha256(f"{tuple(W.shape)} {W.dtype} {k}".encode())
    content.update(W.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    return content.hexdigest()


def fits(W: Tensor, k: int, parts: tuple[Tensor | None, ...]) -> bool:
    """Are these the parts of W? The shapes, and on a few vectors: W takes V_high into U_high and nothing else into it, and no basis meets its other part."""
    U, U_low, V, V_low = parts
    (m, n), R = W.shape, min(W.shape)
    wanted = ((m, k), (m, m - k) if m == R else None, (n, k), (n, n - k) if n == R else None)
    if any((None if B is None else tuple(B.shape)) != shape for B, shape in zip(parts, wanted, strict=True)):
        return False
    g = torch.linspace(-1, 1, max(m, n), dtype=W.dtype, device=W.device)
    Y, scale = W @ (V @ g[:k]), torch.linalg.matrix_norm(W) * torch.linalg.vector_norm(g)
    errors = [torch.linalg.vector_norm(Y - U @ (U.mT @ Y)) / scale.clamp_min(torch.finfo(W.dtype).tiny)]
    for high, low in ((U, U_low), (V, V_low)):
        lengths = [(high @ g[:k]).norm() - g[:k].norm()]
        lengths += [] if low is None else [(low @ g[: low.shape[1]]).norm() - g[: low.shape[1]].norm(), (high.mT @ (low @ g[: low.shape[1]])).norm()]
        errors += [x.abs() / torch.linalg.vector_norm(g) for x in lengths]
    return all(float(e) < 10 * tolerance(W.dtype) for e in errors)
