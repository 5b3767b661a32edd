"""Text files that are never half written."""

import os
from pathlib import Path


def write(path: Path, text: str) -> None:
    """All of the text or none of it, for whoever reads at the same time, and where the disk is full."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
