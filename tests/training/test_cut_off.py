"""Runs that are cut off, and resumed: each ends with the weights of an undisturbed one, or says what to do."""

import json
import random
import shutil
import time
from pathlib import Path

import pytest
import yaml
from datasets import load_from_disk

from .conftest import make_dataset
from .cut_off import FAULTS, Fault, train

TRAINED = {
    "disable_tqdm": True,
    "use_cpu": True,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "max_steps": 6,
    "save_steps": 2,
    "save_total_limit": 1,
    "logging_steps": 2,
}
MEASURED = {"eval_strategy": "steps", "eval_steps": 2, "keep_ratio": "1/2"}
ROLLOUTS = {"num_generations": 2, "num_mini_batches": 2, "num_ppo_epochs": 1, "micro_batch_size": 1}
STAGES = {
    "autoencoder": TRAINED,
    "demonstrations": {"teacher": "gradient", "keep_ratios": [["1/2", "1/4"]]},
    "lfd": {**TRAINED, **MEASURED},
    "ppo": {**TRAINED, **MEASURED, **ROLLOUTS, "score": "logprob"},
}


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """A recipe, and a folder in which all its stages were trained undisturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    make_dataset().save_to_disk(str(folder / "data"))
    source = {"source": str(folder / "data")}
    sections = {
        "base_model": base,
        "output_dir": str(folder / "run"),
        "policy": {"latent_dim": 16, "policy_num_heads": 4, "policy_dim": 16},
        "data": {"train": source, "validation": source},
        **STAGES,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(sections))
    ended = train(["all", "--config", str(folder / "recipe.yaml")], Fault("count", str(folder)))
    assert ended.code == 0, ended.output
    return folder


class Run:
    """One stage of the recipe in a folder of its own, which has all that the stage begins with."""

    def __init__(self, stage, finished, folder):
        self.stage, self.finished, self.folder = stage, finished, folder
        for before in list(STAGES)[: list(STAGES).index(stage)]:
            shutil.copytree(finished / "run" / before, folder / before)

    def train(self, what="count", at=0, timed=False):
        arguments = [self.stage, "--config", str(self.finished / "recipe.yaml"), "--set", f"output_dir={self.folder}"]
        return train(arguments, Fault(what, str(self.folder), at, timed))

    def assert_as_undisturbed(self, ended):
        assert ended.code == 0, ended.output
        assert results(self.folder / self.stage) == results(self.finished / "run" / self.stage), ended.output


def results(folder: Path):
    """All that a stage made, but for times."""
    report = json.loads((folder / "training.json").read_text())
    logs = [row for row in report.get("log_history", []) if "train_runtime" not in row]
    if (folder / "dataset").exists():  # its files have other fingerprints each time
        return load_from_disk(str(folder / "dataset")).to_list()
    skipped = {"training.json", "settings.json", "state.json", "config.json"}  # the last has paths, relative ones too
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in skipped and "checkpoint-" not in path.as_posix()
    }
    return report.get("metrics"), logs, files


@pytest.fixture(params=["autoencoder", "demonstrations", "lfd", "ppo"])
def run(request, finished, tmp_path):
    return Run(request.param, finished, tmp_path / "run")


def moments(count: int, number: int, seed: int) -> list[int]:
    """`number` of `count` changes, spread evenly, and another set for each seed."""
    if number >= count:
        return list(range(1, count + 1))
    width = count / number
    return [1 + int((index + random.Random(seed + index).random()) * width) for index in range(number)]


def test_a_run_that_is_killed_ends_as_undisturbed(run, tmp_path, record_property):
    """At changes of files, within them, and at moments of the clock."""
    started = time.perf_counter()
    undisturbed = run.train()
    seconds = time.perf_counter() - started
    run.assert_as_undisturbed(undisturbed)
    killed = timed = 0
    for index, at in enumerate(moments(undisturbed.changes, FAULTS, seed=len(run.stage))):
        by_clock = index % 4 == 3
        again = Run(run.stage, run.finished, tmp_path / f"kill-{index}")
        when = random.Random(index).uniform(0.2, 1) * seconds if by_clock else at
        ended = again.train("kill", when, by_clock)
        assert ended.code == -9 or (by_clock and ended.code == 0), ended.output
        killed += ended.code == -9
        timed += by_clock
        if index % 3 == 2 and ended.code == -9:  # and once more, when it resumes
            again.train("kill", 1 + at // 2)
            killed += 1
        again.assert_as_undisturbed(again.train())
        shutil.rmtree(again.folder)
    record_property("kills", killed)
    print(f"\n{run.stage}: {killed} kills, {timed} by the clock, {undisturbed.changes} changes, {seconds:.1f} s a run")
