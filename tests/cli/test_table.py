"""`tprl table` joins what `tprl evaluate` wrote."""

import json
from pathlib import Path

import numpy as np
import pytest

from tprl_hf.cli.main import main
from tprl_hf.evaluation.runs_table import Run, as_texts, join_runs

WORDS = ["--num-samples", "8", "--keep-ratios", "1/2,1/4", "--max-new-tokens", "2"]


@pytest.fixture(scope="module")
def runs(base_checkpoint, tmp_path_factory):
    """Two evaluations of the tiny random model: of mosaic, and of own questions that it answers correctly."""
    folder = tmp_path_factory.mktemp("runs")
    from PIL import Image

    Image.new("RGB", (30, 40), "red").save(folder / "red.png")
    words = ["evaluate", str(base_checkpoint), *WORDS, "--pruners", "uniform,fastv", "--random-seeds", "2"]
    assert main([*words, "--output-dir", str(folder / "mosaic")]) == 0
    answers = [json.loads(line)["answer"] for line in (folder / "mosaic" / "answers.jsonl").read_text().splitlines()]
    line = {"image": str(folder / "red.png"), "prompt": "word7", "answer": sorted(set(answers))[:4]}
    (folder / "own.jsonl").write_text("\n".join([json.dumps(line)] * 8) + "\n")
    data = ["--data", str(folder / "own.jsonl")]
    assert main([*words, *data, "--output-dir", str(folder / "own")]) == 0
    return folder


