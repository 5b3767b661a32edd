"""Keep masks of samples that are demonstrated so far, in a file that a run which was cut off resumes from."""

import contextlib
import glob
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from torch import nn
from transformers.utils import logging

from tprl_hf.whole_files import write

from .fingerprint import fingerprint

logger = logging.get_logger(__name__)

Masks = list[list[bool]]  # after each step, of each token


def this_process() -> tuple[int, int]:
    """The number of this process, and of all that `torchrun` started."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class SavedMasks:
    """
    A JSON Lines file: what the masks depend on, then one sample a line. Of several processes each has a file of its
    own, `NAME-1.jsonl` and so on beside the first one's `NAME.jsonl`, and reads those of the others.

    Lines that were not written whole are removed, and their samples are missing. A file that depends on something else
    begins anew, with a warning.

    Args:
        path (`Path`): the file of the first process.
        depends_on (`Mapping[str, Any]`): what other masks would follow from, as JSON.
        process (`int`, defaults to 0): which one this is.
    """

    def __init__(self, path: Path, depends_on: Mapping[str, Any], process: int = 0):
        self.first = path
        self.path = path if process == 0 else path.with_name(f"{path.stem}-{process}{path.suffix}")
        self.depends_on = json.loads(json.dumps(depends_on))
        self.read_so_far: dict[Path, tuple[int, int]] = {}  # inode and bytes of each file of others
        with self.path.open("rb") if self.path.exists() else io.BytesIO() as file:
            head = file.readline()
            self.found: dict[int, Masks] = self.entries(file) if self.is_head(head) else {}
        if head and not self.is_head(head):
            before = parsed_object(head) or {}
            other = sorted(name for name, value in self.depends_on.items() if before.get(name) != value)
            logger.warning(
                f"{self.path} is of another run ({', '.join(other) or 'damaged'}): demonstrations begin anew."
            )
        rest = "".join(line_of(sample, masks) for sample, masks in self.found.items())
        path.parent.mkdir(parents=True, exist_ok=True)
        write(self.path, json.dumps(depends_on) + "\n" + rest)
        self.read_others()

    def is_head(self, line: bytes) -> bool:
        return parsed_object(line) == self.depends_on

    def entries(self, file: IO[bytes]) -> dict[int, Masks]:
        """Samples and masks of the lines that follow and are whole."""
        return dict(entry for line in file if line.endswith(b"\n") and (entry := parsed_entry(line)))

    def files(self) -> list[Path]:
        """Those of all processes, also of an earlier run with more of them."""
        return sorted(self.first.parent.glob(f"{glob.escape(self.first.stem)}*{self.first.suffix}"))

    def read_others(self) -> None:
        """Reads what other processes have noted since the last call."""
        for path in self.files():
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                before, read = self.read_so_far.get(path, (inode, 0))
                if path == self.path or ((before != inode or read == 0) and not self.is_head(file.readline())):
                    continue
                if before == inode and read:
                    file.seek(read)
                start, text = file.tell(), file.read()
                whole = text[: text.rfind(b"\n") + 1]  # the last line may be on its way
                self.found.update(self.entries(io.BytesIO(whole)))
                self.read_so_far[path] = inode, start + len(whole)

    def add(self, first: int, masks: Sequence[Masks]) -> None:
        """Notes the masks of samples `first`, `first + 1` and so on."""
        new = dict(enumerate(masks, start=first))
        with contextlib.suppress(FileNotFoundError), self.path.open("r+", encoding="utf-8") as file:
            file.seek(0, os.SEEK_END)
            file.write("".join(line_of(sample, mask) for sample, mask in new.items()))
        self.found.update(new)

    def of(self, samples: range) -> list[Masks] | None:
        """The masks of samples, if those of all are there."""
        return [self.found[sample] for sample in samples] if all(one in self.found for one in samples) else None

    @property
    def is_over(self) -> bool:
        """Whether another process had all masks, has saved the dataset, and has removed the files."""
        return not self.path.exists()

    def remove(self) -> None:
        for path in self.files():
            path.unlink(missing_ok=True)


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
