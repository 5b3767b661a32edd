"""Images are decoded and processed in threads of their own, so that the LLM does not wait for them."""

import copy
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from transformers import BatchFeature

Row = dict[str, Any]
# What a processor makes of some rows at once.
Process = Callable[[Any, Sequence[Row]], BatchFeature]


@dataclass
class Group:
    """Rows that the processor, and where `is_encoded` the vision tower, reads at once.

    Args:
        images (`list[str]`), keys (`list[bytes]`): what features and texts of each row are kept under.
    """

    rows: list[Row]
    images: list[str]
    keys: list[bytes]
    is_encoded: bool


class ProcessedAhead:
    """
    Runs a processor in the background.

    Args:
        processor: a fast tokenizer cannot be called by two threads at once, so each thread has a copy.
        process (`Callable`): called with such a copy and the rows of a group.
        num_threads (`int`): 0 to do nothing ahead.
    """

    def __init__(self, processor: Any, process: Process, num_threads: int):
        self.processor, self.process, self.num_threads = processor, process, num_threads
        self.own = threading.local()
        self.pool = ThreadPoolExecutor(num_threads, "process-images") if num_threads else None
        self.waiting: list[tuple[Group, Future[BatchFeature]]] = []

    def work(self, group: Group) -> BatchFeature:
        """In a thread of the pool."""
        if not hasattr(self.own, "processor"):
            self.own.processor = copy.deepcopy(self.processor)
        return self.process(self.own.processor, group.rows)

    def start(self, groups: Iterable[Group], others: Iterable[Callable[[], Any]] = ()) -> None:
        """Begins with `groups`, and with other work; what was begun before and is not wanted any more is dropped."""
        if self.pool is None:
            return
        for _, future in self.waiting:
            future.cancel()
        self.waiting = [(group, self.pool.submit(self.work, group)) for group in groups]
        for other in others:
            self.pool.submit(other)

    def take(self, keys: set[bytes]) -> list[tuple[Group, BatchFeature]]:
        """What was begun of rows `keys`, when it is done."""
        wanted = [entry for entry in self.waiting if keys.intersection(entry[0].keys)]
        self.waiting = [entry for entry in self.waiting if not keys.intersection(entry[0].keys)]
        return [(group, future.result()) for group, future in wanted]

    def run(self, groups: Sequence[Group]) -> list[tuple[Group, BatchFeature]]:
        """What was not begun: by all threads where there are several, else here."""
        if self.pool is None or self.num_threads == 1 or len(groups) == 1:
            return [(group, self.process(self.processor, group.rows)) for group in groups]
        return list(zip(groups, self.pool.map(self.work, groups), strict=True))
