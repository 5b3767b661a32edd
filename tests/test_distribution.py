"""The source distribution and the wheel, as an index and its users get them."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import tprl_hf

ROOT = Path(__file__).parents[1]
# What is made by running, and links, of which the distributions hold what they lead to.
NOT_SOURCE = (".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "runs", "tprl_output")
LINKS = ("modeling", "training", "recipes")


def succeed(*command: str | Path, cwd: Path) -> str:
    """The output of a command that has to succeed, within minutes."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The directory with the source distribution, and the wheel that was built from it."""
    path = tmp_path_factory.mktemp("distribution")
    ignored = shutil.ignore_patterns(*NOT_SOURCE)
    shutil.copytree(ROOT, path / "source", symlinks=True, ignore=ignored)
    succeed(sys.executable, "-m", "build", "--no-isolation", "--outdir", path / "made", path / "source", cwd=path)
    return path / "made"


@pytest.fixture(scope="module")
def unpacked(built, tmp_path_factory) -> Path:
    """The source distribution's content."""
    path = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        archive.extractall(path, filter="data")
    return next(path.iterdir())


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The programs of a fresh environment with the wheel; what the wheel depends on is this environment's."""
    path = tmp_path_factory.mktemp("environment")
    venv.create(path)
    bin = path / ("Scripts" if sys.platform == "win32" else "bin")
    wheel = next(built.glob("*.whl"))
    pip = (sys.executable, "-m", "pip", "--python", bin / "python", "install", "--quiet", "--no-index", "--no-deps")
    succeed(*pip, wheel, cwd=path)
    site = succeed(bin / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=path).strip()
    # a path in a .pth file comes after the environment's own packages, and brings none of its .pth files along
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return bin


def test_an_index_takes_both(built):
    succeed(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir(), cwd=built)
    assert len(list(built.iterdir())) == 2


def test_the_metadata_says_who_and_where_and_links_nowhere_into_the_checkout(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        found = message_from_bytes(wheel.read(name))
    citation = (ROOT / "CITATION.cff").read_text()
    assert found["Author"] in citation and found["License-Expression"] == "Apache-2.0"
    label, url = found["Project-URL"].split(", ")
    assert label == "Paper" and url in citation
    text = found.get_payload(decode=True).decode()
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets and all(target.startswith("https://") for target in targets)
    # each page that README links to is still named
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text()):
        assert target in text, target


def test_the_wheel_holds_the_package_with_its_data_and_nothing_else(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = [path for path in (ROOT / "tprl_hf").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert packed == {path.relative_to(ROOT).as_posix() for path in files}
    assert {"tprl_hf/py.typed", "tprl_hf/recipes/paper.yaml", "tprl_hf/recipes/accelerate/ddp.yaml"} <= packed


def test_the_source_distribution_holds_what_git_does(unpacked):
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in tracked.stdout.split("\0") if name and name not in LINKS and (ROOT / name).exists()]
    assert [name for name in names if not (unpacked / name).is_file()] == []


def test_the_tests_of_the_source_distribution_run_there(unpacked):
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    succeed(sys.executable, *words, "--collect-only", cwd=unpacked)
    own = ("tests/test_architecture.py", "tests/modeling/test_pure_functions.py", "tests/modeling/test_policy.py")
    code = "import tprl_hf; print(tprl_hf.__file__)"
    assert succeed(sys.executable, "-c", code, cwd=unpacked).startswith(str(unpacked))
    assert " passed" in succeed(sys.executable, *words, *own, cwd=unpacked)


@pytest.mark.short
def test_the_wheel_runs_in_another_folder(installed, tmp_path):
    code = "import tprl_hf, tprl_hf.modeling.modeling_tprl as m; print(tprl_hf.__file__, m.__file__)"
    places = succeed(installed / "python", "-c", code, cwd=tmp_path).split()
    assert all(Path(place).is_relative_to(installed.parent) for place in places)
    out = succeed(installed / "tprl", "demo", "--num-samples", "2", "--num-shown", "1", cwd=tmp_path)
    assert "correct at 1/9" in out and (tmp_path / "tprl_output" / "demo" / "kept_tokens.png").is_file()


@pytest.mark.short
def test_the_wheel_trains_by_the_name_of_a_recipe(installed, tmp_path):
    data = [f"data.{name}={{source: mosaic, num_samples: 8}}" for name in ("train", "validation")]
    settings = [*data, f"base_model={tprl_hf.embedded_checkpoint()}", "autoencoder.max_steps=1", "output_dir=run"]
    recipe = ("train", "autoencoder", "--config", "paper", "--set", *settings)
    out = succeed(installed / "tprl", *recipe, cwd=tmp_path)
    assert "autoencoder: run/autoencoder in" in out and (tmp_path / "run/autoencoder/model.safetensors").is_file()
