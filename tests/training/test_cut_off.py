"""Runs that are cut off, and resumed: each ends with the weights of an undisturbed one, or says what to do."""

import errno
import functools
import json
import os
import random
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_from_disk
from transformers import TrainerCallback

from tprl_hf.cli import processes, stop_signals
from tprl_hf.cli.stop_signals import Stopped, StopSignals
from tprl_hf.report.runs import LOG, MASKS, read_stage
from tprl_hf.training.whole_checkpoints import MANIFEST, checkpoint_to_resume, newest_whole, why_not_whole

from .conftest import make_dataset
from .cut_off import Fault, number_of_faults, number_of_others, show_life, start, train
from .test_trainers import stage, weights_of

TRAINED = {
    "disable_tqdm": True,
    "use_cpu": True,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "max_steps": 6,
    "save_steps": 2,
    "save_total_limit": 1,
    "logging_steps": 1,
}
MEASURED = {"eval_strategy": "steps", "eval_steps": 2, "keep_ratio": "1/2"}
ROLLOUTS = {"num_generations": 2, "num_mini_batches": 2, "num_ppo_epochs": 1, "micro_batch_size": 1}
GROUPS = {"num_generations": 2, "num_mini_batches": 2, "num_iterations": 1}
STAGES = {
    "autoencoder": TRAINED,
    "demonstrations": {"teacher": "gradient", "keep_ratios": [["1/2", "1/4"]], "batch_size": 2},
    "lfd": {**TRAINED, **MEASURED},
    "ppo": {**TRAINED, **MEASURED, **ROLLOUTS, "score": "logprob"},
    "grpo": {**TRAINED, **MEASURED, **GROUPS, "score": "logprob"},
    "mapo": {**TRAINED, **MEASURED, **GROUPS, "score": "logprob"},
    "counterfactual": {**TRAINED, **MEASURED, "num_flips": 2, "rollout_keep_ratios": ["1/2"], "score": "logprob"},
    "noise_gate": {**TRAINED, **MEASURED},
    "tune": {**TRAINED, "keep_ratios": [1, "1/2"], "lora": {"r": 2}, "bf16": False},
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
    logs = [
        {name: value for name, value in row.items() if name != "num_tokens"}  # TRL counts those of a process
        for row in report.get("log_history", [])
        if "train_runtime" not in row
    ]
    if (folder / "dataset").exists():  # its files have other fingerprints each time
        return load_from_disk(str(folder / "dataset")).to_list()
    # data.json and log.jsonl have times, and config.json paths, relative ones too
    skipped = {"training.json", "settings.json", "data.json", "state.json", "config.json", LOG, MASKS}
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in skipped and "checkpoint-" not in path.as_posix()
    }
    # a step that is measured again gets a line more; a report reads the first
    return report.get("metrics"), logs, files, read_stage(folder).masks


@pytest.fixture(params=list(STAGES))
def run(request, finished, tmp_path):
    return Run(request.param, finished, tmp_path / "run")


@pytest.fixture(scope="module")
def counted(finished, tmp_path_factory):
    """A function: how many changes of files a stage makes undisturbed, and its seconds."""

    @functools.cache
    def count(name):
        again = Run(name, finished, tmp_path_factory.mktemp(name) / "run")
        started = time.perf_counter()
        ended = again.train()
        seconds = time.perf_counter() - started
        again.assert_as_undisturbed(ended)
        return ended.changes, seconds

    return count


def moments(count: int, number: int, seed: int) -> list[int]:
    """`number` of `count` changes, spread evenly, and another set for each seed."""
    if number >= count:
        return list(range(1, count + 1))
    width = count / number
    return [1 + int((index + random.Random(seed + index).random()) * width) for index in range(number)]


def test_a_run_that_is_killed_ends_as_undisturbed(run, counted, tmp_path):
    """At changes of files, within them, and at moments of the clock."""
    changes, seconds = counted(run.stage)  # the clock's kills lie within them
    killed = timed = 0
    for index, at in enumerate(moments(changes, number_of_faults(run.stage), seed=len(run.stage))):
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
    print(f"\n{run.stage}: {killed} kills, {timed} by the clock, {changes} changes, {seconds:.1f} s a run")


