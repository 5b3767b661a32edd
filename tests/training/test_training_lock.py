"""Two trainings in one directory at the same time: the second one is refused, and a lock ends with its process."""

import contextlib
import errno
import fcntl
import os
import signal

import pytest
import yaml

from tprl_hf.cli.main import main
from tprl_hf.training.training_lock import LOCK, alone_in

from .cut_off import Fault, hold_lock, start
from .test_trainers import stage

USED = r"is in use: process {} of .* trains there\. Wait until it has ended, or end it, or choose another output_dir"


@contextlib.contextmanager
def held(folder):
    """Another process that trains in `folder`."""
    process, output = start(hold_lock, [str(folder)], Fault("count", str(folder)))
    assert output.readline() == b"held\n"
    try:
        yield process
    finally:
        process.kill()
        process.join()
        output.close()


@pytest.mark.parametrize("name", ["autoencoder", "ppo"])
def test_a_second_training_in_a_directory_is_refused(name, make_model, processor, dataset, tmp_path):
    trainer = stage(name, make_model, processor, dataset, str(tmp_path), max_steps=1, save_steps=1)
    with held(tmp_path) as other:
        with pytest.raises(ValueError, match=USED.format(other.pid)) as refused:
            trainer.train()
        assert len(str(refused.value)) < 360 and not list(tmp_path.glob("checkpoint-*"))
    assert trainer.train().global_step == 1  # its process was killed
    assert not (tmp_path / LOCK).exists()


def test_two_trainings_one_after_the_other(make_model, processor, dataset, tmp_path):
    """Also where the first one ended by an error."""
    with pytest.raises(KeyError), alone_in(tmp_path):
        assert (tmp_path / LOCK).exists()
        raise KeyError
    for _ in range(2):
        stage("autoencoder", make_model, processor, dataset, str(tmp_path), max_steps=1).train()
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("code", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_ends_with_its_process(code, tmp_path):
    with held(tmp_path) as other:
        os.kill(other.pid, code)
        other.join()
        assert (tmp_path / LOCK).exists()
        with alone_in(tmp_path):
            assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} of ")
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_disk_without_locks_makes_no_training_impossible(number, monkeypatch, tmp_path):
    def no_locks(*arguments):
        raise OSError(number, os.strerror(number))

    with held(tmp_path):
        monkeypatch.setattr(fcntl, "lockf", no_locks)
        with alone_in(tmp_path):
            pass


def test_a_folder_that_cannot_be_written_makes_no_training_impossible(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    with alone_in(tmp_path / "file"), alone_in(tmp_path / "file" / "run"):  # neither is a folder
        pass
    assert (tmp_path / "file").read_bytes() == b""


def test_overwrite_deletes_no_stage_that_another_process_trains(base, capsys, tmp_path):
    directory = tmp_path / "run" / "autoencoder"
    directory.mkdir(parents=True)
    (directory / "settings.json").write_text("{}")
    sections = {"base_model": base, "output_dir": str(tmp_path / "run"), "data": {"train": {}}, "autoencoder": {}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sections))
    with held(directory):
        assert main(["train", "all", "--config", str(tmp_path / "recipe.yaml"), "--overwrite"]) == 2
        assert "autoencoder is in use: process" in capsys.readouterr().err
        assert (directory / "settings.json").exists()
