"""The model `tprl` of lmms-eval: any of its generation tasks on images, answered with pruned visual tokens.

    lmms-eval --model tprl --model_args pretrained=DIR,keep_ratio=1/3 --tasks pope --batch_size 8

lmms-eval finds it through this package's entry point, see `plugin.py`.
"""

import contextlib
import time
from fractions import Fraction
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from tprl_hf.evaluation.answers import chat_inputs
from tprl_hf.evaluation.benchmark import synchronize
from tprl_hf.loading import load_model
from tprl_hf.modeling.budget import Budget
from tprl_hf.modeling.values import COUNT
from tprl_hf.pruners.by_name import has_budget, make_pruner, own_pruner
from tprl_hf.training.answer_ids import answer_lengths, end_ids

from .samples import cut, stops_of

# for tasks that say no `max_new_tokens`
MAX_NEW_TOKENS = 1024


class TPRL(lmms):
    """
    Args, as lmms-eval's `--model_args` hand them over:
        pretrained (`str`, *optional*): A TPRL checkpoint or any LVLM, as for [`load_model`]; the embedded one if
            absent.
        pruner (`str`, *optional*): Its name, as for [`make_pruner`]. Defaults to the checkpoint's own, which is
            "learned" where its policy is trained; else to "none".
        keep_ratio (`float` or `str`, *optional*): Fraction of the visual tokens to keep, such as 0.333 or 1/3.
        num_keep (`int`, *optional*), threshold (`float`, *optional*): The other budgets; at most one of the three.
            Without any, that of the checkpoint.
        seed (`int`, *optional*, defaults to 0): Of the random pruner.
        batch_size (`int`, *optional*, defaults to 1): Questions at once.
        device (`str`, *optional*): Defaults to the accelerator, if there is one.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        pruner: str | None = None,
        keep_ratio: float | str | None = None,
        num_keep: int | None = None,
        threshold: float | None = None,
        seed: int = 0,
        batch_size: int | str = 1,
        device: str | None = None,
    ):
        super().__init__()
        self.batch_size = COUNT("batch_size", as_number(batch_size))
        named = {"keep_ratio": keep_ratio, "num_keep": num_keep, "threshold": threshold}
        self.budget: dict[str, Any] = {name: as_number(value) for name, value in named.items() if value is not None}
        if self.budget:
            Budget(**self.budget)  # what `generate` would refuse, before a model is loaded and data are read
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = torch.device(device) if device else self.accelerator.device
        self.model, self.processor = load_model(pretrained, self.device)
        own = own_pruner(self.model)
        uses_own, pruner = pruner is None and own is not None, pruner or own or "none"
        if pruner == "none":
            if self.budget:
                raise ValueError(
                    f"A budget, {self.budget}, needs a pruner, and there is none: add pruner=divprune, or another "
                    "that docs/pruners.md names, to --model_args; without a trained policy none is the default."
                )
            self.budget = {"prune": False}
        elif not self.budget and not has_budget(self.model):
            raise ValueError(f"The pruner {pruner!r} needs a budget: add keep_ratio=1/3 to --model_args.")
        self.pruner = None if uses_own else make_pruner(self.model, pruner, seed)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers of the requests, in their order; numbers of tokens and times go to lmms-eval's `throughput`."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[2]), []).append(number)  # one batch has one way to generate
        answers: dict[int, GenerationResult] = {}
        batches: list[dict[str, float]] = []
        with tqdm(total=len(requests), disable=self.rank != 0, unit="answer") as bar:
            for numbers in groups.values():
                for start in range(0, len(numbers), self.batch_size):
                    some = numbers[start : start + self.batch_size]
                    results, measured = self._answer([requests[number] for number in some])
                    answers.update(zip(some, results, strict=True))
                    batches.append(measured)
                    bar.update(len(some))
        if batches:
            _log(batches)
        return [answers[number] for number in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("tprl answers tasks of output_type generate_until, this one compares likelihoods.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("tprl answers tasks of output_type generate_until, this one has several rounds.")

    @torch.no_grad()
    def _answer(self, requests: list[Instance]) -> tuple[list[GenerationResult], dict[str, float]]:
        """Answers of one batch, and sums over it: tokens as counts, times in milliseconds."""
        samples = [self._sample(request) for request in requests]
        wanted = requests[0].args[2]
        inputs = chat_inputs(self.processor, samples, self.device)
        has_images = any(sample["images"] for sample in samples)
        clock = FirstToken()
        start = now()
        with self.model.using(self.pruner) if self.pruner else contextlib.nullcontext():
            features = self.model.encode_images(**inputs) if has_images else None
            encoded = now()
            output = self.model.generate(
                **inputs,
                **self.budget,
                **generation_arguments(wanted),
                visual_features=features,
                tokenizer=self.processor.tokenizer,
                return_dict_in_generate=True,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        end = now()
        length = inputs["input_ids"].shape[1]
        texts = self.processor.batch_decode(output.sequences[:, length:], skip_special_tokens=True)
        ends, stops = end_ids(self.model, self.processor), self.model.generation_config.stop_strings
        lengths = answer_lengths(output.sequences, length, ends, self.processor.tokenizer, stops)
        results = [
            GenerationResult(cut(text, stops_of(wanted)), TokenCounts(output_tokens=length))
            for text, length in zip(texts, lengths, strict=True)
        ]
        kept, visual = (output.get(name, torch.zeros(1)).sum().item() for name in ("num_kept", "num_visual"))
        return results, {
            "questions": len(requests),
            "new_tokens": sum(lengths),
            "total_ms": 1000 * (end - start),
            "vision_ms": 1000 * (encoded - start),
            "prefill_ms": 1000 * (clock.time - encoded),
            "visual_tokens_kept": kept,
            "visual_tokens": visual,
        }

    def _sample(self, request: Instance) -> dict[str, Any]:
        _, doc_to_messages, _, doc_id, task, split = request.args
        chat = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        images, videos, audios = chat.extract_media()
        if videos or audios:
            raise ValueError(f"Task {task!r} has videos or sound in sample {doc_id}; tprl answers tasks on images.")
        return {"images": images, "prompt": chat.to_hf_messages()}


class FirstToken(StoppingCriteria):
    """Notes when the first new token is there; stops nothing."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.time = self.time or now()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def as_number(value: Any) -> Any:
    """
    A text of `--model_args` as a number. One that is not a number stays as it is, and a check refuses it.

    Example:

    ```python
    >>> as_number("1/3"), as_number(16), as_number("auto")
    (0.3333333333333333, 16, 'auto')
    ```
    """
    if isinstance(value, str):
        with contextlib.suppress(ValueError, ZeroDivisionError):
            return float(Fraction(value))
    return value


