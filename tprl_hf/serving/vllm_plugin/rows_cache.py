"""Rows that tower and projector made, by the image they were made of."""

from collections import OrderedDict
from collections.abc import Hashable

import torch
from torch import Tensor


class RowsCache:
    """
    Keeps rows in the machine's memory, the ones used last. vLLM's own cache keeps what is left after pruning, which
    depends on the question; with this one a second question about an image does not run the tower again.

    Args:
        max_bytes (`int`): how much is kept at most; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.rows: OrderedDict[Hashable, Tensor] = OrderedDict()

    def get(self, key: Hashable, device: torch.device) -> Tensor | None:
        """The rows of `key` on `device`, or `None`."""
        found = self.rows.get(key)
        if found is None:
            return None
        self.rows.move_to_end(key)
        return found.to(device)

    def put(self, key: Hashable, rows: Tensor) -> None:
        """Keeps `rows`, and drops those that were not used for longest where there are too many."""
        size = rows.numel() * rows.element_size()
        if key in self.rows or size > self.max_bytes:
            return
        self.rows[key] = rows.detach().cpu().clone()
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            _, dropped = self.rows.popitem(last=False)
            self.num_bytes -= dropped.numel() * dropped.element_size()
