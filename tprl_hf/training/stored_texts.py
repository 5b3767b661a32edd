"""Ids and masks of many prompts in little memory: most of a prompt are placeholders, all alike."""

import zlib
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """A tensor `[n]` as compressed bytes."""

    dtype: torch.dtype
    content: bytes


def packed(value: Any) -> Any:
    """`value` with its tensors `[n]` compressed, also those in tuples and dicts."""
    if isinstance(value, Tensor):
        return Packed(value.dtype, zlib.compress(value.cpu().contiguous().numpy().tobytes(), 1))
    if isinstance(value, tuple):
        return tuple(packed(one) for one in value)
    return {name: packed(one) for name, one in value.items()} if isinstance(value, dict) else value


def unpacked(value: Any) -> Any:
    """What [`packed`] got."""
    if isinstance(value, Packed):
        content = bytearray(zlib.decompress(value.content))
        return torch.frombuffer(content, dtype=value.dtype) if content else torch.empty(0, dtype=value.dtype)
    if isinstance(value, tuple):
        return tuple(unpacked(one) for one in value)
    return {name: unpacked(one) for name, one in value.items()} if isinstance(value, dict) else value
