"""What `tprl reproduce` keeps of each run in the folder of its results: how long it trained, and what it answered.

A run that is kept is not trained or measured again on any machine: a long table can be made in parts. The name of
its file follows from all settings that it depends on, and in it is a digest of the LVLM's weights.
"""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import cache, cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tprl_hf.json_files import COUNT, read_json
from tprl_hf.whole_files import write

from .paper_tables import Run, Table

if TYPE_CHECKING:
    from tprl_hf import TPRLForConditionalGeneration
    from tprl_hf.evaluation.policy_runs import Questions

PACKAGES = ("tprl_hf", "torch", "transformers")
FOLDER = "measured"
ANSWERS = {...: {"correct": str, "kept": COUNT, "on_boxes": float}}
KEPT = {"versions": {...: str}, "machine": str, "lvlm": str, "answers": ANSWERS}
CURE = "delete it to measure the run again."
TRAINED = {"stage": str, "seconds": {...: float}, "curve": [{}]}


def machine() -> dict[str, Any]:
    """What a result was made with."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"versions": versions, "machine": f"{platform.machine()}, {platform.system()}"}


class MeasuredRuns:
    """
    The runs of a table.

    Args:
        table ([`Table`]): the table.
        folder (`Path`): of the results.
    """

    def __init__(self, table: Table, folder: Path):
        self.table = table
        self.folder = folder / FOLDER
        self.ratios = {name: float(Fraction(name)) for name in table.keep_ratios}

    @cached_property
    def questions(self) -> "Questions":
        """Those of the test."""
        from datasets import concatenate_datasets

        from tprl_hf.data import mosaic_vqa
        from tprl_hf.evaluation.policy_runs import Questions

        seeds, number = self.table.test["seeds"], self.table.test["num_samples"]
        return Questions(concatenate_datasets([mosaic_vqa("test", seed, number) for seed in seeds]))

    def path(self, name: str, *depends: Any) -> Path:
        """The file of what is called `name`, and depends on this besides the test."""
        text = json.dumps([*depends, self.table.test, self.table.keep_ratios], sort_keys=True)
        return self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"

    def path_of(self, one: Run) -> Path:
        """The file of a run."""
        directory = one.directories[one.stages[-1]]
        return self.path(directory.name, directory.parent.name)

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """Those that are not kept; each that rows share once."""
        found = {self.path_of(one): one for one in runs if not self.is_kept(self.path_of(one), one.recipe)}
        return list(found.values())

    def is_kept(self, path: Path, recipe: Mapping[str, Any]) -> bool:
        """Whether a file is there, and of the LVLM that the recipe now leads to."""
        return path.exists() and read_json(path, KEPT, CURE)["lvlm"] == digest_of(recipe)

    def keep(self, one: Run) -> None:
        """Measures a run that is trained."""
        from tprl_hf.evaluation.policy_runs import policy_settings

        path = self.path_of(one)
        model, processor = load_checkpoint(str(one.model))
        kept = {"recipe": one.recipe_name, "settings": one.settings, "seed": one.seed, **training_of(one)}
        self.write(path, model, processor, policy_settings(model, self.ratios), kept, one.recipe)

    def of(self, one: Run) -> dict[str, Any]:
        """What is kept of a run: `stage`, `seconds` by stage, `curve`, and `answers` by budget."""
        return self.read(self.path_of(one), TRAINED)

    def of_checkpoint(self, name: str) -> dict[str, Any]:
        """The same of a checkpoint that the table does not train; it is measured when it was not."""
        from tprl_hf.evaluation.fingerprint import fingerprint
        from tprl_hf.evaluation.policy_runs import policy_settings

        model, processor = load_checkpoint(name)
        path = self.path("checkpoint", fingerprint(model), model.config.num_steps, model.config.position_ids)
        if not path.exists():
            self.write(path, model, processor, policy_settings(model, self.ratios), {})
        return self.read(path, {})

    def of_rules(
        self, recipe: Mapping[str, Any], load: Callable[[], tuple["TPRLForConditionalGeneration", Any]]
    ) -> dict[str, Any]:
        """The same unpruned and of the rules that are in every table, measured with the LVLM of a recipe, which `load`
        loads."""
        from tprl_hf.evaluation.policy_runs import rule_settings

        path = self.path("rules", [recipe.get("base_model"), recipe.get("start_from")])
        if not self.is_kept(path, recipe):
            self.write(path, *load(), rule_settings(self.ratios), {}, recipe)
        return self.read(path, {})

    def write(
        self,
        path: Path,
        model: Any,
        processor: Any,
        settings: Mapping[str, Any],
        kept: Mapping[str, Any],
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Asks all questions, and keeps the answers.

        Raises:
            `ValueError`: If the LVLM has other weights than the one that the recipe now leads to.
        """
        from tprl_hf.training.fingerprint import fingerprint_of_lvlm

        lvlm = fingerprint_of_lvlm(model)
        if recipe is not None and lvlm != digest_of(recipe):  # the directory of runs keeps the LVLM it began with
            raise ValueError(
                f"The runs in {recipe['output_dir']} are of other weights of the LVLM than there are now: delete "
                f"{recipe['output_dir']} to train them again."
            )
        found = self.questions.answer(model.eval(), processor, dict(settings))
        about = {**machine(), "lvlm": lvlm, **kept}
        content = {**about, "answers": {name: packed(answers) for name, answers in found.items()}}
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(content, indent=1) + "\n")

    def read(self, path: Path, more: Mapping[str, Any]) -> dict[str, Any]:
        """What a file holds, with the answers question by question."""
        kept = read_json(path, {**KEPT, **more}, CURE)
        number = len(self.questions.types)
        try:
            kept["answers"] = {name: unpacked(answers, number) for name, answers in kept["answers"].items()}
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): {CURE}") from error
        return kept


