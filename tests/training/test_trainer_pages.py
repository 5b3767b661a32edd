"""docs/trainers: each page's start runs and prints what it says, and its metrics are those that the trainer logs."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from tests.training.conftest import POLICY, make_dataset
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.cli.main import make_parser
from tprl_hf.pruners import VisPruner
from tprl_hf.training import generate_demonstrations, tune_lvlm
from tprl_hf.training.stages import STAGES

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((DOCS / "trainers").glob("*.md"))}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
HEADINGS = ["Overview", "Start", "The method, in the order of the code", "What is logged", "Implementation details"]


def blocks(language: str, page: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)


def test_each_trainer_has_its_page_and_each_page_the_same_plan():
    assert PAGES.keys() == {name for name, stage in STAGES.items() if stage.trainer} | {"tune"}
    linked = re.findall(r"\]\(trainers/(\w+)\.md\)", (DOCS / "training.md").read_text(encoding="utf-8"))
    assert set(linked) == PAGES.keys()
    for name, page in PAGES.items():
        found = re.findall(r"^## (.*)$", page, re.M)
        assert [heading for heading in found if heading in HEADINGS] == HEADINGS and "Arguments" in found, name
        assert len(blocks("python", page)[0].splitlines()) <= 20, name


def test_the_commands_of_the_pages_are_understood():
    commands = [line for page in PAGES.values() for line in re.findall(r"(?:^|`)tprl (.*?)(?:`|$)", page, re.M)]
    assert commands
    for words in commands:
        make_parser().parse_args(shlex.split(words))


@pytest.mark.parametrize("name", PAGES)
def test_the_start_prints_what_the_page_says(name, tmp_path, monkeypatch, capsys):
    """Numbers may differ a little: where rounding differs, so do some of the bits that are drawn."""
    if name == "tune":
        pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile("\n".join(blocks("python", PAGES[name])), f"{name}.md", "exec"), {})
    (expected,) = blocks("text", PAGES[name])
    wanted = expected.splitlines()
    printed = capsys.readouterr().out.splitlines()[-len(wanted) :]
    assert [NUMBER.sub("#", line) for line in printed] == [NUMBER.sub("#", line) for line in wanted]
    numbers = [[float(one) for line in lines for one in NUMBER.findall(line)] for lines in (printed, wanted)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.1, abs=0.11)


# ---- metrics ----


def documented(page: str) -> set[str]:
    """The names of the first column under "What is logged"."""
    section = page.split("## What is logged\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


class Logged(TrainerCallback):
    """Collects the names of all that is logged, with R for budgets and NAME for reward functions."""

    def __init__(self):
        self.names: set[str] = set()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.names |= {re.sub(r"(?<=^rewards/)\w+", "NAME", re.sub(r"@[\d.]+$", "@R", name)) for name in logs}


def says_nothing_of_some(prompts, completions, **columns):
    return [None if number % 3 == 0 else float(len(text)) for number, text in enumerate(completions)]


QUIET = {"disable_tqdm": True, "use_cpu": True, "max_steps": 2, "logging_steps": 1, "save_strategy": "no"}
MASKS = {"per_device_train_batch_size": 4, "num_mini_batches": 1, "eval_keep_ratios": [0.5]}
# What makes a tiny random model log everything.
SETTINGS = {
    "autoencoder": {},
    "lfd": {"eval_keep_ratios": [0.5]},
    "ppo": {**MASKS, "num_ppo_epochs": 1},
    "grpo": {**MASKS, "num_iterations": 1, "num_generations": 3},
    "mapo": {
        **MASKS,
        "per_device_train_batch_size": 8,
        "num_iterations": 1,
        "num_generations": 3,
        "efficiency_coef": 1.0,
    },
    "counterfactual": {**MASKS, "num_flips": 2, "num_generations": 3},
    "noise_gate": MASKS,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_page_explains_what_is_logged_and_nothing_else(name, make_model, processor, tmp_path):
    logged, data = Logged(), make_dataset()
    config, trainer = STAGES[name].classes()
    train = data if name != "lfd" else generate_demonstrations(VisPruner(), make_model(), processor, data)
    without = {"train_dataset": train.remove_columns("answer"), "eval_dataset": data.remove_columns("answer")}
    runs: list[tuple[dict, dict]] = [({}, {"train_dataset": train, "eval_dataset": data})]
    if name == "lfd":
        runs.append(({}, without))
    elif name != "autoencoder":
        runs = [({"score": "logprob"}, runs[0][1]), ({"score": "kl"}, without)]
    if STAGES[name].takes_rewards:
        runs.append(({}, {**without, "reward_funcs": [says_nothing_of_some]}))
    for number, (settings, arguments) in enumerate(runs):
        args = config(str(tmp_path / str(number)), **{**QUIET, **SETTINGS[name], **settings})
        made = trainer(make_model(), args, processing_class=processor, callbacks=[logged], **arguments)
        made.train()
        passes = getattr(made, "num_scored", None)
        made.evaluate()
        assert getattr(made, "num_scored", None) == passes  # measuring is not part of the cost of training
    assert documented(PAGES[name]) == logged.names


def test_the_page_of_tuning_explains_what_trl_logs(base, processor, tmp_path):
    trl = pytest.importorskip("trl")
    model = TPRLForConditionalGeneration.from_base_model(base, policy_training={"stage": "lfd"}, **POLICY)
    config = trl.SFTConfig(
        str(tmp_path), report_to="none", bf16=False, max_length=None, per_device_train_batch_size=2, **QUIET
    )
    log = tune_lvlm(model, processor, make_dataset(), config, [1, 0.5], {"r": 4})
    assert documented(PAGES["tune"]) == {name for entry in log for name in entry} - {"step"}


def test_what_counterfactual_credit_brought_is_what_the_files_say():
    results = DOCS / "results"
    read = {
        name: json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        for name in (
            "mosaic_llava/counterfactual_training",
            "mosaic_llava/other_start",
            "photo_llava/seeds",
            "photo_llava/seeds_imitation",
        )
    }
    stages, other = read["mosaic_llava/counterfactual_training"]["stages"], read["mosaic_llava/other_start"]
    validation = [stages["lfd"], stages["ppo"], other["lfd"], other["counterfactual"]]
    rows = [[one["metrics"][f"accuracy@{share}"] for share in ("0.333", "0.111", "0.056")] for one in validation]
    for name in ("photo_llava/seeds_imitation", "photo_llava/seeds"):
        accuracy = {row["budget"]: row["accuracy"]["photo"] for row in read[name]["rows"] if row["pruner"] != "random"}
        rows.append([100 * accuracy[budget] for budget in ("1/3", "1/9", "1/18")])
        assert f"unpruned {100 * accuracy['1']:.1f})" in PAGES["counterfactual"]
    table = re.findall(r"^\| [^|]*[a-z][^|]* \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGES["counterfactual"], re.M)
    assert [list(cells) for cells in table] == [[f"{value:.1f}" for value in row] for row in rows]
    assert abs(validation[1]["metrics"]["accuracy"] - validation[3]["metrics"]["accuracy"]) < 0.1  # the same place
