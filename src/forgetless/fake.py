"""Tensors with a shape and no data (torch's FakeTensorMode), on which `forgetless estimate` plans: what has to look at numbers asks here first."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def is_fake(*tensors: Tensor | None) -> bool:
    return any(isinstance(t, FakeTensor) for t in tensors)


def storage_key(t: Tensor) -> int:
    """The same for tensors that share a storage, and for no others."""
    storage = t.untyped_storage()
    return storage._cdata if is_fake(t) else storage.data_ptr()
