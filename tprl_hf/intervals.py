"""How sure a mean is: bootstrap intervals, alone and paired."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .pictures import image_digest, images_of

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Estimate:
    """
    A mean with its percentile bootstrap interval.

    Args:
        value (`float`): The mean of what was measured.
        low, high (`float`): Ends of the interval.
        count (`int`): How many scores it is the mean of.
    """

    value: float
    low: float
    high: float
    count: int


def units_of(samples: "Dataset") -> list[Hashable]:
    """
    The unit of each question: its image.

    Args:
        samples (`Dataset`): The questions. Those with one `image_id` share a unit, and so do those without any about
            the same pictures; a question without a picture is a unit alone.
    """
    labels = list(samples["image_id"])
    taken = set(map(str, labels))  # a file keeps units as texts
    first: dict[str, Hashable] = {}
    units: list[Hashable] = []
    for number, unit in enumerate(labels):
        if unit in (None, ""):
            sample, own = samples[number], f"question {number}" if str(number) in taken else number
            unit = first.setdefault(image_digest(sample), own) if images_of(sample) else own
        units.append(unit)
    return units


def bootstrap_mean(
    scores: Sequence[float],
    units: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """
    The mean of `scores` and its percentile bootstrap interval.

    For a paired comparison pass the differences of two methods' scores on the same samples.

    Args:
        scores (`Sequence[float]`):
            One number a sample.
        units (`Sequence`, *optional*):
            The unit each sample belongs to, such as its image. Units are drawn as a whole, because questions about one
            image are not independent. Defaults to one unit a sample.
        confidence (`float`, *optional*, defaults to 0.95):
            Share of the resampled means inside the interval.
        num_resamples (`int`, *optional*, defaults to 2000):
            How often the units are drawn anew, with replacement.
        seed (`int`, *optional*, defaults to 0):
            Of the draws.

    Returns:
        [`Estimate`]

    Raises:
        `ValueError`: If there are no scores, or not as many as units.
    """
    if not len(scores):
        raise ValueError("There are no scores to take the mean of.")
    if units is not None and len(units) != len(scores):
        raise ValueError(f"Got {len(scores)} scores and {len(units)} units; each score belongs to one unit.")
    values = np.asarray(scores, dtype=np.float64)
    numbers: dict[Hashable, int] = {}
    unit_of = [numbers.setdefault(unit, len(numbers)) for unit in (units or range(len(values)))]
    totals = np.bincount(unit_of, weights=values)
    counts = np.bincount(unit_of)
    generator = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    for turn in range(num_resamples):
        drawn = generator.integers(len(totals), size=len(totals))
        means[turn] = totals[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(values.mean()), float(low), float(high), len(values))
