import argparse
import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset
from PIL import Image

from tests.cli.test_demo import table_under
from tests.families.tiny_models import build, config_of
from tests.families.tiny_processor import make_processor
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.answer_rules import is_correct
from tprl_hf.cli import evaluate as command
from tprl_hf.cli import loading
from tprl_hf.cli.main import main
from tprl_hf.modeling.lvlm_adapters import LVLMAdapter
from tprl_hf.pruners import PRUNERS
from tprl_hf.training.fingerprint import policy_in_checkpoint

# The tiny random model cannot read; the data decide what is asked.
WORDS = ["--num-samples", "8", "--keep-ratios", "1/2,1/4", "--pruners", "uniform", "--max-new-tokens", "2"]


@pytest.fixture
def evaluate(capsys, base_checkpoint, tmp_path):
    """Runs `tprl evaluate` on 8 questions and returns exit code, stdout and stderr."""

    def run(*words: str, model=base_checkpoint):
        return main(
            ["evaluate", str(model), *WORDS, "--output-dir", str(tmp_path / "out"), *words]
        ), *capsys.readouterr()

    return run


@pytest.fixture
def own_data(tmp_path, image_file):
    """Four questions about two images; the answers differ in form."""
    (tmp_path / "noise.png").write_bytes(image_file.read_bytes())
    lines = [
        {"image": "noise.png", "prompt": "word7", "answer": "word3"},
        {"images": ["noise.png"], "prompt": "word8 word9", "answer": 12, "question_type": "counting"},
        {"images": [str(image_file)], "prompt": "word8", "answer": "word3", "question_type": "counting"},
        {"images": [], "prompt": "word8", "answer": "word3"},
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


def test_each_setting_has_a_row_with_the_baselines_first(evaluate, tmp_path):
    code, out, err = evaluate()
    assert code == 0
    header, *rows = table_under(out, "pruner")
    costs = ["tower M", "pruner M", "prefill M"]
    assert header == [
        "pruner",
        "keep",
        "tokens kept (min-max)",
        "accuracy %",
        "vs. unpruned (pp)",
        "relative to unpruned (%)",
        *costs,
    ]
    kept = {"1": "16.0 of 16.0 (16-16)", "1/2": "8.0 of 16.0 (8-8)", "1/4": "4.0 of 16.0 (4-4)"}
    expected = [("none", "1"), *((name, keep) for name in ("random", "uniform") for keep in ("1/2", "1/4"))]
    assert [(row[0], row[1], row[2]) for row in rows] == [(*key, kept[key[1]]) for key in expected]
    assert "seed 7" in out and "bootstrap" in out and "cpu, float32" in out and "Command: tprl evaluate" in out
    assert "existence (2)" in out and "40/40" in err  # progress

    folder = tmp_path / "out"
    results = json.loads((folder / "results.json").read_text())
    assert [(row["pruner"], row["budget"]) for row in results["rows"]] == expected
    lines = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert len(lines) == 5 * (1 + len(results["rows"][0]["by_type"]))
    assert (folder / "results.md").read_text().count("| uniform | 1/4 |") == 3
    assert (folder / "results.png").stat().st_size > 10_000
    assert len((folder / "answers.jsonl").read_text().splitlines()) == 40


def test_every_setting_says_what_it_costs(evaluate, tmp_path):
    """A pruner that runs part of the LLM pays for it; a grid costs no matrix product."""
    evaluate("--pruners", "uniform,fastv,sparsevlm", "--num-samples", "2")
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    counted = {(row["pruner"], row["budget"]): row["counted"] for row in rows}
    assert counted["none", "1"]["pruner"] == counted["uniform", "1/4"]["pruner"] == 0
    assert (
        counted["uniform", "1/4"]["prefill"] < counted["uniform", "1/2"]["prefill"] < counted["none", "1"]["prefill"]
    )
    assert counted["fastv", "1/4"]["prefill"] == counted["uniform", "1/4"]["prefill"]
    # of two layers, FastV runs one and a half on all tokens
    assert 0.4 < counted["fastv", "1/4"]["pruner"] / counted["none", "1"]["prefill"] < 1
    assert counted["sparsevlm", "1/4"]["pruner"] > counted["fastv", "1/4"]["pruner"]


@pytest.mark.parametrize("columns", [("images",), ("image", "question_type"), ("images", "image_id", "boxes")])
def test_a_saved_dataset_needs_no_more_than_pictures_prompts_and_answers(columns, evaluate, tmp_path, image_file):
    pictures = {"images": [[str(image_file)]] * 3, "image": [str(image_file)] * 3}
    others = {"image_id": [0, 0, None], "boxes": [[[0, 0, 8, 8]], [], None]}
    rows = {name: {**pictures, **others, "question_type": [1, 0, 1]}[name] for name in columns}
    dataset = Dataset.from_dict({**rows, "prompt": ["word7", "word8", "word9"], "answer": [0, 1, 2]})
    if "question_type" in columns:
        dataset = dataset.cast_column("question_type", ClassLabel(names=["colour", "count"]))
    dataset.save_to_disk(str(tmp_path / "saved"))
    words = ["--data", str(tmp_path / "saved"), "--keep-ratios", "1/2"]
    code, _, err = evaluate(*words)
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    kinds = {"colour": 1, "count": 2} if "question_type" in columns else {"all": 3}
    assert {kind: one["count"] for kind, one in found[0]["by_type"].items()} == kinds
    assert evaluate(*words)[0] == 0  # nothing is asked again
    if "boxes" not in columns:
        code, _, err = evaluate(*words, "--pruners", "oracle", "--overwrite")
        assert code == 2 and "saved has none of: leave it out of --pruners" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d.rename_column("image", "picture"),
            "has no column `image`, and one `picture` with pictures: call it `image`",
        ),
        (lambda d: d.rename_column("prompt", "question"), "has no column 'prompt', only image, question, answer"),
        (
            lambda d: d.map(lambda row, n: {"answer": [None, "word8"][n % 2]}, with_indices=True),
            "`answer` is missing in 2 of 3 rows, first in row 0: give",
        ),
    ],
)
def test_a_saved_dataset_that_lacks_something(change, message, evaluate, tmp_path, image_file):
    rows = {"image": [str(image_file)] * 3, "prompt": ["word7"] * 3, "answer": ["word8"] * 3}
    change(Dataset.from_dict(rows)).save_to_disk(str(tmp_path / "saved"))
    code, _, err = evaluate("--data", str(tmp_path / "saved"))
    assert code == 2 and "tprl evaluate: error: " in err and message in err and "Traceback" not in err


