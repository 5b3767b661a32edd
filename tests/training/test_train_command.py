import json
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi

import tprl_hf
from tprl_hf import TPRLConfig, TPRLForConditionalGeneration
from tprl_hf.cli import tune_stage
from tprl_hf.cli.main import main
from tprl_hf.cli.old_recipes import renewed
from tprl_hf.cli.recipe_file import as_number, read_recipe
from tprl_hf.cli.train import base_directory, check_stage, load_data, make_config, settings_of, training_data
from tprl_hf.data import easy_vqa, mosaic_vqa
from tprl_hf.hub.publishing import files_to_publish
from tprl_hf.training import TPRLPPOConfig, TPRLPPOTrainer
from tprl_hf.training.stage_digest import digest_of_stage
from tprl_hf.training.stages import STAGES, Stage, stages_until
from tprl_hf.training.training_record import main as write_training_record
from tprl_hf.training.training_record import recorded_stages, training_record

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
        "ppo": {
            **POLICY_STAGE,
            "keep_best": False,
            "per_device_train_batch_size": 2,
            "num_mini_batches": 2,
            "save_base_model": True,
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def test_all_stages_from_one_recipe(recipe, tmp_path, capsys, monkeypatch):
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
    card = files_to_publish(
        tmp_path / "run" / "ppo", "me/name", HfApi(), stages=recorded_stages(tmp_path / "run" / "ppo")
    )["README.md"].decode()
    for stage in reports:
        assert f"- **{stage}** (0 minutes): `" in card
    assert "save_base_model=true" in card and "accuracy@0.111=" in card and str(tmp_path) not in card

    record = training_record(tmp_path / "run" / "ppo")
    assert list(record["stages"]) == ["autoencoder", "demonstrations", "lfd", "ppo"]
    needed = [*model.policy.parameters(), *model.autoencoder.encoder.parameters()]
    assert record["num_parameters"] == sum(parameter.numel() for parameter in needed)
    assert [row["step"] for row in record["stages"]["ppo"]["validation"]] == [1, 2, 2]
    assert [row["step"] for row in record["stages"]["lfd"]["validation"]] == [0, 1, 2, 2]
    assert reports["lfd"]["best_step"] in (0, 1, 2) and "best_step" not in reports["ppo"]
    assert record["stages"]["lfd"]["metrics"] == reports["lfd"]["metrics"]
    with pytest.raises(ValueError, match="holds no training"):
        training_record(tmp_path)
    monkeypatch.setattr(sys, "argv", ["training_record", str(tmp_path / "run/ppo"), str(tmp_path / "record.json")])
    write_training_record()
    assert json.loads((tmp_path / "record.json").read_text()) == json.loads(json.dumps(record))

    training = {name: model.config.policy_training[name] for name in ("stage", "recipe", "version")}
    assert training == {"stage": "ppo", "recipe": "recipe", "version": tprl_hf.__version__}

    # what is finished stays; what was interrupted resumes
    (tmp_path / "run" / "ppo" / "training.json").unlink()
    capsys.readouterr()
    assert main(["train", "all", "--config", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert out.count("is finished") == 3
    assert main(["train", "lfd", "--config", str(recipe), "--set", "lfd.max_steps=3"]) == 2
    assert "other settings" in capsys.readouterr().err
    # demonstrations read no validation data, and stay when these change
    fewer = ["--set", "data.validation.num_samples=2"]
    assert main(["train", "demonstrations", "--config", str(recipe), *fewer]) == 0
    assert "is finished" in capsys.readouterr().out
    assert main(["train", "lfd", "--config", str(recipe), *fewer]) == 2
    assert "other settings" in capsys.readouterr().err

    # what is damaged or gone is said, with what to do
    run = tmp_path / "run"
    (run / "lfd/training.json").unlink()
    shard = next((run / "demonstrations/dataset").glob("data-*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-1])
    for change, message in (
        (lambda: None, f"{run}/demonstrations/dataset is damaged: "),
        ((run / "demonstrations/training.json").unlink, "which is not there: run `tprl train demonstrations` first"),
        (lambda: (run / "lfd/settings.json").write_text("{"), f"delete {run}/lfd to run this stage again"),
    ):
        change()
        assert main(["train", "lfd", "--config", str(recipe)]) == 2
        assert message in capsys.readouterr().err


def refusal(capsys, *words):
    """The last line of what a command says that ends with exit code 2; it is behind progress bars."""
    capsys.readouterr()
    assert main(["train", *words]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def done(run, stage):
    return json.loads((run / stage / "training.json").read_text())


def test_a_stage_whose_source_was_trained_anew_is_not_finished(recipe, tmp_path, capsys):
    run, words = tmp_path / "run", ["--config", str(recipe)]
    for stage in ("autoencoder", "demonstrations", "lfd"):
        assert main(["train", stage, *words]) == 0
    noted = done(run, "lfd")["begun_from"]
    assert noted == {name: digest_of_stage(run / name) for name in ("autoencoder", "demonstrations")}
    assert done(run, "autoencoder")["begun_from"] == done(run, "demonstrations")["begun_from"] == {}

    # gone is fine where it stays so, and said before it would be trained anew
    (run / "autoencoder").rename(tmp_path / "aside")
    assert main(["train", "lfd", *words]) == 0 and "lfd is finished" in capsys.readouterr().out
    other = [*words, "--set", "autoencoder.seed=5"]
    for more in ([], ["--dry-run"]):
        message = refusal(capsys, "all", *other, *more)
        assert f"{run}/lfd was begun from a training of autoencoder that is not that of {run}/autoencoder" in message
        assert f"delete {run}/lfd to train it again." in message
    assert not (run / "autoencoder").exists()

    # trained anew, by itself
    assert main(["train", "autoencoder", *other]) == 0
    message = refusal(capsys, "all", *other)
    assert f"{run}/lfd was begun from a training of autoencoder that is not that of {run}/autoencoder" in message
    # so is one that was cut off, and would resume from its checkpoint
    (run / "lfd/training.json").rename(tmp_path / "lfd.json")
    assert f"{run}/lfd was begun from a training of autoencoder that" in refusal(capsys, "lfd", *other)
    for path in run.glob("lfd/checkpoint-*"):
        shutil.rmtree(path)
    assert main(["train", "lfd", *other]) == 0  # from the start
    assert done(run, "lfd")["begun_from"] == noted | {"autoencoder": digest_of_stage(run / "autoencoder")}
    assert [stage["stage"] for stage in recorded_stages(run / "lfd")] == ["autoencoder", "demonstrations", "lfd"]

    # the demonstrations that it learned from
    shutil.rmtree(run / "demonstrations")
    assert main(["train", "demonstrations", *other]) == 0
    assert f"{run}/lfd was begun from a training of demonstrations that" in refusal(capsys, "lfd", *other)
    assert [stage["stage"] for stage in recorded_stages(run / "lfd")] == ["autoencoder", "lfd"]
    # a stage of an earlier version noted nothing
    report = done(run, "lfd")
    del report["begun_from"]
    (run / "lfd/training.json").write_text(json.dumps(report))
    assert main(["train", "lfd", *other]) == 0
    assert [stage["stage"] for stage in recorded_stages(run / "lfd")] == ["autoencoder", "demonstrations", "lfd"]
    # and one that is damaged says so
    (run / "lfd/training.json").write_text(json.dumps({**report, "begun_from": ["autoencoder"]}))
    assert "training.json is damaged (begun_from is [" in refusal(capsys, "lfd", *other)
    assert main(["train", "lfd", *other, "--overwrite"]) == 0


def test_a_card_lists_what_led_to_a_model_and_not_what_lies_beside_it(recipe, tmp_path, capsys):
    run, words = tmp_path / "run", ["--config", str(recipe)]
    for stage in ("autoencoder", "demonstrations", "lfd"):
        assert main(["train", stage, *words]) == 0
    shorter = ["--set", "demonstrations=false", "lfd=false"]
    assert main(["train", "ppo", *words, *shorter]) == 0
    assert done(run, "ppo")["begun_from"].keys() == {"autoencoder"}
    assert [stage["stage"] for stage in recorded_stages(run / "ppo")] == ["autoencoder", "ppo"]
    assert list(training_record(run / "ppo")["stages"]) == ["autoencoder", "ppo"]
    # it is not what the recipe with lfd leads to
    message = refusal(capsys, "all", *words)
    assert f"{run}/ppo was begun from autoencoder, and this recipe begins it from lfd: delete {run}/ppo" in message

    shutil.rmtree(run / "ppo")
    assert main(["train", "ppo", *words, *shorter, "autoencoder=false"]) == 0
    assert done(run, "ppo")["begun_from"] == {}
    assert [stage["stage"] for stage in recorded_stages(run / "ppo")] == ["ppo"]
    message = refusal(capsys, "all", *words)
    assert f"{run}/ppo was begun from no other stage, and this recipe begins it from lfd" in message


def write_stage(run, stage, **entries):
    (run / stage).mkdir(exist_ok=True)
    (run / stage / "settings.json").write_text("{}")
    (run / stage / "training.json").write_text(json.dumps({"stage": stage, "seconds": 1.0, **entries}))


@pytest.mark.parametrize("before", ["ppo", "grpo"])
def test_a_lora_was_tuned_for_one_of_several_policies(tmp_path, before):
    run = tmp_path / "run"
    run.mkdir()
    write_stage(run, "lfd")  # of an earlier version
    for stage in ("ppo", "grpo"):
        write_stage(run, stage, begun_from={"lfd": digest_of_stage(run / "lfd")})
    write_stage(run, "tune", begun_from={before: digest_of_stage(run / before)})
    assert [stage["stage"] for stage in recorded_stages(run / "tune")] == ["lfd", before, "tune"]
    write_stage(run, "tune")
    assert [stage["stage"] for stage in recorded_stages(run / "tune")] == ["lfd", "ppo", "grpo", "tune"]
    write_stage(run, "tune", begun_from={"../ppo": "0"})  # no name of a stage
    assert [stage["stage"] for stage in recorded_stages(run / "tune")] == ["tune"]


def test_stages_that_runs_share_are_read_through_their_links(recipe, tmp_path, capsys):
    """As `tprl reproduce` has them: of each run, links to directories of other names."""
    shared, words = tmp_path / "stages", ["--config", str(recipe)]
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        for stage in ("autoencoder", "demonstrations", "lfd"):
            (shared / f"{stage}-0123456789ab").mkdir(parents=True, exist_ok=True)
            (tmp_path / run / stage).symlink_to(f"../stages/{stage}-0123456789ab", target_is_directory=True)
        assert main(["train", "all", *words, "--set", f"output_dir={tmp_path / run}", "ppo=false"]) == 0
    assert capsys.readouterr().out.count("is finished") == 3
    names = ["autoencoder", "demonstrations", "lfd"]
    assert [stage["stage"] for stage in recorded_stages(tmp_path / "two/lfd")] == names
    shutil.rmtree(shared / "autoencoder-0123456789ab")
    (shared / "autoencoder-0123456789ab").mkdir()
    message = refusal(capsys, "all", *words, "--set", f"output_dir={tmp_path / 'two'}", "ppo=false")
    assert f"{tmp_path}/two/lfd was begun from a training of autoencoder that" in message


def test_stages_that_are_overwritten(recipe, base, tmp_path, capsys):
    words = ["--config", str(recipe)]
    run = tmp_path / "run"
    for stage in ("autoencoder", "lfd"):
        (run / stage).mkdir(parents=True)
        (run / stage / "training.json").write_text("{}")
    assert main(["train", "autoencoder", *words, "--overwrite"]) == 2
    assert "autoencoder is not a stage of `tprl train`: it has no settings.json" in capsys.readouterr().err
    for stage in ("autoencoder", "lfd"):
        (run / stage / "settings.json").write_text("{}")
    assert main(["train", "autoencoder", *words]) == 2
    assert "was made with other settings" in (err := capsys.readouterr().err) and "to train this stage again" in err
    assert main(["train", "autoencoder", *words, "--overwrite"]) == 2
    assert "lfd was made from autoencoder, which --overwrite would delete" in capsys.readouterr().err
    assert (run / "autoencoder/training.json").read_text() == (run / "lfd/training.json").read_text() == "{}"

    shutil.rmtree(run / "lfd")
    (run / "base").mkdir()
    (run / "base/taken_from.json").write_text("null")
    assert main(["train", "autoencoder", *words, "--overwrite"]) == 0
    assert json.loads((run / "autoencoder/training.json").read_text())["stage"] == "autoencoder"
    assert not (run / "base").exists()  # no stage was left that had been made from it


@pytest.mark.parametrize("words", [["--overwrite"], []])
def test_a_folder_called_base_that_is_not_ours_stays(make_model, processor, recipe, tmp_path, capsys, words):
    start = tmp_path / "start"
    make_model(policy_training={"stage": "lfd"}).save_pretrained(start, save_base_model=True)
    processor.save_pretrained(start)
    theirs = tmp_path / "run/base"
    shutil.copytree(read_recipe(str(recipe))["base_model"], theirs)
    (theirs / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in theirs.iterdir()}
    words = [*words, "--set", f"base_model={start}"]
    assert main(["train", "autoencoder", "--config", str(recipe), *words]) == 2
    assert "`tprl train` did not make it: move it, or pass --set output_dir=" in capsys.readouterr().err
    words = ["--set", f"base_model={theirs}", "--overwrite"]
    assert main(["train", "autoencoder", "--config", str(recipe), *words]) == 0
    assert {path.name: path.read_bytes() for path in theirs.iterdir()} == before


def test_a_recipe_may_have_data_for_demonstrations_only(recipe, tmp_path):
    content = yaml.safe_load(recipe.read_text())
    content["data"] = {"demonstrations": content["data"]["train"], "validation": content["data"]["validation"]}
    recipe.write_text(yaml.safe_dump({name: content[name] for name in content if name not in ("autoencoder", "ppo")}))
    for stage in ("demonstrations", "lfd"):
        assert main(["train", stage, "--config", str(recipe)]) == 0
    assert (tmp_path / "run/lfd/training.json").exists()


def test_a_recipe_is_the_same_one_from_another_working_directory(recipe, tmp_path, capsys, monkeypatch):
    content = yaml.safe_load(recipe.read_text())
    content["data"] = {name: {"source": "data"} for name in content["data"]}
    recipe.write_text(yaml.safe_dump(content))
    for folder, name in ((tmp_path, "recipe.yaml"), (tmp_path.parent, f"{tmp_path.name}/recipe.yaml")):
        monkeypatch.chdir(folder)
        assert main(["train", "autoencoder", "--config", name]) == 0
    assert "is finished" in capsys.readouterr().out
    assert main(["train", "autoencoder", "--config", name, "--set", "autoencoder.max_steps=5"]) == 2
    assert "was made with other settings (autoencoder.max_steps), see" in capsys.readouterr().err
    assert main(["train", "autoencoder", "--config", name, "--set", "data.train.source=mosaic"]) == 2
    assert "was made with other settings (data.train.source), see" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["mosaic", "easy-vqa", "photo"])
def test_a_folder_called_as_our_data_does_not_hide_them(source, tmp_path, monkeypatch):
    (tmp_path / source).mkdir()
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"output_dir": "run", "data": {"train": {"source": source}}}))
    monkeypatch.chdir(tmp_path.parent)
    assert read_recipe(str(tmp_path / "r.yaml"))["data"]["train"]["source"] == source


def test_several_processes_do_not_overwrite(recipe, tmp_path, capsys, monkeypatch):
    (tmp_path / "run/lfd").mkdir(parents=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "all", "--config", str(recipe), "--overwrite"]) == 2
    assert "--overwrite is for a single process" in capsys.readouterr().err and (tmp_path / "run/lfd").exists()


def test_the_base_model_of_another_checkpoint_is_not_taken(make_model, processor, tmp_path):
    """Where stages were deleted and the recipe now names another checkpoint."""
    for name in ("one", "another"):
        make_model().save_pretrained(tmp_path / name, save_base_model=True)
        processor.save_pretrained(tmp_path / name)
    recipe = {"base_model": str(tmp_path / "one"), "output_dir": str(tmp_path / "run")}
    assert base_directory(recipe) == base_directory(recipe) == str(tmp_path / "run/base")
    with pytest.raises(ValueError, match=r"run/base is part of .*one, but the recipe names .*another: delete"):
        base_directory({**recipe, "base_model": str(tmp_path / "another")})


def test_a_stage_may_be_left_out(recipe):
    sections = read_recipe(str(recipe), ["lfd=false", "demonstrations=false"])
    assert [stage for stage in STAGES if stage in sections] == ["autoencoder", "ppo"]


@pytest.mark.parametrize("stage", [name for name, stage in STAGES.items() if stage.config] + ["tune"])
def test_names_that_yaml_takes_for_truth_values(stage, recipe, tmp_path):
    """`no` is a name where the choices are names, and False where the setting is a flag, quoted or not."""
    make = tune_stage.make_config if stage == "tune" else partial(make_config, stage)
    sections = yaml.safe_load(recipe.read_text())
    sections[stage] = {"use_cpu": True, **({"keep_ratios": [0.5]} if stage == "tune" else {})}
    recipe.write_text(yaml.safe_dump(sections))
    for setting in ("eval_strategy", "logging_strategy", "save_strategy"):
        for word in ("no", "No", '"no"'):
            found = read_recipe(str(recipe), [f"{stage}.{setting}={word}"])
            assert getattr(make(found), setting) == "no"
            assert found[stage][setting] == "no"  # the same settings for a run that resumes
    found = read_recipe(str(recipe), [f"{stage}.logging_first_step=no", f"{stage}.include_num_input_tokens_seen=yes"])
    config = make(found)
    assert config.logging_first_step is False and config.include_num_input_tokens_seen == "all"


def test_several_sources_are_shuffled_together():
    sections = [{"seed": 100, "num_samples": 40}, {"source": "easy-vqa", "num_samples": 20}]
    mixture = load_data({"data": {"train": sections}}, "train")
    assert sorted(mixture["image_id"]) == sorted(
        [*mosaic_vqa("train", 100, 40)["image_id"], *easy_vqa("train", 20)["image_id"]]
    )
    assert load_data({"data": {"train": sections}}, "train", 12)["prompt"] == mixture["prompt"][:12]
    assert {name.split("-")[0] for name in mixture["image_id"][:12]} == {"mosaic", "easy"}


def read_recipe_text(folder, train) -> list:
    """The question types of a recipe with these data; types may be numbers, with or without quotes."""
    (folder / "recipe.yaml").write_text(f"output_dir: out\ndata: {{train: {train}}}\nautoencoder: {{max_steps: 1}}\n")
    return read_recipe(str(folder / "recipe.yaml"))["data"]["train"]["question_types"]


def test_a_stage_may_have_its_own_data(tmp_path):
    own = {"seed": 101, "num_samples": 12, "question_types": ["counting", "relation"]}
    recipe = {"data": {"train": {"num_samples": 6}, "ppo": own, "validation": {}}, "lfd": {}, "ppo": {}}
    dataset = load_data(recipe, training_data("ppo", recipe))
    assert sorted(dataset["question_type"]) == ["counting"] * 2 + ["relation"] * 2
    assert all(name.startswith("mosaic-train-101") for name in dataset["image_id"])
    assert len(load_data(recipe, training_data("lfd", recipe))) == 6
    # other stages do not depend on it
    assert settings_of("ppo", recipe)["data"].keys() == {"ppo", "validation"}
    assert settings_of("lfd", recipe)["data"].keys() == {"train", "validation"}
    assert read_recipe_text(tmp_path, "{source: mosaic, num_samples: 6, question_types: ['1', 2]}") == ["1", 2]
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
        (["all", "--set", "data.train.source=nowhere"], "There are no data 'nowhere': data.train.source is mosaic"),
        (["all", "--set", "data.train=[]"], "data.train.source"),
        (["all", "--set", "data.lfdd={}"], "data has no setting 'lfdd'; did you mean 'lfd'?"),
        (
            ["all", "--set", "data.train=[{sourc: mosaic}]"],
            "data.train has no setting 'sourc'; did you mean 'source'?",
        ),
        (["all", "--set", "seed"], "not an override"),
        (["all", "--set", "base_model.x=1"], "base_model is not a section"),
        (["all", "--set", "grpo.seed=1"], "has no stage grpo; its stages are autoencoder, demonstrations, lfd, ppo"),
        # of stages that would run last
        (["all", "--set", "ppo.learning_rat=1"], "ppo has no setting 'learning_rat'; did you mean 'learning_rate'?"),
        (["all", "--set", "ppo.xyzzy=1"], "there are reward_funcs, feature_cache_mb, feature_cache_dir, "),
        (["all", "--set", "ppo.num_mini_batches=3"], "ppo: per_device_train_batch_size * num_generations = 2"),
        (
            ["all", "--set", "ppo.eval_strategy=yes"],
            "ppo.eval_strategy must be 'no' or 'steps' or 'epoch'; got True. YAML",
        ),
        (
            ["all", "--set", "ppo.log_level=off"],
            "ppo.log_level must be a text; got False. YAML reads no, off,",
        ),
        (["all", "--set", "ppo.ratio=off"], "ppo.ratio must be 'joint' or 'token'; got False. YAML reads no, off,"),
        (
            ["all", "--set", "base_model=no"],
            "must be a text; got False. YAML reads no, off, yes and on",
        ),
        (["all", "--set", "output_dir=2026"], "must be a text; got 2026."),
        (["all", "--set", "output_dir="], "must say `output_dir`"),
        (["all", "--set", "ppo.ratio=both"], "ppo: ratio must be 'joint' or 'token'; got 'both'"),
        (["all", "--set", "ppo.reward_funcs=[nowhere:f]"], "There is no reward function 'nowhere:f'"),
        (["all", "--set", "ppo.reward_funcs=[json]"], "'json' does not name a reward function: write module:function"),
        (["all", "--set", "ppo.reward_funcs=json:loads"], "ppo.reward_funcs is a list of names"),
        (["all", "--set", "ppo.reward_funcs=[json:loads]", "ppo.reward_weights=[1, 2]"], "are not one for each of"),
        (["all", "--set", "demonstrations.teacher=me"], "There is no teacher 'me'"),
        (["all", "--set", "data.ppo={sourc: mosaic}"], "data.ppo has no setting 'sourc'"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_run(recipe, capsys, words, message, tmp_path):
    assert main(["train", words[0], "--config", str(recipe), *words[1:]]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert message in err
    assert not [*tmp_path.glob("run/*/training.json")]


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
    recipe = read_recipe(str(path))
    assert renewed(recipe) == (recipe, [])  # of today's version
    stages = [stage for stage in STAGES if stage in recipe]
    assert stages
    for stage in stages:
        check_stage(stage, recipe)
        if STAGES[stage].config is not None:
            recipe[stage]["use_cpu"] = True
            assert isinstance(make_config(stage, recipe).learning_rate, float)
    policy = recipe.get("policy", {})
    assert set(policy) <= set(TPRLConfig().to_dict())
    TPRLForConditionalGeneration.from_base_model(base, **policy)  # settings that go together


def test_the_paper_recipe_is_the_default_of_the_code(tmp_path):
    from tprl_hf import training

    recipe = read_recipe(str(next(path for path in RECIPES if path.stem == "paper")))
    for stage, config in (("lfd", training.LfDConfig), ("ppo", training.TPRLPPOConfig)):
        # what no result depends on: where features lie, and how often a checkpoint is written
        kept = {name: recipe[stage].pop(name) for name in ("feature_cache_dir", "feature_cache_mb", "save_steps")
                if name in recipe[stage]}  # fmt: skip
        assert kept["feature_cache_mb"] > 50_000 * 576 * 4096 * 2 / 2**20  # all images of the paper
        assert config(str(tmp_path), use_cpu=True, **recipe[stage]) == config(str(tmp_path), use_cpu=True)


WORDS = """
def words(completions, **columns):
    return [float(len(text.split())) for text in completions]


def letters(completions, **columns):
    return [float(len(text)) for text in completions]
"""


def test_a_recipe_may_name_rewards(recipe, tmp_path, monkeypatch):
    (tmp_path / "rewards_of_this_test.py").write_text(WORDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    names = "[rewards_of_this_test:words, rewards_of_this_test:letters]"
    settings = [f"ppo.reward_funcs={names}", "ppo.reward_weights=[1, 0.5]", "ppo.logging_steps=1", "ppo.max_steps=1"]
    settings += ["lfd=false", "demonstrations=false", "ppo.max_completion_length=2"]
    assert main(["train", "all", "--config", str(recipe), "--set", *settings]) == 0
    history = json.loads((tmp_path / "run" / "ppo" / "training.json").read_text())["log_history"]
    (row,) = [row for row in history if "objective/score" in row]
    weighted = row["rewards/words/mean"] + 0.5 * row["rewards/letters/mean"]
    assert row["objective/score"] == pytest.approx(weighted)


class ToyConfig(TPRLPPOConfig):
    """A pair that a contributor would write."""


class ToyTrainer(TPRLPPOTrainer):
    _stage = "toy"


def test_an_algorithm_is_a_pair_and_one_row_of_the_table(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(STAGES, "toy", Stage("ToyConfig", "ToyTrainer", starts_from=("lfd", "autoencoder")))
    for toy in (ToyConfig, ToyTrainer):
        monkeypatch.setattr(tprl_hf.training, toy.__name__, toy, raising=False)
    sections = yaml.safe_load(recipe.read_text())
    sections["toy"] = {**sections.pop("ppo"), "save_base_model": False}
    recipe.write_text(yaml.safe_dump(sections))
    assert main(["train", "all", "--config", str(recipe), "--set", "lfd=false", "demonstrations=false"]) == 0
    model = TPRLForConditionalGeneration.from_pretrained(tmp_path / "run" / "toy")
    assert model.config.policy_training["stage"] == "toy"
    assert [stage["stage"] for stage in recorded_stages(tmp_path / "run" / "toy")] == ["autoencoder", "toy"]


def test_each_stage_offers_its_pair():
    assert stages_until("counterfactual") == ["autoencoder", "demonstrations", "lfd", "counterfactual"]
    assert stages_until("autoencoder") == ["autoencoder"]
    for name, stage in STAGES.items():
        if stage.config is not None:
            config, trainer = stage.classes()
            assert trainer.__annotations__["args"] is config
            assert name == "autoencoder" or trainer._stage == name


OLD = {
    "output_dir": "run",
    "policy": {"lambda_disc": 0.5, "latent_dim": 16},
    "data": {"train": {}, "ppo": {"seed": 1}},
}


def test_recipes_of_older_versions_are_read(tmp_path):
    path = tmp_path / "old.yaml"

    def read(**ppo):
        path.write_text(yaml.safe_dump({**OLD, "ppo": ppo}))
        with pytest.warns(FutureWarning, match="older version"):
            return read_recipe(str(path))

    def refused(message, **ppo):
        path.write_text(yaml.safe_dump({**OLD, "ppo": ppo}))
        with pytest.raises(ValueError, match=message):
            read_recipe(str(path))

    shipped = {"advantages": "counterfactual", "ratio": "token", "num_steps": 1, "entropy_coef": 0.0, "vf_coef": 0.0}
    found = read(**shipped, kl_coef=0.005, beta=0.0, rollout_keep_ratios=["1/3"], num_rollouts=2, gamma=1.0)
    assert found["data"] == {"train": {}, "counterfactual": {"seed": 1}} and found["policy"] == {"latent_dim": 16}
    assert "ppo" not in found
    settings = found["counterfactual"]
    assert settings["beta"] == 0.005 and settings["efficiency_coef"] == 0.0 and settings["num_generations"] == 2
    # what it did not say was the default of the time
    assert settings["learning_rate"] == 1e-5 and settings["weight_by_budget"] is False and settings["num_flips"] == 16
    settings["use_cpu"] = True
    assert make_config("counterfactual", found).num_iterations == 4

    paper = {"advantages": "gae", "score_every_step": True, "beta": 0.1, "num_rollouts": 1}
    assert read(**paper)["ppo"] == {"beta": 0.1, "num_generations": 1, "score_every_step": True}
    assert read(score_every_step=False)["ppo"] == {"score_every_step": False}  # today's code has it again
    refused("ppo.entropy_coef=0.01 is no longer possible: set it to 0", **{**shipped, "entropy_coef": 0.01})
    refused("is now the stage grpo", advantages="group")
    refused("ppo.target_keep_ratio=0.3 is no longer possible", target_keep_ratio=0.3)


def test_a_config_of_an_older_version_is_read():
    config = TPRLConfig.from_dict({"model_type": "tprl", "lambda_disc": 0.5, "latent_dim": 16})
    assert config.latent_dim == 16 and config.policy_training is None and "lambda_disc" not in config.to_dict()
