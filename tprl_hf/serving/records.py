"""What becomes of each request: a line of the log, and metrics in Prometheus' format."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from openai.types.completion_usage import PromptTokensDetails
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
BATCHES = (1, 2, 4, 8, 16, 32)
MAX_NOTE = 200  # characters of a refusal in the log


@dataclass
class RequestRecord:
    """
    One request. What it asks and what it is answered are not noted.

    Args:
        request_id (`str`): Its name.
        status (`int`): Of the answer; 499 when the client left before.
        images (`int`): How many it has.
        prompt_tokens, visual_tokens (`int`): Of the prompt, visual ones before pruning.
        kept_tokens (`int`): Visual tokens that the LLM saw.
        new_tokens (`int`): Of the answer.
        held_bytes (`int`): Of its body, and of the images that were fetched for it.
        batch (`int`): Requests that were answered in the same call of the model.
        problem (`str`): Why it was refused.
        seconds (`dict[str, float]`): While it was read, waited for its turn, was prepared (its images opened, its
            prompt made), and while the model made its answer.
    """

    request_id: str
    status: int = 0
    images: int = 0
    prompt_tokens: int = 0
    visual_tokens: int = 0
    kept_tokens: int = 0
    new_tokens: int = 0
    held_bytes: int = 0
    batch: int = 0
    problem: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    noted: float = field(default_factory=time.monotonic)

    def note(self, stage: str) -> None:
        """Ends a stage, or a part of it: the time since the last one was its own."""
        now = time.monotonic()
        self.seconds[stage] = self.seconds.get(stage, 0) + now - self.noted
        self.noted = now

    def timings(self) -> dict[str, float]:
        """The seconds so far in milliseconds, as an answer tells them."""
        return {f"{stage}_ms": round(1000 * seconds, 1) for stage, seconds in self.seconds.items()}

    def line(self) -> str:
        """The record on one line, as the log has it."""
        told = [f"{self.request_id} {self.status} {time.monotonic() - self.started:.3f} s"]
        if self.seconds:
            told.append("(" + ", ".join(f"{name} {seconds:.3f}" for name, seconds in self.seconds.items()) + ")")
        if self.prompt_tokens:
            told.append(
                f"{self.images} images, {self.prompt_tokens} prompt tokens, {self.kept_tokens} of "
                f"{self.visual_tokens} visual tokens kept, {self.new_tokens} new tokens"
            )
        if self.batch > 1:
            told.append(f"(one of {self.batch} in a call)")
        if self.problem:
            told.append(json.dumps(self.problem)[:MAX_NOTE])
        return " ".join(told)


class Metrics:
    """
    What all requests came to.

    Args:
        num_waiting (`Callable`): Says how many requests wait for their answers.
    """

    def __init__(self, num_waiting: Callable[[], int]):
        self.quiet = False
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter("tprl_requests", "Requests by status", ["status"], registry=self.registry)
        self.tokens = Counter("tprl_tokens", "Tokens of answered requests", ["kind"], registry=self.registry)
        self.seconds = Histogram(
            "tprl_request_seconds", "Time of requests", ["stage"], buckets=SECONDS, registry=self.registry
        )
        self.batches = Histogram(
            "tprl_batch_requests", "Requests of the call of each request", buckets=BATCHES, registry=self.registry
        )
        self.waiting = Gauge("tprl_requests_waiting", "Requests without their answer", registry=self.registry)
        self.waiting.set_function(num_waiting)

    def add(self, record: RequestRecord) -> None:
        """Counts a request that is over, and writes its line; where `quiet` is set, only that of a failed one."""
        self.requests.labels(str(record.status)).inc()
        for kind in ("prompt", "visual", "kept", "new"):
            self.tokens.labels(kind).inc(getattr(record, f"{kind}_tokens"))
        if record.batch:
            self.batches.observe(record.batch)
        for stage, seconds in {**record.seconds, "total": time.monotonic() - record.started}.items():
            self.seconds.labels(stage).observe(seconds)
        if record.status >= 400 or not self.quiet:
            print(record.line(), file=sys.stderr, flush=True)

    def text(self) -> bytes:
        return generate_latest(self.registry)


def usage_details(record: RequestRecord) -> Any:
    """The visual tokens of a prompt as `usage` tells them: how many there were, and how many were kept."""
    return PromptTokensDetails.model_validate(
        {"image_tokens": record.visual_tokens, "image_tokens_kept": record.kept_tokens}
    )
