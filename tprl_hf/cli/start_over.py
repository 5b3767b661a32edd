"""`tprl train --overwrite`: stages that are deleted before they are run again."""

import os
import shutil
from pathlib import Path
from typing import Any

from tprl_hf.training.stages import STAGES, stages_until
from tprl_hf.training.training_lock import alone_in


def refuse_several_processes(recipe: dict[str, Any]) -> None:
    """Raises `ValueError` where several processes run, which would not wait until one has deleted."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        folder = recipe["output_dir"]
        raise ValueError(f"--overwrite is for a single process: delete the stages in {folder} yourself.")


def delete_stages(stages: list[str], recipe: dict[str, Any]) -> None:
    """
    Deletes what an earlier run of `stages` left in the recipe's `output_dir`, and the base model there with the last
    of all stages. Nothing is deleted where something is refused.

    Raises:
        `ValueError`: where a stage that is not among them was made from one of them, where a directory is not that of
            a stage, and while another process trains in one.
    """
    from .train import TAKEN_FROM

    folder = Path(recipe["output_dir"])
    there = [stage for stage in STAGES if (folder / stage).is_dir()]
    for stage in there:
        if stage in stages and not (folder / stage / "settings.json").is_file():
            raise ValueError(
                f"{folder / stage} is not a stage of `tprl train`: it has no settings.json. Delete it yourself."
            )
        if stage in stages:
            with alone_in(folder / stage):  # else its process would write on into what is made anew
                pass
        made_from = [one for one in stages_until(stage) if one in stages and one in there]
        if stage not in stages and made_from:
            raise ValueError(
                f"{folder / stage} was made from {', '.join(made_from)}, which --overwrite would delete: overwrite it "
                "too (tprl train all --overwrite), or pass --set output_dir=ANOTHER."
            )
    for stage in there:
        if stage in stages:
            shutil.rmtree(folder / stage)
    if set(there) <= set(stages) and (folder / "base" / TAKEN_FROM).is_file():  # else it is not ours
        shutil.rmtree(folder / "base")
