"""`tprl report`: pages of real trainings and evaluations, finished, cut off in the middle, or damaged."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from tests.families.tiny_models import build
from tests.families.tiny_processor import make_processor
from tests.training.conftest import make_dataset
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.cli.main import main
from tprl_hf.evaluation.broken import broken_questions
from tprl_hf.evaluation.compare_pruners import Record, Setting
from tprl_hf.missing_packages import load_processor
from tprl_hf.pruners import UniformPruner
from tprl_hf.report.charts import Series, box_chart, line_chart, ticks
from tprl_hf.report.evaluation_page import read_results
from tprl_hf.report.runs import disk_of, json_lines, read_training
from tprl_hf.report.shown import ShownGrid, ShownPictures, ShownSample, veil_of
from tprl_hf.report.training_page import training_page
from tprl_hf.report.two_evaluations import difference, read_evaluation
from tprl_hf.style import PALETTE, colour_of, repeats_colour

POLICY = {"latent_dim": 16, "policy_num_heads": 4, "policy_dim": 16}
STAGE = {"max_steps": 4, "logging_steps": 1, "disable_tqdm": True, "use_cpu": True, "save_steps": 2}
MEASURED = {**STAGE, "eval_strategy": "steps", "eval_steps": 1, "eval_keep_ratios": ["1/2", "1/4"]}
VOID = {"meta", "br"}


class Reader(HTMLParser):
    """Texts and tags of a page; fails where a tag is closed that was not open, or stays open."""

    def __init__(self, page: str):
        super().__init__()
        self.texts, self.open, self.tags = [], [], []
        self.feed(page)
        assert self.open == [], f"still open: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def check_page(path: Path) -> Reader:
    """A page is well-formed, loads nothing and runs nothing, and names no place of this machine."""
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"<script|<link|@import|src=|https?://", page)
    assert "nan" not in re.sub(r"data:[^)]*", "", page).lower().split()
    assert str(path.parent) not in page
    return Reader(page)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A whole recipe: PPO on a tiny LLaVA, with pictures that are watched."""
    folder = tmp_path_factory.mktemp("trained")
    model = build("llava")
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder / "base")
    make_processor().save_pretrained(folder / "base")
    make_dataset().save_to_disk(str(folder / "data"))
    source = {"source": str(folder / "data")}
    recipe = {
        "base_model": str(folder / "base"),
        "output_dir": str(folder / "run"),
        "policy": POLICY,
        "data": {"train": source, "validation": source},
        "autoencoder": STAGE,
        "ppo": {**MEASURED, "per_device_train_batch_size": 2, "num_mini_batches": 1, "num_ppo_epochs": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", "all", "--config", str(folder / "recipe.yaml"), "--quiet"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "out"
    words = ["--num-samples", "8", "--keep-ratios", "1/2,1/4", "--pruners", "uniform,divprune,resize"]
    base = trained.parent / "base"
    assert main(["evaluate", str(base), *words, "--max-new-tokens", "2", "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def report(*words: str) -> None:
    assert main(["report", *map(str, words)]) == 0


class TestTraining:
    def test_a_page_has_stages_curves_masks_settings_and_versions(self, run):
        report(run)
        page = check_page(run / "report.html")
        text = " ".join(page.texts)
        for said in (
            *("autoencoder", "ppo", "finished", "accuracy, 0.500 kept", "keep masks that the LLM has scored"),
            *("Reward and its parts", "Entropy", "Approximate KL divergence", "Clip fraction", "Explained variance"),
            *("The same pictures over time", "step 0", "step 4", "word", "Tokens kept by question type"),
            *("per_device_train_batch_size", "transformers", "cpu", "MB"),
        ):
            assert said in text, said
        assert "base_model" in text and str(run) not in text

    def test_pictures_are_the_same_at_all_times_and_masks_have_their_budget(self, run):
        stage = read_training(run).stage("ppo")
        assert len(stage.samples) == 4  # of four pictures that differ
        assert [line["step"] for line in stage.masks] == [0, 1, 2, 3, 4]
        for line in stage.masks:
            for masks in line["masks"]:
                assert [mask.count("1") for mask in masks] == [8, 4]
            for budget, by_type in enumerate(line["kept_by_type"]):
                least, *_, most = by_type["existence"]
                assert least <= (8, 4)[budget] <= most
        report(run)
        page = (run / "report.html").read_text()
        assert page.count("data:image/webp") == 4  # each once, though it is shown ten times
        assert page.count('class="picture i') == 4 * 5 * 2

    def test_the_log_has_each_row_and_when_it_was(self, run):
        rows = json_lines(run / "ppo" / "log.jsonl")
        assert rows[0]["start"]["max_steps"] == 4 and rows[0]["start"]["settings"]["max_steps"] == 4
        history = json.loads((run / "ppo" / "training.json").read_text())["log_history"]
        assert [{k: v for k, v in row.items() if k != "time"} for row in rows[1:]] == history
        times = [row["time"] for row in rows[1:]]
        assert times == sorted(times) and times[0] >= rows[0]["start"]["time"]

    def test_a_run_that_was_cut_off_resumes_its_log_where_its_checkpoint_is(self, run, trained, tmp_path, capsys):
        ppo = run / "ppo"
        (ppo / "training.json").unlink()
        shutil.rmtree(ppo / "checkpoint-4")
        report(run)
        text = " ".join(check_page(run / "report.html").texts)
        assert "not finished: step 4 of 4, last log" in text
        recipe = yaml.safe_load((trained.parent / "recipe.yaml").read_text())
        recipe["output_dir"] = str(run)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        assert main(["train", "all", "--config", str(tmp_path / "recipe.yaml"), "--quiet"]) == 0
        stage = read_training(run).stage("ppo")
        assert [start["step"] for start in stage.starts] == [0, 2]
        assert [row["step"] for row in stage.history if "objective/reward" in row] == [1, 2, 3, 4]
        before = read_training(trained).stage("ppo")
        assert stage.masks == before.masks  # as those of an unbroken run
        report(run)
        assert "2 starts" in " ".join(check_page(run / "report.html").texts)

    def test_without_a_log_the_newest_checkpoint_tells_the_curves(self, run):
        ppo = run / "ppo"
        for name in ("training.json", "log.jsonl", "watched.json", "watched_masks.jsonl"):
            (ppo / name).unlink()
        stage = read_training(run).stage("ppo")
        assert stage.step == 4 and not stage.is_finished and stage.max_steps == 4
        report(ppo, "--output", run / "page.html")
        assert "Reward and its parts" in " ".join(check_page(run / "page.html").texts)

    def test_half_written_lines_are_left_out(self, run):
        log = run / "ppo" / "log.jsonl"
        whole = log.read_text()
        log.write_text(whole[: len(whole) - 30])
        (run / "ppo" / "training.json").write_text("{")
        rows = read_training(run).stage("ppo").history
        assert len(rows) == len(whole.splitlines()) - 2
        report(run)
        check_page(run / "report.html")

    def test_a_directory_that_is_deleted_meanwhile_does_not_count(self, tmp_path, monkeypatch):
        """A run that keeps few checkpoints deletes older ones while a live page is written."""
        (tmp_path / "checkpoint-1").mkdir()
        (tmp_path / "checkpoint-1" / "weights").write_text("many")
        (tmp_path / "log.jsonl").write_text("{}\n")
        lstat = Path.lstat

        def deleted(path):
            if path.name == "weights":
                shutil.rmtree(path.parent)
            return lstat(path)

        monkeypatch.setattr(Path, "lstat", deleted)
        assert disk_of(tmp_path) == {"checkpoints": 0, "else": 3}

    def test_a_run_that_counts_no_passes_is_drawn_beside_one_that_does(self, tmp_path):
        for name, passes in (("old", {}), ("new", {"llm_passes": 64})):
            (tmp_path / name / "ppo").mkdir(parents=True)
            rows = [{"step": step, "eval_reward": 0.5, **passes} for step in (1, 2)]
            (tmp_path / name / "ppo" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        page = training_page([read_training(tmp_path / name) for name in ("old", "new")], "tprl report old new")
        assert page.count("<polyline") == 2 and "optimizer step" in page

    def test_two_runs_lie_over_each_other(self, run, tmp_path):
        other = tmp_path / "other" / "run"
        shutil.copytree(run, other)
        settings = json.loads((other / "ppo" / "settings.json").read_text())
        settings["ppo"]["learning_rate"] = 0.5
        (other / "ppo" / "settings.json").write_text(json.dumps(settings))
        report(run, other, "--output", tmp_path / "both.html")
        page = check_page(tmp_path / "both.html")
        text = " ".join(page.texts)
        names = "/".join(run.parts[-2:]), "other/run"
        assert all(f"accuracy, 0.500 kept, {name}: " in text for name in names)  # under the pointer
        assert f"Whole lines are {names[0]}, dashed ones {names[1]}." in text
        different = text.split("Settings that differ")[-1].split("All settings")[0]
        assert "learning_rate" in different and "0.5" in different and "max_steps" not in different
        dashed = [
            attributes for tag, attributes in page.tags if tag == "polyline" and "stroke-dasharray" in attributes
        ]
        assert len(dashed) == len([1 for tag, _ in page.tags if tag == "polyline"]) / 2

    def test_stages_behind_links_have_the_names_of_the_links(self, tmp_path):
        for run, name in (("one", "grpo-aaa"), ("two", "grpo-bbb")):
            (tmp_path / "stages" / name).mkdir(parents=True)
            rows = [{"step": step, "eval_reward": 0.5} for step in (1, 2)]
            (tmp_path / "stages" / name / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (tmp_path / run).mkdir()
            (tmp_path / run / "grpo").symlink_to(tmp_path / "stages" / name)
        found = [read_training(tmp_path / run) for run in ("one", "two")]
        assert [[stage.name for stage in one.stages] for one in found] == [["grpo"], ["grpo"]]
        assert "grpo-aaa" not in training_page(found, "tprl report one two")

    def test_live_pages_are_written_again_until_the_command_is_stopped(self, run):
        words = [sys.executable, "-m", "tprl_hf.cli.main", "report", str(run), "--live", "1"]
        process = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            text=True,
            # a shell starts what runs in its background deaf to Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            assert process.stdout.readline().startswith("Written: ")
            page = run / "report.html"
            assert '<meta http-equiv="refresh" content="1">' in page.read_text()
            with (run / "ppo" / "log.jsonl").open("a") as log:
                log.write(json.dumps({"step": 5, "my/metric": 0.25, "time": time.time()}) + "\n")
            deadline = time.monotonic() + 60
            while "my/metric" not in page.read_text():
                assert time.monotonic() < deadline
                time.sleep(0.2)
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "http-equiv" not in page.read_text() and "my/metric" in page.read_text()

    def test_what_cannot_be_reported_is_said(self, run, tmp_path, capsys):
        (tmp_path / "empty").mkdir()
        for words, message in {
            (tmp_path / "none",): "There is no directory",
            (tmp_path / "empty",): "holds no training",
            (run, run, run): "At most two",
            (run, "--output", tmp_path): "is a directory",
        }.items():
            assert main(["report", *map(str, words)]) == 2
            assert message in capsys.readouterr().err


class TestEvaluation:
    def test_the_page_of_an_evaluation(self, evaluated):
        text = " ".join(check_page(evaluated / "results.html").texts)
        for said in (
            "Accuracy and tokens",
            "Accuracy and operations",
            "1/4 of the tokens kept",
            "Broken: correct with",
        ):
            assert said in text, said
        report(evaluated)
        assert (evaluated / "report.html").read_text() == (evaluated / "results.html").read_text()

    def test_what_was_broken_is_counted_and_shown_with_both_answers(self, trained, evaluated, tmp_path):
        """The tiny model answers nothing correctly, so the scores are made up; pictures and masks are real."""
        base = str(trained.parent / "base")
        model, processor = TPRLForConditionalGeneration.from_base_model(base), load_processor(base)
        samples = list(make_dataset())
        settings = [
            Setting("none", "1", None, {"prune": False}),
            Setting("uniform", "1/4", UniformPruner(), {"keep_ratio": 1 / 4}),
            Setting("resize", "1/4", None, {"prune": False}, picture_ratio=1 / 4),
        ]
        records = [
            Record(setting.pruner, setting.budget, number, f"{setting.pruner} says", score, kept, 16)
            for setting, kept in zip(settings, (16, 4, 4), strict=True)
            for number in range(8)
            for score in [{"none": number < 6, "uniform": number % 2, "resize": True}[setting.pruner] * 1.0]
        ]
        broken = broken_questions(model, processor, samples, settings, records)
        counts = {row["pruner"]: row["by_type"]["existence"] for row in broken["counts"]}
        assert counts == {"uniform": [3, 1, 8], "resize": [0, 2, 8]}
        assert [case["sample"] for case in broken["cases"]] == [0, 2, 4]
        assert all(case["keep_mask"].count("1") == 4 for case in broken["cases"])

        shutil.copytree(evaluated, tmp_path / "out")
        (tmp_path / "out" / "broken.json").write_text(json.dumps(broken))
        report(tmp_path / "out")
        text = " ".join(check_page(tmp_path / "out" / "report.html").texts)
        assert text.count("none says") == text.count("uniform says") == 3 and "3 of 8" in text
        for number in (0, 2, 4):
            assert samples[number]["prompt"] in text

    def test_a_picture_of_another_size_has_its_own_grid(self, trained):
        base = str(trained.parent / "base")
        model, processor = TPRLForConditionalGeneration.from_base_model(base), load_processor(base)
        settings = [
            Setting("none", "1", None, {"prune": False}),
            Setting("resize+uniform", "1/8", UniformPruner(), {"keep_ratio": 1 / 8}, picture_ratio=1 / 2),
        ]
        records = [Record(one.pruner, one.budget, 0, "", float(one is settings[0]), 2, 16) for one in settings]
        broken = broken_questions(model, processor, list(make_dataset())[:1], settings, records)
        (case,) = broken["cases"]
        small = broken["samples"][case["shown"]]
        assert broken["samples"]["0"]["num_visual"] == 16 > small["num_visual"] == len(case["keep_mask"])
        assert case["keep_mask"].count("1") == 2

    def test_an_unfinished_or_mixed_evaluation_is_refused(self, evaluated, trained, tmp_path, capsys):
        shutil.copytree(evaluated, tmp_path / "half")
        (tmp_path / "half" / "results.json").unlink()
        for words, message in {
            (tmp_path / "half",): "let its command finish",
            (evaluated, trained): "pass two of one kind",
            (evaluated, evaluated, evaluated): "`tprl table` joins more",
            (evaluated, "--live"): "not live",
        }.items():
            assert main(["report", *map(str, words)]) == 2
            assert message in capsys.readouterr().err


class TestTwoEvaluations:
    """Real rows of a tiny model, which answers nothing correctly, so that scores are made up."""

    ANSWERED = 0, 1, 6, 7

    @pytest.fixture
    def pair(self, evaluated, tmp_path) -> list[Path]:
        """The first one answers only unpruned, the second one some pruned too: two of six about a picture, and both
        about another."""
        folders = []
        for name, correct in (("first", ()), ("second", self.ANSWERED)):
            folder = tmp_path / name
            shutil.copytree(evaluated, folder)
            lines = json_lines(folder / "answers.jsonl")
            for line in lines:
                line["score"] = float(line["pruner"] == "none" or line["sample"] in correct)
                line["answer"] = f"{name} says {line['sample']}"
            (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            folders.append(folder)
        return folders

    def test_curves_lie_over_each_other_and_differences_are_paired(self, pair, tmp_path):
        report(*pair, "--output", tmp_path / "both.html")
        page = check_page(tmp_path / "both.html")
        text = " ".join(page.texts)
        assert "Whole lines and filled marks are first, dashed lines and hollow marks second." in text
        marks = [attributes["class"] for tag, attributes in page.tags if tag in ("circle", "polygon", "rect")]
        assert sum(mark.startswith("hollow") for mark in marks) > 0
        assert "second compared with first (pp)" in text and "+50.0 [+33.3, +100.0]" in text
        curves = [attributes for tag, attributes in page.tags if tag == "polyline"]
        assert len(curves) == 2 * len([one for one in curves if "stroke-dasharray" in one]) > 0
        rows = read_results(pair[0])["rows"]
        for row in rows[1:]:  # unpruned alike, all others with four of eight questions more
            better = difference(*map(read_evaluation, pair, ("a", "b")), (row["pruner"], row["budget"]))
            # pictures are drawn, not questions
            assert (better.value, better.low, better.high, better.count) == (0.5, pytest.approx(1 / 3), 1, 8)
        unpruned = difference(*map(read_evaluation, pair, ("a", "b")), ("none", "1"))
        assert (unpruned.value, unpruned.low, unpruned.high) == (0, 0, 0)
        assert text.count("4 of 8") == text.count("0 of 8") - 2 == len(rows) - 1

    def test_what_one_broke_and_the_other_answered_is_shown_with_the_mask_of_the_first(self, pair, trained, tmp_path):
        base = str(trained.parent / "base")
        model, processor = TPRLForConditionalGeneration.from_base_model(base), load_processor(base)
        settings = [Setting("none", "1", None, {"prune": False}), Setting("uniform", "1/4", UniformPruner(), {})]
        settings[1].arguments["keep_ratio"] = 1 / 4
        records = [
            Record(one.pruner, one.budget, number, f"first says {number}", float(one.pruner == "none"), kept, 16)
            for one, kept in zip(settings, (16, 4), strict=True)
            for number in range(8)
        ]
        broken = broken_questions(model, processor, list(make_dataset()), settings, records)
        (pair[0] / "broken.json").write_text(json.dumps(broken))
        report(*pair, "--output", tmp_path / "both.html")
        text = " ".join(check_page(tmp_path / "both.html").texts)
        asked = [case["sample"] for case in broken["cases"]]
        assert "uniform, 1/4 kept: broken in first, answered in second" in text
        assert any(number in self.ANSWERED for number in asked)
        for number in asked:
            is_shown = number in self.ANSWERED
            assert (f"second says {number}" in text) == (f"first says {number}" in text) == is_shown

    def test_other_questions_are_not_compared_one_by_one(self, pair, tmp_path):
        results = read_results(pair[1])
        (pair[1] / "results.json").write_text(json.dumps({**results, "questions": "others", "seed": 8}))
        report(*pair, "--output", tmp_path / "both.html")
        text = " ".join(check_page(tmp_path / "both.html").texts)
        assert "They asked different questions" in text and "compared with first" not in text
        assert "Questions that only one answered" not in text
        different = text.split("What differs")[-1].split("What is alike")[0]
        assert "seed" in different and "num_samples" not in different

    def test_seeds_of_an_earlier_command_do_not_count(self, pair):
        before = read_evaluation(pair[1], "b").answers["random", "1/4"]
        lines = json_lines(pair[1] / "answers.jsonl")
        more = [{**line, "seed": 99, "score": 1 - line["score"]} for line in lines if line["pruner"] == "random"]
        (pair[1] / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, *more]))
        assert more and read_evaluation(pair[1], "b").answers["random", "1/4"] == before

    def test_rows_of_one_alone_have_no_difference(self, pair, tmp_path):
        results = read_results(pair[1])
        results["rows"] = [row for row in results["rows"] if row["pruner"] != "divprune"]
        (pair[1] / "results.json").write_text(json.dumps(results))
        lines = [line for line in json_lines(pair[1] / "answers.jsonl") if line["pruner"] != "divprune"]
        (pair[1] / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        first, second = map(read_evaluation, pair, ("a", "b"))
        assert difference(first, second, ("divprune", "1/4")) is None
        report(*pair, "--output", tmp_path / "both.html")
        check_page(tmp_path / "both.html")

    def test_names_are_escaped(self, pair, tmp_path):
        named = tmp_path / "<b>"
        pair[1].rename(named)
        report(pair[0], named, "--output", tmp_path / "both.html")
        assert "<b>second" not in (tmp_path / "both.html").read_text()
        assert "&lt;b&gt;" in (tmp_path / "both.html").read_text()
        check_page(tmp_path / "both.html")


class TestCharts:
    def test_an_axis_is_in_round_numbers_and_bars_begin_at_zero(self):
        assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
        drawn = Reader(box_chart("Kept", {"all": (2, 3, 4, 5, 9)}, "tokens", 16))
        zero = next(attributes for tag, attributes in drawn.tags if attributes.get("class") == "zero")
        box = next(attributes for tag, attributes in drawn.tags if tag == "rect")
        left, scale = float(zero["x1"]), (float(box["x"]) - float(zero["x1"])) / 3
        assert left + 16 * scale == pytest.approx(406, abs=0.5)

    def test_points_that_are_not_numbers_are_left_out_and_nothing_is_an_empty_string(self):
        assert line_chart("Nothing", [Series("a", [(0, float("nan"))])], "x", "y") == ""
        drawn = Reader(line_chart("Some", [Series("a", [(0, 1.0), (1, float("inf")), (2, 3.0)])], "x", "y"))
        points = [attributes["points"] for tag, attributes in drawn.tags if tag == "polyline"]
        assert len(points) == 1 and len(points[0].split()) == 2

    def test_one_point_and_equal_points_have_an_axis(self):
        Reader(line_chart("One", [Series("a", [(5, 0.0)])], "x", "y", x_from_zero=False))

    def test_long_curves_are_thinned(self):
        drawn = line_chart("Long", [Series("a", [(x, x % 7) for x in range(5000)])], "x", "y")
        assert len(drawn) < 10_000

    def test_names_are_escaped(self):
        drawn = line_chart("<b>", [Series("<i>", [(0, 1), (1, 2)])], "<x>", "<y>")
        assert not re.search("<i>|<x>|<y>", drawn) and "&lt;i&gt;" in drawn

    def test_no_two_colours_are_alike(self):
        assert len(set(PALETTE)) == len(PALETTE)

    @pytest.mark.parametrize("with_learned", [False, True])
    def test_no_two_series_look_alike(self, with_learned):
        """As many as two rounds of the colours that are free: black is the learned policy's."""
        names = ["learned"][: int(with_learned)] + list("abcdefghijkl")
        assert len({(colour_of(name, names), repeats_colour(name, names)) for name in names}) == len(names)


class TestShown:
    def test_the_veil_lies_over_pruned_patches_alone(self):
        grid = ShownGrid("", 2, 3, [0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2])
        path = re.search(r'class="mask" d="([^"]*)"', veil_of(grid, "100110"))[1]
        assert path == "M48 0h96v48h-96zM96 48h48v48h-48z"

    def test_a_sample_survives_its_file(self):
        sample = ShownSample("Where?", None, "all", 1, [ShownGrid("data:,", 1, 1, [0], [0], [0])])
        assert ShownSample.from_json(json.loads(json.dumps(sample.as_json()))) == sample

    def test_texts_are_escaped(self):
        panel = ShownPictures().panel(ShownSample("", None, "all", 0, []), None, "<b>", "<i>", True)
        assert "&lt;b&gt;" in panel and "&lt;i&gt;" in panel and 'class="correct"' in panel
