"""Notes what a stage of `tprl train` was begun from, so that what was made from an earlier model does not count as
finished. Imports no torch."""

import json
from pathlib import Path
from typing import Any

from tprl_hf.json_files import read_json
from tprl_hf.training.stage_digest import DIGESTS, digest_of_stage
from tprl_hf.training.stages import STAGES
from tprl_hf.whole_files import write

from .processes import is_first_process

NOTE = "begun_from.json"  # what a stage that is not finished was begun from


def start_of(stage: str, recipe: dict[str, Any]) -> str | None:
    """The stage whose model it starts from; `None` for a new policy, or that of a checkpoint."""
    return next((before for before in STAGES[stage].starts_from if before in recipe), None)


def sources_of_stage(stage: str, recipe: dict[str, Any]) -> list[str]:
    """The stages that its result depends on: whose model it starts from, and whose data it learns from."""
    # a teacher reads the frozen LVLM: it does not matter what the autoencoder learned before
    start = None if stage == "demonstrations" else start_of(stage, recipe)
    return [name for name in (start, STAGES[stage].learns_from) if name is not None]


def refuse_stale(stages: list[str], recipe: dict[str, Any]) -> None:
    """
    Before the first of `stages` runs, which may take hours.

    Raises:
        `ValueError`: where one of them is finished, or would resume, and was begun from other stages than the recipe
            says, or from one that was trained anew since or would be now. One that is gone and stays so is fine.
    """
    for stage in stages:
        directory = Path(recipe["output_dir"]) / stage  # of `tprl reproduce` a link; its sources lie beside the link
        noted, sources = noted_in(directory), sources_of_stage(stage, recipe)
        if noted is None:
            continue
        cure = f"delete {directory} to train it again."
        if sorted(noted) != sorted(sources):
            was, now = (" and ".join(sorted(names)) or "no other stage" for names in (noted, sources))
            raise ValueError(f"{directory} was begun from {was}, and this recipe begins it from {now}: {cure}")
        for source in sources:
            path = directory.parent / source
            found = digest_of_stage(path)
            if found != noted[source] if found is not None else source in stages:
                raise ValueError(
                    f"{directory} was begun from a training of {source} that is not that of {path / 'training.json'}: "
                    f"{cure}"
                )


def noted_in(directory: Path) -> dict[str, str] | None:
    """What a stage noted that is finished or would resume; `None` for others, and for those of earlier versions."""
    cure = f"delete {directory} to run this stage again."
    if (directory / "training.json").exists():
        done: dict[str, Any] = read_json(directory / "training.json", {"?begun_from": DIGESTS}, cure)
        return done.get("begun_from")
    if (directory / NOTE).exists() and any(directory.glob("checkpoint-*")):
        noted: dict[str, str] = read_json(directory / NOTE, DIGESTS, cure)
        return noted
    return None


def claim_sources(stage: str, recipe: dict[str, Any]) -> dict[str, str]:
    """
    Notes in a stage's directory what it is begun from, for the run that resumes it.

    Returns:
        `dict[str, str]`: digests by stage, for its `training.json`.
    """
    directory = Path(recipe["output_dir"]) / stage
    noted = noted_in(directory)
    if noted is not None:  # it resumes
        return noted
    digests = {source: digest_of_stage(directory.parent / source) for source in sources_of_stage(stage, recipe)}
    found = {source: digest for source, digest in digests.items() if digest is not None}  # else the stage says so
    if is_first_process():
        write(directory / NOTE, json.dumps(found, indent=2) + "\n")
    return found