def test_random_under_several_seeds_is_one_row_with_their_spread(evaluate, tmp_path):
    code, out, _ = evaluate("--random-seeds", "3", "--keep-ratios", "1/4")
    header = table_under(out, "pruner")[0]
    assert code == 0 and "sd, pruner seeds" in header and "sd, data seeds" not in header
    assert "random: mean over its seeds 7 to 9" in out and "--random-seeds 3" in out
    found = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["pruner"] for row in found] == ["none", "random", "uniform"]
    by_seed = found[1]["by_pruner_seed"]
    assert list(by_seed) == ["7", "8", "9"] and found[2]["by_pruner_seed"] == {}
    assert found[1]["accuracy"]["value"] == pytest.approx(sum(by_seed.values()) / 3)
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 5 * 8
    for seed, accuracy in by_seed.items():
        own = [record["score"] for record in answers if record["pruner"] == "random" and record["seed"] == int(seed)]
        assert len(own) == 8 and sum(own) / 8 == accuracy


def test_several_seeds_of_the_data(evaluate, tmp_path, own_data):
    code, out, _ = evaluate("--seed", "7,9", "--keep-ratios", "1/4")
    assert code == 0 and "16 questions of mosaic" in out and "seed 7,9" in out and "sd, data seeds" in out
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert all(list(row["by_data_seed"]) == ["7", "9"] for row in rows)
    command = re.search(r"^Command: tprl (.*)$", out, re.M)[1].split()
    assert main([*command, "--output-dir", str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again" / "results.json").read_text())["rows"] == rows
    code, _, err = evaluate("--seed", "7,9", "--data", str(own_data))
    assert code == 2 and "the same questions under every --seed" in err


def test_rows_that_read_attention_trained_with_boxes_are_marked(tmp_path, capsys):
    """On the embedded model; the other tests' model has rows without a mark."""
    words = ["--pruners", "fastv,sparsevlm", "--keep-ratios", "1/9", "--num-samples", "2", "--max-new-tokens", "2"]
    assert main(["evaluate", *words, "--output-dir", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["pruner"] for row in rows] == ["none", "random", "fastv*", "sparsevlm*"]
    assert (
        "trained with boxes" in capsys.readouterr().out
        and "trained with boxes" in (tmp_path / "results.md").read_text()
    )


def test_the_command_it_prints_gives_the_same_rows(evaluate, tmp_path):
    out = evaluate()[1]
    command = re.search(r"^Command: tprl (.*)$", out, re.M)[1].split()
    first = json.loads((tmp_path / "out" / "results.json").read_text())
    assert main([*command, "--output-dir", str(tmp_path / "again"), "--batch-size", "3"]) == 0
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert first["command"] == again["command"]
    for one, other in zip(first["rows"], again["rows"], strict=True):
        # batches of another size round otherwise, which probabilities show
        assert one.pop("confidence") == pytest.approx(other.pop("confidence"), abs=1e-4)
        assert one == other


def test_a_run_that_was_cut_off_resumes_and_ends_the_same(evaluate, tmp_path):
    evaluate()
    path = tmp_path / "out" / "answers.jsonl"
    whole, rows = path.read_text(), json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    path.write_text(whole[: len(whole) // 2])  # in the middle of a line
    code, _, err = evaluate()
    assert code == 0 and json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == rows
    assert sorted(path.read_text().splitlines()) == sorted(whole.splitlines())
    assert re.search(r"(19|2\d)/40", err)  # began where it stopped


def test_questions_without_a_type_are_not_all(evaluate, own_data, tmp_path):
    code, out, _ = evaluate("--data", str(own_data), "--pruners", "uniform", "--num-samples", "4")
    assert code == 0 and "untyped (2)" in out and "counting (2)" in out and "all (2)" not in out
    lines = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    for row in rows:
        own = [one for one in lines if (one["pruner"], one["keep"]) == (row["pruner"], row["budget"])]
        counts = {one["question_type"]: one["count"] for one in own}
        assert counts == {"all": "4", "counting": "2", "untyped": "2"} and own[0]["question_type"] == "all"
        assert float(own[0]["accuracy"]) == row["accuracy"]["value"] and own[0]["difference"] != ""
    assert "untyped (2)" in (tmp_path / "out" / "results.html").read_text()


def test_own_data_have_no_split(evaluate, own_data, tmp_path):
    words = ["--data", str(own_data), "--num-samples", "4"]
    code, out, _ = evaluate(*words)
    assert code == 0 and f"4 questions of {own_data}, seed 7." in out and ", split" not in out
    assert json.loads((tmp_path / "out" / "results.json").read_text())["split"] is None
    path = tmp_path / "out" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "split": "test"}))  # as earlier versions noted it
    assert evaluate(*words)[0] == 0
    assert "split test, seed 7" in evaluate("--overwrite")[1]  # of Mosaic-VQA


def test_answers_of_two_dtypes_do_not_go_into_one_folder(evaluate, tmp_path):
    assert evaluate("--dtype", "float32")[0] == 0
    code, _, err = evaluate("--dtype", "bfloat16")
    assert code == 2 and "dtype float32 instead of bfloat16" in err
    before = json.loads((tmp_path / "out" / "run.json").read_text())
    (tmp_path / "out" / "run.json").write_text(json.dumps({k: v for k, v in before.items() if k != "dtype"}))
    assert evaluate("--dtype", "float32")[0] == 0  # a folder of a version that did not note it


def test_a_tower_without_attention_is_asked_with_a_picture(base_checkpoint, own_data, tmp_path, monkeypatch, capsys):
    """The first row may have none, and then every tower seems to return it."""
    rows = [json.loads(line) for line in own_data.read_text().splitlines() if line]
    own_data.write_text("\n".join(map(json.dumps, rows[::-1])))
    encode = LVLMAdapter.encode

    def without(adapter, ids, inputs, with_attention=False, **named):
        if with_attention:
            raise ValueError("This tower returns no attention.")
        return encode(adapter, ids, inputs, with_attention, **named)

    monkeypatch.setattr(LVLMAdapter, "encode", without)
    words = ["--data", str(own_data), "--keep-ratios", "1/2", "--max-new-tokens", "1"]
    assert main(["evaluate", str(base_checkpoint), *words, "--output-dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "Without vispruner: This tower" in said.err and "vispruner" not in said.out


def test_a_folder_with_answers_of_another_run_is_refused(evaluate, tmp_path):
    evaluate()
    code, out, err = evaluate("--seed", "8")
    assert code == 2 and out == "" and "seed 7 instead of 8" in err and "--output-dir" in err
    (tmp_path / "out" / "run.json").write_text("")
    code, _, err = evaluate()
    assert code == 2 and "run.json is damaged: pass another --output-dir" in err


def change_processor(folder):
    return (
        "processor_config.json",
        lambda text: text.replace('"do_normalize": true', '"do_normalize": false'),
        r"processor \w+ instead of \w+",
    )


def change_template(folder):
    return "chat_template.jinja", lambda text: f"{text} word9", r"processor \w+ instead of \w+"


def change_generation(folder):
    changed = json.dumps({"repetition_penalty": 1.5, "eos_token_id": 3})
    return "generation_config.json", lambda text: changed, r"generation .* instead of .*repetition_penalty"


@pytest.mark.parametrize("change", [change_processor, change_template, change_generation])
def test_answers_of_a_model_whose_other_files_changed_are_not_taken(change, evaluate, base_checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(base_checkpoint, folder)
    assert evaluate(model=folder)[0] == 0
    moved = folder.rename(tmp_path / "moved")
    assert "40/40" in evaluate(model=moved)[2]  # it may lie elsewhere
    name, other, message = change(moved)
    before = (moved / name).read_text()
    (moved / name).write_text(other(before))
    assert (moved / name).read_text() != before
    code, out, err = evaluate(model=moved)
    assert code == 2 and out == "" and re.search(f"another run \\({message}", err)


def changed_answer(path):
    path.write_text(path.read_text().replace("word3", "word4"))


def changed_question(path):
    path.write_text(path.read_text().replace("word7", "word6"))


def changed_image(path):
    image = Image.open(path.parent / "noise.png")
    image.putpixel((0, 0), (1, 2, 3))
    image.save(path.parent / "noise.png")


@pytest.mark.parametrize(
    "change", [changed_answer, changed_question, changed_image], ids=lambda change: change.__name__
)
def test_answers_to_other_questions_are_not_taken(evaluate, own_data, change):
    assert evaluate("--data", str(own_data))[0] == 0
    change(own_data)
    code, out, err = evaluate("--data", str(own_data))
    assert code == 2 and out == "" and re.search(r"another run \(questions \w+ instead of \w+\): pass another", err)


def test_the_same_questions_under_another_name_are_not_answered_again(evaluate, own_data, tmp_path):
    evaluate("--data", str(own_data))
    again = own_data.rename(tmp_path / "moved.jsonl")
    code, _, err = evaluate("--data", str(again))
    assert code == 0 and "20/20" in err


@pytest.mark.parametrize(
    ("torn", "removed"),
    [
        (lambda lines: [*lines[:3], lines[3][:9], *lines[4:]], 1),
        (lambda lines: [*lines[:3], b"", *lines[4:]], 1),
        (lambda lines: [*lines[:3], b"\0" * 40, *lines[4:]], 1),
        (lambda lines: [*lines[:3], "\u00e9".encode()[:1], *lines[4:]], 1),
        (lambda lines: [*lines[:3], lines[3][:20] + lines[4], *lines[5:]], 1),  # two that were written into one
        (lambda lines: [*lines[:3], lines[3].replace(b'"score": ', b'"score": "x'), b"{}", b"[1]", *lines[4:]], 3),
        (lambda lines: [*lines[:3], re.sub(rb'"score": [\d.]+', b'"score": NaN', lines[3]), *lines[4:]], 1),
        (lambda lines: [*lines[:3], re.sub(rb'"score": [\d.]+', b'"score": 1e9', lines[3]), *lines[4:]], 1),
        (lambda lines: [*lines[:-1], lines[-1] + "\u00e9".encode()[:1]], 1),
        (lambda lines: [*lines[:-1], lines[-1].replace(b'"answer": "', b'"answer": "\xe2\x80\xa8\xc2\x85')], 0),
    ],
)
def test_any_torn_line_is_answered_again(evaluate, tmp_path, torn, removed):
    evaluate()
    path = tmp_path / "out" / "answers.jsonl"
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    whole = path.read_bytes()
    damaged = torn(whole.removesuffix(b"\n").split(b"\n"))
    path.write_bytes(b"\n".join(damaged) + (b"" if damaged[-1].endswith(b"\xc3") else b"\n"))
    code, _, err = evaluate()
    assert code == 0 and (f"{removed} damaged lines were removed" in err) == bool(removed)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == rows
    if removed:
        assert sorted(path.read_bytes().split(b"\n")) == sorted(whole.split(b"\n"))


def test_scores_are_those_of_the_answers(evaluate, tmp_path, monkeypatch):
    from tprl_hf import answer_rules
    from tprl_hf.data import mosaic_vqa

    monkeypatch.setattr(answer_rules, "exact_score", lambda answer, reference: reference == "yes")
    evaluate()
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    correct = [sample["answer"] == "yes" for sample in mosaic_vqa(split="test", seed=7, num_samples=8)]
    assert all(row["accuracy"]["value"] == sum(correct) / 8 for row in rows)
    assert all(row["difference"]["value"] == 0 for row in rows)


def test_it_reads_the_users_own_questions(evaluate, own_data):
    code, out, _ = evaluate("--data", str(own_data), "--num-samples", "4")
    assert code == 0 and "untyped (2)" in out and "counting (2)" in out
    assert table_under(out, "pruner")[2][2] == "6.0 of 12.0 (0-8)"  # one question has no image


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "has no samples"),
        ("{", "line 1: not JSON"),
        ("[]", "line 1: expected an object"),
        ('{"prompt": ["q"], "answer": "a"}', '`prompt` must be the question as a text; got ["q"]'),
        ('{"prompt": "q", "answer": "a", "image": "none.png"}', "there is no image file"),
    ],
)
def test_broken_data_is_one_line_and_exit_code_2(evaluate, tmp_path, line, message):
    path = tmp_path / "broken.jsonl"
    path.write_text(line + "\n")
    code, _, err = evaluate("--data", str(path))
    assert code == 2 and message in err and err.count("\n") == 1


def test_without_answers_pruned_answers_are_compared_with_unpruned_ones(evaluate, own_data, tmp_path):
    lines = [json.loads(line) for line in own_data.read_text().splitlines() if line]
    own_data.write_text("".join(json.dumps({**line, "answer": None}) + "\n" for line in lines))
    code, out, _ = evaluate("--data", str(own_data))
    assert code == 0 and "so the unpruned model's own answers are the references" in out and "ECE" not in out
    folder = tmp_path / "out"
    records = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    unpruned = {one["sample"]: one["answer"] for one in records if one["pruner"] == "none"}
    assert all(one["score"] == is_correct(one["answer"], unpruned[one["sample"]]) for one in records)
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert rows[0]["accuracy"]["value"] == 1 and 0 < min(row["accuracy"]["value"] for row in rows) < 1

    # resumed where the unpruned answers are there already
    kept = [json.dumps(one) + "\n" for one in records if one["pruner"] == "none"]
    (folder / "answers.jsonl").write_text("".join(kept))
    assert evaluate("--data", str(own_data))[0] == 0
    assert json.loads((folder / "results.json").read_text())["rows"] == rows

    code, _, err = evaluate("--data", str(own_data), "--metric", "yes-no")
    assert code == 2 and "has no `answer`, which --metric yes-no compares with" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("metric", "answer", "message"),
    [
        ("choice", 2, "--metric choice reads each `answer` as the letter of an option, such as B; got '2' in row 0"),
        ("yes-no", "red", "--metric yes-no reads each `answer` as yes or no; got 'red' in row 0"),
    ],
)
def test_references_that_a_metric_cannot_read_are_refused(evaluate, tmp_path, metric, answer, message, monkeypatch):
    """ScienceQA's answers are numbers of options: as letters all of them were wrong, and as yes or no all a no."""
    monkeypatch.setattr(loading, "load_named_model", lambda *_: pytest.fail("it loads a model"))
    (tmp_path / "own.jsonl").write_text(json.dumps({"images": [], "prompt": "word7", "answer": answer}) + "\n")
    code, _, err = evaluate("--data", str(tmp_path / "own.jsonl"), "--metric", metric)
    assert code == 2 and message in err and err.count("\n") == 1


def test_questions_without_image_ids_share_the_unit_of_their_picture(evaluate, tmp_path, image_file):
    """Else intervals over images would be those over questions."""
    rows = {"images": [[str(image_file)]] * 3, "prompt": ["word7", "word8", "word9"], "answer": [0, 1, 2]}
    Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"))
    assert evaluate("--data", str(tmp_path / "saved"))[0] == 0
    assert json.loads((tmp_path / "out" / "questions.json").read_text())["units"] == ["0", "0", "0"]


def test_an_llm_whose_config_has_no_intermediate_size(evaluate, tmp_path):
    """Of Qwen3.5's mixture of experts, and four more families."""
    base = build("llava", text_config=config_of("qwen3_5_moe").text_config.to_dict())
    base.save_pretrained(tmp_path / "base")
    make_processor().save_pretrained(tmp_path / "base")
    words = ["--num-samples", "2", "--keep-ratios", "1/2"]
    code, _, err = evaluate(*words, model=tmp_path / "base")
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "questions.json").read_text())["llm_layers"] == 2


