"""JSON files that are read again: where one is damaged, the message names it and what to do. Imports no torch."""

import json
import math
from pathlib import Path
from typing import Any

# A type; a frozenset of texts, of which it is one; a tuple of shapes, of which one fits; [shape] for a list of such;
# {"name": shape, "?name": shape} for an object that has the first and may have the second, with {...: shape} for all
# its other values; COUNT; or object, which is anything.
Shape = Any
COUNT = "a whole number of at least 1"
NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", None: "null", COUNT: COUNT}


def read_json(path: Path, shape: Shape, cure: str) -> Any:
    """
    What a JSON file holds.

    Args:
        path (`Path`): The file.
        shape (`Shape`): What it must hold; more names than these are fine.
        cure (`str`): What to do where it does not, as a sentence without a capital letter.

    Raises:
        `ValueError`: If it cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path} is damaged ({reason}): {cure}") from error
    reason = misfit(found, shape)
    if reason is not None:
        raise ValueError(f"{path} is damaged ({reason}): {cure}")
    return found


def misfit(value: Any, shape: Shape, place: str = "") -> str | None:
    """Where a value has another shape, and what is there; `None` where it fits."""
    if shape is object:
        return None
    if isinstance(shape, tuple):
        reasons = [misfit(value, one, place) for one in shape]
        return None if None in reasons else reasons[0]
    if isinstance(shape, dict) and isinstance(value, dict):
        return misfit_of_object(value, shape, place)
    if isinstance(shape, list) and isinstance(value, list):
        reasons = [misfit(one, shape[0], f"{place}[{number}]") for number, one in enumerate(value)]
        return next((reason for reason in reasons if reason is not None), None)
    if not isinstance(shape, dict | list) and is_a(value, shape):
        return None
    if isinstance(shape, frozenset):
        wanted = f"one of {', '.join(sorted(shape))}"
    else:
        wanted = "an object" if isinstance(shape, dict) else "a list" if isinstance(shape, list) else NAMES[shape]
    found = json.dumps(value)
    return f"{place.lstrip('.') or 'it'} is {found if len(found) < 40 else f'{found[:40]}...'}, not {wanted}"


def misfit_of_object(value: dict[str, Any], shape: dict[Any, Shape], place: str) -> str | None:
    """The same for an object."""
    named = {name.removeprefix("?"): one for name, one in shape.items() if name is not ...}
    for name in shape:
        if name is not ... and not name.startswith("?") and name not in value:
            return f"{f'{place}.{name}'.lstrip('.')} is missing"
    for name, one in value.items():
        reason = misfit(one, named.get(name, shape.get(..., object)), f"{place}.{name}")
        if reason is not None:
            return reason
    return None


def is_a(value: Any, shape: Shape) -> bool:
    """Whether a value that is neither list nor object is of a type; a truth value is not a number, nor is NaN."""
    if isinstance(shape, frozenset):
        return isinstance(value, str) and value in shape
    if shape is None:
        return value is None
    if shape == COUNT:
        return type(value) is int and value >= 1
    if shape is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is shape