def digest_of(recipe: Mapping[str, Any]) -> str:
    """Of the weights of the LVLM that a recipe leads to."""
    return digest_of_lvlm(recipe.get("start_from") or recipe.get("base_model"))


@cache
def digest_of_lvlm(name: str | None) -> str:
    from tprl_hf.loading import load_model
    from tprl_hf.training.fingerprint import fingerprint_of_lvlm

    return fingerprint_of_lvlm(load_model(name, "cpu", dtype="float32")[0])


def load_checkpoint(name: str) -> tuple["TPRLForConditionalGeneration", Any]:
    """A checkpoint in float32 on the default device, and its processor."""
    import torch
    from transformers import AutoProcessor

    from tprl_hf import TPRLForConditionalGeneration
    from tprl_hf.loading import device_named

    model = TPRLForConditionalGeneration.from_pretrained(name, dtype=torch.float32).to(device_named())
    return model, AutoProcessor.from_pretrained(name)


def training_of(one: Run) -> dict[str, Any]:
    """The seconds of each stage of a run, and the curve of its last one: accuracy on validation by step."""
    shape = {"seconds": float, "?log_history": [{}]}
    records = {
        stage: read_json(path / "training.json", shape, f"delete {path} to train it again.")
        for stage, path in one.directories.items()
    }
    curve = [
        {key: entry[key] for key in entry if key in ("step", "llm_passes") or key.startswith("eval_accuracy")}
        for entry in records[one.stages[-1]].get("log_history", [])
        if "eval_accuracy" in entry
    ]
    seconds = {stage: record["seconds"] for stage, record in records.items()}
    return {"stage": one.stages[-1], "seconds": seconds, "curve": curve}


def packed(answers: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The answers of a fixed budget, in a quarter of a character a question."""
    import numpy as np

    (kept,) = set(answers["kept"])  # all pictures of Mosaic-VQA have equally many tokens
    correct = np.packbits(np.array(answers["correct"], dtype=bool)).tobytes().hex()
    return {"correct": correct, "kept": int(kept), "on_boxes": round(fmean(answers["on_boxes"]), 6)}


def unpacked(kept: Mapping[str, Any], number: int) -> dict[str, list[float]]:
    """
    The reverse of [`packed`], for `number` questions. The share on boxes is the mean of all.

    Raises:
        `ValueError`: If the answers are of another number of questions.
    """
    import numpy as np

    raw = np.frombuffer(bytes.fromhex(kept["correct"]), dtype=np.uint8)
    if len(raw) != -(-number // 8):
        raise ValueError(f"it has answers of about {8 * len(raw)} questions, not of {number}")
    correct = np.unpackbits(raw, count=number).astype(float).tolist()
    return {"correct": correct, "kept": [float(kept["kept"])] * number, "on_boxes": [float(kept["on_boxes"])] * number}