def test_a_trained_policy_has_rows_of_its_own(evaluate, tmp_path):
    model = TPRLForConditionalGeneration.from_base_model(
        build("llava"), keep_ratio=0.5, policy_training={"stage": "lfd"}, policy_num_heads=2
    )
    model.save_pretrained(tmp_path / "model", save_base_model=True)
    make_processor().save_pretrained(tmp_path / "model")
    command = ["evaluate", str(tmp_path / "model"), "--num-samples", "2", "--output-dir", str(tmp_path / "o")]
    assert main(command) == 0
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    thirds = [row["pruner"] for row in results["rows"] if row["budget"] == "1/3"]
    assert thirds == ["random", "uniform", "vispruner", "learned"]
    assert results["policy_weights"] == policy_in_checkpoint(tmp_path / "model") is not None
    # versions that did not note it left the same run.json
    assert "policy_weights" not in json.loads((tmp_path / "o" / "run.json").read_text())
    before = (tmp_path / "o" / "answers.jsonl").read_text()
    assert main(command) == 0 and (tmp_path / "o" / "answers.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pruners", "magic"], "there is no pruner 'magic'; choose from none, random"),
        (["--pruners", "resize+none"], "there is no pruner 'resize+none'; did you mean"),
        (["--keep-ratios", "1/3,2"], "2 is not in (0, 1]"),
        (["--seed", "7,7"], "'7,7' is not a list of different whole numbers"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *words])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1


