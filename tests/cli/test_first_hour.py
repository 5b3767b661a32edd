"""What a user types in the first hour: one command after the other, and mistakes that are told at once."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from tests.families.tiny_processor import make_processor
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.cli.dry_run import duration
from tprl_hf.cli.main import main
from tprl_hf.cli.recipe_file import read_recipe
from tprl_hf.data import mosaic_vqa
from tprl_hf.data.samples import SAMPLE_FEATURES

ROOT = Path(__file__).parents[2]
FEW = ["--num-samples", "4", "--keep-ratios", "1/2", "--pruners", "uniform", "--max-new-tokens", "1"]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def own_data(here, image_file) -> Path:
    """A folder with three questions and a recipe beside them, which is not the working directory."""
    folder = here / "project"
    folder.mkdir()
    shutil.copy(image_file, folder / "noise.png")
    row = {"image": "noise.png", "prompt": "word7 word8", "answer": "word3"}
    (folder / "mine.jsonl").write_text("\n".join([json.dumps(row)] * 3))
    return folder


def recipe_in(folder: Path, base, **sections) -> str:
    path = folder / "recipe.yaml"
    source = {"source": "mine.jsonl"}
    recipe = {
        "base_model": str(base),
        "output_dir": "run",
        "policy": {"latent_dim": 16, "policy_num_heads": 4, "policy_dim": 16},
        "data": {"train": source, "validation": source},
        "autoencoder": {"max_steps": 2, "save_steps": 1, "use_cpu": True, "disable_tqdm": True},
        "lfd": {"num_train_epochs": 3},
    }
    path.write_text(yaml.safe_dump({**recipe, **sections}))
    return str(path)


# What makes a documented command as short as a test may be; training, serving and publishing have tests of their own.
SHORTER = {
    "demo": ["--num-samples", "2", "--num-shown", "1", "--keep-ratios", "1/9"],
    "generate": ["--max-new-tokens", "2"],
    "compare": ["--max-new-tokens", "2", "--pruners", "uniform,learned"],
    "trajectory": ["--max-new-tokens", "2"],
    "evaluate": ["--num-samples", "6", "--max-new-tokens", "2", "--random-seeds", "1", "--seed", "7"],
    "benchmark": ["--rounds", "2", "--max-new-tokens", "2", "--pruners", "uniform,divprune"],
    "flops": [],
}
# Names on the Hub and presets of billions of weights.
LARGE = re.compile(r"llava-hf/|^benchmark llava|gqa")


def test_the_commands_of_the_pages_run_one_after_the_other(here, image_file, capsys):
    shutil.copy(image_file, here / "photo.png")
    ran: list[list[str]] = []
    for page in ("README.md", "docs/quickstart.md", "docs/evaluation.md"):
        for line in re.findall(r"^tprl (\w.*?)(?:  +#.*)?$", (ROOT / page).read_text(encoding="utf-8"), re.M):
            words = shlex.split(line)
            if words[0] in SHORTER and not LARGE.search(line) and words not in ran:
                assert main([*words, *SHORTER[words[0]]]) == 0, (line, capsys.readouterr().err)
                ran.append(words)
    assert {words[0] for words in ran} == SHORTER.keys() and len(ran) >= 12
    # whoever asks it about a photograph should not take the answer for the method's
    assert "Loading the embedded model, which knows drawn shapes only ..." in capsys.readouterr().err


class TestEvaluate:
    def test_no_command_refuses_the_next_one(self, here, base_checkpoint, own_data, capsys):
        for words in ([], ["--seed", "8"], ["--dtype", "bfloat16"], ["--data", "project/mine.jsonl"]):
            assert main(["evaluate", str(base_checkpoint), *FEW, *words]) == 0, capsys.readouterr().err
        folders = sorted(path.name for path in (here / "tprl_output" / "evaluate").iterdir())
        assert len(folders) == 4 and sum("-mine-" in name for name in folders) == 1
        capsys.readouterr()
        assert main(["evaluate", str(base_checkpoint), *FEW, "--pruners", "uniform,divprune"]) == 0
        assert "12/16" in capsys.readouterr().err  # the same questions: only the new rows are answered
        assert len(list((here / "tprl_output" / "evaluate").iterdir())) == 4

    def test_another_run_is_refused_before_anything_is_loaded_and_may_be_overwritten(
        self, here, base_checkpoint, capsys
    ):
        words = ["evaluate", str(base_checkpoint), *FEW, "--output-dir", "out"]
        assert main(words) == 0
        capsys.readouterr()
        assert main([*words, "--seed", "9"]) == 2
        err = capsys.readouterr().err
        assert "seed 7 instead of 9" in err and "--overwrite to delete" in err and "Loading" not in err
        assert main([*words, "--seed", "9", "--overwrite"]) == 0
        assert json.loads((here / "out" / "results.json").read_text())["seed"] == 9
        assert "  0%" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ("none.jsonl", "There is no file none.jsonl."),
            ("a/b", "There is no file or directory a/b."),
            ("file.json", "file.json is not a .jsonl file"),
            ("empty", "empty is not a saved dataset"),
        ],
    )
    def test_data_that_are_not_there(self, here, base_checkpoint, capsys, data, message):
        (here / "file.json").touch()
        (here / "empty").mkdir()
        assert main(["evaluate", str(base_checkpoint), "--data", data]) == 2
        err = capsys.readouterr().err
        assert message in err and "Loading" not in err

    def test_a_file_has_no_splits(self, own_data, capsys):
        assert main(["evaluate", "--data", "project/mine.jsonl", "--split", "validation"]) == 2
        assert "has no splits: leave out --split" in capsys.readouterr().err


class TestRecipe:
    def test_data_lie_beside_the_recipe_or_in_the_working_directory(self, here, own_data, base_checkpoint):
        path = recipe_in(own_data, base_checkpoint)
        assert read_recipe(path)["data"]["train"] == {"source": "project/mine.jsonl"}
        assert read_recipe(path, ["data.train.source=mosaic"])["data"]["train"] == {"source": "mosaic"}
        (here / "mine.jsonl").touch()
        with pytest.raises(ValueError, match=r"data\.train\.source: .* are two files"):
            read_recipe(path)
        (here / "only-here.jsonl").touch()
        train = read_recipe(path, ["data.train.source=only-here.jsonl", "data.validation.source=mosaic"])["data"]
        assert train["train"] == {"source": "only-here.jsonl"}

    @pytest.mark.parametrize(
        ("sections", "message"),
        [
            ({"lfd": {"learning_rte": 1}}, "lfd has no setting 'learning_rte'; did you mean 'learning_rate'?"),
            ({"lfdd": {}}, "has no setting 'lfdd'; did you mean 'lfd'?"),
            ({"data": {"trian": {"source": "mosaic"}}}, "data has no setting 'trian'; did you mean 'train'?"),
            ({"data": {"train": {"sorce": "mosaic"}}}, "data.train has no setting 'sorce'; did you mean 'source'?"),
            ({"data": {"train": {"source": "mosaik"}}}, "or from the working directory. Did you mean mosaic?"),
            (
                {"data": {"validation": {"source": "no.jsonl"}}},
                "There are no data 'no.jsonl': data.validation.s",
            ),
            ({"policy": {"latent": 3}}, "policy has no setting 'latent'; did you mean 'latent_dim'?"),
            ({"base_model": "./none"}, "There is no directory ./none"),
            ({"output_dir": "file/run"}, "file/run cannot be written: "),
        ],
    )
    def test_every_stage_is_checked_before_the_first_one_begins(
        self, here, own_data, base_checkpoint, capsys, sections, message
    ):
        (here / "file").touch()
        assert main(["train", "autoencoder", "--config", recipe_in(own_data, base_checkpoint, **sections)]) == 2
        assert message in capsys.readouterr().err and not (here / "run").exists()


def test_a_picture_that_cannot_be_read_is_named(here, own_data, base_checkpoint, capsys):
    """By its path; where a dataset holds the pictures themselves, by the sample's name for them."""
    picture = (own_data / "noise.png").read_bytes()
    (own_data / "noise.png").write_bytes(picture[: len(picture) // 2])
    config = recipe_in(own_data, base_checkpoint)
    mosaic_vqa("test", 0, 6).map(
        lambda row: {"images": [{"bytes": picture[: len(picture) // 2], "path": None}], "image_id": "the-cut-one"},
        features=SAMPLE_FEATURES,
    ).save_to_disk("saved")
    for words, name in [
        (["evaluate", str(base_checkpoint), *FEW, "--data", "project/mine.jsonl"], "project/noise.png is damaged ("),
        (["evaluate", str(base_checkpoint), *FEW, "--data", "saved"], "the-cut-one is damaged ("),
        (["train", "autoencoder", "--config", config], "project/noise.png is damaged ("),
        (["train", "autoencoder", "--config", config, "--set", "data.train.source=saved"], "the-cut-one is damaged ("),
    ]:
        shutil.rmtree("run", ignore_errors=True)
        assert main(words) == 2
        assert name in capsys.readouterr().err.splitlines()[-1]


def test_a_dry_run_says_what_would_be_done_and_does_nothing(here, own_data, base_checkpoint, capsys):
    words = ["train", "all", "--config", recipe_in(own_data, base_checkpoint)]
    assert main([*words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    rows = [re.split(r"\s{2,}", line) for line in out.splitlines() if line.startswith(("autoencoder", "lfd"))]
    assert [row[:6] for row in rows] == [
        ["autoencoder", "to do", "a new policy", "mine.jsonl", "2", "not known"],
        ["lfd", "to do", "autoencoder", "demonstrations", "3 epochs", "not known"],
    ]
    assert "free there: " in out and not (here / "run").exists()

    assert main(["train", "autoencoder", *words[2:]]) == 0
    written = sum(path.stat().st_size for path in (here / "run").rglob("*.safetensors"))
    capsys.readouterr()
    assert main([*words, "--dry-run"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("autoencoder"))
    assert re.split(r"\s{2,}", row)[1] == "finished" and " s  " in row
    # what was said of the disk is at least what the weights took, and not ten times as much
    said = float(row.split()[-2]) * 1e6
    assert 0.5 * written < said < 10 * written

    (here / "run" / "autoencoder" / "training.json").unlink()
    assert main([*words, "--dry-run"]) == 0
    assert "at step 2 of 2" in capsys.readouterr().out
    assert [duration(seconds) for seconds in (5, 600, 90_000)] == ["5 s", "10 min", "25.0 h"]


def test_a_policy_whose_base_model_is_in_a_directory_is_pushed_with_it(here, base_checkpoint, capsys):
    model = TPRLForConditionalGeneration.from_base_model(
        str(base_checkpoint), keep_ratio=0.5, policy_training={"stage": "lfd"}, latent_dim=8, policy_num_heads=2
    )
    model.save_pretrained(here / "policy")
    make_processor().save_pretrained(here / "policy")
    words = ["push", "policy", "me/mine", "--dry-run"]
    assert main(words) == 2
    assert "(tprl push --merged)" in capsys.readouterr().err
    assert main([*words, "--merged"]) == 0
    listed = dict(line.split()[::-1] for line in capsys.readouterr().out.split("\n\n")[0].splitlines())
    whole = sum(weight.numel() for weight in model.state_dict().values())
    assert int(listed["model.safetensors"]) > 4 * whole and "tokenizer.json" in listed
    assert (here / "policy" / "model.safetensors").stat().st_size < 2e5  # it is left as it was


def test_quiet_prints_the_result_alone(base_checkpoint, image_file, capsys):
    words = ["generate", str(base_checkpoint), "--image", str(image_file), "--question", "word7", "--quiet"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and err == ""
    assert main([*words[:-1]]) == 0
    assert "visual tokens kept" in capsys.readouterr().err
