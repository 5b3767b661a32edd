"""How sure an answer is: probabilities noted while it is written, and what they are worth."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from tprl_hf.answer_rules import is_yes, says_yes

if TYPE_CHECKING:
    from .compare_pruners import Record

NUM_BINS = 10


class ConfidenceNotes(LogitsProcessor):
    """
    Notes how sure greedy decoding is, and changes nothing. One for each call of `generate`.

    Attributes:
        logprobs (`list[Tensor]`): Log-probability of the likeliest token of each step, float32 `[B]`.
        first_entropy (`Tensor`): Entropy of the first step in nats, float32 `[B]`.
    """

    def __init__(self) -> None:
        self.logprobs: list[Tensor] = []
        self.first_entropy = torch.empty(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logprobs = scores.float().log_softmax(-1)
        if not self.logprobs:
            self.first_entropy = torch.special.entr(logprobs.exp()).sum(-1)
        self.logprobs.append(logprobs.amax(-1))
        return scores

    def of_answers(self, lengths: Sequence[int]) -> list[tuple[float, float]]:
        """The probability and the first entropy of each answer, which has so many tokens."""
        logprobs = torch.stack(self.logprobs, dim=1)
        places = torch.arange(logprobs.shape[1], device=logprobs.device)
        written = places < torch.tensor(lengths, device=logprobs.device)[:, None]
        probabilities = (logprobs * written).sum(1).exp()
        return list(zip(probabilities.tolist(), self.first_entropy.tolist(), strict=True))


@dataclass(frozen=True)
class Confidence:
    """
    What the probabilities of one setting's answers are worth.

    Args:
        ece (`float`): Expected calibration error in [0, 1], see [`expected_calibration_error`].
        brier (`float`): Mean squared difference of probability and score.
        entropy_correct, entropy_wrong (`float`, *optional*): Mean entropy of the first token in nats, of answers with
            a score of at least 0.5 and of the others; `None` where there are none.
        false_positives (`float`, *optional*): Share of existence questions with the reference "no" that were answered
            "yes"; `None` where there are no such questions.
        num_negatives (`int`): How many such questions there are.
    """

    ece: float
    brier: float
    entropy_correct: float | None
    entropy_wrong: float | None
    false_positives: float | None
    num_negatives: int


def confidence_of(
    records: Sequence["Record"], question_types: Sequence[str], references: Sequence[Any]
) -> Confidence | None:
    """
    Args:
        records (`Sequence[Record]`): Of one setting; with several seeds those of all of them.
        question_types (`Sequence[str]`), references (`Sequence`): Of each sample. Without a question type "existence"
            all questions whose reference is yes or no count as such.

    Returns:
        [`Confidence`], or `None` where an answer was noted without its probability.
    """
    pairs = [(one.probability, one.first_entropy, one.score) for one in records]
    if not pairs or any(probability is None or entropy is None for probability, entropy, _ in pairs):
        return None
    known = [(float(p or 0.0), float(e or 0.0), score) for p, e, score in pairs]
    entropies: dict[bool, list[float]] = {True: [], False: []}
    for _, entropy, score in known:
        entropies[score >= 0.5].append(entropy)
    existence = "existence" in question_types
    negatives = {
        number
        for number, reference in enumerate(references)
        if is_yes(reference) is False and (not existence or question_types[number] == "existence")
    }
    said = [says_yes(one.answer) for one in records if one.sample in negatives]
    return Confidence(
        ece=expected_calibration_error([p for p, _, _ in known], [score for _, _, score in known]),
        brier=fmean((p - score) ** 2 for p, _, score in known),
        entropy_correct=fmean(entropies[True]) if entropies[True] else None,
        entropy_wrong=fmean(entropies[False]) if entropies[False] else None,
        false_positives=fmean(said) if said else None,
        num_negatives=len(negatives),
    )


def expected_calibration_error(
    probabilities: Sequence[float], scores: Sequence[float], num_bins: int = NUM_BINS
) -> float:
    """
    The expected calibration error (Guo et al., arXiv 1706.04599): answers are put into bins of equal width by their
    probability; the mean, over the answers, of the distance of their bin's mean probability and mean score.

    Example:

    ```python
    >>> expected_calibration_error([0.9, 0.9, 0.2], [1.0, 1.0, 0.0])
    0.13333333333333333
    ```
    """
    bins: dict[int, list[tuple[float, float]]] = {}
    for probability, score in zip(probabilities, scores, strict=True):
        bins.setdefault(min(int(probability * num_bins), num_bins - 1), []).append((probability, score))
    return sum(abs(sum(p - score for p, score in one)) for one in bins.values()) / len(probabilities)


def confidence_table(rows: Sequence[Any]) -> list[list[str]]:
    """Header and lines of the confidences of rows that have one, as texts."""
    header = ["pruner", "keep", "ECE", "Brier", "entropy, correct", "entropy, wrong", "false yes %"]
    lines = []
    for row in rows:
        one: Confidence | None = row.confidence
        if one is not None:
            entropies = [
                "-" if value is None else f"{value:.3f}" for value in (one.entropy_correct, one.entropy_wrong)
            ]
            false = "-" if one.false_positives is None else f"{100 * one.false_positives:.1f} ({one.num_negatives})"
            lines.append([row.pruner, row.budget, f"{one.ece:.3f}", f"{one.brier:.3f}", *entropies, false])
    return [header, *lines]