def test_unknown_data_and_an_untrained_policy_are_refused(evaluate):
    code, _, err = evaluate("--data", "gqa")
    assert code == 2 and "'gqa' is neither mosaic, easy-vqa, photo nor" in err and "lmms-eval --model tprl" in err
    assert "docs/evaluation.md" in err and "pip" not in err  # which does not know this package in a new environment
    code, _, err = evaluate("--pruners", "learned")
    assert code == 2 and "policy has not been trained" in err


def test_every_pruner_has_its_rows(evaluate, tmp_path):
    names = [*PRUNERS, "oracle"]
    assert evaluate("--pruners", ",".join(names), "--keep-ratios", "1/4", "--num-samples", "2")[0] == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["pruner"] for row in rows] == names
    assert {row["mean_kept"] for row in rows[1:]} == {4.0}


def test_pruners_take_settings(evaluate, tmp_path):
    names = "fastv:layer=1,query-similarity:reduce=max,resize+fastv:layer=1"
    code, out, _ = evaluate("--pruners", names, "--keep-ratios", "1/4", "--num-samples", "2")
    assert code == 0 and f"--pruners {names} " in out
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["pruner"] for row in rows[2:]] == names.split(",")
    assert [row["mean_kept"] for row in rows[2:]] == [4, 4, 4]
    # the first layer on all 16 tokens costs less than both
    whole, half = rows[2]["counted"]["pruner"], rows[4]["counted"]["pruner"]
    assert 0 < half < whole < rows[0]["counted"]["prefill"] / 2
    code, _, err = evaluate("--pruners", "fastv:layers=1", "--num-samples", "2")
    assert code == 2 and "fastv has no setting 'layers'; it has layer." in err
    code, _, err = evaluate("--pruners", "uniform:keep_ratio=0.5", "--num-samples", "2")
    assert code == 2 and "uniform has no setting 'keep_ratio'; it has none." in err


