"""How correct one answer is, by the rules of the public benchmarks. Pure functions of texts and boxes."""

import re
from collections.abc import Sequence
from itertools import combinations
from typing import Any

CORRECT = 0.5  # a score from here on counts as a correct answer, where answers are counted
AGREEING = 3  # people who give an answer that VQAv2 counts in full
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBER_WORDS)}}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The contractions whose apostrophes VQAv2's evaluation restores. It leaves "lets", "its", "im" and "ive" alone.
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's i'd've isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've she's should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def _without_some_apostrophes(word: str) -> list[str]:
    """All spellings of a contraction that lack at least one apostrophe."""
    places = [index for index, letter in enumerate(word) if letter == "'"]
    dropped = [chosen for size in range(1, len(places) + 1) for chosen in combinations(places, size)]
    return ["".join(letter for index, letter in enumerate(word) if index not in chosen) for chosen in dropped]


RESTORED = {spelling: word for word in CONTRACTIONS for spelling in _without_some_apostrophes(word)}


def normalize_vqa(text: str) -> str:
    """
    An answer as VQAv2's evaluation compares it: punctuation, number words, articles and contractions made alike.

    Example:

    ```python
    >>> normalize_vqa("The two dogs, dont you see?")
    "2 dogs don't you see"
    ```
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_thousands = re.search(r"\d,\d", text) is not None
    result = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_space or has_thousands else " ")
    result = re.sub(r"\.(?!\d)", "", result)
    words = [NUMBERS.get(word, word) for word in result.lower().split()]
    return " ".join(RESTORED.get(word, word) for word in words if word not in ARTICLES)


def vqa_score(answer: str, references: Sequence[str] | str) -> float:
    """
    VQA accuracy (Antol et al., arXiv 1505.00468; VQAv2's evaluation): the mean, over leaving out each reference in
    turn, of `min(1, equal references / 3)`.

    Answer and references are always normalised; VQAv2's own script skips that where all references are the same. Three
    references or fewer are no vote, as no answer could have three others: they are answers that are correct, and one
    that equals any of them scores 1.

    Args:
        answer (`str`): The model's answer.
        references (`Sequence[str]` or `str`): Usually ten people's answers.

    Returns:
        `float`: In [0, 1].
    """
    texts = [normalize_vqa(text) for text in as_texts(references)]
    answer = normalize_vqa(answer)
    if len(texts) <= AGREEING:
        return float(answer in texts)
    equal = [text == answer for text in texts]
    return sum(min(1.0, (sum(equal) - left_out) / AGREEING) for left_out in equal) / len(equal)


def is_correct(answer: str, reference: str) -> bool:
    """
    Whether an answer equals the reference, letter case, surrounding blanks and a closing full stop aside.

    Example:

    ```python
    >>> is_correct(" Yes.", "yes"), is_correct("yes it is", "yes")
    (True, False)
    ```
    """
    return _normalized(answer) == _normalized(reference)


def _normalized(text: str) -> str:
    return text.strip().rstrip(".").rstrip().lower()


def exact_score(answer: str, references: Sequence[str] | str) -> float:
    """1 where [`is_correct`] holds for any of the references, else 0."""
    return float(any(is_correct(answer, reference) for reference in as_texts(references)))


def relaxed_score(answer: str, references: Sequence[str] | str, tolerance: float = 0.05) -> float:
    """
    ChartQA's relaxed accuracy (Masry et al., arXiv 2203.10244): numbers within 5 % of the reference are correct, other
    answers must be equal, letter case aside. "5%" is 0.05, and a reference of 0 must be met exactly.

    Example:

    ```python
    >>> relaxed_score("104", "100"), relaxed_score("106", "100"), relaxed_score("Blue", "blue")
    (1.0, 0.0, 1.0)
    ```
    """
    return float(any(_is_close(answer.strip(), reference.strip(), tolerance) for reference in as_texts(references)))


def _is_close(answer: str, reference: str, tolerance: float) -> bool:
    number, target = _as_number(answer), _as_number(reference)
    if number is not None and target:
        return abs(number - target) / abs(target) <= tolerance
    return answer.lower() == reference.lower()


def _as_number(text: str) -> float | None:
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None


def anls_score(answer: str, references: Sequence[str] | str, threshold: float = 0.5) -> float:
    """
    Normalised Levenshtein similarity to the closest reference, 0 where it is below `threshold` (Biten et al., arXiv
    1905.13648; DocVQA). Its mean over questions is ANLS. Letter case and repeated blanks do not count; DocVQA's
    script divides by a length with the latter. A similarity of exactly `threshold` counts, as in that script.
    """
    text = " ".join(answer.lower().split())
    best = 0.0
    for reference in as_texts(references):
        target = " ".join(reference.lower().split())
        longest = max(len(text), len(target))
        best = max(best, 1 - edit_distance(text, target) / longest if longest else 1.0)
    return best if best >= threshold else 0.0


def edit_distance(first: str, second: str) -> int:
    """How many letters have to be put in, taken out or replaced to turn `first` into `second`."""
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, start=1):
        before, row = row, [i]
        for j, other in enumerate(second, start=1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other)))
    return row[-1]


CHOICE = re.compile(r"\W*(?P<alone>[A-Za-z])\W*|\s*\(?(?P<first>[A-Z])[).:](?=\s|$).*", re.DOTALL)
# A small letter only where nothing but a mark follows: "the answer is a cat" names no option.
STATED_CHOICE = re.compile(r"(?i:answer\s*(?:is\s*:?|:)\s*(?:option\s*)?)[(*]*([A-Z]\b|[a-z](?=[).:*]|\s*$))")


def chosen_option(answer: str) -> str | None:
    """
    The letter of the option that an answer to a multiple-choice question names; `None` where it names none.

    Much as the evaluations of ScienceQA (Lu et al., arXiv 2209.09513) and LLaVA read it: a letter alone, a letter that
    a bracket, full stop or colon follows, or "the answer is" and a letter. It is more lenient: a small letter alone
    counts, of several statements the first does, and nothing is drawn at random where none is found.

    Example:

    ```python
    >>> chosen_option("(B)"), chosen_option("B. a cat"), chosen_option("The answer is: B"), chosen_option("A cat")
    ('B', 'B', 'B', None)
    ```
    """
    if found := CHOICE.fullmatch(answer):
        return (found["alone"] or found["first"]).upper()
    stated = STATED_CHOICE.search(answer)
    return stated[1].upper() if stated else None


def choice_score(answer: str, references: Sequence[str] | str) -> float:
    """
    1 where the answer names the option of the reference, which is its letter, else 0. Raises `ValueError` for a
    reference that names no option.
    """
    options = list(map(chosen_option, as_texts(references)))
    if None in options:
        raise ValueError(
            f"The reference {references!r} is not the letter of an option: change it, or take another metric or "
            "reward."
        )
    return float(chosen_option(answer) in options)


def says_yes(answer: str) -> bool:
    """
    POPE's reading of an answer (Li et al., arXiv 2305.10355): "no" if its first sentence has the word "no", "No" or
    "not", and "yes" otherwise.

    Example:

    ```python
    >>> says_yes("Yes, there is."), says_yes("There is not."), says_yes("A dog.")
    (True, False, True)
    ```
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def is_yes(references: Sequence[str] | str) -> bool | None:
    """
    Whether the reference, or the most frequent of several, is "yes", and not "no"; `None` where it is neither. Letter
    case and a closing full stop do not count.
    """
    texts = as_texts(references)
    reference = _normalized(max(texts, key=texts.count, default=""))
    return {"yes": True, "no": False}.get(reference)


def expects_yes(references: Sequence[str] | str) -> bool:
    """What [`is_yes`] says. Raises `ValueError` for a reference that is neither yes nor no."""
    expected = is_yes(references)
    if expected is None:
        raise ValueError(f"The reference {references!r} is neither yes nor no: change it, or take another metric.")
    return expected


def yes_no_score(answer: str, references: Sequence[str] | str) -> float:
    """1 where POPE reads the answer as the reference, which must be "yes" or "no"; see [`expects_yes`]."""
    return float(says_yes(answer) == expects_yes(references))


def box_iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes `(x0, y0, x1, y1)`; 0 where both are empty."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [max(x1 - x0, 0.0) * max(y1 - y0, 0.0) for x0, y0, x1, y1 in (first, second)]
    union = sum(areas) - shared
    return shared / union if union else 0.0


def as_text(reference: Any) -> str:
    """A reference as a text. A column of whole numbers with a gap holds 2.0 where its author wrote 2: that is "2"."""
    is_whole = isinstance(reference, float) and reference.is_integer()
    return str(int(reference)) if is_whole else str(reference)


def as_texts(references: Any) -> list[str]:
    """References as texts: one or several, texts or numbers."""
    several = references if isinstance(references, Sequence) and not isinstance(references, str) else [references]
    return [as_text(one) for one in several if one is not None]