def now() -> float:
    """Seconds, after the device has finished what it was given."""
    synchronize()
    return time.perf_counter()


def generation_arguments(wanted: dict[str, Any]) -> dict[str, Any]:
    """A task's `generation_kwargs` as `generate` takes them; what is not about generating, or null, is left out."""
    wanted = {name: value for name, value in wanted.items() if value is not None}
    arguments = {"max_new_tokens": wanted.get("max_new_tokens", MAX_NEW_TOKENS), "do_sample": False}
    if wanted.get("num_beams", 1) > 1:
        arguments["num_beams"] = wanted["num_beams"]
    if wanted.get("do_sample") or wanted.get("temperature", 0) > 0:
        arguments["do_sample"] = True
        arguments |= {name: wanted[name] for name in ("temperature", "top_p", "top_k") if wanted.get(name)}
    return arguments


def _log(batches: list[dict[str, float]]) -> None:
    """lmms-eval's `throughput`: its own numbers, and means a question of ours (`avg_visual_tokens_kept`, ...)."""
    total = {name: sum(batch[name] for batch in batches) for name in batches[0]}
    means = ("visual_tokens_kept", "visual_tokens", "vision_ms", "prefill_ms")
    seconds = total["total_ms"] / 1000
    log_metrics(
        total_elapsed_time=seconds,
        total_gen_tokens=int(total["new_tokens"]),
        avg_speed=total["new_tokens"] / seconds,
        additional_metrics={
            "total_requests": int(total["questions"]),
            **{name: total[name] / total["questions"] for name in means},
        },
    )