def test_smaller_pictures_have_rows(evaluate, tmp_path):
    """The budget counts tokens of the full size; group A and the time of each row stand beside the accuracy."""
    names = "resize,enlarged,pool,resize+divprune"
    code, out, _ = evaluate("--pruners", names, "--keep-ratios", "1/4", "--num-samples", "4", "--time-rounds", "2")
    rows = {row["pruner"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]}
    assert code == 0 and list(rows) == ["none", "random", *names.split(",")]
    assert [(row["mean_kept"], row["mean_visual"]) for row in rows.values()] == 2 * [(16, 16), (4, 16), (4, 16)]
    towers = {name: row["counted"]["tower"] for name, row in rows.items()}
    assert towers["resize"] < towers["resize+divprune"] < towers["pool"] == towers["enlarged"] == towers["none"]
    assert all(0 < row["milliseconds"]["low"] <= row["milliseconds"]["high"] for row in rows.values())
    assert all(0 <= row["confidence"]["ece"] <= 1 for row in rows.values())
    header = table_under(out, "pruner")[0]
    assert header[-4:] == ["tower M", "pruner M", "prefill M", "ms"] and "ECE" in out
    code, _, err = evaluate("--pruners", "resize+divprune", "--keep-ratios", "1/2", "--num-samples", "4")
    assert code == 2 and "resize+divprune prunes from a picture of half the tokens: keep less than 1/2" in err


