"""What training costs: the hours of docs/at_real_size.md are those that its command prints, and work adds up."""

import json
import re
import sys
from pathlib import Path

import pytest

from tprl_hf.evaluation import training_costs
from tprl_hf.evaluation.training_costs import (
    Prompts,
    Speed,
    Work,
    demonstration_work,
    kept_in_rollouts,
    noise_gate_work,
    rollout_work,
    supervised_work,
)
from tprl_hf.training import AutoencoderConfig, CounterfactualConfig, NoiseGateConfig, TPRLGRPOConfig, TPRLPPOConfig

PAGE = (Path(__file__).parents[2] / "docs" / "at_real_size.md").read_text(encoding="utf-8")
PROMPTS = Prompts(visual=100, text=10)


@pytest.fixture
def printed(monkeypatch, capsys):
    """What the command prints: hours of each stage, and their sum."""

    def run(*words: str) -> dict[str, float]:
        monkeypatch.setattr(sys, "argv", ["training_costs", *words])
        training_costs.main()
        lines = capsys.readouterr().out.splitlines()[1:]
        return {line.split()[0]: float(line.split()[-1]) for line in lines}

    return run


def test_the_hours_of_the_page_are_those_of_the_command(printed):
    hours = printed()
    assert list(hours) == ["autoencoder", "demonstrations", "lfd", "ppo", "sum"]
    assert f"about {hours['sum']:.0f} h |" in PAGE
    (passes,) = re.findall(r"`ppo\.num_train_epochs=(\d+)`\) \| 48 \|", PAGE)
    assert round(printed("--epochs", passes)["sum"]) == 48
    (faster,) = re.findall(r"one H100 at 720 TFLOP/s, all 200 passes \| (\d+) \|", PAGE)
    assert round(printed("--tflops", "720")["sum"]) == int(faster)
    (last,) = re.findall(r"with `--last-masks`\) \| (\d+) \|", PAGE)
    assert round(printed("--last-masks")["sum"]) == int(last)


def test_twice_as_many_questions_cost_twice_and_a_faster_machine_less(printed):
    once, twice = printed("--questions", "10240"), printed("--questions", "20480")
    assert twice["sum"] == pytest.approx(2 * once["sum"], rel=0.02)
    slow = printed("--questions", "10240", "--images-per-second", "1")
    assert slow["ppo"] == once["ppo"] and slow["autoencoder"] > 5 * once["autoencoder"]  # PPO finds all encoded


def test_what_is_read_from_a_cache_is_not_encoded_again():
    """Over the epochs each visit of an image is either a pass through the tower or a read."""
    for config, work in (
        (AutoencoderConfig("x", num_train_epochs=3), supervised_work),
        (TPRLPPOConfig("x", num_train_epochs=3), rollout_work),
    ):
        for hits in (0.0, 0.25, 1.0):
            found = work(config, 640, PROMPTS, 1000.0, hits)
            assert found.images + found.read_bytes / 1000 == pytest.approx(3 * 640)
            assert found.images == pytest.approx(640 + 2 * 640 * (1 - hits))


def test_each_keep_mask_of_a_rollout_is_counted():
    """Those after each step, those of the last step alone, and a counterfactual's one and its flips."""
    budgets = {"rollout_keep_ratios": [0.2, 0.4], "num_steps": 3, "num_generations": 2}
    assert kept_in_rollouts(TPRLGRPOConfig("x", **budgets)) == pytest.approx([0.5, 0.25, 0.3] * 2)
    last = TPRLGRPOConfig("x", **budgets, score_every_step=False)
    assert kept_in_rollouts(last) == pytest.approx([0.3] * 2)
    assert kept_in_rollouts(TPRLPPOConfig("x", num_steps=2, score_every_step=False)) == pytest.approx([0.7 * 0.35])
    free = kept_in_rollouts(TPRLPPOConfig("x", num_steps=2, lambda_disc=0.5, num_generations=1))
    assert free == pytest.approx([0.7, 0.7 * 0.35])
    flips = CounterfactualConfig("x", rollout_keep_ratios=[0.2, 0.4], num_flips=5)
    sixteen = budgets | {"num_generations": 16, "score_every_step": False}
    some = TPRLGRPOConfig("x", **sixteen, min_spread=0.1, num_probes=4)
    assert len(kept_in_rollouts(some)) == 7  # four, and of a quarter of the questions twelve more
    assert kept_in_rollouts(flips) == pytest.approx([0.3] * 6 * flips.num_generations)
    limited = TPRLGRPOConfig("x", max_llm_passes=60, num_train_epochs=100, **budgets)
    assert rollout_work(limited, 1000, PROMPTS, 1.0, 1.0).images == 10  # six masks a visit


