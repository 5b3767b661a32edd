"""Saving over an older checkpoint: cut off at any moment, one of the two is there, and whole."""

import copy
import json
import os
import platform
import shutil
import stat
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.families.tiny_models import build
from tests.families.tiny_processor import make_processor
from tests.training.cut_off import Fault, run, save_another
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.cli.train import base_directory
from tprl_hf.modeling.checkpoint_tprl import policy_state
from tprl_hf.modeling.saved_files import made_whole

POLICY = {"latent_dim": 8, "policy_num_heads": 4, "policy_dim": 16, "policy_training": {"stage": "lfd"}}
KEEP_RATIO = {"old": 0.5, "new": 0.25}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Directories of two models that differ in weights and config."""
    folder = tmp_path_factory.mktemp("two")
    build("llava").save_pretrained(folder / "base")
    for seed, (name, keep_ratio) in enumerate(KEEP_RATIO.items()):
        torch.manual_seed(seed)
        model = TPRLForConditionalGeneration.from_base_model(folder / "base", keep_ratio=keep_ratio, **POLICY)
        model.save_pretrained(folder / name)
    return folder


def which(directory, two) -> str:
    """`old` or `new`: whose config and weights are both in a directory."""
    try:
        found = AutoModelForImageTextToText.from_pretrained(directory)
    except OSError as error:  # the config was read before
        assert "load it again" in str(error)
        found = AutoModelForImageTextToText.from_pretrained(directory)
    state = policy_state(found.state_dict())
    for name in ("old", "new"):
        weights = load_file(two / name / "model.safetensors")
        assert weights.keys() == state.keys()
        same = [value.equal(weights[key]) for key, value in state.items()]
        if found.config.keep_ratio == KEEP_RATIO[name] and all(same):
            return name
    raise AssertionError("a mixture")


def save(two, directory, what="count", at=0):
    shutil.copytree(two / "old", directory)
    return run(save_another, [str(two / "new"), str(directory)], Fault(what, str(directory), at))


def test_a_save_that_is_killed_leaves_the_old_or_the_new(two, tmp_path):
    undisturbed = save(two, tmp_path / "whole")
    assert undisturbed.code == 0 and which(tmp_path / "whole", two) == "new"
    found = []
    for at in range(1, undisturbed.changes + 1):
        directory = tmp_path / f"kill-{at}"
        assert save(two, directory, "kill", at).code == -9
        found.append(which(directory, two))
        TPRLForConditionalGeneration.from_pretrained(two / "new").save_pretrained(directory)
        assert which(directory, two) == "new" and not list(directory.glob(".[sw]*"))
    assert found == sorted(found, reverse=True) and set(found) == {"old", "new"}  # never back


def test_a_full_disk_leaves_the_old_or_the_new(two, tmp_path):
    found = []
    for at in range(1, save(two, tmp_path / "whole").changes + 1):
        directory = tmp_path / f"full-{at}"
        ended = save(two, directory, "full", at)
        found.append(which(directory, two))
        if found[-1] == "old":
            assert ended.code == 2 and ("could not be written" in ended.output or "Errno" in ended.output)
        else:
            assert ended.code == 0
    assert set(found) == {"old", "new"}


def test_of_several_that_make_a_directory_the_first_one_counts(tmp_path):
    """Two commands that start in one new folder, and a third one that was killed there."""
    place, killed = tmp_path / "run" / "base", tmp_path / "run" / f".writing-{platform.node()}-{ended_process()}-abc"
    killed.mkdir(parents=True)
    both_have_written = threading.Barrier(2)

    def make(name):
        with made_whole(place) as new:
            new.mkdir()
            (new / "model.safetensors").write_text(name)
            both_have_written.wait(timeout=30)
        return (place / "model.safetensors").read_text()

    with ThreadPoolExecutor(2) as pool:
        found = set(pool.map(make, ("one", "another")))
    assert len(found) == 1 and found < {"one", "another"}
    assert [path.name for path in place.parent.iterdir()] == ["base"]
    with pytest.raises(OSError, match="No such file"), made_whole(place):
        pass  # nothing was written


def ended_process():
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


def test_weights_without_a_successor_go_when_all_else_is_in_its_place(two, tmp_path):
    shutil.copytree(two / "old", tmp_path / "out")
    (tmp_path / "out" / "model-00001-of-00002.safetensors").write_bytes(b"of an earlier save")
    TPRLForConditionalGeneration.from_pretrained(two / "new").save_pretrained(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert which(tmp_path / "out", two) == "new"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_that_the_umask_leaves(two, tmp_path, umask):
    """Also the weights, which safetensors lets their owner read alone, and the base model that `tprl train` takes."""
    before = os.umask(umask)
    try:
        model = TPRLForConditionalGeneration.from_pretrained(two / "new")
        model.save_pretrained(tmp_path / "policy")
        model.save_pretrained(tmp_path / "whole", save_base_model=True)
        make_processor().save_pretrained(tmp_path / "whole")
        base_directory({"base_model": str(tmp_path / "whole"), "output_dir": str(tmp_path)})
    finally:
        os.umask(before)
    for folder in ("policy", "whole", "base"):
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / folder).iterdir()}
        assert "model.safetensors" in modes and set(modes.values()) == {0o666 & ~umask}, modes


@pytest.mark.parametrize("names", [["../.profile", "../../.profile"], ["/tmp/x"], ["link/x"], "model", [1]])
def test_a_directory_from_elsewhere_moves_nothing_out_of_itself(names, two, tmp_path):
    """Whoever made it may have put any list of files there."""
    outside, directory = tmp_path / "home", tmp_path / "home" / "checkpoint"
    shutil.copytree(two / "old", directory)
    (outside / ".profile").write_text("mine")
    (directory / ".profile").write_text("theirs")
    (directory / "link").symlink_to(outside)
    (directory / ".saved").mkdir()
    (directory / ".saved" / ".names.json").write_text(json.dumps(names))
    before = sorted(path.relative_to(outside) for path in outside.rglob("*"))
    with pytest.raises(ValueError, match=r"\.names\.json names"):
        AutoModelForImageTextToText.from_pretrained(directory)
    assert sorted(path.relative_to(outside) for path in outside.rglob("*")) == before
    assert (outside / ".profile").read_text() == "mine"


def test_a_link_in_a_directory_from_elsewhere_takes_nothing_in(two, tmp_path):
    home, directory = tmp_path / "home", tmp_path / "checkpoint"
    shutil.copytree(two / "old", directory)
    home.mkdir()
    (home / "key").write_text("mine")
    (home / ".names.json").write_text('["key"]')
    (directory / ".saved").symlink_to(home)
    with pytest.raises(ValueError, match="leads out of"):
        AutoModelForImageTextToText.from_pretrained(directory)
    assert (home / "key").read_text() == "mine"


def test_a_base_model_whose_layers_changed_places_is_saved(two, tmp_path):
    """No value is new: only names tell that the files have another model."""
    model = TPRLForConditionalGeneration.from_base_model(two / "base", **POLICY)
    model.save_pretrained(tmp_path / "same")
    assert not AutoModelForImageTextToText.from_pretrained(tmp_path / "same").config.includes_base_model
    layers = model.lvlm.get_decoder().layers
    first, second = (copy.deepcopy(layer.state_dict()) for layer in layers[:2])
    layers[0].load_state_dict(second)
    layers[1].load_state_dict(first)
    model.save_pretrained(tmp_path / "swapped")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "swapped")
    assert again.config.includes_base_model
    assert all(value.equal(first[name]) for name, value in again.lvlm.get_decoder().layers[1].state_dict().items())


def test_the_adapter_is_that_of_the_base_model_at_hand():
    """`nn.DataParallel` gives each GPU a copy of the modules, and of nothing else."""
    model = TPRLForConditionalGeneration.from_base_model(build("llava"), **POLICY)
    replica = model._replicate_for_data_parallel()
    replica._modules["lvlm"] = copy.deepcopy(model.lvlm)
    assert replica.adapter.base is replica.lvlm and model.adapter.base is model.lvlm


@pytest.mark.parametrize("chain", [False, True])
def test_saving_over_the_base_model_takes_it_along(two, tmp_path, chain):
    """Else the only copy of its weights would be replaced by a policy."""
    shutil.copytree(two / "base", tmp_path / "base")
    model = TPRLForConditionalGeneration.from_base_model(tmp_path / "base", keep_ratio=0.5, **POLICY)
    if chain:  # a policy on the way to the base model
        model.save_pretrained(tmp_path / "policy")
        model = TPRLForConditionalGeneration.from_base_model(tmp_path / "policy", keep_ratio=0.5, **POLICY)
    place = tmp_path / ("policy" if chain else "base")
    before = {path: path.read_bytes() for path in place.iterdir()}
    with pytest.raises(ValueError, match="holds the base model, which save_base_model=False would replace"):
        model.save_pretrained(place, save_base_model=False)
    assert {path: path.read_bytes() for path in place.iterdir()} == before
    model.save_pretrained(place)
    for directory in (place, tmp_path / "again"):
        found = AutoModelForImageTextToText.from_pretrained(place)
        assert all(value.equal(found.state_dict()[name]) for name, value in model.state_dict().items())
        found.save_pretrained(directory)
    found = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    assert all(value.equal(found.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_variant_does_not_take_the_place_of_the_usual_weights(two, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(two / "old")
    model.save_pretrained(tmp_path, save_base_model=True, max_shard_size="60KB")
    (tmp_path / "model_ema.safetensors").write_text("theirs")
    usual = {path.name for path in tmp_path.glob("model*")}
    assert len(usual) > 3
    for _ in range(2):
        model.save_pretrained(tmp_path, save_base_model=True, variant="fp16")
        assert {path.name for path in tmp_path.glob("model*")} == {*usual, "model.fp16.safetensors"}
    for variant in (None, "fp16"):
        found = AutoModelForImageTextToText.from_pretrained(tmp_path, variant=variant)
        assert all(value.equal(found.state_dict()[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path, save_base_model=True)
    assert {path.name for path in tmp_path.glob("model*.safetensors")} == {
        "model.safetensors", "model.fp16.safetensors", "model_ema.safetensors",
    }  # fmt: skip


def test_a_copied_policy_keeps_its_base_model(two, tmp_path):
    """Another base model may lie where it is seen from the copy."""
    build("llava", seed=5).save_pretrained(tmp_path / "base")
    shutil.copytree(two / "old", tmp_path / "old")
    found = AutoModelForImageTextToText.from_pretrained(tmp_path / "old")
    wanted = AutoModelForImageTextToText.from_pretrained(two / "old")
    assert all(value.equal(found.state_dict()[name]) for name, value in wanted.state_dict().items())