def test_the_checkpoints_own_pruner_has_its_settings(evaluate, base_checkpoint, tmp_path):
    """Its row is what `generate` does with the checkpoint, and its name says so."""
    model = TPRLForConditionalGeneration.from_base_model(str(base_checkpoint), pruner="uniform")
    model.set_pruner("query-similarity", reduce="max", keep_ratio=0.5)
    model.save_pretrained(tmp_path / "own", save_base_model=True)
    make_processor().save_pretrained(tmp_path / "own")
    words = ["--num-samples", "8", "--keep-ratios", "1/4", "--max-new-tokens", "2"]
    assert main(["evaluate", str(tmp_path / "own"), *words, "--output-dir", str(tmp_path / "rows")]) == 0
    names = {row["pruner"] for row in json.loads((tmp_path / "rows" / "results.json").read_text())["rows"]}
    assert "query-similarity:reduce=max" in names and "query-similarity" not in names


def test_the_policy_takes_a_number_of_steps(tmp_path, capsys):
    words = ["evaluate", "--num-samples", "6", "--keep-ratios", "1/9", "--output-dir", str(tmp_path)]
    assert main([*words, "--pruners", "learned,learned:num_steps=3"]) == 0
    rows = {row["pruner"]: row["mean_kept"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert rows["learned"] == rows["learned:num_steps=3"] == 16
    for wrong, message in (("num_steps=0", "num_steps"), ("depth=3", "learned has no setting 'depth'")):
        capsys.readouterr()
        assert main([*words, "--pruners", f"learned:{wrong}"]) == 2
        assert message in capsys.readouterr().err


def test_rows_that_cannot_be_asked_are_named_before_the_first_answer(evaluate, own_data, tmp_path):
    lines = own_data.read_text().splitlines()
    whole = (tmp_path / "noise.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    lines += [json.dumps({"image": "half.png", "prompt": "word7", "answer": "word3"})]
    lines += [json.dumps({"image": "noise.png", "prompt": "<image> word7", "answer": "word3"})]
    own_data.write_text("\n".join(lines))
    code, out, err = evaluate("--data", str(own_data))
    assert code == 2 and out == "" and "2 of 6 rows" in err
    assert "Row 4: " in err and "half.png is damaged" in err and "Row 5: its prompt has <image>" in err
    assert not (tmp_path / "out" / "answers.jsonl").exists()


def test_a_saved_dataset_without_rows_and_one_with_an_empty_column_of_videos(evaluate, tmp_path, image_file):
    Dataset.from_dict({"image": [], "prompt": [], "answer": []}).save_to_disk(tmp_path / "empty")
    code, _, err = evaluate("--data", str(tmp_path / "empty"))
    assert code == 2 and "has no samples" in err
    rows = [{"image": str(image_file), "prompt": "word7", "answer": "word3", "videos": None}] * 2
    Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    assert evaluate("--data", str(tmp_path / "rows"))[0] == 0


def test_the_oracle_needs_boxes(evaluate, own_data):
    code, _, err = evaluate("--pruners", "oracle", "--data", str(own_data))
    assert code == 2 and "needs boxes" in err


@pytest.mark.parametrize(
    ("words", "asked"),
    [(["--data", "photo"], "photo-llava"), (["mine", "--data", "photo"], "mine"), ([], None)],
)
def test_questions_about_photographs_are_for_photo_llava(words, asked, monkeypatch):
    """Without a model's name: the other embedded model has never seen a photograph."""
    from tprl_hf.test_bed import photo_checkpoint

    loaded = []
    monkeypatch.setattr(photo_checkpoint, "photo_policy_checkpoint", lambda log: Path("photo-llava"))
    monkeypatch.setattr(loading, "load_named_model", lambda arguments: loaded.append(arguments.model))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = parser.parse_args(words)
    loading.load_model_for(arguments.data, arguments)
    assert loaded == [asked] and arguments.model == (asked if asked == "mine" else None)
