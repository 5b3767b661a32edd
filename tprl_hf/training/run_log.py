"""What a run writes while it trains, line by line, so that `tprl report` has it before the first checkpoint."""

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback, TrainingArguments

import tprl_hf
from tprl_hf.hub.publishing import changed_settings
from tprl_hf.modeling.saved_files import written_whole
from tprl_hf.report.runs import LOG, MASKS, json_lines


class StepLines:
    """
    A JSON Lines file of a run. Begun at a step, it keeps the lines of before that step, and drops those that an
    interrupted run wrote behind its checkpoint.

    Args:
        path (`Path`): The file.
    """

    def __init__(self, path: Path):
        self.path = path

    def begin(self, step: int) -> None:
        """Leaves what a run that is at `step` wrote; nothing at step 0."""
        lines = json_lines(self.path) if step else []
        kept = [line for line in lines if line.get("step", line.get("start", {}).get("step", 0)) <= step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not kept:
            self.path.unlink(missing_ok=True)
            return
        with written_whole(self.path.parent) as scratch:
            lines_of_before = "".join(json.dumps(line) + "\n" for line in kept)
            Path(scratch, self.path.name).write_text(lines_of_before, encoding="utf-8")

    def add(self, line: Mapping[str, Any]) -> None:
        """Adds a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class RunLog(TrainerCallback):
    """
    Writes each row of the log to `output_dir/log.jsonl` at once, with its time; before them, at each start, what runs.

    Args:
        output_dir (`str`): Of the training.
        facts (`dict`): What runs, see [`start_facts`].

    Attributes:
        is_open (`bool`): Whether a training has begun, and this process writes.
        masks ([`StepLines`]): The file for the keep masks that are watched.
    """

    def __init__(self, output_dir: str, facts: Mapping[str, Any]):
        self.facts = dict(facts)
        self.is_open = False
        self.rows, self.masks = (StepLines(Path(output_dir) / name) for name in (LOG, MASKS))

    def on_train_begin(self, args, state, control, **kwargs):
        self.is_open = state.is_world_process_zero
        if self.is_open:
            self.rows.begin(state.global_step)
            self.masks.begin(state.global_step)
            now = time.time()
            when = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M UTC")
            start = {"time": now, "when": when, "step": state.global_step, "max_steps": state.max_steps}
            self.rows.add({"start": {**start, **self.facts}})

    def on_log(self, args, state, control, **kwargs):
        if self.is_open:
            self.rows.add({"time": time.time(), **state.log_history[-1]})


def start_facts(stage: str, args: TrainingArguments) -> dict[str, Any]:
    """
    What the log says of a start: the settings that are not defaults, and with what and on what they run. To be asked
    before there is an `Accelerator`: a config that is made later resets its state.
    """
    device = args.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "stage": stage,
        "settings": changed_settings(args),
        "device": f"{name}, threads: {torch.get_num_threads()}, processes: {args.world_size}",
        "versions": {one.__name__: one.__version__ for one in (tprl_hf, transformers, torch)},
    }
