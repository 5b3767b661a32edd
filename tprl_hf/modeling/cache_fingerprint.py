"""By what rows and columns of a key-value cache are known again, after they were cropped, repeated or reordered."""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer, StaticSlidingWindowLayer

NUM_VALUES = 8  # of each column's key: few, and yet no two tokens at one position share them


class ReadableKeys(NamedTuple):
    """Keys `[R, heads, n, width]` of a layer, and which column of the cache is the first of the n."""

    keys: Tensor
    start: int
    layer: int


def readable_keys(cache: Cache) -> ReadableKeys | None:
    """Keys of the first layer that has all of them, else of one that has most, as layers with a sliding window do.

    `None` where no layer keeps keys as they were computed, as in a quantised cache.
    """
    if cache.offloading and torch.accelerator.is_available():  # it copies without waiting
        torch.accelerator.synchronize()
    held = int(cache.get_seq_length())
    found: ReadableKeys | None = None
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, CacheLayerMixin) or isinstance(layer, StaticSlidingWindowLayer):
            continue
        keys = layer.keys
        if keys is None or keys.ndim != 4 or keys.shape[2] == 0:
            continue
        if isinstance(layer, StaticLayer):
            return ReadableKeys(keys[:, :, :held], 0, index)
        if found is None or keys.shape[2] > found.keys.shape[2]:
            found = ReadableKeys(keys, held - keys.shape[2], index)
        if found.start == 0:
            return found
    return found


class CacheFingerprint:
    """A few numbers of each column of a cache, as they were when it was noted what it holds."""

    def __init__(self, cache: Cache):
        self.length = int(cache.get_seq_length())
        found = readable_keys(cache)
        self.start = self.length if found is None else found.start
        self.values = None if found is None else found.keys[:, 0, :, :NUM_VALUES].detach().clone()
        # dynamic layers get a new tensor with every change, so that the same one needs no second look
        self.seen = None if found is None else weakref.ref(found.keys)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "seen": None}  # a copy has tensors of its own

    def find_rows(self, cache: Cache, num_rows: int) -> list[int] | None:
        """For each row of `cache` as it is now, which of the `num_rows` rows it was.

        Columns may be missing at the end, or have been added. Without keys to look at, rows are as they were.

        Returns:
            `None` for a cache whose columns are others, one row enough.
        """
        found = readable_keys(cache)
        same_rows = list(range(num_rows))
        if found is None or self.values is None:
            return same_rows
        keys, start, _ = found
        if self.seen is not None and self.seen() is keys and self.length == int(cache.get_seq_length()):
            return same_rows
        first, end = max(start, self.start), min(start + keys.shape[2], self.length)
        if first >= end:
            return same_rows if len(keys) == num_rows else None
        now = keys[:, 0, first - start : end - start, :NUM_VALUES].flatten(1)
        noted = self.values[:, first - self.start : end - self.start].to(now).flatten(1)
        same = torch.stack([(now == row).all(1) for row in noted], 1).cpu()
        if not same.any(1).all():
            return None
        found_rows = same.int().argmax(1).tolist()
        return [i if i < num_rows and same[i, i] else row for i, row in enumerate(found_rows)]
