"""Which training a finished stage is of: what is made from it notes this. Imports no torch."""

import hashlib
from pathlib import Path

DIGESTS = {...: str}  # the shape of `begun_from` in training.json: by stage, its digest


def digest_of_stage(folder: Path) -> str | None:
    """Of what a stage wrote at its end, with the time when that was; `None` where it is not finished."""
    path = folder / "training.json"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else None
