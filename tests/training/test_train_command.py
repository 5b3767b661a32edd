import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi

from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.cli.main import main
from tprl_hf.cli.recipe_file import STAGES, as_number, read_recipe
from tprl_hf.cli.train import load_data, settings_of, training_data
from tprl_hf.data import easy_vqa, mosaic_vqa
from tprl_hf.training.publishing import files_to_publish
from tprl_hf.training.training_record import training_record

pytestmark = pytest.mark.short

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
POLICY_STAGE = {"max_steps": 2, "disable_tqdm": True, "use_cpu": True, "eval_strategy": "steps", "eval_steps": 1}
STAGE = {"max_steps": 2, "disable_tqdm": True, "use_cpu": True}


@pytest.fixture
def recipe(base, dataset, tmp_path):
    dataset.save_to_disk(str(tmp_path / "data"))
    sections = {
        "base_model": base,
        "output_dir": str(tmp_path / "run"),
        "policy": {"latent_dim": 16, "policy_num_heads": 4, "policy_dim": 16},
        "data": {"train": {"source": str(tmp_path / "data")}, "validation": {"source": str(tmp_path / "data")}},
        "autoencoder": STAGE,
        "demonstrations": {"teacher": "gradient", "keep_ratios": [["1/2", "1/4"]], "num_samples": 6},
        "lfd": {**POLICY_STAGE, "keep_ratio": "1/4", "learning_rate": "1e-3"},
        "ppo": {**POLICY_STAGE, "per_device_train_batch_size": 2, "num_mini_batches": 2, "save_base_model": True},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def test_all_stages_from_one_recipe(recipe, tmp_path, capsys):
    assert main(["train", "all", "--config", str(recipe)]) == 0
    reports = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("run/*/training.json")}
    assert set(reports) == {"autoencoder", "demonstrations", "lfd", "ppo"}
    assert "explained_variance" in reports["autoencoder"]["metrics"]
    assert "accuracy@0.111" in reports["ppo"]["metrics"]
    assert reports["demonstrations"]["num_samples"] == 6
    model = TPRLForConditionalGeneration.from_pretrained(tmp_path / "run" / "ppo")
    assert model.config.keep_ratio == 0.25 and model.config.includes_base_model
    assert model.config.base_model_name_or_path is None

    # what was recorded goes onto the card, without this machine's paths
    card = files_to_publish(tmp_path / "run" / "ppo", "me/name", HfApi())["README.md"].decode()
    for stage in reports:
        assert f"- **{stage}** (0 minutes): `" in card
    assert "save_base_model=true" in card and "accuracy@0.111=" in card and str(tmp_path) not in card

    record = training_record(tmp_path / "run" / "ppo")
    assert list(record["stages"]) == ["autoencoder", "demonstrations", "lfd", "ppo"]
    needed = [*model.policy.parameters(), *model.autoencoder.encoder.parameters()]
    assert record["num_parameters"] == sum(parameter.numel() for parameter in needed)
    assert [row["step"] for row in record["stages"]["ppo"]["validation"]] == [1, 2, 2]
    assert record["stages"]["lfd"]["metrics"] == reports["lfd"]["metrics"]
    with pytest.raises(ValueError, match="holds no training"):
        training_record(tmp_path)

    # what is finished stays; what was cut off goes on
    (tmp_path / "run" / "ppo" / "training.json").unlink()
    capsys.readouterr()
    assert main(["train", "all", "--config", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert out.count("is finished") == 3
    assert main(["train", "lfd", "--config", str(recipe), "--set", "lfd.max_steps=3"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_a_stage_may_be_left_out(recipe):
    sections = read_recipe(str(recipe), ["lfd=false", "demonstrations=false"])
    assert [stage for stage in STAGES if stage in sections] == ["autoencoder", "ppo"]


def test_several_sources_are_shuffled_together():
    sections = [{"seed": 100, "num_samples": 40}, {"source": "easy-vqa", "num_samples": 20}]
    mixture = load_data({"data": {"train": sections}}, "train")
    assert sorted(mixture["image_id"]) == sorted(
        [*mosaic_vqa("train", 100, 40)["image_id"], *easy_vqa("train", 20)["image_id"]]
    )
    assert load_data({"data": {"train": sections}}, "train", 12)["prompt"] == mixture["prompt"][:12]
    assert {name.split("-")[0] for name in mixture["image_id"][:12]} == {"mosaic", "easy"}


def test_a_stage_may_have_its_own_data():
    own = {"seed": 101, "num_samples": 12, "question_types": ["counting", "relation"]}
    recipe = {"data": {"train": {"num_samples": 6}, "ppo": own, "validation": {}}, "lfd": {}, "ppo": {}}
    dataset = load_data(recipe, training_data("ppo", recipe))
    assert sorted(dataset["question_type"]) == ["counting"] * 2 + ["relation"] * 2
    assert all(name.startswith("mosaic-train-101") for name in dataset["image_id"])
    assert len(load_data(recipe, training_data("lfd", recipe))) == 6
    # other stages do not depend on it
    assert settings_of("ppo", recipe)["data"].keys() == {"ppo", "validation"}
    assert settings_of("lfd", recipe)["data"].keys() == {"train", "validation"}
    own["question_types"] = ["taste"]
    with pytest.raises(ValueError, match=r"of types \['taste'\], but of color, counting,"):
        load_data(recipe, "ppo")
    for mistaken in (["counting", "relations"], "counting", []):
        own["question_types"] = mistaken
        with pytest.raises(ValueError, match="but of color, counting,"):
            load_data(recipe, "ppo")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lfd"], "begins with what autoencoder left"),
        (["grpo"], "has no section grpo"),
        (["all", "--set", "autoencoder.learning_rat=1"], "no setting 'learning_rat'; did you mean 'learning_rate'?"),
        (["all", "--set", "lfdd.max_steps=1"], "no setting 'lfdd'; did you mean 'lfd'?"),
        (["all", "--set", "policy.latent=1"], "policy has no setting 'latent'"),
        (["all", "--set", "data.train.source=nowhere"], "There are no data 'nowhere'"),
        (["all", "--set", "data.train=[]"], "data.train.source"),
        (["all", "--set", "data.lfdd={}"], "data has no setting 'lfdd'; did you mean 'lfd'?"),
        (
            ["all", "--set", "data.train=[{sourc: mosaic}]"],
            "data.train has no setting 'sourc'; did you mean 'source'?",
        ),
        (["all", "--set", "seed"], "no override"),
        (["all", "--set", "base_model.x=1"], "base_model is no section"),
    ],
)
def test_mistakes_are_one_line(recipe, capsys, words, message):
    assert main(["train", words[0], "--config", str(recipe), *words[1:]]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert message in err


def test_a_missing_recipe(capsys):
    assert main(["train", "all", "--config", "none.yaml"]) == 2
    names = ", ".join(path.stem for path in RECIPES)
    assert f"There is no recipe none.yaml: pass a file, or one of ours: {names}." in capsys.readouterr().err


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_our_recipes_have_names_and_a_file_of_the_user_comes_first(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_recipe(path.stem) == read_recipe(str(path))
    Path(path.stem).write_text("output_dir: mine")
    assert read_recipe(path.stem) == {"output_dir": "mine"}


def test_numbers_that_yaml_leaves_as_text():
    assert as_number({"a": "1e-4", "b": ["1/3", "x", True, None], "c": "1/2/3", "d": "no"}) == {
        "a": 1e-4,
        "b": [1 / 3, "x", True, None],
        "c": "1/2/3",
        "d": "no",
    }


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_our_recipes_hold_settings_that_exist(path, base, tmp_path):
    from dataclasses import fields

    from tprl_hf import TPRLConfig, training
    from tprl_hf.cli.train import DATA_SETTINGS, DEMONSTRATION_SETTINGS

    recipe = read_recipe(str(path))
    configs = {
        "autoencoder": training.AutoencoderConfig,
        "lfd": training.LfDConfig,
        "ppo": training.TPRLPPOConfig,
        "grpo": training.TPRLGRPOConfig,
    }
    for stage in configs.keys() & recipe.keys():
        config = configs[stage](output_dir=str(tmp_path), use_cpu=True, **recipe[stage])
        assert {type(getattr(config, f.name)) for f in fields(config) if f.name == "learning_rate"} == {float}
    assert set(recipe["demonstrations"]) <= set(DEMONSTRATION_SETTINGS)
    assert set(recipe["policy"]) <= set(TPRLConfig().to_dict())
    TPRLForConditionalGeneration.from_base_model(base, **recipe["policy"])  # settings that go together
    for sections in recipe["data"].values():
        sources = sections if isinstance(sections, list) else [sections]
        assert all(set(section) <= set(DATA_SETTINGS) for section in sources)


def test_the_paper_recipe_is_the_default_of_the_code(tmp_path):
    from tprl_hf import training

    recipe = read_recipe(str(next(path for path in RECIPES if path.stem == "paper")))
    for stage, config in (("lfd", training.LfDConfig), ("ppo", training.TPRLPPOConfig)):
        assert config(str(tmp_path), use_cpu=True, **recipe[stage]) == config(str(tmp_path), use_cpu=True)
