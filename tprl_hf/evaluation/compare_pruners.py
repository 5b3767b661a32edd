"""Answers of one model under many pruners and budgets, to the same questions."""

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessorList

from tprl_hf.answer_rules import exact_score
from tprl_hf.modeling.generation_tprl import GREEDY
from tprl_hf.modeling.saved_files import written_whole
from tprl_hf.modeling.token_pruner import TokenPruner
from tprl_hf.pictures import image_digest, images_of
from tprl_hf.training.answer_ids import answer_lengths

from .answers import chat_inputs
from .confidence import ConfidenceNotes
from .smaller_pictures import PictureShrinker, enlarged

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
        picture_ratio (`float`, *optional*): The pictures are shrunk until they have this fraction of their visual
            tokens, before the tower reads them. A `keep_ratio` is still one of the tokens of the full size.
        enlarged (`bool`): Shrunk pictures are enlarged again: they lack detail, and have all their tokens.
    """

    pruner: str
    budget: str
    method: TokenPruner | Callable[[Sequence[dict[str, Any]]], TokenPruner] | None
    arguments: dict[str, Any]
    seed: int | None = None
    picture_ratio: float | None = None
    enlarged: bool = False

    @property
    def key(self) -> tuple[str, str, int | None]:
        return self.pruner, self.budget, self.seed

    def pruner_for(self, samples: Sequence[dict[str, Any]]) -> TokenPruner | None:
        """The pruner of a batch."""
        return self.method if self.method is None or isinstance(self.method, TokenPruner) else self.method(samples)


@dataclass(frozen=True)
class Record:
    """
    One answer.

    Args:
        pruner, budget (`str`): Those of the [`Setting`].
        sample (`int`): Index of the sample.
        answer (`str`): What the model said.
        score (`float`): How correct it is, in [0, 1].
        num_kept, num_visual (`int`): Visual tokens that the LLM saw, and that there are of the pictures as they were
            given.
        seed (`int`, *optional*): That of the [`Setting`].
        probability (`float`, *optional*): The model's probability of the answer: the product over its tokens.
        first_entropy (`float`, *optional*): Entropy in nats of the model's distribution of the first token.
    """

    pruner: str
    budget: str
    sample: int
    answer: str
    score: float
    num_kept: int
    num_visual: int
    seed: int | None = None
    probability: float | None = None
    first_entropy: float | None = None

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
            Each with `images`, `prompt` and `answer`. Without `answer`, the reference is what the model says under
            the first setting.
        settings (`Sequence[Setting]`):
            The rows of the comparison.
        batch_size (`int`, *optional*, defaults to 48):
            Samples that are answered at once. Answers do not depend on it beyond rounding.
        score (`Callable`, *optional*, defaults to [`~tprl_hf.answer_rules.exact_score`]):
            From the answer and the sample's reference, or references, to a number in [0, 1].
        known (`Sequence[Record]`, *optional*):
            What an earlier, interrupted comparison found; it is not computed again.
        generate_kwargs:
            Handed to `model.generate`, such as `max_new_tokens`.

    Yields:
        `list[Record]`: The new records of one batch and one setting.
    """
    done = {(*record.key, record.sample) for record in known}
    own = {record.sample: record.answer for record in known if record.key == settings[0].key}
    shrinker = PictureShrinker(model, processor)
    observer = first_observer(settings)
    for start in range(0, len(samples), batch_size):
        numbers = range(start, min(start + batch_size, len(samples)))
        missing = {s.key: [n for n in numbers if (*s.key, n) not in done] for s in settings}
        if not any(missing.values()):
            continue
        batch = [samples[number] for number in numbers]
        full = full_size(model, processor, batch, observer)
        for setting in settings:
            if not missing[setting.key]:
                continue
            prompts: Iterable[Prompts] = [full]
            if setting.enlarged and setting.picture_ratio is not None:
                prompts = [full_size(model, processor, [enlarged(one, setting.picture_ratio) for one in batch], None)]
            elif setting.picture_ratio is not None:
                prompts = shrunk(model, shrinker, batch, setting, full)
            found: dict[int, tuple[str, int, float, float]] = {}
            for part in prompts:
                found |= answer(model, processor, batch, setting, part, **generate_kwargs)
            if setting is settings[0]:
                own |= {number: found[number - start][0] for number in missing[setting.key]}
            yield [
                Record(
                    setting.pruner,
                    setting.budget,
                    sample=number,
                    answer=text,
                    score=float(score(text, batch[number - start].get("answer", own[number]))),
                    num_kept=num_kept,
                    num_visual=full.num_visual[number - start],
                    seed=setting.seed,
                    probability=probability,
                    first_entropy=entropy,
                )
                for number in missing[setting.key]
                for text, num_kept, probability, entropy in [found[number - start]]
            ]


@dataclass(frozen=True)
class Prompts:
    """
    Some samples of a batch as the model reads them.

    Args:
        rows (`list[int]`): Which samples of the batch.
        inputs: What the processor returned.
        features ([`VisualFeatures`], *optional*): Of their pictures, where they have any.
        num_visual (`list[int]`): Visual tokens of each of their prompts.
        arguments (`dict`): A budget that replaces that of the setting.
    """

    rows: list[int]
    inputs: Any
    features: Any
    num_visual: list[int]
    arguments: dict[str, Any] | None = None


def full_size(model, processor, samples: Sequence[dict[str, Any]], observer: TokenPruner | None) -> Prompts:
    """A batch with its pictures as they are."""
    inputs = chat_inputs(processor, samples, model.device)
    features = encode_once(model, processor, samples, observer)
    num_visual = model.adapter.find_visual(inputs["input_ids"]).sum(1).tolist()
    return Prompts(list(range(len(samples))), inputs, features, num_visual)


