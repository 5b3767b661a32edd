"""Rewards that compare answers with the labels of a benchmark, by its own rule. A recipe names them alone."""

from collections.abc import Callable, Sequence
from typing import Any

from tprl_hf import answer_rules

# The column `answer`: of each row one correct answer, or several, as texts or numbers.
Labels = Sequence[Sequence[Any] | str | float | None]


def exact_match(prompts: Sequence[Any], completions: Sequence[Any], answer: Labels, **columns: Any) -> list:
    """
    1 where the answer equals a label, letter case and a closing full stop aside, else 0.

    Example:

    ```python
    >>> exact_match(["what colour ?"], ["Red."], answer=["red"])
    [1.0]
    ```
    """
    return _compared(answer_rules.exact_score, completions, answer)


def vqa_score(prompts: Sequence[Any], completions: Sequence[Any], answer: Labels, **columns: Any) -> list:
    """
    VQA accuracy (Antol et al., arXiv 1505.00468), as VQAv2, TextVQA and VizWiz have it: `min(1, equal labels / 3)`,
    mean over leaving out each label in turn, and 1 for any of up to three labels; punctuation, articles, number words
    and contractions are normalised.

    Example:

    ```python
    >>> vqa_score(["how many ?"], ["Two"], answer=[["2"] * 3 + ["3"] * 7])
    [0.9]
    ```
    """
    return _compared(answer_rules.vqa_score, completions, answer)


def relaxed_accuracy(prompts: Sequence[Any], completions: Sequence[Any], answer: Labels, **columns: Any) -> list:
    """
    ChartQA's relaxed accuracy (Masry et al., arXiv 2203.10244): 1 for a number within 5 % of a label or for an
    equal text, else 0.

    Example:

    ```python
    >>> relaxed_accuracy(["how high ?"] * 2, ["104", "106"], answer=["100", "100"])
    [1.0, 0.0]
    ```
    """
    return _compared(answer_rules.relaxed_score, completions, answer)


def anls(prompts: Sequence[Any], completions: Sequence[Any], answer: Labels, **columns: Any) -> list:
    """
    Normalised Levenshtein similarity to the closest label, 0 below 0.5 (Biten et al., arXiv 1905.13648; DocVQA).

    Example:

    ```python
    >>> anls(["who ?"] * 2, ["smitt", "jones"], answer=["Smith", ["Smith", "J. Smith"]])
    [0.8, 0.0]
    ```
    """
    return _compared(answer_rules.anls_score, completions, answer)


def multiple_choice(prompts: Sequence[Any], completions: Sequence[Any], answer: Labels, **columns: Any) -> list:
    """
    1 where the answer names the letter of the correct option, else 0 (ScienceQA, Lu et al., arXiv 2209.09513; see
    [`~tprl_hf.answer_rules.chosen_option`]). The label is that letter; another one is a `ValueError`.

    Example:

    ```python
    >>> multiple_choice(["which ? A. cat B. dog"] * 2, ["B. dog", "dog"], answer=["B", "B"])
    [1.0, 0.0]
    ```
    """
    return _compared(answer_rules.choice_score, completions, answer)


ANSWER_REWARDS = {f.__name__: f for f in (exact_match, vqa_score, relaxed_accuracy, anls, multiple_choice)}


def _compared(score: Callable[[str, Any], float], completions: Sequence[Any], labels: Labels) -> list[float | None]:
    """The score of each completion; `None` where its row has no label."""
    pairs = zip(completions, map(answer_rules.as_texts, labels), strict=True)
    return [score(_text(one), texts) if any(texts) else None for one, texts in pairs]


def _text(completion: Any) -> str:
    """What was said, also where prompts are messages."""
    return completion if isinstance(completion, str) else completion[0]["content"]
