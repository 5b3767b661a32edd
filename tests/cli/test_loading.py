"""Every command that loads a model takes the same options, and says at once what cannot be."""

import json

import pytest
import torch

from tests.test_processors import run_without
from tprl_hf.cli.arguments import loading_options, loading_words
from tprl_hf.cli.main import COMMANDS, main, make_parser
from tprl_hf.loading import check_model_name, load_model

LOADING = ["demo", "generate", "compare", "evaluate", "trajectory", "benchmark", "train", "serve", "app"]
REQUIRED = {
    "generate": ["--image", "a.png", "--question", "q"],
    "train": ["all", "--config", "paper"],
    "trajectory": ["a.png", "q"],
    "compare": ["a.png", "q"],
}
OPTIONS = "--dtype bfloat16 --device-map auto --attn-implementation eager --load-in-4bit"


def test_the_commands_that_load_a_model_have_the_options():
    for command in COMMANDS:
        words = [command.NAME, *REQUIRED.get(command.NAME, [])]
        if command.NAME in LOADING:
            arguments = make_parser().parse_args([*words, *OPTIONS.split()])
            assert loading_words(arguments) == f" {OPTIONS}"
            arguments = make_parser().parse_args(words)
            assert loading_words(arguments) == "" and not any(loading_options(arguments).values())


def test_what_is_asked_for_is_what_is_loaded(base_checkpoint):
    model, _ = load_model(str(base_checkpoint))
    assert model.dtype == torch.float32 and model.lvlm.config._attn_implementation == "sdpa"
    model, _ = load_model(str(base_checkpoint), dtype="bfloat16", attn_implementation="eager", device_map="auto")
    assert model.dtype == torch.bfloat16 and model.lvlm.config._attn_implementation == "eager"
    assert next(model.policy.parameters()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"There is no device cuda:77 \(.*\): this machine has cpu"):
        load_model(str(base_checkpoint), device="cuda:77")


def test_four_bits_without_the_package_are_one_line(tmp_path):
    words = ["evaluate", "--load-in-4bit", "--output-dir", str(tmp_path), "--num-samples", "2"]
    done = run_without(f"from tprl_hf.cli.main import main; sys.exit(main({words!r}))", "bitsandbytes")
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == (
        "tprl evaluate: error: 4 bits need bitsandbytes, which is not installed: pip install 'tprl_hf[quantized]'."
    )


class TestNames:
    @pytest.mark.parametrize("name", ["gpt2", "llava-hf/llava-1.5-7b-hf", "me/a_b.c"])
    def test_what_may_be_on_the_hub_is_not_looked_up(self, name):
        assert check_model_name(name) == name

    @pytest.mark.parametrize("name", ["./mine", "/mine", "runs/mine/lfd", "~/mine", "mine/", "a b"])
    def test_what_can_only_be_a_directory_must_be_there(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match="There is no directory"):
            check_model_name(name)

    def test_what_was_probably_meant_is_said(self, tmp_path):
        for stage in ("autoencoder", "lfd"):
            (tmp_path / "run" / stage).mkdir(parents=True)
            (tmp_path / "run" / stage / "config.json").write_text("{}")
        with pytest.raises(ValueError, match=r"no config.json; there is one in autoencoder, lfd\."):
            check_model_name(f"{tmp_path}/run")
        with pytest.raises(ValueError, match=r"did you mean .*/run/lfd\?"):
            check_model_name(f"{tmp_path}/run/lfdd")
        with pytest.raises(ValueError, match="is a file"):
            check_model_name(f"{tmp_path}/run/lfd/config.json")

    def test_commands_say_it_before_anything_is_imported(self, tmp_path):
        (tmp_path / "file").touch()
        calls = [["demo", "./none"], ["demo", "--output-dir", str(tmp_path / "file" / "out")]]
        code = f"from tprl_hf.cli.main import main\ncodes = [main(words) for words in {json.dumps(calls)}]\n"
        done = run_without(code + "print(codes, sorted({'torch', 'transformers'} & set(sys.modules)))")
        assert done.stdout == "[2, 2] []\n"
        assert "There is no directory none" in done.stderr.replace("./", "")
        assert f"{tmp_path / 'file'} is not a directory" in done.stderr

    def test_a_name_that_the_hub_does_not_have(self, capsys):
        assert main(["demo", "me/none"]) == 2
        assert "There is no directory me/none, and the Hub gave no such model: " in capsys.readouterr().err
