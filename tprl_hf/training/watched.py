"""The keep masks of the same few pictures, each time that the policy is measured, for `tprl report`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from tprl_hf.data.own_rows import kind_of
from tprl_hf.modeling.saved_files import written_whole
from tprl_hf.modeling.text_query import question_of
from tprl_hf.pictures import image_digest, images_of
from tprl_hf.report.runs import SHOWN
from tprl_hf.report.shown import as_bits, shown_sample

from .answer_batches import SampleEncoder, open_images, reference_answer


@dataclass
class ChosenTokens:
    """What the policy chose of one sample's N tokens at R budgets.

    Args:
        number (`int`): the row of the dataset.
        question_type (`str`): that of the row; "all" where rows have none.
        keep_masks (`bool [R, N]`), scores (float32 `[R, N]`): at each budget.
    """

    number: int
    question_type: str
    keep_masks: np.ndarray
    scores: np.ndarray


def question_type_of(row: Mapping[str, Any]) -> str:
    """The type of a row's question, also where types are numbers; "all" where rows have none."""
    return kind_of(row.get("question_type"))


def watched_numbers(chosen: Sequence[ChosenTokens], dataset: Dataset, count: int) -> list[int]:
    """Places in `chosen` of the first `count` samples whose pictures are all new."""
    found: list[int] = []
    seen = set()
    for place, one in enumerate(chosen):
        if len(found) == count:
            break
        row = dataset[one.number]
        if images_of(row) and (digest := image_digest(row)) not in seen:
            seen.add(digest)
            found.append(place)
    return found


@torch.no_grad()
def write_watched(encoder: SampleEncoder, rows: Sequence[dict[str, Any]], output_dir: str) -> None:
    """Writes the pictures of `rows`, as the vision tower sees them, to `output_dir/watched.json`."""
    samples = []
    for row in rows:
        layout = encoder([row]).inputs.layout[torch.tensor(0)]
        inputs, images = encoder.process(row), open_images(images_of(row))
        asked = question_of(row["prompt"]), reference_answer(row), question_type_of(row)
        samples.append(shown_sample(*asked, images, encoder.processor, inputs, layout).as_json())
    with written_whole(Path(output_dir)) as scratch:
        (Path(scratch) / SHOWN).write_text(json.dumps({"samples": samples}) + "\n", encoding="utf-8")


def masks_line(
    step: int, keep_ratios: Sequence[float], chosen: Sequence[ChosenTokens], places: Sequence[int]
) -> dict[str, Any]:
    """A line of the masks' file: those of the watched samples, and how budgets are divided among question types."""
    masks = [[as_bits(mask) for mask in chosen[place].keep_masks] for place in places]
    by_type = [kept_by_type(chosen, number) for number in range(len(keep_ratios))]
    return {"step": step, "keep_ratios": list(keep_ratios), "masks": masks, "kept_by_type": by_type}


def kept_by_type(chosen: Sequence[ChosenTokens], budget: int) -> dict[str, list[float]]:
    """
    How many tokens each question would keep if all questions shared one budget, the same on average: one threshold of
    the scores for all of them.

    Args:
        chosen: of all samples that were measured.
        budget (`int`): which of the R budgets.

    Returns:
        `dict`: by question type least, quartile, median, quartile and greatest number of kept tokens.
    """
    scores = [one.scores[budget] for one in chosen]
    count = sum(int(one.keep_masks[budget].sum()) for one in chosen)
    together = np.concatenate(scores)
    if not count:
        return {}
    threshold = np.partition(together, len(together) - count)[len(together) - count]
    kept: dict[str, list[int]] = {}
    for one, own in zip(chosen, scores, strict=True):
        kept.setdefault(one.question_type, []).append(int((own >= threshold).sum()))
    return {kind: np.quantile(kept[kind], [0, 0.25, 0.5, 0.75, 1]).tolist() for kind in sorted(kept)}
