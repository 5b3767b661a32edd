"""Keep masks of samples that are demonstrated so far, in a file that a run which was cut off resumes from."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging

from tprl_hf.modeling.saved_files import written_whole

from .fingerprint import fingerprint

logger = logging.get_logger(__name__)

Masks = list[list[bool]]  # after each step, of each token


class SavedMasks:
    """
    A JSON Lines file: what the masks depend on, then one sample a line.

    Lines that were not written whole are removed, and their samples are missing. A file that depends on something else
    begins anew, with a warning.

    Args:
        path (`Path`): the file.
        depends_on (`Mapping[str, Any]`): what other masks would follow from, as JSON.
    """

    def __init__(self, path: Path, depends_on: Mapping[str, Any]):
        self.path = path
        head, *lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        before, found = parsed_object(head), {}
        if before == json.loads(json.dumps(depends_on)):
            found = {sample: masks for line in lines if (entry := parsed_entry(line)) for sample, masks in [entry]}
        elif head:
            other = sorted(name for name in depends_on if (before or {}).get(name) != depends_on[name])
            logger.warning(f"{path} is of another run ({', '.join(other) or 'damaged'}): demonstrations begin anew.")
        self.found: dict[int, Masks] = found
        rest = "".join(line_of(sample, masks) for sample, masks in found.items())
        with written_whole(path.parent) as scratch:
            Path(scratch, path.name).write_text(json.dumps(depends_on) + "\n" + rest, encoding="utf-8")

    def add(self, first: int, masks: Sequence[Masks]) -> None:
        """Notes the masks of samples `first`, `first + 1` and so on."""
        new = dict(enumerate(masks, start=first))
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(line_of(sample, mask) for sample, mask in new.items()))
        self.found.update(new)

    def of(self, samples: range) -> list[Masks] | None:
        """The masks of samples, if those of all are there."""
        return [self.found[sample] for sample in samples] if all(one in self.found for one in samples) else None


def line_of(sample: int, masks: Masks) -> str:
    texts = ["".join("01"[bit] for bit in mask) for mask in masks]
    return json.dumps({"sample": sample, "keep_masks": texts}) + "\n"


def parsed_object(line: bytes) -> dict[str, Any] | None:
    """The JSON object that a line holds, if it is whole."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def parsed_entry(line: bytes) -> tuple[int, Masks] | None:
    """Sample and masks that a line holds, if it is whole."""
    found = parsed_object(line)
    if found is None or found.keys() != {"sample", "keep_masks"}:
        return None
    sample, texts = found["sample"], found["keep_masks"]
    are_masks = isinstance(texts, list) and all(isinstance(text, str) and set(text) <= set("01") for text in texts)
    if type(sample) is not int or sample < 0 or not are_masks:
        return None
    return sample, [[bit == "1" for bit in text] for text in texts]


def description(teacher: Any) -> str:
    """Class and settings of a teacher; of networks that it has, their weights."""
    settings = {
        name: fingerprint(value) if isinstance(value, nn.Module) else repr(value)
        for name, value in sorted(vars(teacher).items())
    }
    return f"{type(teacher).__module__}.{type(teacher).__qualname__} {settings}"
