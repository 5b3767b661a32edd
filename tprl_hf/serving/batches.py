"""
Waiting requests that are answered together, in one call of `generate`.

The thread that generates takes the request that has waited longest, and those behind it that fit into the same call:
greedy ones with the same budget and inputs of the same shape. They start together; each ends by itself, and its answer
goes out then. Requests that come meanwhile wait for the next call.
"""

import asyncio
import contextvars
import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from starlette.exceptions import HTTPException
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.utils import GenerateManager

from .places import Turn
from .records import RequestRecord
from .stopping import AnswerEnd, CutQueue, EndsAnswer

# Base models whose batch is not its samples one by one, or whose images lie in one strip.
ALONE = {"hunyuan_vl", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7"}


@dataclass
class Wishes:
    """
    What a request asks for besides what transformers' handler knows.

    Args:
        end ([`AnswerEnd`]): Where the answer ends.
        budget (`dict`): Keyword arguments of `generate`.
        seed (`int`, *optional*): Of the random numbers, where the answer is drawn.
        inputs ([`BatchFeature`]): Of the model.
        asked_tokens (`int`, *optional*): The longest answer that the request asks for.
        num_kept (`int`, *optional*): Visual tokens that the budget keeps; `None` where that shows later.
        max_kept (`int`, *optional*): The most visual tokens that it may keep.
        timings (`bool`): Whether the answer says what took how long.
        turn ([`Turn`]): Ends when the model has answered.
        record ([`RequestRecord`]): Of the request.
    """

    end: AnswerEnd
    budget: dict[str, Any]
    seed: int | None
    inputs: Any
    asked_tokens: int | None
    num_kept: int | None
    max_kept: int | None
    timings: bool
    turn: Turn
    record: RequestRecord

    @property
    def may_exceed(self) -> bool:
        """Whether only the pruner can tell if the request keeps more than it may."""
        return self.max_kept is not None and self.num_kept is None and self.record.visual_tokens > self.max_kept


# Of the request that the current task serves; read where the task hands it over to the thread that generates.
WISHES: contextvars.ContextVar[Wishes] = contextvars.ContextVar("wishes")


class Job:
    """
    One request for the thread that generates, which takes it for the model.

    Args:
        batches ([`Batches`]): Who answers it.
        model ([`TPRLForConditionalGeneration`]): The model.
        processor ([`ProcessorMixin`]): Its processor.
        config (`GenerationConfig`): Of the answer.

    Attributes:
        sequence (`int64 [1, L + T]`): Prompt and answer, when it is over.
    """

    def __init__(self, batches: "Batches", model: Any, processor: Any, config: GenerationConfig):
        self.batches, self.model, self.processor, self.config = batches, model, processor, config
        self.wishes = WISHES.get()
        self.inputs: dict[str, Tensor] = dict(self.wishes.inputs)
        self.context = contextvars.copy_context()  # in which the model has the pruner that it has here
        self.loop = asyncio.get_running_loop()
        self.streamer: Any = None
        self.is_taken = self.is_over = False
        self.sequence: Tensor | None = None
        ends = config.eos_token_id if config.eos_token_id is not None else model.generation_config.eos_token_id
        self.last_tokens = {ends} if isinstance(ends, int) else set(ends or ())

    def generate(self, streamer: Any = None, **arguments: Any) -> Any:
        """What transformers' thread calls in place of the model's. Answers the jobs that fit to this one too."""
        jobs = self.batches.take(self, streamer)
        if jobs:
            answer(jobs)
        if self.wishes.end.error is not None:
            raise self.wishes.end.error
        return self.sequence

    def read_by(self, streamer: Any) -> None:
        """Hands the answer to a streamer of transformers, as it grows."""
        if self.streamer is None:
            self.streamer = streamer
            streamer.put(self.inputs["input_ids"])  # it waits for the prompt, and leaves it out

    def can_share(self) -> bool:
        """Whether its answer is the same in a batch: nothing is drawn, and nothing looks at the whole prompt."""
        if self.model.lvlm.config.model_type in ALONE:
            return False
        config = self.config
        plain = not config.do_sample and (config.num_beams or 1) == 1
        plain = plain and (config.repetition_penalty or 1) == 1 and not config.no_repeat_ngram_size
        return plain and config.sequence_bias is None and self.wishes.seed is None and not self.wishes.may_exceed

    def fits(self, other: "Job") -> bool:
        """Whether `other` can be a further row of this one's call."""
        if not (self.can_share() and other.can_share()) or self.wishes.budget != other.wishes.budget:
            return False
        settings, others = self.config.to_dict(), other.config.to_dict()
        if {**settings, "max_new_tokens": 0} != {**others, "max_new_tokens": 0}:
            return False
        same_names = self.inputs.keys() == other.inputs.keys()
        return same_names and all(fit(name, self.inputs, other.inputs) for name in self.inputs)

    def take(self, new_tokens: Tensor) -> None:
        """The answer's tokens so far, `int64 [T]`, the last of which is new."""
        try:
            if self.streamer is not None and not self.wishes.end.is_late():
                self.streamer.put(new_tokens[-1:])
        except Exception as error:  # its reader has left; the other rows of the call have theirs
            self.fail(error)
            return
        if self.is_done(new_tokens):
            self.finish(new_tokens)

    def is_done(self, new_tokens: Tensor) -> bool:
        """Whether the answer is over with these tokens `[T]`."""
        end = self.wishes.end
        if end.is_late() or len(new_tokens) >= self.config.max_new_tokens:
            return True
        if int(new_tokens[-1]) in self.last_tokens:
            return True
        if not end.stops:
            return False
        text = self.processor.decode(new_tokens, skip_special_tokens=True)
        return any(stop in text for stop in end.stops)

    def finish(self, new_tokens: Tensor) -> None:
        """Gives the answer to the client, where it is known what it cost."""
        self.is_over = True
        self.wishes.end.is_whole = int(new_tokens[-1]) in self.last_tokens
        self.sequence = torch.cat([self.inputs["input_ids"][0].cpu(), new_tokens.cpu()])[None]
        if self.wishes.num_kept is not None:
            self.settle(self.wishes.num_kept)

    def settle(self, num_kept: int) -> None:
        record = self.wishes.record
        if self.loop.is_closed() or "generated" in record.seconds:
            return
        record.note("generated")
        record.kept_tokens = num_kept
        try:
            self.wishes.end.refuse_late()
        except HTTPException as error:
            self.fail(error)
            return
        if self.streamer is not None:
            self.streamer.end()
        self.let_go()

    def fail(self, error: Exception) -> None:
        self.wishes.end.error, self.is_over = error, True
        self.wishes.record.problem = error.detail if isinstance(error, HTTPException) else str(error)
        self.let_go()

    def let_go(self) -> None:
        self.loop.call_soon_threadsafe(self.wishes.turn.end)
        self.loop.call_soon_threadsafe(self.wishes.end.generated.set)


def fit(name: str, some: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether an input of two requests can be one: tokens are padded, all else is put one behind the other."""
    one, other = some[name], others[name]
    if not (torch.is_tensor(one) and torch.is_tensor(other)):
        return False
    if one.shape == some["input_ids"].shape and other.shape == others["input_ids"].shape:
        return True
    return one.shape[1:] == other.shape[1:]


class Rows(StoppingCriteria):
    """Hands each row of a call to its own request as it grows, and ends it where that request ends."""

    def __init__(self, jobs: Sequence[Job], prompt_length: int):
        self.jobs, self.prompt_length = jobs, prompt_length
        self.has_begun = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.has_begun = True
        new_tokens = input_ids[:, self.prompt_length :].cpu()
        for job, row in zip(self.jobs, new_tokens, strict=True):
            if not job.is_over:
                job.take(row)
        return torch.tensor([job.is_over for job in self.jobs], device=input_ids.device)


def merged(jobs: Sequence[Job]) -> dict[str, Any]:
    """The inputs of several requests in one: tokens padded on the left, all else one behind the other."""
    if len(jobs) == 1:
        return dict(jobs[0].inputs)
    filler = jobs[0].processor.tokenizer.pad_token_id or 0  # hidden by the attention mask
    width = max(job.inputs["input_ids"].shape[1] for job in jobs)
    found = {}
    for name in jobs[0].inputs:
        parts = []
        for job in jobs:
            value, prompt = job.inputs[name], job.inputs["input_ids"]
            if value.shape == prompt.shape:
                value = pad(value, (width - value.shape[1], 0), value=filler if name == "input_ids" else 0)
            parts.append(value)
        found[name] = torch.cat(parts)
    return found


def answer(jobs: Sequence[Job]) -> None:
    """Answers requests in one call. After an error before the first token each is tried alone."""
    rows = Rows(jobs, max(job.inputs["input_ids"].shape[1] for job in jobs))
    for job in jobs:
        job.wishes.record.note("waited")
        job.wishes.record.batch = len(jobs)
    try:
        output = jobs[0].context.run(generate, rows)
        for index, job in enumerate(jobs):
            if not job.is_over:  # beams end by themselves
                job.finish(output.sequences[index, rows.prompt_length :])
            # a model that pruned nothing does not say how many it kept
            kept = output["num_kept"][index] if "num_kept" in output else job.wishes.record.visual_tokens
            job.settle(int(kept))
    except Exception as error:
        if len(jobs) > 1 and not rows.has_begun:
            for job in jobs:
                answer([job])
            return
        for job in jobs:
            if "generated" not in job.wishes.record.seconds:
                job.fail(error)


def generate(rows: Rows) -> Any:
    """The call of the model. A budget that keeps more than the server allows is lowered."""
    first, inputs = rows.jobs[0], merged(rows.jobs)
    wishes, model = first.wishes, first.model
    if len(rows.jobs) == 1:
        wishes.end.refuse_late()
    if wishes.seed is not None:
        torch.manual_seed(wishes.seed)
    config = copy.deepcopy(first.config)
    config.max_new_tokens = max(job.config.max_new_tokens for job in rows.jobs)
    is_beam_search = (config.num_beams or 1) > 1
    ends = EndsAnswer(wishes.end, first.processor, rows.prompt_length) if is_beam_search else rows
    budget, features = wishes.budget, None
    if wishes.may_exceed:
        features = model.encode_images(**inputs)
        plan = model.prune(**inputs, **budget, visual_features=features)
        if int(plan.num_kept) > int(wishes.max_kept or 0):
            budget = {"num_keep": wishes.max_kept}
    return model.generate(
        **inputs,
        **budget,
        visual_features=features,
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([ends]),
        stop_strings=None,  # those of the checkpoint, which the request has as its own
        return_dict_in_generate=True,
    )


class Batches(GenerateManager):
    """
    The thread that generates.

    Args:
        max_batch (`int`): Requests that are answered together.
    """

    def __init__(self, max_batch: int):
        super().__init__()
        self.max_batch = max_batch
        self.waiting: list[Job] = []
        self.lock = threading.Lock()

    def add(self, job: Job, streamer: Any = None) -> None:
        """Lets others take the job along. Its turn may have come already."""
        with self.lock:
            if not job.is_taken:
                if streamer is not None:
                    job.read_by(streamer)
                self.waiting.append(job)

    def take(self, job: Job, streamer: Any = None) -> list[Job]:
        """The job, and those that fit to it; nothing where another one has taken it along."""
        with self.lock:
            if job.is_taken:
                return []
            if streamer is not None:
                job.read_by(streamer)
            fitting = [other for other in self.waiting if other is not job and job.fits(other)]
            taken = [job, *fitting[: self.max_batch - 1]]
            for one in taken:
                one.is_taken = True
            self.waiting = [one for one in self.waiting if not one.is_taken]
        return taken

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        job = Job(self, model, processor, gen_config)
        queue, streamer = super().generate_streaming(
            job, processor, inputs, gen_config, request_id=request_id, response_parser=response_parser
        )
        self.add(job, streamer)
        return CutQueue(queue, job.wishes.end), streamer

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        job = Job(self, model, processor, gen_config)
        self.add(job)
        self.submit(job.generate)
        await job.wishes.end.generated.wait()
        if job.wishes.end.error is not None:
            raise job.wishes.end.error
        assert job.sequence is not None
        length = inputs["input_ids"].shape[-1]
        tokens = job.sequence[0, length:]
        return processor.decode(tokens, skip_special_tokens=True), length, tokens
