"""What `tprl train` would do: its stages, their data and steps, and the disk that they need. Nothing is written."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tprl_hf.json_files import COUNT, read_json
from tprl_hf.training.stages import STAGES

from .recipe_file import model_of
from .tables import format_table

WIDTH = 4  # bytes of a weight of the policy, which is float32
HEADS = ["stage", "state", "starts from", "learns from", "steps", "time", "disk"]


def describe(stages: list[str], recipe: dict[str, Any], expected: Mapping[str, float] | None = None) -> str:
    """A table of the stages, and lines below it. `recipe` has been checked; `expected` has seconds by stage."""
    expected = expected or {}
    weights, base = sizes_of_model(recipe)
    rows, total = [HEADS], 0
    for stage in stages:
        directory = Path(recipe["output_dir"]) / stage
        state, left = state_of(stage, directory)
        if left == "not known" and stage in expected:
            left = f"about {duration(expected[stage])}"
        size = disk_of(stage, recipe, weights, base)
        total += 0 if state == "finished" else size
        before = next((one for one in STAGES[stage].starts_from if one in recipe), None)
        rows.append(
            [
                stage,
                state,
                before or recipe.get("start_from") or "a new policy",
                STAGES[stage].learns_from or data_words(stage, recipe),
                steps_of(stage, recipe),
                left,
                megabytes(size) if size else "pictures",
            ]
        )
    folder = Path(recipe["output_dir"]).absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    lines = [
        f"To be written in {recipe['output_dir']}: about {megabytes(total)}; free there: "
        f"{megabytes(shutil.disk_usage(there).free)}. Pictures that demonstrations copy are not counted.",
        *feature_lines(stages, recipe, base),
        f"Policy and autoencoder have {weights // WIDTH:,} weights, the base model has {megabytes(base)}.",
        "time: what a finished stage took, or what an interrupted one still needs at the pace of its last two "
        "checkpoints; "
        + ("about: the work of a stage at the speed of a short trial." if expected else "others begin with a trial."),
    ]
    return "\n".join([format_table(rows), *lines])


def feature_lines(stages: list[str], recipe: dict[str, Any], base: int) -> list[str]:
    """How much room visual features may take, in memory and on disk."""
    from .train import make_config

    in_memory, on_disk = 0, dict[str, int]()
    for stage in stages:
        if STAGES[stage].config is not None:
            config = make_config(stage, recipe)
            room = config.feature_cache_mb * 2**20
            if config.feature_cache_dir is None:
                in_memory = max(in_memory, room)
            else:
                on_disk[config.feature_cache_dir] = max(on_disk.get(config.feature_cache_dir, 0), room)
    lines = [
        f"Memory: {megabytes(base)} for the base model, and at most {megabytes(in_memory)} for features of images."
    ]
    return lines + [f"Features of images take at most {megabytes(room)} of {path}." for path, room in on_disk.items()]


def seconds_of(directory: Path) -> float:
    """How long a finished stage took. Raises `ValueError` where what it wrote at its end is damaged."""
    cure = f"delete {directory} to run this stage again."
    return read_json(directory / "training.json", {"seconds": float}, cure)["seconds"]


def state_of(stage: str, directory: Path) -> tuple[str, str]:
    """Whether a stage has run, and the time that it took or still needs, as far as it is known."""
    if (directory / "training.json").exists():
        return "finished", duration(seconds_of(directory))
    found = []
    for path in directory.glob("checkpoint-*/trainer_state.json"):
        try:
            state = read_json(path, {"global_step": COUNT, "max_steps": COUNT}, "it is passed over.")
        except ValueError:  # as the stage itself does
            continue
        found.append((state["global_step"], path.stat().st_mtime, state["max_steps"]))
    if not found:
        return "to do", "not known"
    found.sort()
    step, written, steps = found[-1]
    state = f"at step {step} of {steps}"
    if len(found) < 2:
        return state, "not known"
    pace = (written - found[-2][1]) / (step - found[-2][0])
    return state, f"{duration(pace * (steps - step))} left"


def steps_of(stage: str, recipe: dict[str, Any]) -> str:
    """How long a stage is, as its settings say it."""
    from .train import make_config

    if STAGES[stage].config is None:
        return ""
    config = make_config(stage, recipe)
    return str(config.max_steps) if config.max_steps > 0 else f"{config.num_train_epochs:g} epochs"


def data_words(stage: str, recipe: dict[str, Any]) -> str:
    """The sources of a stage's data, and how many samples each has."""
    from .train import sources_of, training_data

    words = []
    for section in sources_of(recipe, training_data(stage, recipe)):
        name, number = section.get("source", "mosaic"), section.get("num_samples")
        kinds = f" of {len(section['question_types'])} types" if "question_types" in section else ""
        words.append(f"{Path(name).name}{f' {number}' if number else ''}{kinds}")
    return " + ".join(words)


def sizes_of_model(recipe: dict[str, Any]) -> tuple[int, int]:
    """Bytes of policy and autoencoder, and of the base model; no weight is made or read."""
    import torch

    import tprl_hf
    from tprl_hf.loading import config_of

    base: Any = config_of(model_of(recipe))
    if recipe.get("start_from"):
        config = base
    else:
        base = base.base_config if isinstance(base, tprl_hf.TPRLConfig) else base
        config = tprl_hf.TPRLConfig(base_config=base, **recipe.get("policy", {}))
    with torch.device("meta"):
        model = tprl_hf.TPRLForConditionalGeneration(config)
    own = sum(one.numel() for part in (model.policy, model.autoencoder) for one in part.parameters())
    width = torch.empty(0, dtype=model.lvlm.config.dtype or torch.float32, device="meta").element_size()
    return WIDTH * own, width * sum(one.numel() for one in model.lvlm.parameters())


def disk_of(stage: str, recipe: dict[str, Any], weights: int, base: int) -> int:
    """Bytes that a stage's checkpoints and result take at most: weights, and two moments of each for the optimizer."""
    from .train import make_config

    if STAGES[stage].config is None:
        return 0
    config = make_config(stage, recipe)
    checkpoints = 0 if config.save_strategy == "no" else (config.save_total_limit or 1) + 1
    # a policy that keeps its best weights has them in its checkpoints too
    copies = 4 if STAGES[stage].starts_from else 3
    return checkpoints * copies * weights + weights + (base if config.save_base_model else 0)


def megabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """In the largest two units that matter."""
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes:.0f} min" if minutes < 120 else f"{hours:.1f} h"
