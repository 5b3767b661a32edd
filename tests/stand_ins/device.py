"""A second device for machines that have none: `pretend:0` computes on the CPU, but refuses to be mixed with it.

Importing this registers the device, as the accelerator of this process; code runs on it within `PretendMode()`.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretend")
torch.accelerator.synchronize = lambda *device: None

DEVICE = torch.device("pretend:0")
aten = torch.ops.aten
BETWEEN_DEVICES = {aten._to_copy.default, aten.copy_.default, aten.copy.default}
# their indices, the second argument, may lie on the CPU
INDEXING = {
    *(aten.index.Tensor, aten._unsafe_index.Tensor),
    *(aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default),
}
# whose result has a size that only the device knows
SIZED_BY_VALUES = {
    *(aten.nonzero.default, aten.masked_select.default, aten.bincount.default, aten.repeat_interleave.Tensor),
    *(aten._unique2.default, aten.unique_dim.default, aten.equal.default),
}
# What a GPU would have been given, by operation, and what the program would have waited for.
launches: Counter[str] = Counter()
waits: Counter[str] = Counter()


class PretendTensor(Tensor):
    """A tensor on [`DEVICE`], whose values are those of the CPU tensor `inner`."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            dtype=inner.dtype,
            device=DEVICE,
            storage_offset=inner.storage_offset(),
        )

    def __init__(self, inner: Tensor):
        self.inner = inner

    def __repr__(self, **kwargs: Any) -> str:
        return f"PretendTensor({self.inner})"

    def tolist(self) -> Any:
        waits["tolist"] += 1
        return self.inner.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"A tensor on {DEVICE} has no NumPy array: call .cpu() first.")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class PretendMode(TorchDispatchMode):
    """Within it tensors may be made on [`DEVICE`]."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def compute(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """One operation, on the CPU. Raises `RuntimeError` where devices are mixed as a GPU would not have it."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    checked = tree_flatten((args[:1], args[2:]))[0] if func in INDEXING else tensors
    there = [isinstance(value, PretendTensor) for value in checked if isinstance(value, Tensor) and value.dim() > 0]
    if any(there) and not all(there) and func not in BETWEEN_DEVICES:
        found = [(str(value.device), tuple(value.shape)) for value in tensors]
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {found}.")

    goes_there = any(isinstance(value, PretendTensor) for value in tensors)
    if kwargs.get("device") is not None:
        goes_there = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs = {**kwargs, "device": "cpu"}
    if func == aten.copy_.default:
        goes_there = isinstance(args[0], PretendTensor)
    count(func, args, tensors, goes_there)
    inner_args, inner_kwargs = tree_map(inner_of, (args, kwargs))
    if func == aten.histc.default and not inner_args[0].is_floating_point():  # the CPU's is for floats only
        result = func(inner_args[0].double(), *inner_args[1:], **inner_kwargs).to(inner_args[0].dtype)
    else:
        result = func(*inner_args, **inner_kwargs)
    if not goes_there:
        return result
    outer = {id(value.inner): value for value in tensors if isinstance(value, PretendTensor)}  # what in-place returns

    def outer_of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return outer[id(value)] if id(value) in outer else PretendTensor(value)

    return tree_map(outer_of, result)


def count(func: Any, args: tuple, tensors: list[Tensor], goes_there: bool) -> None:
    """Notes what is started on the device, and where the program has to wait for it."""
    comes_from = any(isinstance(value, PretendTensor) for value in tensors)
    if not (goes_there or comes_from) or func.is_view or func == aten.detach.default:
        return
    if func == aten._local_scalar_dense.default:
        waits[str(func)] += 1
        return
    launches[str(func)] += 1
    indices = args[1] if func in INDEXING else ()
    by_mask = any(isinstance(index, PretendTensor) and index.dtype == torch.bool for index in indices)
    if func in SIZED_BY_VALUES or by_mask or (comes_from and not goes_there):
        waits[str(func)] += 1


def inner_of(value: Any) -> Any:
    return value.inner if isinstance(value, PretendTensor) else value


def on_device(value: Any) -> Any:
    """`value` on [`DEVICE`]: a tensor, or a module, in place."""
    if isinstance(value, nn.Module):
        with PretendMode():
            return value.to(DEVICE)
    return PretendTensor(value) if isinstance(value, Tensor) else value


# What C++ calls without asking the mode: `torch.tensor(..., device=...)`, `int(tensor)`.
_library = torch.library.Library("aten", "IMPL")


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return PretendTensor(torch.empty_strided(size, stride, dtype=dtype))


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return PretendTensor(torch.empty(size, dtype=dtype))


def _copy_from(source, target, non_blocking=False):
    inner_of(target).copy_(inner_of(source))
    count(aten.copy_.default, (target, source), [source, target], isinstance(target, PretendTensor))
    return target


def _local_scalar_dense(tensor):
    waits["_local_scalar_dense"] += 1
    return tensor.inner.item()


_library.impl("empty_strided", _empty_strided, "PrivateUse1")
_library.impl("empty.memory_format", _empty, "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
_library.impl("_local_scalar_dense", _local_scalar_dense, "PrivateUse1")