def test_noise_gates_cost_the_llm_three_passes_of_each_prompt():
    config = NoiseGateConfig("x", max_steps=10, per_device_train_batch_size=4)
    work = noise_gate_work(config, 640, PROMPTS, 1000.0, 0.0)
    assert work.llm_tokens == 3 * 40 * 110 and work.images == work.updates * 4 == 40


def test_reading_takes_time_only_where_it_is_slower_than_the_llm():
    work = Work(images=1, llm_tokens=10, read_bytes=100) + Work(updates=2)
    assert work == Work(images=1, llm_tokens=10, updates=2, read_bytes=100)
    speed = Speed(image=1.0, llm_token=0.1, update=0.5, read_byte=0.01)
    assert speed.seconds(work) == pytest.approx(3.0)
    assert Speed(image=1.0, llm_token=0.1, update=0.5, read_byte=1.0).seconds(work) == pytest.approx(100.0)


def test_a_teacher_that_knows_the_answer_runs_the_llm():
    costs = {teacher: demonstration_work(teacher, 4, PROMPTS).llm_tokens for teacher in ("vispruner", "gradient")}
    assert costs == {"vispruner": 0, "gradient": 4 * 3 * 110}
    assert demonstration_work("leave-out", 4, PROMPTS).llm_tokens > costs["gradient"]


def test_rates_of_a_gpu_are_those_of_its_file(printed):
    """The table of docs/at_real_size.md, and what follows from it."""
    file = Path(__file__).parents[2] / "docs" / "results" / "gpu" / "rollouts_llava-1.5-7b.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    ways = {row["way"]: row for row in found["ways"]}
    page = " ".join(PAGE.split())
    for name, row in ways.items():
        ratios = [row[f"times the {naive}"] for naive in ("naive loop", "naive loop, features cached")]
        cells = [(row["rollouts_per_second"], row), *((ratio["median"], ratio) for ratio in ratios)]
        written = [f"{value:.2f} ({one['lowest']:.2f}–{one['highest']:.2f})" for value, one in cells]
        assert f"| {name} | {' | '.join(written)} | {row['llm_tokens_per_rollout']:.0f} |" in page
    later, updated, first = ways["later visits"], ways["later visits and updates"], ways["first visit"]
    tokens = later["rollouts_per_second"] * later["llm_tokens_per_rollout"]
    tflops = 2 * 6.74e9 * tokens / 1e12
    update = found["questions"] / 16 * (1 / updated["rollouts_per_second"] - 1 / later["rollouts_per_second"])
    more = first["llm_tokens_per_rollout"] - later["llm_tokens_per_rollout"]
    image = 1 / first["rollouts_per_second"] - 1 / later["rollouts_per_second"] - more / tokens
    assert f"{tflops:.0f} TFLOP/s in the LLM, {1e3 * update:.0f} ms for an update and {1 / image:.0f} images" in page
    words = re.search(r"training_costs (--tflops [^`]*)`\) the sum is (\d+) h again", page)
    assert words is not None
    assert words[1] == f"--tflops {tflops:.0f} --update-ms {1e3 * update:.0f} --images-per-second {1 / image:.0f}"
    assert round(printed(*words[1].split())["sum"]) == int(words[2])
