"""One JSON file of what `tprl train` recorded on the way to a checkpoint: settings, seconds, curves.

`python -m tprl_hf.training.training_record runs/mosaic_llava_policy/grpo policy_training.json`
"""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from tprl_hf.hub.publishing import training_data
from tprl_hf.json_files import read_json

from .stage_digest import DIGESTS, digest_of_stage
from .stages import STAGES, stages_until

TIMES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "epoch", "learning_rate")


def recorded_stages(directory: str | Path) -> list[dict[str, Any]]:
    """
    The stages of `tprl train` that led to `directory`, as they were recorded. A stage that was trained anew since is
    not the one that led there, and is left out. Stages of earlier versions did not note what they began from: for them
    it is all that may have led there.

    Returns:
        `list[dict]`: `stage`, `settings`, `metrics`, `seconds` and `history` (rows of the log) of each; empty for a
        directory that no stage wrote.
    """
    stages = []
    for name, folder in folders_until(Path(directory)).items():
        done = read_done(folder)
        settings = read_json(folder / "settings.json", {"?data": {}, f"?{name}": {}}, f"train {folder} again.")
        used = {**settings.get(name, {}), "data": training_data(name, settings)}
        metrics, history = done.get("metrics", {}), done.get("log_history", [])
        stages.append(
            {"stage": name, "settings": used, "metrics": metrics, "seconds": done["seconds"], "history": history}
        )
    return stages


def folders_until(directory: Path) -> dict[str, Path]:
    """By stage, in their order, the directories of those that led to `directory`, and itself."""
    if not (directory / "training.json").exists():
        return {}
    found: dict[str, Path] = {}
    waiting = {read_done(directory)["stage"]: directory}
    while waiting:
        name, folder = waiting.popitem()
        found[name] = folder
        noted = read_done(folder).get("begun_from")
        for before in stages_until(name)[:-1] if noted is None else STAGES.keys() & noted.keys():
            path = directory.parent / before
            digest = digest_of_stage(path)
            if before not in found and digest is not None and (noted is None or digest == noted[before]):
                waiting[before] = path
    return {name: found[name] for name in STAGES if name in found}


def read_done(folder: Path) -> dict[str, Any]:
    """What a stage wrote at its end. Raises `ValueError` where it is damaged."""
    shape = {
        **{"stage": frozenset(STAGES), "?begun_from": DIGESTS, "seconds": float},
        **{"?metrics": {...: float}, "?log_history": [{}]},
    }
    return read_json(folder / "training.json", shape, f"delete it, and train {folder} again.")


def training_record(directory: str | Path) -> dict[str, Any]:
    """
    The stages that led to a checkpoint.

    Args:
        directory (`str` or `Path`): The last stage's directory, which `tprl train` wrote.

    Returns:
        `dict`: `num_parameters` that pruning needs (policy, and encoder of the codes), and `stages` by name:
        `settings`, `seconds` (since the last start, where it was cut off), `metrics`, and the curves `training` and
        `validation`, lists of dicts with `step`.

    Raises:
        `ValueError`: If no stage wrote `directory`.
    """
    directory = Path(directory)
    stages = recorded_stages(directory)
    if not stages:
        raise ValueError(f"{directory} holds no training.json: pass the directory of a stage of `tprl train`.")
    num_parameters = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            for name in weights.keys():
                if name.startswith(("policy.", "autoencoder.encoder.")):
                    num_parameters += math.prod(weights.get_slice(name).get_shape())
    return {"num_parameters": num_parameters, "stages": {stage["stage"]: _stage(stage) for stage in stages}}


def _stage(stage: Mapping[str, Any]) -> dict[str, Any]:
    rows = [{name: _short(value) for name, value in row.items() if name not in TIMES} for row in stage["history"]]
    return {
        **{name: stage[name] for name in ("settings", "seconds", "metrics")},
        "training": [row for row in rows if not _validates(row) and "train_runtime" not in row],
        "validation": [row for row in rows if _validates(row)],
    }


def _validates(row: Mapping[str, Any]) -> bool:
    return any(name.startswith("eval_") for name in row)


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    arguments.output.write_text(json.dumps(training_record(arguments.directory), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