def faults(*kinds):
    """Each stage and kind of fault that is tried."""
    pairs = [(stage, kind) for stage in STAGES for kind in kinds if number_of_others(stage, kind)]
    return pytest.mark.parametrize(("name", "what"), pairs)


@faults("full", "denied")
def test_a_run_without_room_or_rights_says_so_and_ends_as_undisturbed(finished, counted, tmp_path, name, what):
    """From some change of a file on, in each part of a checkpoint as the number of faults grows."""
    changes, _ = counted(name)
    failed = 0
    for index, at in enumerate(moments(changes, number_of_others(name, what), seed=len(name + what))):
        again = Run(name, finished, tmp_path / f"{what}-{index}")
        ended = again.train(what, at)
        assert ended.code in (0, 2) and "Traceback" not in ended.output, ended.output
        if ended.code:
            failed += 1
            assert "tprl train: error: " in ended.output
        again.assert_as_undisturbed(again.train())
        shutil.rmtree(again.folder)
    assert failed
    print(f"\n{name}: {failed} times {what}")


CODES = {"SIGTERM": 143, "SIGINT": 130}


@faults(*CODES)
def test_a_signal_saves_the_step_and_the_same_command_resumes(finished, tmp_path, name, what):
    """Demonstrations have no steps: those that are noted are not made again."""
    for step in range(3, 3 + min(number_of_others(name, what), 4)):
        run = Run(name, finished, tmp_path / f"at-{step}")
        ended = run.train(what, at=step)
        assert ended.code == CODES[what], ended.output
        assert f"stopped by {what}; " in ended.output and "The same command resumes." in ended.output
        again = run.train()
        if name != "demonstrations":
            place = f"{run.folder}/{name}/checkpoint-{step}"
            assert f"step {step} is in {place}. The" in ended.output
            assert f"{name}: resumes from {place}" in again.output
        run.assert_as_undisturbed(again)


def test_a_signal_outside_of_training_or_a_second_one_or_a_long_step_ends_at_once(monkeypatch):
    monkeypatch.setattr(stop_signals, "SECONDS_TO_SAVE", 1)
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals():
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.signum == signal.SIGTERM
    with StopSignals() as signals:
        signals.is_training = True
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)
    with StopSignals() as signals:
        signals.is_training = True
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Stopped) as stopped:
            time.sleep(30)
    assert stopped.value.signum == signal.SIGINT and signal.getsignal(signal.SIGTERM) == before


def test_waiting_for_the_first_process_ends_when_it_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 3.0)
    process, output = start(show_life, [str(tmp_path)], Fault("count", str(tmp_path)))
    assert output.readline() == b"alive\n"
    killer = threading.Timer(6, process.kill)
    killer.start()
    started = time.monotonic()
    with pytest.raises(
        TimeoutError, match=r"RANK=0.* has not shown a sign of life for 3 s .*start all processes again"
    ):
        processes.wait_for(tmp_path / "training.json", tmp_path)
    assert time.monotonic() - started > 7  # not while it lived
    process.join()
    output.close()


def test_signs_of_life_change_and_are_gone_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 0.3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    sign = tmp_path / "run" / processes.SIGN_OF_LIFE
    monkeypatch.setenv("RANK", "1")
    with processes.signs_of_life(sign.parent):
        assert not sign.exists()
    monkeypatch.setenv("RANK", "0")
    with processes.signs_of_life(sign.parent):
        seen, until = set(), time.monotonic() + 30
        while len(seen) < 3 and time.monotonic() < until:
            seen |= {sign.read_text()} if sign.exists() else set()
    assert len(seen - {""}) >= 2 and not sign.exists()


# ---- damaged checkpoints ----

DAMAGES = {
    "missing": Path.unlink,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "zeroed": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
}


@faults("missing", "truncated", "zeroed")
def test_a_run_whose_last_checkpoint_is_damaged_ends_as_undisturbed(finished, tmp_path, name, what):
    """It has this one alone, so that it starts again; demonstrations have their dataset."""
    last = "dataset" if name == "demonstrations" else "checkpoint-6"
    files = sorted(path for path in (finished / "run" / name / last).rglob("*") if path.is_file())
    for at in moments(len(files), number_of_others(name, what), seed=len(name + what)):
        run = Run(name, finished, tmp_path / f"file-{at}")
        shutil.copytree(finished / "run" / name, run.folder / name)
        (run.folder / name / "training.json").unlink()
        damaged = run.folder / files[at - 1].relative_to(finished / "run")
        DAMAGES[what](damaged)
        ended = run.train()
        run.assert_as_undisturbed(ended)
        if name != "demonstrations":
            assert f"{name}: starts again" in ended.output and damaged.name in ended.output
        shutil.rmtree(run.folder)


