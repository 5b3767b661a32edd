"""Metrics of the optimizer steps between two logs."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor


class StepMetrics(defaultdict[str, list[float]]):
    """By its name what was noted of each metric. NaN is a mean of nothing, and left out."""

    def __init__(self) -> None:
        super().__init__(list)
        self.share: float | None = None  # of its batch, that the micro-batch is which is being noted
        self.parts: dict[str, list[tuple[float, float]]] = defaultdict(list)  # of the batch: values and shares

    def note(self, values: Mapping[str, float | Tensor]) -> None:
        """Adds values; inside [`of_part`] they are of a micro-batch."""
        for name, value in values.items():
            number = value.item() if isinstance(value, Tensor) else value
            if math.isnan(number):
                continue
            if self.share is None:
                self[name].append(number)
            else:
                self.parts[name].append((number, self.share))

    @contextmanager
    def of_part(self, share: float, is_last: bool) -> Iterator[None]:
        """What is noted inside is of a micro-batch, `share` of its batch; after the last one it is of the batch."""
        self.share = share
        try:
            yield
        finally:
            self.share = None
        if is_last:
            for name, parts in self.parts.items():
                self[name].append(sum(value * part for value, part in parts) / sum(part for _, part in parts))
            self.parts.clear()

    def means(self) -> dict[str, float]:
        """Of all that was noted since the last [`clear`]."""
        return {name: sum(values) / len(values) for name, values in self.items()}
