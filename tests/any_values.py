"""Values of every kind that a setting may be given, and a judge of what becomes of them.

Each test describes what is valid in its own words, without the package's checks, and says what a valid case must give.
`judge` then calls it one of: "correct", "refused" (one exception that names argument, value and cure), "wrong",
"unclear", "refused though valid", "hang".
"""

import os
import re
import signal
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# The number of cases of each test is multiplied by this.
FACTOR = float(os.environ.get("TPRL_TEST_VALUES", "1"))
SECONDS = 60  # after which a case counts as a hang
GOOD = ("correct", "refused")

CURE = re.compile(
    r"\b(must|pass|choose|leave|use|set|did you mean|write|has no|needs? |there are|list|give|change|lower|raise|"
    r"one of|such as|is not a multiple|hold|wants|copy|download|instead|at least|in \(|"
    r"run (?:its|the) command|save it|delete|again)",
    re.I,
)


def several(number: int):
    """How often hypothesis draws, always the same cases, so that a failure is a failure for everyone."""
    return settings(
        max_examples=max(int(number * FACTOR), 1),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# ---- values ----

NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([0, 1, 2, 10**12, -(10**12), 10**30]),
    st.sampled_from(
        [0.0, -0.0, 1.0, 3.0, 0.5, 1 / 3, 1e-9, 1.5, 2.7, -0.5, 1e300, float("nan"), float("inf"), -float("inf")]
    ),
    st.floats(0.01, 1.0),
)
SCALARS = st.one_of(
    NUMBERS.filter(lambda value: abs(value) < 10**15 or isinstance(value, float)).flatmap(
        lambda value: st.sampled_from([np.array(value)[()], torch.tensor(value), np.array(value), np.float32(value)])
    ),
    st.sampled_from([np.bool_(True), np.bool_(False), torch.tensor(True), torch.tensor(False), np.str_("x")]),
)
TEXTS = st.sampled_from(
    ["", " ", "0.5", "1/3", "3", "x", "True", "false", "None", "nan", "original", "learned", "\u2028"]
)
OTHERS = st.sampled_from(
    [
        None,
        True,
        False,
        b"1",
        (),
        [],
        {},
        [0.5],
        [[0.5]],
        [1, 2],
        (0.5,),
        {"a": 1},
        {0.5},
        1j,
        [None],
        [True],
        ["0.5"],
        object,
        print,
    ]
)
ARRAYS = st.sampled_from(
    [torch.ones(1), torch.ones(2, 3), torch.zeros(0), np.ones(1), np.ones((2, 3)), torch.ones(2, dtype=torch.bool)]
)
ANYTHING = st.one_of(NUMBERS, NUMBERS, SCALARS, TEXTS, OTHERS, ARRAYS)
# What JSON and YAML can say.
WRITABLE = st.one_of(
    NUMBERS, TEXTS, st.sampled_from([None, True, False, [], {}, [0.5], [[0.5]], {"a": 1}, [None], ["0.5"]])
)


# ---- what they are, in plain words ----


def scalar(value: Any) -> Any:
    """The Python number or truth value that a scalar is; `NotImplemented` for what is none."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.shape == () else NotImplemented
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.item() if value.shape == () else NotImplemented
    return value if type(value) in (bool, int, float) else NotImplemented


def is_number(value: Any, least=-float("inf"), most=float("inf"), above=-float("inf"), below=float("inf")) -> bool:
    found = scalar(value)
    if type(found) not in (int, float) or found != found or abs(found) == float("inf"):
        return False
    return least <= found <= most and above < found < below


def is_count(value: Any, least: int = 1, most: float = float("inf")) -> bool:
    return is_number(value, least, most) and scalar(value) == int(scalar(value))


def is_flag(value: Any) -> bool:
    return type(scalar(value)) is bool


def is_fraction(value: Any) -> bool:
    return is_number(value, above=0, most=1)


def or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


# ---- judging ----


class Hang(BaseException):
    pass


@contextmanager
def limited():
    def stop(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def forms(value: Any) -> list[str]:
    """Ways in which a message may name a value."""
    if isinstance(value, torch.Tensor) and value.ndim:
        return [str(tuple(value.shape)), str(value.dtype)]
    if isinstance(value, np.ndarray) and value.ndim:
        return ["ndarray", str(value.shape)]
    if isinstance(value, (list, tuple)) and value:
        return [repr(value)[:20], *(form for one in value for form in forms(one))]
    plain = value.item() if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) else value
    if type(plain) is float and plain.is_integer() and abs(plain) < 2**53:
        return [repr(plain), repr(int(plain))]
    return [repr(plain)[:20], str(plain)[:20] or "''", type(value).__name__, repr(plain).replace("'", '"')[:20]]


def is_clear(error: BaseException, arguments: dict[str, Any]) -> bool:
    """Whether an error names one of the arguments, its value and a cure, in three lines."""
    message = str(error)
    if not isinstance(error, (ValueError, TypeError, OSError)) or len(message) > 3 * 119 + 200:
        return False
    named = [name for name in arguments if re.search(rf"(?<![\w]){re.escape(name.rsplit('.')[-1])}", message)]
    has_value = any(form in message for name in named for form in forms(arguments[name]))
    return has_value and bool(CURE.search(message))


def judge(
    call: Callable[[], Any],
    arguments: dict[str, Any],
    is_valid: bool | None,
    difference: Callable[[Any], str | None] = lambda result: None,
) -> tuple[str, str]:
    """
    What became of a case.

    Args:
        call: the call.
        arguments: what was changed, by the names that an error may use.
        is_valid: whether it must work; `None` where it may be refused as well.
        difference: what is wrong with a result, or `None`.

    Returns:
        The verdict and what it rests on.
    """
    try:
        with limited():
            result = call()
    except Hang:
        return "hang", f"{arguments}"
    except Exception as error:
        what = f"{arguments}: {type(error).__name__}: {error}"
        if is_valid:
            return "refused though valid", what
        return ("refused" if is_clear(error, arguments) else "unclear"), what
    if is_valid is False:
        return "wrong", f"{arguments}: taken, gave {str(result)[:200]}"
    found = difference(result)
    return ("correct", "") if found is None else ("wrong", f"{arguments}: {found}")


def assert_good(verdict: tuple[str, str], *or_says: str) -> None:
    """The case was correct, or refused in a clear line; as clear is one that says one of `or_says`."""
    said = verdict[0] in ("refused", "unclear") and any(words in verdict[1] for words in or_says)
    assert said or verdict[0] in GOOD, verdict


def assert_reaches(verdict: tuple[str, str], words: str) -> None:
    """The case came as far as the error that a valid one meets, which says `words`."""
    assert verdict[0] in ("refused", "unclear") and words in verdict[1], verdict


def some_of(values: dict[str, Any], most: int = 2, least: int = 1):
    """A strategy of dicts with `least` to `most` of the names, each with a value of its strategy."""
    names = st.lists(st.sampled_from(sorted(values)), unique=True, min_size=least, max_size=most)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({name: values[name] for name in chosen}))


def all_good(values: dict[str, Any], valid: dict[str, Callable[[Any], bool]]) -> bool:
    return all(valid[name](value) for name, value in values.items())


def wrong_ones(values: dict[str, Any], valid: dict[str, Callable[[Any], bool]]) -> Iterable[str]:
    return [name for name, value in values.items() if not valid[name](value)]
