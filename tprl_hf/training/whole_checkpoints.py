"""Which checkpoints of a run are whole: a file in each, written last, lists all others with sizes and digests."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from transformers import TrainerCallback, TrainingArguments
from transformers.utils import logging

from tprl_hf.modeling.saved_files import flush
from tprl_hf.report.runs import LOG, json_lines

logger = logging.get_logger(__name__)

MANIFEST = "whole.json"
OPTIMIZER = "optimizer.pt"
# of a checkpoint that is being written anew, until the new one is whole
REPLACED = ".replaced-"


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def mark_whole(folder: Path, num_processes: int = 1, run: int = 0) -> None:
    """
    Lists the files of a checkpoint, or of another folder, in its manifest, once the disk has them.

    Args:
        num_processes (`int`, defaults to 1): that wrote it.
        run (`int`, defaults to 0): the run that it belongs to, see [`new_run`].
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            flush(path)
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": digest_of(path)}
    unfinished = folder / f".{MANIFEST}"
    unfinished.write_text(json.dumps({"num_processes": num_processes, "run": run, "files": files}, indent=1) + "\n")
    flush(unfinished)
    unfinished.replace(folder / MANIFEST)


def damage_of(folder: Path) -> str | None:
    """What differs from the manifest of a folder, or that it has none; `None` where all is as it was written."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        return f"it has no {MANIFEST}: writing it was cut off, or an older version wrote it"
    try:
        files = json.loads(manifest.read_bytes())["files"]
        expected = [(name, entry["size"], entry["sha256"]) for name, entry in files.items()]
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"its {MANIFEST} is damaged"
    for name, size, digest in expected:
        path = folder / name
        if not path.is_file():
            return f"its {name} is missing"
        if path.stat().st_size != size:
            return f"its {name} has {path.stat().st_size} bytes, not the {size} that were written"
        if digest_of(path) != digest:
            return f"its {name} is not as it was written"
    return None


def why_not_whole(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; `None` where a run can resume from it."""
    why = damage_of(checkpoint)
    if why is None and not (checkpoint / OPTIMIZER).exists():
        return f"it has no {OPTIMIZER}: it was saved with save_only_model=True"
    return why


def num_processes(checkpoint: Path) -> int:
    """How many processes wrote a whole checkpoint."""
    return json.loads((checkpoint / MANIFEST).read_bytes())["num_processes"]


def run_of(checkpoint: Path) -> int | None:
    """The number of the run that wrote a checkpoint; 0 of older versions, `None` where it was not marked."""
    try:
        return json.loads((checkpoint / MANIFEST).read_bytes()).get("run", 0)
    except (OSError, ValueError, AttributeError):
        return None


def latest_run(folder: Path) -> int:
    """The number of the run that was started last in a directory, as its log says, whether or not it has checkpoints;
    without such a log that of the last one that has some."""
    noted = [line["start"].get("run") for line in json_lines(folder / LOG, {"start": {}})]
    return noted[-1] if noted and isinstance(noted[-1], int) else last_saved_run(folder)


def last_saved_run(folder: Path) -> int:
    """The number of the last run that has checkpoints in a directory, 0 without any."""
    return max((run_of(checkpoint) or 0 for checkpoint in checkpoints_of(folder)), default=0)


