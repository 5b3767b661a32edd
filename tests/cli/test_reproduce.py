"""`tprl reproduce`: what it trains, what tables share, and what it writes."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch

from tprl_hf.cli import measured_runs, paper_tables, reproduce
from tprl_hf.cli.main import main
from tprl_hf.cli.paper_tables import read_table, runs_of, table_names
from tprl_hf.cli.stop_signals import StopSignals
from tprl_hf.loading import load_model
from tprl_hf.training.fingerprint import fingerprint, fingerprint_of_lvlm
from tprl_hf.training.stages import STAGES

SMALL = {
    "data.train": {"source": "mosaic", "seed": 100, "num_samples": 12},
    "data.validation.num_samples": 6,
    "autoencoder.max_steps": 1,
    "demonstrations.num_samples": 12,
    "demonstrations.batch_size": 6,
    "lfd.max_steps": 2,
    "lfd.per_device_train_batch_size": 4,
    "lfd.eval_steps": 1,
    "lfd.keep_best": False,  # else an untrained policy may be the best
    "ppo.max_steps": 4,
    "ppo.per_device_train_batch_size": 4,
    "ppo.eval_steps": 2,
    "ppo.keep_best": False,
}


@pytest.mark.parametrize("name", table_names())
@pytest.mark.parametrize("full", [False, True])
def test_each_table_names_recipes_and_settings_that_there_are(name, full, tmp_path):
    from tprl_hf.cli.train import check_stage

    table = read_table(name)
    runs = runs_of(table, tmp_path, full)
    assert len(runs) == sum(len(row.get("seeds", table.seeds)) for row in table.rows.values())
    for run in runs:
        for stage in run.stages:
            check_stage(stage, run.recipe)
        assert run.model.name == run.stages[-1] == table.rows[run.label].get("stage", table.stage)
        seeds = {run.recipe[stage]["seed"] for stage in run.stages if stage != "demonstrations"}
        assert seeds == {run.seed}


def test_what_is_equal_is_trained_once_and_what_differs_is_not_shared(tmp_path):
    runs = runs_of(read_table("table7"), tmp_path, full=False)
    by_stage = {stage: {run.directories[stage] for run in runs} for stage in runs[0].stages}
    assert {stage: len(paths) for stage, paths in by_stage.items()} == {
        "autoencoder": 1, "demonstrations": 1, "lfd": 1, "ppo": 5,
    }  # fmt: skip
    (figure,) = runs_of(read_table("fig4"), tmp_path, full=False)
    assert figure.directories == next(run for run in runs if run.label == "T = 3").directories

    widths = runs_of(read_table("fig2"), tmp_path, full=False)
    assert len({run.directories["autoencoder"] for run in widths}) == len(widths)
    assert {run.directories["demonstrations"] for run in widths} == by_stage["demonstrations"]
    full = runs_of(read_table("table7"), tmp_path, full=True)
    assert full[0].directories["ppo"] not in by_stage["ppo"]

    scratch = runs_of(read_table("table6"), tmp_path, full=False)[0]
    assert scratch.stages == ["autoencoder", "ppo"]


def test_a_row_of_another_recipe_has_it_as_it_is(tmp_path):
    from tprl_hf.cli.recipe_file import read_recipe

    table = replace(read_table("rival"), common={"lfd.max_steps": 2}, short={"lfd.logging_steps": 3})
    runs = {run.label: run for run in runs_of(table, tmp_path, full=False)}
    own = runs["counterfactual credit"]
    seeds = [f"{stage}.seed=2" for stage in ("autoencoder", "lfd", "counterfactual")]
    assert (own.recipe_name, own.seed) == ("mosaic_llava_counterfactual", 2)
    assert own.recipe == {**read_recipe(own.recipe_name, seeds), "output_dir": own.recipe["output_dir"]}
    others = [run for label, run in runs.items() if label != own.label]
    assert {(run.recipe_name, run.recipe["lfd"]["max_steps"]) for run in others} == {("mosaic_llava_policy", 2)}
    with_labels = next(run for run in runs_of(read_table("unlabelled"), tmp_path, False) if run.label == "with labels")
    assert with_labels.directories == own.directories  # what both tables compare with is one policy


@pytest.mark.parametrize("name", ["rival", "unlabelled", "table6"])
def test_a_page_is_what_its_file_says(name):
    folder = Path(__file__).parents[2] / "docs" / "results" / "paper"
    result = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    page = (folder / f"{name}.md").read_text(encoding="utf-8")
    assert reproduce.as_table(read_table(name), result) in page
    recipes = {row["recipe"] for row in read_table(name).rows.values() if "recipe" in row}
    assert all(f"by recipes/{recipe}.yaml as it is." in page for recipe in recipes)


def test_a_lora_is_of_the_policy_that_it_was_tuned_with(tmp_path, monkeypatch):
    table = read_table("table5")
    found = dict.fromkeys(("one", "other"))
    for digest in found:
        monkeypatch.setattr(paper_tables, "digest_of_start", lambda name, digest=digest: digest)
        found[digest] = runs_of(table, tmp_path, full=False)[0].directories["tune"]
    assert found["one"] != found["other"]
    monkeypatch.undo()
    assert paper_tables.digest_of_start(None) == fingerprint(load_model(None, "cpu", dtype="float32")[0])


def test_a_run_of_other_settings_does_not_read_the_stages_of_the_former_ones(tmp_path):
    table = read_table("table7")
    for short in (SMALL, {**SMALL, "ppo.max_steps": 6}):
        run = runs_of(replace(table, short=short), tmp_path, full=False)[0]
        run.link()
        assert run.model.resolve() == run.directories["ppo"].resolve()
        for stage, path in run.directories.items():
            assert (run.model.parent / stage).resolve() == path.resolve()


def test_a_table_that_there_is_not(capsys):
    assert main(["reproduce", "table9"]) == 2
    assert "There is no table 'table9'; there are fig2," in capsys.readouterr().err


def test_a_dry_run_says_how_long_it_takes_and_trains_nothing(tmp_path, capsys):
    where = ["--runs-dir", str(tmp_path / "runs"), "--output-dir", str(tmp_path / "out")]  # where no run is kept
    assert main(["reproduce", "table7", "fig4", *where, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "table7: Table 7: steps of a trajectory in training. 0 of 8 stages are trained" in out
    assert re.search(r"missing takes about 7[0-9] minutes", out)  # what fig4 shares is counted once
    assert not (tmp_path / "runs").exists()


def test_all_is_the_papers_and_more_is_the_rest(tmp_path, capsys):
    listed = {}
    for word in ("all", "more"):
        assert main(["reproduce", word, "--runs-dir", str(tmp_path), "--output-dir", str(tmp_path), "--dry-run"]) == 0
        listed[word] = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if "trained" in line]
    assert "table7" in listed["all"] and "teachers" in listed["more"] and not {*listed["all"]} & {*listed["more"]}


def test_from_nothing_to_a_table_and_a_figure(tmp_path, monkeypatch, capsys):
    def small(name):
        table = read_table(name)
        rows = {label: table.rows[label] for label in list(table.rows)[-1:]} if name == "table7" else table.rows
        rows = {**rows, "LfD": {"stage": "lfd", "seeds": [0]}} if name == "table7" else rows
        drawn = None if table.trajectories is None else {**table.trajectories, "num_samples": 2}
        return replace(
            table, rows=rows, short=SMALL, test={"seeds": [7], "num_samples": 12}, keep_ratios=["1/9"],
            trajectories=drawn, against="LfD" if name == "table7" else None,
        )  # fmt: skip

    monkeypatch.setattr(reproduce, "read_table", small)
    command = [
        "reproduce",
        "table7",
        "fig4",
        "--runs-dir",
        str(tmp_path / "runs"),
        "--output-dir",
        str(tmp_path / "out"),
    ]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "run 1 of 2, T = 5, seed 0" in out and "run 2 of 2, LfD" not in out  # its policy is there already

    result = json.loads((tmp_path / "out" / "table7.json").read_text())
    assert result["command"] == "tprl reproduce table7" and set(result["versions"]) == set(measured_runs.PACKAGES)
    assert str(tmp_path) not in json.dumps(result)
    assert [one["row"] for one in result["training"]] == ["T = 5", "LfD"]
    assert all(one["curve"] and set(one["seconds"]) <= set(STAGES) for one in result["training"])
    text = (tmp_path / "out" / "table7.md").read_text()
    for row in ("T = 5", "LfD", "rule: vispruner", "rule: random"):
        assert re.search(rf"^\| {row} \| [+-]\d+\.\d\d \[", text, re.MULTILINE), row
    assert "12 test questions (seeds 7), one training seed. *LfD*: of training seed 0." in text
    (less,) = [row["less row1"] for row in result["measured"]["rows"] if row["way"] == "row0"]
    assert f"\n| T = 5 | {100 * less['value']:+.2f} [" in text.partition("one training seed.")[2]
    assert "compared with the row *LfD*" in text and "Trained by recipes/mosaic_llava_paper.yaml, with" in text
    assert result["settings"] == SMALL and all(name in text for name in SMALL)
    assert (tmp_path / "out" / "table7.png").stat().st_size > 5000
    assert (tmp_path / "out" / "fig4.png").stat().st_size > 5000

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("training.json")}
    assert main(command) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("training.json")}
    out = capsys.readouterr().out
    assert "training. 2 of 2 runs are measured.\n" in out and "step. 4 of 4 stages are trained\n" in out
    runs = runs_of(small("table7"), tmp_path / "runs", full=False)
    assert paper_tables.minutes_left(runs, tmp_path / "runs") == 0

    # another machine has the results, but neither the policies nor the answers that are gone
    shutil.rmtree(tmp_path / "runs")
    kept = {path.name.partition("-")[0]: path for path in (tmp_path / "out" / "measured").iterdir()}
    assert set(kept) == {"ppo", "lfd", "rules"}
    kept["rules"].unlink()
    (tmp_path / "out" / "table7.json").unlink()
    here = ["reproduce", "table7", *command[3:]]
    assert main(here) == 0
    assert "run 1" not in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "table7.json").read_text()) == result

    found = json.loads(kept["lfd"].read_text())
    assert found["settings"]["lfd.max_steps"] == 2 and found["seed"] == 0 and found["recipe"] == "mosaic_llava_paper"
    for damaged in ("{", json.dumps(found | {"answers": {"1/9": {"correct": "ffff", "kept": 16}}}), json.dumps(
        found | {"answers": {"1/9": {"correct": "f0f0f0f0", "kept": 16, "on_boxes": 0.5}}}
    )):  # fmt: skip
        kept["lfd"].write_text(damaged)
        assert main(here) == 2
        err = capsys.readouterr().err
        assert f"{kept['lfd']} is damaged (" in err and "delete it to measure the run again." in err
    kept["lfd"].unlink()
    assert main([*here, "--dry-run"]) == 0
    assert "1 of 2 runs are measured. 0 of 3 stages are trained\n" in capsys.readouterr().out

    # what was kept of an LVLM with other weights does not count
    kept["lfd"].write_text(json.dumps(found | {"lvlm": "of another"}))
    assert main([*here, "--dry-run"]) == 0
    assert "1 of 2 runs are measured. 0 of 3 stages are trained\n" in capsys.readouterr().out


def test_the_digest_of_an_lvlm_is_that_before_its_lora_and_of_its_weights():
    model, _ = load_model(None, "cpu", dtype="float32")
    before = fingerprint_of_lvlm(model)
    layer = model.lvlm.model.language_model.layers[0].self_attn
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model.lvlm)
    assert isinstance(layer.q_proj, peft.tuners.lora.LoraLayer) and fingerprint_of_lvlm(model) == before
    with torch.no_grad():
        layer.k_proj.weight[0, 0] += 1
    assert fingerprint_of_lvlm(model) != before


def test_a_policy_of_other_weights_is_not_measured(tmp_path, monkeypatch):
    """`runs` may still hold what was trained before the LVLM was trained on."""
    table = read_table("table7")
    (run,) = (one for one in runs_of(table, tmp_path, full=False) if one.label == "T = 3")
    measured = measured_runs.MeasuredRuns(table, tmp_path)
    monkeypatch.setattr(measured_runs, "load_checkpoint", lambda name: load_model(None, "cpu", dtype="float32"))
    monkeypatch.setattr(measured_runs, "training_of", lambda one: {})
    monkeypatch.setattr(measured_runs, "digest_of", lambda recipe: "of another")
    with pytest.raises(ValueError, match=f"other weights of the LVLM.*: delete {tmp_path}"):
        measured.keep(run)
    with pytest.raises(ValueError, match=f"other weights of the LVLM.*: delete {tmp_path}"):
        measured.of_rules(run.recipe, lambda: load_model(None, "cpu", dtype="float32"))


def test_answers_are_kept_question_by_question():
    answers = {
        "correct": [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0],
        "kept": [16] * 9,
        "on_boxes": [0.25, 0.5] * 4 + [0.0],
    }
    kept = measured_runs.packed(answers)
    assert kept == {"correct": "9a80", "kept": 16, "on_boxes": 0.333333}
    assert measured_runs.unpacked(kept, 9) == answers | {"kept": [16.0] * 9, "on_boxes": [0.333333] * 9}


def test_what_is_kept_is_of_these_settings_and_these_questions_only(tmp_path):
    table = read_table("table7")
    (run,) = (one for one in runs_of(table, tmp_path, full=False) if one.label == "T = 3")

    def path(**changed):
        return measured_runs.MeasuredRuns(replace(table, **changed), tmp_path).path_of(run)

    assert path() == path() == path(title="another title")
    assert len({path(), path(test={"seeds": [8], "num_samples": 1400}), path(keep_ratios=["1/3"])}) == 3
    longer = next(one for one in runs_of(table, tmp_path, full=True) if one.label == "T = 3")
    elsewhere = next(one for one in runs_of(table, tmp_path / "elsewhere", full=False) if one.label == "T = 3")
    assert measured_runs.MeasuredRuns(table, tmp_path).path_of(longer) != path()
    assert measured_runs.MeasuredRuns(table, tmp_path).path_of(elsewhere) == path()


def test_a_table_of_commands_holds_what_they_print_and_is_not_made_twice(tmp_path):
    table = replace(read_table("table4"), commands=["flops llava-1.5-7b --num-keep 192"])
    with StopSignals() as signals:
        reproduce.reproduce(table, [], tmp_path, signals, "tprl reproduce table4", {})
    page = (tmp_path / "table4.md").read_text()
    assert page.startswith("# Table 4: KV cache") and "`tprl flops llava-1.5-7b --num-keep 192`\n\n```\n" in page
    assert "prefill G" in page.split("```")[-2] and "Command: tprl flops llava-1.5-7b --num-keep 192" in page
    assert json.loads((tmp_path / "table4.json").read_text())["command"] == "tprl reproduce table4"
    assert not (tmp_path / "table4").exists()  # the command wrote no files

    # what a command wrote into its directory is the answer, and counts as there
    (tmp_path / "out").mkdir()
    for name in ("results.md", "results.json", "results.png"):
        (tmp_path / "out" / name).write_text("made before")
    table = replace(table, name="out", title="A table", commands=["evaluate no-such-model --output-dir {out}"])
    with StopSignals() as signals:
        reproduce.reproduce(table, [], tmp_path, signals, "tprl reproduce out", {})
    assert (tmp_path / "out.md").read_text().endswith("made before\n![A table](out/results.png)\n")


def test_a_command_that_fails_ends_the_table(tmp_path, capsys):
    with pytest.raises(ValueError, match="`tprl flops no-such-preset` ended with 2"):
        reproduce.run_command("flops no-such-preset", tmp_path / "out")
    assert "no-such-preset" in capsys.readouterr().err


def test_a_signal_ends_the_command_and_says_what_resumes(tmp_path, monkeypatch, capsys):
    """The same answer as of `tprl train`: what is saved, and 128 + the signal."""

    def stopped(table, runs, folder, signals, command, settings):
        os.kill(os.getpid(), signal.SIGTERM)  # outside of a training step

    monkeypatch.setattr(reproduce, "reproduce", stopped)
    words = ["reproduce", "table4", "--runs-dir", str(tmp_path), "--output-dir", str(tmp_path / "out")]
    assert main(words) == 143
    err = capsys.readouterr().err
    assert "tprl reproduce: stopped by SIGTERM; no new checkpoint was saved. The same command resumes." in err


def test_a_curve_has_one_point_for_each_count():
    steps = [
        {"eval_accuracy": 50.0},
        {"llm_passes": 8, "eval_accuracy": 60.0},
        {"llm_passes": 16, "eval_accuracy": 55.0},
    ]
    best_again = {"llm_passes": 16, "eval_accuracy": 60.0}
    assert reproduce.curve_of([*steps, best_again], "llm_passes") == [(0, 50.0), (8, 60.0), (16, 55.0)]
