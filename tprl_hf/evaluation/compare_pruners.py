"""Answers of one model under many pruners and budgets, to the same questions."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tprl_hf.modeling.token_pruner import TokenPruner

from .answers import chat_inputs
from .scores import exact_score

Score = Callable[[str, Any], float]


@dataclass(frozen=True)
class Setting:
    """
    One row of a comparison: a pruner and how much it keeps.

    Args:
        pruner (`str`): Its name in tables.
        budget (`str`): The budget's name in tables, such as `"1/3"`.
        method ([`TokenPruner`], *optional*): The pruner; `None` for the model's own policy; or a function from the
            samples of a batch to a pruner, for one that knows their boxes.
        arguments (`dict`): The budget as `generate` takes it, such as `{"keep_ratio": 1 / 3}`.
        seed (`int`, *optional*): The pruner's, where it has one. Settings that differ by it alone are one row.
    """

    pruner: str
    budget: str
    method: TokenPruner | Callable[[Sequence[dict[str, Any]]], TokenPruner] | None
    arguments: dict[str, Any]
    seed: int | None = None

    @property
    def key(self) -> tuple[str, str, int | None]:
        return self.pruner, self.budget, self.seed


@dataclass(frozen=True)
class Record:
    """
    One answer.

    Args:
        pruner, budget (`str`): Those of the [`Setting`].
        sample (`int`): Index of the sample.
        answer (`str`): What the model said.
        score (`float`): How correct it is, in [0, 1].
        num_kept, num_visual (`int`): Visual tokens that the LLM saw, and that there were.
        seed (`int`, *optional*): That of the [`Setting`].
    """

    pruner: str
    budget: str
    sample: int
    answer: str
    score: float
    num_kept: int
    num_visual: int
    seed: int | None = None

    @property
    def key(self) -> tuple[str, str, int | None]:
        return self.pruner, self.budget, self.seed


def compare_pruners(
    model,
    processor,
    samples: Sequence[dict[str, Any]],
    settings: Sequence[Setting],
    batch_size: int = 48,
    score: Score = exact_score,
    known: Sequence[Record] = (),
    **generate_kwargs: Any,
) -> Iterator[list[Record]]:
    """
    Answers every sample under every setting, greedily. Each image of a batch is encoded once, for all its questions
    and all settings.

    Args:
        model ([`TPRLForConditionalGeneration`]):
            The model.
        processor ([`ProcessorMixin`]):
            Its processor.
        samples (`Sequence[dict]`):
            Each with `images`, `prompt` and `answer`. Samples with the same `image_id` share their images.
        settings (`Sequence[Setting]`):
            The rows of the comparison.
        batch_size (`int`, *optional*, defaults to 48):
            Samples that are answered at once. Answers do not depend on it beyond rounding.
        score (`Callable`, *optional*, defaults to [`~tprl_hf.evaluation.scores.exact_score`]):
            From the answer and the sample's reference, or references, to a number in [0, 1].
        known (`Sequence[Record]`, *optional*):
            What an earlier, interrupted comparison found; it is not computed again.
        generate_kwargs:
            Handed to `model.generate`, such as `max_new_tokens`.

    Yields:
        `list[Record]`: The new records of one batch and one setting.
    """
    done = {(*record.key, record.sample) for record in known}
    pruners = [setting.method for setting in settings if isinstance(setting.method, TokenPruner)]
    observer = next((pruner for pruner in pruners if pruner.needs_attention), None)
    for start in range(0, len(samples), batch_size):
        numbers = range(start, min(start + batch_size, len(samples)))
        missing = {s.key: [n for n in numbers if (*s.key, n) not in done] for s in settings}
        if not any(missing.values()):
            continue
        batch = [samples[number] for number in numbers]
        inputs = chat_inputs(processor, batch, model.device)
        features = encode_once(model, processor, batch, observer)
        for setting in settings:
            if not missing[setting.key]:
                continue
            method = setting.method
            with _using(model, method if method is None or isinstance(method, TokenPruner) else method(batch)):
                output = model.generate(
                    **inputs,
                    **setting.arguments,
                    visual_features=features,
                    do_sample=False,
                    return_dict_in_generate=True,
                    **generate_kwargs,
                )
            new_tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
            answers = [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]
            kept, visual = (output.get(name, torch.zeros(len(batch))).tolist() for name in ("num_kept", "num_visual"))
            yield [
                Record(
                    setting.pruner,
                    setting.budget,
                    sample=number,
                    answer=answers[number - start],
                    score=float(score(answers[number - start], batch[number - start]["answer"])),
                    num_kept=int(kept[number - start]),
                    num_visual=int(visual[number - start]),
                    seed=setting.seed,
                )
                for number in missing[setting.key]
            ]


def encode_once(model, processor, samples: Sequence[dict[str, Any]], observer: TokenPruner | None):
    """
    Visual features of a batch, for which each image ran through the vision tower once.

    Args:
        model ([`TPRLForConditionalGeneration`]), processor ([`ProcessorMixin`]):
            The model and its processor.
        samples (`Sequence[dict]`):
            The batch; samples of equal `image_id` share their features.
        observer ([`TokenPruner`], *optional*):
            A pruner that reads the tower's attention, if any of those to come does.

    Returns:
        [`VisualFeatures`] of the whole batch, or `None` where it has no image.
    """
    first: dict[Any, int] = {}
    rows = [first.setdefault(sample.get("image_id") or index, len(first)) for index, sample in enumerate(samples)]
    unique = [samples[rows.index(row)] for row in range(len(first))]
    inputs = chat_inputs(processor, unique, model.device)
    if not any(sample["images"] for sample in unique):
        return None
    with torch.no_grad(), _using(model, observer):
        return model.encode_images(**inputs).take(rows)


def _using(model, pruner: TokenPruner | None):
    return contextlib.nullcontext() if pruner is None else model.using(pruner)


def append_records(path: Path, records: Sequence[Record]) -> None:
    """Adds records to a JSON Lines file, one a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records))


def read_records(path: Path) -> tuple[list[Record], int]:
    """
    The records of a file that [`append_records`] wrote; none if there is no such file.

    Lines that are not records, as where the machine stopped or the disk was full, are removed from the file.

    Returns:
        `tuple`: the records, and the number of lines that were removed.
    """
    if not path.exists():
        return [], 0
    # only at \n: JSON may hold other line separators, and a line may be cut inside a character
    parts = path.read_bytes().split(b"\n")
    lines, cut = parts[:-1], parts[-1]
    found = [(line, record) for line in lines if (record := parse_record(line)) is not None]
    removed = len(lines) - len(found) + bool(cut)
    if removed:
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        unfinished.write_bytes(b"".join(line + b"\n" for line, _ in found))
        unfinished.replace(path)
    return [record for _, record in found], removed


def parse_record(line: bytes) -> Record | None:
    """The record that a line holds, if it holds one."""
    try:
        record = Record(**json.loads(line))
    except (TypeError, ValueError):
        return None
    numbers = (record.sample, record.num_kept, record.num_visual)
    whole = all(type(number) is int and number >= 0 for number in numbers)
    texts = all(isinstance(text, str) for text in (record.pruner, record.budget, record.answer))
    seed = record.seed is None or type(record.seed) is int
    score = isinstance(record.score, float | int) and math.isfinite(record.score)
    return record if whole and texts and seed and score else None