def new_run(folder: Path) -> int:
    """The number of a run that starts anew in a directory: the checkpoints of others are neither its own nor newer."""
    others = [checkpoint for checkpoint in checkpoints_of(folder) if run_of(checkpoint) is not None]
    if others:
        logger.warning(
            f"{folder} has checkpoints of another run, such as {others[0].name}: they stay, but for those of the same "
            "steps. Pass resume_from_checkpoint=True to resume, or another output_dir."
        )
    return last_saved_run(folder) + 1


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def checkpoints_of(folder: Path) -> list[Path]:
    """All checkpoints of a directory, highest step first, with those that were being written anew."""
    pattern = re.compile(rf"({re.escape(REPLACED)})?checkpoint-\d+")
    found = [path for path in folder.glob("*checkpoint-*") if pattern.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (step_of(path), path.name), reverse=True)


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of the last run that can be resumed from, if any, and a line for each one above it."""
    passed_over: list[str] = []
    last = latest_run(folder)
    for checkpoint in checkpoints_of(folder):
        if run_of(checkpoint) in (last, None):  # one that was not marked may be of the last run
            why = why_not_whole(checkpoint)
        else:
            why = "another run wrote it, before the one that was started last"
        if why is None:
            return checkpoint, passed_over
        passed_over.append(f"passed over {checkpoint}: {why}.")
    return None, passed_over


def checkpoint_to_resume(wanted: str | Literal[True], args: TrainingArguments) -> Path:
    """
    The checkpoint `wanted`, or for `True` the newest whole one of the output directory.

    Raises:
        `ValueError`: when there is none, or the one that is wanted is not whole.
    """
    if wanted is not True:
        why = why_not_whole(Path(wanted))
        if why is not None:
            raise ValueError(
                f"{wanted} cannot be resumed from: {why}. Pass resume_from_checkpoint=True for the newest whole "
                "checkpoint, or start again."
            )
        return Path(wanted)
    newest, passed_over = newest_whole(Path(args.output_dir))
    if newest is None:
        raise ValueError(
            f"There is no whole checkpoint in {args.output_dir} to resume from: start again without "
            f"resume_from_checkpoint. {' '.join(passed_over)}".strip()
        )
    if args.process_index == 0:
        for line in passed_over:
            logger.warning(f"Resuming from {newest}; {line}")
    return newest


def make_room(checkpoint: Path) -> None:
    """Moves away what is in the place of a checkpoint that is to be written: it is deleted when that one is whole."""
    if not checkpoint.exists():
        return
    if why_not_whole(checkpoint) is None:
        aside = checkpoint.with_name(REPLACED + checkpoint.name)
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
    else:
        shutil.rmtree(checkpoint)


def could_not_be_written(checkpoint: Path, error: Exception) -> OSError:
    """The error for a checkpoint that is half written, after it was deleted."""
    shutil.rmtree(checkpoint, ignore_errors=True)
    return OSError(
        f"{checkpoint} could not be written ({error}). Checkpoints before it are as they were: make room, and resume."
    )


def remove_old(newest: Path, limit: int | None, best: str | None) -> None:
    """
    Deletes what a whole checkpoint makes unnecessary; of other runs nothing.

    Args:
        newest (`Path`): the checkpoint that was just marked.
        limit (`int`, *optional*): how many marked ones of its run may stay, `newest` and `best` always.
        best (`str`, *optional*): a checkpoint that is kept.
    """
    shutil.rmtree(newest.with_name(REPLACED + newest.name), ignore_errors=True)
    if not limit or limit < 0:
        return
    kept = {newest.name, *([Path(best).name] if best else [])}
    marked = [path for path in checkpoints_of(newest.parent) if run_of(path) == run_of(newest)]
    others = [path for path in marked if path.name not in kept]
    for path in others[max(0, limit - len(kept)) :]:
        (path / MANIFEST).unlink()  # first, so that half of it is not taken for all
        shutil.rmtree(path, ignore_errors=True)


class AfterSaving(TrainerCallback):
    """Calls a function after transformers has written the last file of a checkpoint."""

    def __init__(self, function: Callable[[], None]):
        self.function = function

    def on_save(self, args, state, control, **kwargs):
        self.function()


class NothingLeft(Exception):
    """A run resumed from its last step."""


class StopBeforeAnotherStep(TrainerCallback):
    """Raises [`NothingLeft`] where transformers, in the middle of an epoch, would train one step too many.

    Args:
        has_ended (`Callable`, *optional*): says whether a resumed run has ended for another reason.
    """

    def __init__(self, has_ended: Callable[[], bool] | None = None):
        self.has_ended = has_ended

    def on_train_begin(self, args, state, control, **kwargs):
        is_spent = state.global_step > 0 and self.has_ended is not None and self.has_ended()
        if state.global_step >= state.max_steps or is_spent:
            raise NothingLeft
