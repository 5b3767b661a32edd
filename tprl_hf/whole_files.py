"""Files that are never half written. Imports no torch."""

import contextlib
import glob
import os
import platform
from collections.abc import Iterator
from pathlib import Path


def write(path: Path, text: str) -> None:
    """All of the text or none of it, for whoever reads at the same time, and where the disk is full."""
    with written_beside(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A place for what becomes the file `path` when all of it is written. What killed processes left there goes."""
    own = f".{path.name}.{platform.node()}."  # process numbers are of one machine, disks are shared
    for left in path.parent.glob(f"{glob.escape(own)}*"):
        process = left.name.removeprefix(own)
        if process.isdigit():
            from tprl_hf.modeling.saved_files import is_alive  # which imports torch

            if not is_alive(int(process)):
                left.unlink(missing_ok=True)
    unfinished = path.with_name(f"{own}{os.getpid()}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