def shrunk(
    model, shrinker: PictureShrinker, samples: Sequence[dict[str, Any]], setting: Setting, full: Prompts
) -> Iterator[Prompts]:
    """A batch with smaller pictures, in parts that share a processor and a number of tokens to keep."""
    assert setting.picture_ratio is not None
    ratio = setting.arguments.get("keep_ratio")
    parts: dict[tuple[int, int | None], tuple[Any, list[int], list[dict[str, Any]]]] = {}
    for row, sample in enumerate(samples):
        processor, smaller = shrinker(sample, setting.picture_ratio)
        num_keep = None if ratio is None else max(1, round(ratio * full.num_visual[row]))
        _, rows, pictures = parts.setdefault((id(processor), num_keep), (processor, [], []))
        rows.append(row)
        pictures.append(smaller)
    for (_, num_keep), (processor, rows, pictures) in parts.items():
        observer = first_observer([setting])
        inputs = chat_inputs(processor, pictures, model.device)
        features = encode_once(model, processor, pictures, observer, **model.adapter.smaller_picture_options)
        num_visual = model.adapter.find_visual(inputs["input_ids"]).sum(1).tolist()
        yield Prompts(rows, inputs, features, num_visual, None if num_keep is None else {"num_keep": num_keep})


def answer(
    model, processor, samples: Sequence[dict[str, Any]], setting: Setting, prompts: Prompts, **generate_kwargs: Any
) -> dict[int, tuple[str, int, float, float]]:
    """
    Answers prompts under a setting.

    Returns:
        `dict`: For each row of the batch the answer, the number of visual tokens kept, the probability of the answer
        and the entropy of its first token.
    """
    notes = ConfidenceNotes()
    with using(model, setting.pruner_for([samples[row] for row in prompts.rows])):
        output = model.generate(
            **prompts.inputs,
            **(setting.arguments if prompts.arguments is None else prompts.arguments),
            visual_features=prompts.features,
            logits_processor=LogitsProcessorList([notes]),
            tokenizer=processor.tokenizer,
            **GREEDY | {"return_dict_in_generate": True} | generate_kwargs,
        )
    length, settings = prompts.inputs["input_ids"].shape[1], model.generation_config
    end = settings.eos_token_id
    ends = end if isinstance(end, list) else [] if end is None else [end]
    texts = [text.strip() for text in processor.batch_decode(output.sequences[:, length:], skip_special_tokens=True)]
    kept = output.num_kept.tolist()
    stops = generate_kwargs.get("stop_strings", settings.stop_strings)
    sure = notes.of_answers(answer_lengths(output.sequences, length, ends, processor.tokenizer, stops))
    return {
        row: (text, int(num_kept), *one)
        for row, text, num_kept, one in zip(prompts.rows, texts, kept, sure, strict=True)
    }


def first_observer(settings: Sequence[Setting]) -> TokenPruner | None:
    """A pruner of the settings that reads the tower's attention, if any does."""
    pruners = [setting.method for setting in settings if isinstance(setting.method, TokenPruner)]
    return next((pruner for pruner in pruners if pruner.needs_attention), None)


def encode_once(
    model, processor, samples: Sequence[dict[str, Any]], observer: TokenPruner | None, **tower_options: Any
):
    """
    Visual features of a batch, for which each image ran through the vision tower once.

    Args:
        model ([`TPRLForConditionalGeneration`]), processor ([`ProcessorMixin`]):
            The model and its processor.
        samples (`Sequence[dict]`):
            The batch; samples with the same pictures share their features.
        observer ([`TokenPruner`], *optional*):
            A pruner that reads the tower's attention, if any of those to come does.
        tower_options:
            Handed to the tower, such as `interpolate_pos_encoding`.

    Returns:
        [`VisualFeatures`] of the whole batch, or `None` where it has no image.
    """
    keys = [index if sample.get("videos") else image_digest(sample) for index, sample in enumerate(samples)]
    first: dict[Any, int] = {}
    rows = [first.setdefault(key, len(first)) for key in keys]
    unique = [samples[rows.index(row)] for row in range(len(first))]
    inputs = chat_inputs(processor, unique, model.device)
    if not any(map(images_of, unique)):
        return None
    with torch.no_grad(), using(model, observer):
        return model.encode_images(**inputs, **tower_options).take(rows)


def using(model, pruner: TokenPruner | None):
    """The model with a pruner, or as it is."""
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
    found, removed = parse_lines(path)
    if removed:
        with written_whole(path.parent) as scratch:
            Path(scratch, path.name).write_bytes(b"".join(line + b"\n" for line, _ in found))
    return [record for _, record in found], removed


def parse_lines(path: Path) -> tuple[list[tuple[bytes, Record]], int]:
    """The lines of a file that are records, and how many others there are; the file stays as it is."""
    if not path.exists():
        return [], 0
    # only at \n: JSON may hold other line separators, and a line may be cut inside a character
    parts = path.read_bytes().split(b"\n")
    lines, cut = parts[:-1], parts[-1]
    found = [(line, record) for line in lines if (record := parse_record(line)) is not None]
    return found, len(lines) - len(found) + bool(cut)


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
    score = isinstance(record.score, float | int) and 0 <= record.score <= 1
    sure = all(
        number is None or (type(number) is float and math.isfinite(number))
        for number in (record.probability, record.first_entropy)
    )
    return record if whole and texts and seed and score and sure else None
