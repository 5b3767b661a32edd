"""Drawn questions lie in files while this process runs: they take none of its memory, and are drawn once."""

from __future__ import annotations

import atexit
import functools
import os
import platform
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset

PREFIX = f"tprl-drawn-{platform.node()}-"


@functools.cache
def folder(process: int) -> Path:
    """The files of this process, which go when it ends; those of processes that were killed go now."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if not is_alive(left.name.removeprefix(PREFIX).partition("-")[0]):
            shutil.rmtree(left, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{process}-"))
    atexit.register(remove, made, process)
    return made


def remove(path: Path, process: int) -> None:
    """Removes the files of `process`, unless this is a copy of it."""
    if os.getpid() == process:
        shutil.rmtree(path, ignore_errors=True)


def is_alive(process: str) -> bool:
    """Whether this machine runs a process of that number; `True` where that cannot be asked."""
    if os.name != "posix" or not process.isdigit():
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def in_file(dataset: Dataset) -> Dataset:
    """The same rows, read from a file; where it cannot be written, they stay in memory."""
    try:
        own = folder(os.getpid())
        path = own / f"{len(list(own.iterdir()))}.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, dataset.data.schema) as stream:
            stream.write_table(dataset.data.table)
        return Dataset.from_file(str(path))
    except OSError:
        return dataset