@pytest.mark.parametrize("name", ["autoencoder", "lfd", "ppo"])
def test_a_checkpoint_with_a_damaged_file_is_not_resumed_from(name, make_model, processor, dataset, tmp_path):
    settings = {"max_steps": 4, "save_steps": 2, "logging_steps": 1}
    whole = stage(name, make_model, processor, dataset, str(tmp_path), **settings)
    whole.train()
    last = tmp_path / "checkpoint-4"
    files = [path for path in sorted(last.rglob("*")) if path.is_file()]
    names = {path.name for path in files}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"} <= names
    for path in files:
        content = path.read_bytes()
        for damage, spoil in DAMAGES.items():
            spoil(path)
            found, passed_over = newest_whole(tmp_path)
            assert len(passed_over) == 1, (damage, path)
            (line,) = passed_over
            assert found == tmp_path / "checkpoint-2" and str(last) in line and path.name in line
            with pytest.raises(ValueError, match=rf"checkpoint-4 cannot be resumed from: .*{re.escape(path.name)}"):
                checkpoint_to_resume(str(last), whole.args)
            path.write_bytes(content)
    assert newest_whole(tmp_path) == (last, [])

    (last / "optimizer.pt").unlink()
    resumed = stage(name, make_model, processor, dataset, str(tmp_path), **settings)
    resumed.train(resume_from_checkpoint=True)
    after = weights_of(resumed.tprl_model)
    assert all(value.equal(after[key]) for key, value in weights_of(whole.tprl_model).items())
    assert newest_whole(tmp_path) == (last, [])  # written again

    for path in tmp_path.glob("checkpoint-*"):
        (path / MANIFEST).unlink()
    with pytest.raises(
        ValueError, match=r"There is no whole checkpoint in .*: start again.*checkpoint-2: it has no whole"
    ):
        resumed.train(resume_from_checkpoint=True)


