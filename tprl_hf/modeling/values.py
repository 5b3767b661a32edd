"""Checks of single values: each gives the value back as plain Python, or raises one `ValueError`.

Scalars of numpy and torch count as those of Python. A bool is not a number, and neither is a text. A check is called
with the name of the argument and its value; the error names both and what the value must be. Imports no torch.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

Check = Callable[[str, Any], Any]

MAX_SHOWN = 80


def plain(value: Any) -> Any:
    """A scalar of numpy or torch as that of Python; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def shown(value: Any) -> str:
    """A value as a message shows it: an array by its dtype and shape, anything long cut off."""
    if getattr(value, "ndim", 0):
        kind = "" if "torch" in str(value.dtype) else f"{type(value).__name__} of "
        return f"{kind}{value.dtype} of shape {tuple(value.shape)}"
    text = repr(plain(value))
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({type(value).__name__})"


def wrong(name: str, value: Any, what: str, cure: str = "") -> ValueError:
    """The error for a value that is not `what` it must be."""
    return ValueError(f"{name} must be {what}; got {shown(value)}.{f' {cure}' if cure else ''}")


def whole(least: int | None = None, most: int | None = None, cure: str = "") -> Check:
    """A check for whole numbers from `least` to `most`; 3.0 is one, and becomes 3."""
    bounds = [f"of at least {least}" if least is not None else "", f"of at most {most}" if most is not None else ""]
    what = " ".join(["a whole number", " and ".join(filter(None, bounds))]).strip()

    def check(name: str, value: Any) -> int:
        given = plain(value)
        is_whole = isinstance(given, Integral) or (isinstance(given, float) and given.is_integer())
        if isinstance(given, bool) or not is_whole:
            raise wrong(name, value, what, cure)
        if (least is not None and given < least) or (most is not None and given > most):
            raise wrong(name, value, what, cure)
        return int(given)

    return check


def number(
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    what: str = "a number, and finite",
    cure: str = "",
) -> Check:
    """A check for finite numbers from `least` to `most`, above `above` and below `below`; `what` says it in words."""

    def check(name: str, value: Any) -> float:
        given = plain(value)
        if isinstance(given, bool) or not isinstance(given, Real) or not math.isfinite(given):
            raise wrong(name, value, what, cure)
        found = given if isinstance(given, int) else float(given)
        if (least is not None and found < least) or (most is not None and found > most):
            raise wrong(name, value, what, cure)
        if (above is not None and found <= above) or (below is not None and found >= below):
            raise wrong(name, value, what, cure)
        return found

    return check


# As they are used most.
POSITIVE = number(above=0, what="a number above 0")
NOT_NEGATIVE = number(least=0, what="a number of at least 0")
UNIT = number(least=0, most=1, what="a number in [0, 1]")
FRACTION = number(above=0, most=1, what="a number in (0, 1]")
KEPT_FRACTION = number(above=0, most=1, what="the fraction of visual tokens that is KEPT, a number in (0, 1]")
COUNT = whole(1)


def flag(name: str, value: Any) -> bool:
    """A check for True and False, and nothing that only counts as one of them."""
    given = plain(value)
    if not isinstance(given, bool):
        raise wrong(name, value, "True or False")
    return given


def text(name: str, value: Any) -> str:
    """A check for texts that are not empty."""
    if not isinstance(value, str) or not value.strip():
        raise wrong(name, value, "a text that is not empty")
    return value


def one_of(choices: Iterable[Any]) -> Check:
    """A check for one of `choices`, and for nothing that only equals it, such as True for 1."""
    known = list(choices)

    def check(name: str, value: Any) -> Any:
        if not any(type(value) is type(choice) and value == choice for choice in known):
            raise wrong(name, value, " or ".join(map(repr, known)), did_you_mean(value, known))
        return value

    return check


def optional(check: Check) -> Check:
    """The same check, which also lets `None` through."""
    return lambda name, value: None if value is None else check(name, value)


def list_of(check: Check, least: int = 0) -> Check:
    """A check for lists and tuples of at least `least` values that pass `check`; they become lists."""

    def check_all(name: str, value: Any) -> list:
        if not isinstance(value, (list, tuple)) or len(value) < least:
            raise wrong(name, value, f"a list of at least {least}" if least else "a list")
        return [check(f"{name}[{index}]", one) for index, one in enumerate(value)]

    return check_all


def did_you_mean(name: Any, known: Iterable[Any], cutoff: float = 0.6) -> str:
    """A question after the known name that is closest; empty where none is close."""
    names = [one for one in known if isinstance(one, str)]
    close = difflib.get_close_matches(name, names, n=1, cutoff=cutoff) if isinstance(name, str) else []
    return f"Did you mean {close[0]!r}?" if close else ""


def refuse_misspelled(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises `ValueError` for a name that is not `known`, but nearly."""
    names = list(known)
    for name in given:
        if name not in names and (hint := did_you_mean(name, names, cutoff=0.8)):
            raise ValueError(f"{where} has no argument {name!r}. {hint}")


def check_fields(holder: Any, checks: Mapping[str, Check]) -> None:
    """Replaces each attribute of `holder` that `checks` names by what its check gives back."""
    for name, check in checks.items():
        value = getattr(holder, name)
        checked = check(name, value)
        if checked is not value:
            object.__setattr__(holder, name, checked)
