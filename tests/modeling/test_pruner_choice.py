"""Which pruner a model uses: one that was set is saved with it, and a policy that was never trained is refused."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText

from tests.families.tiny_models import build, collate, sample
from tprl_hf import TokenPruner, TPRLConfig, TPRLForConditionalGeneration
from tprl_hf.pruners import DEFAULT_PRUNER, PRUNERS, DivPrune, OraclePruner, UniformPruner, VisionZip

# Each pruner with an argument that is not its default, where it has one.
SETTINGS = {
    "random": {"seed": 3},
    "feature-norm": {"largest": False},
    "query-similarity": {"reduce": "max"},
    "visionzip": {"merge": False, "dominant_ratio": 0.25},
    "prumerge": {"num_neighbors": 2},
    "vispruner": {"important_ratio": 0.25},
    "fastv": {"layer": 1},
    "sparsevlm": {"layer": 1},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava") / "base"
    build("llava").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def batch():
    return collate("llava", [sample("llava", 1, 1), sample("llava", 2, 2)])


@pytest.mark.parametrize("merged", [False, True], ids=["policy-only", "merged"])
@pytest.mark.parametrize("name", PRUNERS)
@torch.no_grad()
def test_a_pruner_is_saved_and_comes_back(tmp_path, base, batch, name, merged):
    model = TPRLForConditionalGeneration.from_base_model(base, latent_dim=8, num_keep=5).eval()
    model.set_pruner(name, **SETTINGS.get(name, {}))
    expected = model.prune(**batch).keep_mask
    model.save_pretrained(tmp_path, save_base_model=merged)
    loaded = (AutoModel if merged else AutoModelForImageTextToText).from_pretrained(tmp_path).eval()
    assert type(loaded.pruner) is PRUNERS[name]
    assert loaded.pruner.settings() == model.pruner.settings() == SETTINGS.get(name, {})
    assert loaded.config.pruner == {"name": name, **SETTINGS.get(name, {})}
    assert torch.equal(loaded.prune(**batch).keep_mask, expected)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@torch.no_grad()
def test_three_ways_to_set_one(base, batch):
    by_name = TPRLForConditionalGeneration.from_base_model(base, latent_dim=8, pruner="divprune", keep_ratio=1 / 3)
    live = TPRLForConditionalGeneration.from_base_model(base, latent_dim=8, pruner=DivPrune(keep_ratio=1 / 3))
    later = TPRLForConditionalGeneration.from_base_model(base, latent_dim=8)
    later.set_pruner("divprune", keep_ratio=1 / 3)
    masks = [model.eval().prune(**batch).keep_mask for model in (by_name, live, later)]
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])
    assert live.config.pruner == later.config.pruner == {"name": "divprune", "keep_ratio": 1 / 3}
    with later.using(VisionZip(num_keep=3)):
        assert later.prune(**batch).num_kept.tolist() == [3, 3]
    assert torch.equal(later.prune(**batch).keep_mask, masks[0])
    for nothing in (None, "learned"):
        later.set_pruner("uniform")
        later.set_pruner(nothing)
        assert later.config.pruner is None and type(later.pruner).__name__ == "LearnedPruner"


@torch.no_grad()
def test_an_edit_of_the_config_sets_one(tmp_path, base, batch):
    """What is saved is what chooses."""
    model = TPRLForConditionalGeneration.from_base_model(
        base, latent_dim=8, policy_training={"stage": "lfd"}, keep_ratio=0.4
    ).eval()
    for name, edit in (("learned", None), ("uniform", "uniform"), ("divprune", {"name": "divprune"})):
        model.config.pruner = edit
        assert type(model.pruner).__name__ == ("LearnedPruner" if edit is None else PRUNERS[name].__name__)
        model.save_pretrained(tmp_path / name)
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / name).eval()
        assert torch.equal(loaded.prune(**batch).keep_mask, model.prune(**batch).keep_mask)
    made = model.pruner
    assert model.pruner is made  # without an edit
    model.config.pruner["num_keep"] = 3
    assert model.prune(**batch).num_kept.tolist() == [3, 3]
    model.config.pruner = "divprun"
    for call in (model, model.prune, model.generate):
        with pytest.raises(ValueError, match="no pruner 'divprun'"):
            call(**batch)
    model.set_pruner(UniformPruner(num_keep=2))
    assert model.prune(**batch).num_kept.tolist() == [2, 2]
    model.config.pruner = None
    assert type(model.pruner).__name__ == "LearnedPruner"


def test_what_a_checkpoint_could_not_name_is_refused(base):
    class Mine(TokenPruner):
        def score(self, inputs):
            return inputs.tokens[..., 0]

    model = TPRLForConditionalGeneration.from_base_model(base, latent_dim=8)
    for pruner in (Mine(), OraclePruner([], [])):
        with pytest.raises(ValueError, match=r"not in tprl_hf\.pruners\.PRUNERS.*model\.using"):
            model.set_pruner(pruner)
    with pytest.raises(ValueError, match=r"no pruner 'divprun'; choose from .*divprune"):
        model.set_pruner("divprun")
    with pytest.raises(ValueError, match="no pruner 'divprun'"):
        TPRLForConditionalGeneration.from_base_model(base, pruner="divprun")
    with pytest.raises(ValueError, match="layer=7, but the LLM has layers 1 to 2"):
        model.set_pruner("fastv", layer=7)
    with pytest.raises(ValueError, match="pruner must be the name of a pruner"):
        TPRLConfig(pruner={"keep_ratio": 0.5})
    PRUNERS["mine"] = Mine  # as the first message says
    try:
        model.set_pruner(Mine(num_keep=2))
        assert model.config.pruner == {"name": "mine", "num_keep": 2}
    finally:
        del PRUNERS["mine"]


@pytest.mark.parametrize("call", ["generate", "forward", "prune"])
@pytest.mark.parametrize("budget", [{"keep_ratio": 1 / 3}, {"num_keep": 4}, {"threshold": 0.5}, {"prune": True}, {}])
def test_an_untrained_policy_is_refused(base, batch, call, budget):
    settings = {} if budget and "prune" not in budget else {"threshold": 0.5}
    model = TPRLForConditionalGeneration.from_base_model(base, latent_dim=8, **settings).eval()
    run = model if call == "forward" else getattr(model, call)
    with pytest.raises(ValueError, match=r'policy has not been trained.*set_pruner\("divprune"'):
        run(**batch, **budget)
    assert run(**batch, prune=False) is not None
    model.set_pruner("uniform", num_keep=4)
    assert run(**batch) is not None


@torch.no_grad()
def test_a_new_model_with_a_budget_has_the_default_pruner(tmp_path, base, batch):
    """It would keep random tokens otherwise. A policy that counts as trained, or another pruner, goes before it."""
    model = TPRLForConditionalGeneration.from_base_model(base, latent_dim=8, keep_ratio=0.5).eval()
    assert model.config.pruner == {"name": DEFAULT_PRUNER} and type(model.pruner) is PRUNERS[DEFAULT_PRUNER]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(loaded.prune(**batch).keep_mask, model.prune(**batch).keep_mask)
    for settings in ({"policy_training": {"stage": "lfd"}}, {"pruner": "uniform"}, {"pruner": UniformPruner()}):
        model = TPRLForConditionalGeneration.from_base_model(base, latent_dim=8, keep_ratio=0.5, **settings)
        assert type(model.pruner).__name__ == ("LearnedPruner" if "policy_training" in settings else "UniformPruner")


def test_a_policy_stays_untrained_when_it_is_saved(tmp_path, base, batch):
    model = TPRLForConditionalGeneration.from_base_model(base, latent_dim=8)
    model.config.keep_ratio = 0.5
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="policy has not been trained"):
        AutoModelForImageTextToText.from_pretrained(tmp_path).generate(**batch)
    with pytest.raises(ValueError, match="policy has not been trained"):
        model.push_to_hub("me/never")
    config = json.loads((tmp_path / "config.json").read_text())
    config["policy_training"] = {"stage": "ppo", "recipe": None, "data": None, "version": "0.1.0"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert len(AutoModelForImageTextToText.from_pretrained(tmp_path).generate(**batch, max_new_tokens=1))


class TestWhereTheBaseLies:
    @pytest.fixture
    def tree(self, tmp_path, base):
        """models/base and policies/mine, saved from a working directory with relative paths."""
        shutil.copytree(base, tmp_path / "here/models/base")
        code = (
            "from tprl_hf import TPRLForConditionalGeneration as M\n"
            "M.from_base_model('models/base', latent_dim=8, pruner='uniform', num_keep=3).save_pretrained('p/mine')"
        )
        root = str(tmp_path / "here")
        done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return tmp_path / "here"

    def test_from_any_working_directory(self, tree):
        assert AutoModel.from_pretrained(tree / "p/mine").config.base_model_name_or_path == str(tree / "models/base")

    def test_both_moved_together(self, tree, tmp_path):
        tree.rename(tmp_path / "there")
        model = AutoModel.from_pretrained(tmp_path / "there/p/mine")
        assert model.config.base_model_name_or_path == str(tmp_path / "there/models/base")

    def test_the_checkpoint_moved_alone(self, tree, tmp_path):
        (tree / "p/mine").rename(tmp_path / "mine")
        assert AutoModel.from_pretrained(tmp_path / "mine").config.base_model_name_or_path == str(tree / "models/base")

    def test_the_base_is_gone(self, tree, tmp_path):
        (tree / "models/base").rename(tmp_path / "elsewhere")
        with pytest.raises(OSError, match=r"not in .*models/base.*base_model=NAME_OR_PATH"):
            AutoModel.from_pretrained(tree / "p/mine")
        found = TPRLForConditionalGeneration.from_pretrained(tree / "p/mine", base_model=tmp_path / "elsewhere")
        found.save_pretrained(tree / "p/mine")  # now it knows
        assert AutoModel.from_pretrained(tree / "p/mine").config.pruner["name"] == "uniform"
