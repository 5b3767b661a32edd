"""What several processes of one run, on one machine or more, tell each other through files."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

# Without a sign of life for so long, in seconds, the first process counts as ended.
PATIENCE = 120.0
SIGN_OF_LIFE = ".first-process"


def is_first_process() -> bool:
    """Of those that `torchrun` started on all machines; the only one without it."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    if is_first_process():
        print(text, flush=True)


@contextlib.contextmanager
def signs_of_life(folder: Path) -> Iterator[None]:
    """Within it the first of several processes lets the others see that it still works."""
    if not is_first_process() or os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.is_set():
            count += 1
            (folder / SIGN_OF_LIFE).write_text(str(count))  # content, because clocks of machines differ
            ended.wait(PATIENCE / 30)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        (folder / SIGN_OF_LIFE).unlink(missing_ok=True)


def wait_for(path: Path, folder: Path) -> None:
    """
    Until the first process has written `path`.

    Args:
        path (`Path`): what to wait for.
        folder (`Path`): where the first process shows [`signs_of_life`].

    Raises:
        `TimeoutError`: when it has not shown one for two minutes.
    """
    seen, since = "", time.monotonic()
    while not path.exists():
        try:
            sign = (folder / SIGN_OF_LIFE).read_text()
        except OSError:  # it has not begun, has ended, or this machine does not see the folder
            sign = seen
        if sign != seen:
            seen, since = sign, time.monotonic()
        if time.monotonic() - since > PATIENCE:
            raise TimeoutError(
                f"The first process (RANK=0) has not shown a sign of life for {PATIENCE:.0f} s while this one waited "
                f"for {path}: see why it ended, and start all processes again. They must share {folder}."
            )
        time.sleep(0.2)
