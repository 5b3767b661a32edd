"""Which questions pruning broke: the model answered them unpruned, and no longer with a part of the tokens."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from tprl_hf.answer_rules import CORRECT
from tprl_hf.modeling.text_query import question_of
from tprl_hf.pictures import images_of, picture_of
from tprl_hf.report.shown import as_bits, shown_sample

from .answers import chat_inputs
from .compare_pruners import Record, Setting, encode_once, first_observer, using
from .smaller_pictures import PictureShrinker, enlarged

MOST_SHOWN = 3  # of a pruner at a budget


def broken_questions(
    model: Any,
    processor: Any,
    samples: Sequence[dict[str, Any]],
    settings: Sequence[Setting],
    records: Sequence[Record],
) -> dict[str, Any]:
    """
    What `tprl report` shows of them.

    Args:
        model ([`TPRLForConditionalGeneration`]), processor ([`ProcessorMixin`]): The model and its processor.
        samples (`Sequence[dict]`): The questions.
        settings (`Sequence[Setting]`): The rows, the unpruned one first. Of several seeds the first one counts.
        records (`Sequence[Record]`): All answers.

    Returns:
        `dict`, as JSON has it. `counts`: for each pruner and budget how many questions were broken, and how many were
        answered correctly with pruning alone (`mended`), by question type. `cases`: of each the first [`MOST_SHOWN`]
        broken ones, question types in turn, with both answers and the keep mask. `samples`: their pictures.
    """
    answers = {(record.key, record.sample): record for record in records}
    unpruned = settings[0]
    shrinker = PictureShrinker(model, processor)
    counts, cases = [], []
    shown: dict[str, dict[str, Any]] = {}
    seen = set()
    for setting in settings[1:]:
        if (setting.pruner, setting.budget) in seen:
            continue
        seen.add((setting.pruner, setting.budget))
        by_type: dict[str, list[int]] = {}
        broken: dict[str, list[int]] = {}
        for number in range(len(samples)):
            kind = samples[number]["question_type"]
            before, after = (answers[one.key, number].score >= CORRECT for one in (unpruned, setting))
            row = by_type.setdefault(kind, [0, 0, 0])
            row[0] += before and not after
            row[1] += after and not before
            row[2] += 1
            if before and not after:
                broken.setdefault(kind, []).append(number)
        counts.append({"pruner": setting.pruner, "budget": setting.budget, "by_type": dict(sorted(by_type.items()))})
        for number in in_turns(broken)[:MOST_SHOWN]:
            one, other = answers[unpruned.key, number], answers[setting.key, number]
            case = {"pruner": setting.pruner, "budget": setting.budget, "sample": number}
            case |= {"unpruned": one.answer, "answer": other.answer}
            case |= {"num_kept": other.num_kept, "num_visual": other.num_visual}
            sample = samples[number]
            if images_of(sample):
                name, small = str(number), sample
                how: Any = processor
                if setting.picture_ratio is not None:
                    name = f"{number} {setting.pruner} {setting.budget}"
                    ratio = setting.picture_ratio
                    how, small = (how, enlarged(sample, ratio)) if setting.enlarged else shrinker(sample, ratio)
                    shown.setdefault(str(number), picture_and_mask(model, processor, sample, unpruned)[0])
                picture, case["keep_mask"] = picture_and_mask(model, how, small, setting, other.num_kept)
                shown[name], case["shown"] = picture, name
            cases.append(case)
    return {"counts": counts, "cases": cases, "samples": shown}


def in_turns(by_type: dict[str, list[int]]) -> list[int]:
    """
    Samples of all types, which take turns.

    Example:

    ```python
    >>> in_turns({"colour": [0, 4, 6], "counting": [5]})
    [0, 5, 4, 6]
    ```
    """
    places: Counter[str] = Counter()
    order = []
    for kind, numbers in by_type.items():
        for number in sorted(numbers):
            order.append((places[kind], number))
            places[kind] += 1
    return [number for _, number in sorted(order)]


@torch.no_grad()
def picture_and_mask(
    model: Any, processor: Any, sample: dict[str, Any], setting: Setting, num_keep: int | None = None
) -> tuple[dict[str, Any], str]:
    """A sample as pages show it, and its keep mask under a setting; of a smaller picture, `num_keep` tokens."""
    inputs = chat_inputs(processor, [sample], model.device)
    arguments: dict[str, Any] = setting.arguments
    if setting.picture_ratio is not None and not setting.enlarged:
        options = model.adapter.smaller_picture_options
        features = encode_once(model, processor, [sample], first_observer([setting]), **options)
        arguments = {
            **({"num_keep": num_keep} if "keep_ratio" in arguments else arguments),
            "visual_features": features,
        }
    with using(model, setting.pruner_for([sample])):
        plan = model.prune(**inputs, **arguments)
    images = [picture_of(image) for image in images_of(sample)]
    answer = sample["answer"]
    reference = ", ".join(dict.fromkeys(answer)) if isinstance(answer, list) else answer
    asked = question_of(sample["prompt"]), None if reference is None else str(reference), sample["question_type"]
    shown = shown_sample(*asked, images, processor, inputs, plan.layout)
    return shown.as_json(), as_bits(plan.keep_mask.tolist())
