"""One training at a time in a directory: a file that the operating system locks for as long as the process lives."""

import contextlib
import errno
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

LOCK = ".training.lock"
PLACE = 2**20  # the byte that is locked, behind the text: on Windows others cannot read what is locked
IS_LOCKED = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """
    Within it no other process trains in `directory`. The lock ends with this process, however that ends. Where a file
    cannot be written or locked, as on a read-only disk and on some network disks, other processes are not noticed.

    Raises:
        `ValueError`: when another process trains there.
    """
    file = locked_file(directory / LOCK)
    if file is None:
        yield
        return
    with file:
        with contextlib.suppress(OSError):  # a full disk: then messages do not say who it is
            file.truncate(0)
            file.write(f"process {os.getpid()} of {platform.node()}".encode())
            file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows deletes no open file
                (directory / LOCK).unlink()


def locked_file(path: Path) -> BinaryIO | None:
    """The file `path`, open and locked; `None` where it cannot be. Raises `ValueError` when another process has it."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+b", buffering=0)
        except OSError:
            return None
        try:
            lock(file)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:  # whoever had it has just ended, and deleted it
            pass
        except OSError as error:
            file.close()
            if error.errno in IS_LOCKED:
                raise in_use(path) from None
            return None
        file.close()


def lock(file: BinaryIO) -> None:
    """Raises `OSError` where another process has the lock, or there are no locks."""
    if sys.platform == "win32":
        import msvcrt

        file.seek(PLACE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, PLACE)  # which a forked child does not inherit


def in_use(path: Path) -> ValueError:
    """The error for a directory in which another process trains."""
    try:
        who = path.read_text(encoding="utf-8") or "another process"
    except OSError:
        who = "another process"
    return ValueError(
        f"{path.parent} is in use: {who} trains there. Wait until it has ended, or end it, or choose another "
        "output_dir."
    )
