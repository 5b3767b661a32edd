"""docs/your_model.md is true: each of its blocks runs, on tiny models of the families that it names, from a Hub."""

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from tests.families.stock_processors import save
from tests.families.tiny_models import build, config_of
from tprl_hf.cli.main import make_parser
from tprl_hf.data import sources

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "your_model.md"
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S))
LLAVA, QWEN, IN_4_BITS, LARGE = "LLaVA-1.5-7B", "Qwen2.5-VL-7B", "In 4 bits", "Larger than a card"
NEEDS = {QWEN: "torchvision", IN_4_BITS: "bitsandbytes"}
# What makes the page's training as short as a test may be, and ends with weights that training changed.
SHORT = [
    *(f"{stage}.max_steps=1" for stage in ("autoencoder", "lfd", "grpo")),
    *("lfd.keep_best=false", "grpo.keep_best=false", "lfd.warmup_steps=0"),
]


def blocks(language: str, section: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], re.M | re.S)


def commands(section: str) -> list[list[str]]:
    """The words of each `tprl` command of a section, without `tprl`."""
    lines = "\n".join(blocks("bash", section)).splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("tprl ")]


def wide_llava():
    """As wide as the blocks of 64 weights that quantisation takes together."""
    config = config_of("llava").to_dict()
    config["text_config"].update(hidden_size=64, intermediate_size=128, head_dim=16)
    config["vision_config"].update(hidden_size=64, intermediate_size=128, projection_dim=64)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(type(config_of("llava")).from_dict(config))


@pytest.fixture(scope="module")
def models(hub, tmp_path_factory) -> None:
    """Tiny models under the page's names."""
    made = {
        "llava-hf/llava-1.5-7b-hf": ("llava", wide_llava),
        "Qwen/Qwen2.5-VL-7B-Instruct": ("qwen2_5_vl", lambda: build("qwen2_5_vl")),
        "llava-hf/llava-v1.6-34b-hf": ("llava_next", lambda: build("llava_next")),
    }
    for name, (family, make) in made.items():
        folder = tmp_path_factory.mktemp(family)
        save(family, folder)
        make().save_pretrained(folder)
        hub.put(name, {path.name: path.read_bytes() for path in folder.iterdir()})


@pytest.fixture
def here(tmp_path) -> Path:
    """Where a user would be: with a picture, and the page's own questions as data."""
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.jpg")
    (questions,) = blocks("json", "Measure it on your own questions")
    (tmp_path / "questions.jsonl").write_text(questions)
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(questions)
    return tmp_path


def test_there_is_a_test_for_every_block():
    found = {name: re.findall(r"^```(\w+)\n", text, re.M) for name, text in SECTIONS.items()}
    assert {name for name, kinds in found.items() if "python" in kinds} == {LLAVA, QWEN, IN_4_BITS, LARGE}
    assert {kind for kinds in found.values() for kind in kinds} == {"bash", "python", "json"}
    for section in SECTIONS:
        for words in commands(section):
            make_parser().parse_args(words)


def test_the_questions_of_the_page_are_read(here):
    rows = sources.read_source(str(here / "questions.jsonl"), "test")
    assert rows["question_type"] == ["all", "place"] and rows["answer"][0] == ["red"]


CHECKS = {
    LLAVA: "assert model.lvlm.dtype == torch.bfloat16 and next(model.policy.parameters()).dtype == torch.float32",
    IN_4_BITS: "assert model.is_loaded_in_4bit",
}
SHOWN = {"generate", "compare", "evaluate", "benchmark", "flops", "train", "push"}
SHORTER = {"train": ["--set", *SHORT], "benchmark": ["--rounds", "2", "--max-new-tokens", "2"]}


@pytest.mark.parametrize("sections", [[QWEN], [IN_4_BITS], [name for name in SECTIONS if name not in NEEDS]])
def test_the_python_of_the_page_runs_and_then_its_commands_one_after_the_other(sections, models, run, here):
    for section in sections:
        if section in NEEDS and find_spec(NEEDS[section]) is None:
            pytest.skip(f"{NEEDS[section]} is not installed")
    lines = [f"import os, sys; sys.path[0] = os.getcwd(); os.chdir({str(here)!r})"]
    for section in dict.fromkeys([LLAVA, *sections]):
        lines += [*blocks("python", section), CHECKS.get(section, "")]
    calls = [words for section in sections for words in commands(section) if words[0] != "serve"]
    lines.append("from tprl_hf.cli.main import main")
    for words in calls:
        lines.append(f"print('called', {words[0]!r}); assert main({[*words, *SHORTER.get(words[0], [])]!r}) == 0")
    out = run("\n".join(lines))
    assert out.count("called") == len(calls) > 0
    if LLAVA in sections:
        assert {words[0] for words in calls} == SHOWN
        card = out[out.rindex("called push") :]
        assert "model.safetensors" in card and "base_model: llava-hf/llava-1.5-7b-hf" in card
        rows = json.loads((here / "results" / "questions" / "results.json").read_text())["rows"]
        assert {"none", "random", "divprune", "vispruner", "uniform"} == {row["pruner"] for row in rows}
