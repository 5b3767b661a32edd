"""Files that are written beside their place and renamed."""

import os
import platform
import subprocess

import pytest

from tprl_hf.whole_files import write, written_beside


def ended_process() -> int:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


def test_what_a_killed_process_left_goes_and_nothing_else(tmp_path):
    here, dead = platform.node(), ended_process()
    left = tmp_path / f".data.json.{here}.{dead}"
    others = [
        tmp_path / name
        for name in (
            f".data.json.{here}.{os.getppid()}",  # it lives
            f".data.json.{here}-b.{dead}",  # of another machine, whose processes nobody knows here
            f".data.json.{here}.{dead}.old",
            f".other.json.{here}.{dead}",
            f"data.json.{dead}",
        )
    ]
    for path in (left, *others):
        path.write_text("{")
    write(tmp_path / "data.json", "{}\n")
    assert {path.name for path in tmp_path.iterdir()} == {"data.json", *(path.name for path in others)}
    assert (tmp_path / "data.json").read_text() == "{}\n"


def test_what_could_not_be_written_leaves_the_file_of_before(tmp_path):
    write(tmp_path / "data.json", "before")
    with pytest.raises(OSError, match="No space left"), written_beside(tmp_path / "data.json") as unfinished:
        unfinished.write_text("af")
        raise OSError("No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]
    assert (tmp_path / "data.json").read_text() == "before"


def test_names_with_signs_of_patterns(tmp_path):
    left = tmp_path / f".a[b]*.json.{platform.node()}.{ended_process()}"
    left.touch()
    write(tmp_path / "a[b]*.json", "1")
    assert not left.exists()
