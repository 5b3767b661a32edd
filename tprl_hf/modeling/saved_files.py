"""Directories that hold one saved state or another, never a mixture of two."""

import contextlib
import errno
import glob
import json
import os
import platform
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from .checkpoint_checks import refuse_unsafe_name
from .hub_tprl import WEIGHT_PATTERNS

# Weights as transformers calls them: of a variant such as fp16 or of none, in one file or several, and their index.
WEIGHTS = re.compile(r"model(?:\.(.+?))?(?:-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index(?:\.(.+))?\.json")
# Of a save whose files are all written and not yet all moved to their places, and the list of them in it.
SAVED, NAMES = ".saved", ".names.json"


def variant_of(name: str) -> str | None:
    """The variant that a file of weights is of, "" for the usual one; `None` for other files."""
    found = WEIGHTS.fullmatch(name)
    return None if found is None else found[1] or found[2] or ""


@contextlib.contextmanager
def scratch_directory(beside: Path) -> Iterator[str]:
    """A temporary directory on the same disk as `beside`. Those of processes that were killed there are deleted."""
    beside.mkdir(parents=True, exist_ok=True)
    machine = f".writing-{platform.node()}-"
    for left in beside.glob(f"{glob.escape(machine)}*"):
        process = left.name.removeprefix(machine).split("-")[0]
        if process.isdigit() and not is_alive(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    scratch = tempfile.mkdtemp(dir=beside, prefix=f"{machine}{os.getpid()}-")
    try:
        yield scratch
    finally:  # not by TemporaryDirectory, which recurses without end where it may not delete
        shutil.rmtree(scratch, ignore_errors=True)


def is_alive(process: int) -> bool:
    """Whether this machine runs a process of that number; `True` where that cannot be asked."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def written_whole(directory: Path) -> Iterator[str]:
    """
    A folder to write into, whose files then take their places in `directory`: all, or none where writing failed.
    Weights of an earlier checkpoint that have no successor go.

    Raises:
        `OSError`: where the disk is full, or refuses; what was in `directory` is as before.
    """
    try:
        with scratch_directory(directory) as scratch:
            yield scratch
            allow_as_umask(Path(scratch))
            names = sorted(path.relative_to(scratch).as_posix() for path in Path(scratch).rglob("*") if path.is_file())
            for name in names:
                flush(Path(scratch, name))
            Path(scratch, NAMES).write_text(json.dumps(names), encoding="utf-8")
            flush(Path(scratch, NAMES))
            publish_files(Path(scratch), directory)
    except SafetensorError as error:
        raise OSError(
            f"{directory} could not be written ({error}); what it held is as before. Make room, and save again."
        ) from error


@contextlib.contextmanager
def made_whole(directory: Path) -> Iterator[Path]:
    """
    A place for what becomes `directory` when all of it is written. Of several processes that make it at the same time
    the first one counts.
    """
    with scratch_directory(directory.parent) as scratch:
        new = Path(scratch, directory.name)
        yield new
        allow_as_umask(new)
        put_first(new, directory)


def put_first(new: Path, directory: Path) -> None:
    """Renames a directory, unless another process has put its own there meanwhile."""
    try:
        new.rename(directory)
    except OSError:
        if not directory.is_dir():
            raise


def allow_as_umask(folder: Path) -> None:
    """Lets those read the files of a folder whom the umask lets: safetensors 0.8 lets their owner alone."""
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)  # os.umask would change it for other threads
    probe.unlink()
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)


def flush(path: Path) -> None:
    """Waits until the disk has the file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def publish_files(scratch: Path, directory: Path) -> None:
    """From here on the save counts, also if this process ends before every file is in its place."""
    while True:
        finish_saving(directory)
        try:
            os.rename(scratch, directory / SAVED)
            break
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # another process saves here at the same time
                raise
    finish_saving(directory)


def finish_saving(directory: Path) -> bool:
    """
    Moves the files of a save that was cut off to their places, each at once; several processes may do so together.

    Returns:
        `bool`: whether there were any.

    Raises:
        `ValueError`: where the list of these files leads out of the directory.
    """
    saved = directory / SAVED
    if not saved.is_dir():
        return False
    try:
        names = json.loads((saved / NAMES).read_text(encoding="utf-8"))
    except FileNotFoundError:  # all its files are in their places
        shutil.rmtree(saved, ignore_errors=True)
        return False
    if not isinstance(names, list):
        names = [None]  # a directory from elsewhere may have anything in it
    for name in names:
        refuse_unsafe_name(name, str(saved / NAMES))
        for root in (saved, directory):
            if not Path(root, name).parent.resolve().is_relative_to(directory.resolve()):
                raise ValueError(f"{saved / NAMES} names {name!r}, which leads out of {directory}. Nothing was moved.")
    variants = {variant_of(name) for name in names} - {None}
    for path in [path for pattern in WEIGHT_PATTERNS for path in directory.glob(pattern)]:
        if path.name not in names and variant_of(path.name) in variants:  # of a save with more shards
            path.unlink(missing_ok=True)
    for name in sorted(names, key=lambda name: name != "config.json"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            os.replace(saved / name, directory / name)
    (saved / NAMES).unlink(missing_ok=True)
    shutil.rmtree(saved, ignore_errors=True)
    return True