def test_the_older_checkpoint_stays_until_the_new_one_is_whole(make_model, processor, dataset, tmp_path, monkeypatch):
    """Also where a checkpoint of the same step is written again."""
    settings = {"max_steps": 4, "save_steps": 2, "save_total_limit": 1}
    stage("lfd", make_model, processor, dataset, str(tmp_path), **settings).train()
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == ["checkpoint-4"]
    again = stage("lfd", make_model, processor, dataset, str(tmp_path), **{**settings, "save_steps": 4})

    def no_room(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", no_room)
    with pytest.raises(OSError, match=r"checkpoint-4 could not be written .*No space left.*make room, and resume"):
        again.train()
    older = tmp_path / ".replaced-checkpoint-4"
    assert why_not_whole(older) is None and again.args.save_total_limit == 1
    found, passed_over = newest_whole(tmp_path)  # it is of the first run, and the second one was started last
    assert found is None and ".replaced-checkpoint-4: another run wrote it" in passed_over[0]


def test_checkpoints_of_an_earlier_run_are_neither_taken_nor_deleted(make_model, processor, dataset, tmp_path, caplog):
    def run(folder=tmp_path, **settings):
        settings = {"save_steps": 2, "save_total_limit": 2, "logging_steps": 1, **settings}
        return stage("autoencoder", make_model, processor, dataset, str(folder), **settings)

    def steps():
        return sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))

    run(max_steps=8).train()
    assert steps() == [6, 8] and not caplog.text
    run(max_steps=4, learning_rate=1e-3).train()
    assert steps() == [2, 4, 6, 8] and "has checkpoints of another run, such as checkpoint-8: they stay" in caplog.text
    found, passed_over = newest_whole(tmp_path)
    assert found == tmp_path / "checkpoint-4" and "checkpoint-8: another run wrote it" in passed_over[0]
    again = run(max_steps=6, learning_rate=1e-3)
    again.train(resume_from_checkpoint=True)
    assert steps() == [4, 6, 8] and newest_whole(tmp_path)[0] == tmp_path / "checkpoint-6"
    assert [row["step"] for row in again.state.log_history if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_ended_before_its_first_checkpoint_is_not_resumed_from_an_older_one(
    make_model, processor, dataset, tmp_path
):
    def run(**settings):
        settings = {"save_steps": 2, "max_steps": 4, "logging_steps": 1, **settings}
        return stage("autoencoder", make_model, processor, dataset, str(tmp_path), **settings)

    class EndAtOnce(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    run().train()
    second = run(learning_rate=1e-3)
    second.add_callback(EndAtOnce())
    with pytest.raises(KeyboardInterrupt):
        second.train()
    found, passed_over = newest_whole(tmp_path)  # `tprl train` starts again, and says so
    assert found is None and "checkpoint-4: another run wrote it, before the one that was st" in passed_over[0]
    again = run(learning_rate=1e-3)
    with pytest.raises(ValueError, match=r"no whole checkpoint in .*: start again .*checkpoint-4: another run wrote"):
        again.train(resume_from_checkpoint=True)
    again.train()
    assert newest_whole(tmp_path)[0] == tmp_path / "checkpoint-4" and again.run == 2
    # named, an older run is the last one again
    third = run(max_steps=2)
    third.train()
    assert third.run == 3 and newest_whole(tmp_path)[0] == tmp_path / "checkpoint-2"
    run(max_steps=6, learning_rate=1e-3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert newest_whole(tmp_path)[0] == tmp_path / "checkpoint-6"


def test_checkpoints_of_older_versions_have_no_run_and_are_resumed_from(make_model, processor, dataset, tmp_path):
    settings = {"save_steps": 2, "save_total_limit": 2}
    stage("autoencoder", make_model, processor, dataset, str(tmp_path), max_steps=4, **settings).train()
    for path in tmp_path.glob(f"checkpoint-*/{MANIFEST}"):
        manifest = json.loads(path.read_text())
        del manifest["run"]
        path.write_text(json.dumps(manifest))
    lines = [line.replace(', "run": 1', "") for line in (tmp_path / LOG).read_text().splitlines(keepends=True)]
    assert '"run"' not in "".join(lines)
    (tmp_path / LOG).write_text("".join(lines))
    resumed = stage("autoencoder", make_model, processor, dataset, str(tmp_path), max_steps=6, **settings)
    assert resumed.train(resume_from_checkpoint=True).global_step == 6
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    stage("autoencoder", make_model, processor, dataset, str(tmp_path), max_steps=2, **settings).train()
    assert newest_whole(tmp_path)[0] == tmp_path / "checkpoint-2"


def test_a_run_that_is_resumed_at_its_last_step_trains_no_step_more(make_model, processor, dataset, tmp_path):
    """In the middle of an epoch, with a learning rate that does not end at 0."""
    settings = {"max_steps": 3, "save_steps": 3, "lr_scheduler_type": "constant"}
    whole = stage("autoencoder", make_model, processor, dataset, str(tmp_path), **settings)
    whole.train()
    resumed = stage("autoencoder", make_model, processor, dataset, str(tmp_path), **settings)
    assert resumed.train(resume_from_checkpoint=True).global_step == resumed.state.global_step == 3
    after = weights_of(resumed.tprl_model)
    assert all(value.equal(after[key]) for key, value in weights_of(whole.tprl_model).items())
    longer = stage("autoencoder", make_model, processor, dataset, str(tmp_path), **{**settings, "max_steps": 4})
    assert longer.train(resume_from_checkpoint=True).global_step == 4


def test_another_training_is_not_resumed_from(make_model, processor, dataset, tmp_path):
    settings = {"max_steps": 2, "save_steps": 2}
    stage("autoencoder", make_model, processor, dataset, str(tmp_path), **settings).train()
    other = stage("lfd", make_model, processor, dataset, str(tmp_path), **settings)
    with pytest.raises(ValueError, match="checkpoint-2 is of a training with autoencoder, not lfd: resume it with"):
        other.train(resume_from_checkpoint=True)


def test_what_was_saved_without_an_optimizer_is_not_resumed_from(make_model, processor, dataset, tmp_path):
    settings = {"max_steps": 2, "save_steps": 2, "save_only_model": True}
    trainer = stage("autoencoder", make_model, processor, dataset, str(tmp_path), **settings)
    trainer.train()
    with pytest.raises(ValueError, match="it was saved with save_only_model=True"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