def with_scores(folder, name, score_of):
    """A copy of an evaluation whose scores are others: the random model's are 0."""
    import shutil

    copy = folder / f"{name}-copy"
    shutil.copytree(folder / name, copy, dirs_exist_ok=True)
    records = [json.loads(line) for line in (copy / "answers.jsonl").read_text().splitlines()]
    for record in records:
        record["score"] = float(score_of(record))
    (copy / "answers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return copy


def table_of(tmp_path, *folders):
    assert main(["table", *map(str, folders), "--output-dir", str(tmp_path / "table")]) == 0
    rows = json.loads((tmp_path / "table" / "table.json").read_text())["rows"]
    return {(row["pruner"], row["budget"]): row for row in rows}


def test_percent_of_unpruned_by_task_and_their_mean(runs, tmp_path, capsys):
    # unpruned: 6 of 8 questions; uniform: 3; random: 6 under one seed and 3 under the other
    def mosaic(record):
        most = 3 if record["pruner"] == "uniform" or record["seed"] == 8 else 6
        return record["sample"] < most

    first = with_scores(runs, "mosaic", mosaic)
    second = with_scores(runs, "own", lambda record: record["sample"] < (4 if record["pruner"] != "none" else 8))
    capsys.readouterr()
    rows = table_of(tmp_path, first, second)
    out = capsys.readouterr().out
    assert next(iter(rows)) == ("none", "1") and {budget for _, budget in list(rows)[1:4]} == {"1/2"}
    uniform, random = rows["uniform", "1/4"], rows["random", "1/4"]
    assert {task: one["value"] for task, one in uniform["percent"].items()} == {"mosaic": 50.0, "own": 50.0}
    assert random["percent"]["mosaic"]["value"] == 75.0 and random["by_replicate"]["mosaic"] == [100.0, 50.0]
    assert random["mean"]["value"] == 62.5 and random["mean"]["low"] <= 62.5 <= random["mean"]["high"]
    assert rows["none", "1"]["percent"]["own"]["low"] == rows["none", "1"]["percent"]["own"]["high"] == 100
    assert "100 (75.0)" in out and "75.0 ± 35.4" in out

    # FastV runs two of two layers on all 16 tokens first
    assert (uniform["first_layer"], uniform["mean_layers"]) == (4, 4)
    assert (rows["fastv", "1/4"]["first_layer"], rows["fastv", "1/4"]["mean_layers"]) == (16, 20)

    latex = (tmp_path / "table" / "table.tex").read_text()
    assert latex.startswith(r"\begin{tabular}{llrrrrr}") and latex.count(r"\midrule") == 3
    assert latex.count(r" \\") == 1 + len(rows) and r"$\pm$" in latex
    assert "| uniform | 1/4 |" in (tmp_path / "table" / "table.md").read_text()


def test_runs_of_one_task_are_replicates(runs, tmp_path, capsys):
    """Such as policies of two seeds: every answer counts, and the spread is theirs."""
    good = with_scores(runs, "mosaic", lambda record: True)
    bad = good.rename(runs / "good")
    worse = with_scores(runs, "mosaic", lambda record: record["pruner"] == "none" or record["sample"] < 4)
    capsys.readouterr()
    rows = table_of(tmp_path, bad, worse)
    assert rows["uniform", "1/2"]["percent"]["mosaic"]["value"] == 75
    assert rows["uniform", "1/2"]["by_replicate"]["mosaic"] == [100, 50]
    assert capsys.readouterr().err == ""


def test_two_models_on_one_task_are_said(runs, tmp_path, capsys):
    one = with_scores(runs, "mosaic", lambda record: True).rename(runs / "one")
    other = with_scores(runs, "mosaic", lambda record: record["sample"] < 4)
    table_of(tmp_path, one, other)
    err = capsys.readouterr().err
    assert "ask the same questions, and 100.0 and 50.0 % of their unpruned answers are right" in err


def test_what_is_not_finished_is_left_out_and_said(runs, tmp_path, capsys):
    copy = with_scores(runs, "mosaic", lambda record: True)
    whole = (copy / "answers.jsonl").read_bytes()
    (copy / "answers.jsonl").write_bytes(whole[:-20])  # the last setting's last answer, being written
    before = (copy / "answers.jsonl").read_bytes()
    rows = table_of(tmp_path, copy)
    assert (copy / "answers.jsonl").read_bytes() == before
    said = capsys.readouterr()
    assert len(rows) == 6 and "lacks 1 answers and is left out" in said.err
    (copy / "answers.jsonl").write_bytes(whole)
    assert len(table_of(tmp_path, copy)) == 7


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("run.json", "pass directories that"),
        ("questions.json", "once more"),
        ("answers.jsonl", "let its command finish"),
    ],
)
def test_a_directory_that_lacks_something_is_refused(runs, tmp_path, capsys, missing, message):
    copy = with_scores(runs, "own", lambda record: True)
    (copy / missing).unlink()
    assert main(["table", str(copy), "--output-dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_two_files_of_one_name_are_two_tasks():
    """Else the answers to both would be one column, as if they were replicates."""

    def run(data, questions, accuracy):
        scores = {("none", "1"): np.ones((1, 4)), ("uniform", "1/2"): np.full((1, 4), accuracy)}
        units = list("abcd")
        return Run(
            Path("out"), Path(data).stem, questions, units, 2, scores, dict.fromkeys(scores, 8.0), 16.0, {}, data
        )

    def columns(*runs):
        (line,) = (line for line in join_runs(runs) if line.pruner == "uniform")
        return {task: round(cell.percent.value) for task, cell in line.cells.items()}

    first, second = run("gqa/test.jsonl", "1", 0.5), run("pope/test.jsonl", "2", 0.9)
    assert columns(first, second) == {"gqa/test.jsonl": 50, "pope/test.jsonl": 90}
    assert columns(first, run("moved/test.jsonl", "1", 0.7)) == {"test": 60}  # the same questions
    assert columns(first, run("gqa/test.jsonl", "3", 0.7)) == {"test": 60}  # more of them, or another seed


def made_run(scores, units=(*"aabb",)):
    unpruned = {("none", "1"): np.ones((1, 4))}
    scores = {name: np.array(one, dtype=float) for name, one in scores.items()}
    kept = dict.fromkeys([*unpruned, *scores], 8.0)
    return Run(Path("out"), "own", "1", list(units), 4, unpruned | scores, kept, 144.0, {}, "own.jsonl")


def test_an_image_counts_once_however_its_path_was_typed():
    scores = {("uniform", "1/2"): [[0, 1, 1, 1]]}
    paths = [[*"aabb"], ["/x/a", "/x/a", "/x/b", "/x/b"]]
    tables = [join_runs([made_run(scores, paths[0]), made_run(scores, other)]) for other in paths]
    (one,), (other,) = ([line.cells["own"].percent for line in lines if line.pruner == "uniform"] for lines in tables)
    assert one == other and one.low < one.value


def test_what_a_pruner_in_the_llm_reads_of_a_smaller_picture_is_not_known():
    name = ("resize+fastv*", "1/9")
    (line,) = (one for one in join_runs([made_run({name: [[1, 1, 1, 1]]})]) if one.pruner == name[0])
    assert (line.first_layer, line.mean_layers) == (None, None)
    assert as_texts([line])[1][2:4] == ["-", "-"]


def test_seeds_of_an_earlier_command_do_not_count(runs, tmp_path):
    copy = with_scores(runs, "mosaic", lambda record: record["seed"] != 8)
    seeds = {json.loads(line)["seed"] for line in (copy / "answers.jsonl").read_text().splitlines()}
    assert seeds == {None, 7, 8}
    results = json.loads((copy / "results.json").read_text())
    for row in results["rows"]:
        row["by_pruner_seed"] = {seed: score for seed, score in row["by_pruner_seed"].items() if seed != "8"}
    (copy / "results.json").write_text(json.dumps(results))
    assert table_of(tmp_path, copy)["random", "1/4"]["by_replicate"]["mosaic"] == [100.0]
