"""What commands say on stderr while they work, and nothing with `--quiet`. Imports no torch."""

import os
import sys
from typing import Any

# Documented switches of the libraries, which read them when they are imported.
SILENCERS = {
    "TQDM_DISABLE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
_is_quiet = False


def set_quiet(quiet: bool) -> None:
    """For the command that runs now."""
    global _is_quiet
    _is_quiet = quiet
    if quiet:
        os.environ.update(SILENCERS)


def is_quiet() -> bool:
    return _is_quiet


def note(text: str) -> None:
    """A line that is not a result."""
    if not _is_quiet:
        print(text, file=sys.stderr, flush=True)


def bar(total: int, unit: str, description: str = "", done: int = 0) -> Any:
    """A `tqdm` bar with the time that is left."""
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit=unit, desc=description or None, disable=_is_quiet, file=sys.stderr)
