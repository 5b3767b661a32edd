"""Whatever lies in the files that a command of `tprl` reads: the same as before, or one line that names the file."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.any_values import assert_good, judge, several
from tests.report.test_report import check_page
from tests.training.conftest import make_dataset
from tprl_hf.cli.main import main
from tprl_hf.json_files import COUNT, misfit

from .test_any_words import said

STAGE = {"max_steps": 2, "save_steps": 1, "logging_steps": 1, "disable_tqdm": True, "use_cpu": True}
RECIPE = {
    "policy": {"latent_dim": 16, "policy_num_heads": 4, "policy_dim": 16},
    "autoencoder": STAGE,
    "demonstrations": {"teacher": "uniform", "keep_ratios": [["1/2"]]},
    "lfd": {
        **{"save_base_model": True, "keep_best": False},  # else an untrained policy may be the best
        **STAGE,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_keep_ratios": ["1/2"],
    },
}
LATENCY = {
    **{"command": "tprl benchmark", "device": "cpu", "pruner": "uniform"},
    **{"num_keep": 8, "num_visual": 16, "batch": 1, "new_tokens": 2, "rounds": 2},
    "milliseconds": {"pruner": {"median": 1.0, "low": 0.5, "high": 1.5}},
}


@pytest.fixture(scope="module")
def made(base_checkpoint, image_file, tmp_path_factory):
    """A folder with two evaluations, a training, a run of `tprl reproduce`, and the files of a card."""
    folder = tmp_path_factory.mktemp("made")
    asked = [{"image": str(image_file), "prompt": f"word{number}", "answer": "word3"} for number in range(4)]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    data = ["--data", str(folder / "q.jsonl"), "--pruners", "uniform", "--keep-ratios", "1/2", "--max-new-tokens", "2"]
    assert main(["evaluate", str(base_checkpoint), *data, "--output-dir", str(folder / "first")]) == 0
    lines = [json.loads(line) for line in (folder / "first" / "answers.jsonl").read_text().splitlines()]
    for line in lines:  # so that there is something to compare with
        line["score"] = float(line["sample"] != (line["pruner"] == "uniform"))
    (folder / "first" / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copytree(folder / "first", folder / "second")

    make_dataset().save_to_disk(str(folder / "data"))
    source = {"source": str(folder / "data")}
    recipe = {"base_model": str(base_checkpoint), "output_dir": str(folder / "run"), **RECIPE}
    recipe["data"] = {"train": source, "validation": source}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", "all", "--config", str(folder / "recipe.yaml")]) == 0
    shutil.copytree(folder / "run" / "lfd", folder / "runs" / "stages" / "lfd-0123456789ab")
    (folder / "latency.json").write_text(json.dumps(LATENCY))
    return folder


COMMANDS = {
    "table": ["table", "{}/first", "--output-dir", "{}/table"],
    "one": ["report", "{}/first", "--output", "{}/page.html"],
    "two": ["report", "{}/first", "{}/second", "--output", "{}/page.html"],
    "training": ["report", "{}/run", "--output", "{}/page.html"],
    "push": [
        *("push", "{}/run/lfd", "me/x", "--dry-run", "--results", "{}/first/results.json"),
        *("--latency", "{}/latency.json"),
    ],
    "reproduce": ["reproduce", "table7", "--dry-run", "--runs-dir", "{}/runs"],
    "train": ["train", "all", "--config", "{}/recipe.yaml", "--dry-run"],
    "count": ["count", "{}/run/lfd", "--image", "{}/q.jsonl"],
    "flops": ["flops", "{}/run/lfd"],
}
EVALUATION = ["run.json", "questions.json", "answers.jsonl"]
PAGE = ["results.json", "broken.json", "run.json", "answers.jsonl"]
STAGES = [f"run/{stage}/{name}" for stage in ("autoencoder", "lfd") for name in ("training.json", "settings.json")]
LOGS = [f"run/lfd/{name}" for name in ("log.jsonl", "watched.json", "watched_masks.jsonl")]
READ = {
    "table": [f"first/{name}" for name in EVALUATION],
    "one": [f"first/{name}" for name in PAGE],
    "two": [f"second/{name}" for name in (*PAGE, "questions.json")],
    "training": [*STAGES, *LOGS, "run/demonstrations/training.json", "run/lfd/checkpoint-2/trainer_state.json"],
    "push": ["first/results.json", "latency.json", "run/lfd/training.json", "run/lfd/config.json", STAGES[0]],
    "reproduce": ["runs/stages/lfd-0123456789ab/training.json"],
    "train": [STAGES[0], STAGES[2], "run/lfd/checkpoint-2/trainer_state.json"],
    "flops": ["run/lfd/config.json"],
}
CASES = [(command, file) for command in READ for file in READ[command]]

RAW = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "zeroed": lambda content: bytes(len(content)),
    "not text": lambda content: b"\xff\xfe" + content,
    "a list": lambda content: b"[]",
    "null": lambda content: b"null",
    "a number": lambda content: b"3",
    "a text": lambda content: b'"x"',
    "an object": lambda content: b"{}",
    "deep": lambda content: b"[" * 50_000,
}
WRONG = [None, "x", "", -1, 0, 1.5, [], {}, True, math.nan, math.inf, [None], 10**30]
GONE = object()


def places_in(value, place=()):
    """The ways to all that a JSON value holds."""
    found = [place] if place else []
    if isinstance(value, dict):
        for name in value:
            found += places_in(value[name], (*place, name))
    elif isinstance(value, list):
        for number in range(min(len(value), 2)):
            found += places_in(value[number], (*place, number))
    return found


def changed(value, place, new):
    """A copy with another value at a place, and what was there."""
    value = copy.deepcopy(value)
    inner = value
    for name in place[:-1]:
        inner = inner[name]
    before = inner[place[-1]]
    if new is GONE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = new
    return value, before


def damage(path, raw, number, new):
    """Damages a file; returns whether what it holds may pass for another one that is whole, and what was changed."""
    content = path.read_bytes()
    if raw is not None:
        path.write_bytes(RAW[raw](content))
        return False, path.name
    lines = content.decode().splitlines() if path.suffix == ".jsonl" else [content.decode()]
    line = number % len(lines)
    found = json.loads(lines[line])
    places = places_in(found)
    place = places[number % len(places)]
    value, before = changed(found, place, new)
    lines[line] = json.dumps(value)
    path.write_text("\n".join(lines) + "\n")
    may_pass = type(new) is type(before) or (isinstance(before, float) and type(new) is int) or before is None
    return may_pass, str(place[-1])


def results(command, folder):
    """What a command wrote: a table as numbers, a page that is well-formed."""
    if command == "table":
        rows = json.loads((folder / "table" / "table.json").read_text())["rows"]
        return {(row["pruner"], row["budget"]): row for row in rows}
    if (folder / "page.html").exists():
        check_page(folder / "page.html")
    return None


@several(260)
@given(
    case=st.sampled_from(CASES),
    raw=st.one_of(st.none(), st.none(), st.sampled_from(sorted(RAW))),
    number=st.integers(0, 10**4),
    new=st.sampled_from([*WRONG, GONE, GONE]),
)
def test_a_damaged_file(case, raw, number, new, made, capsys):
    command, file = case
    words = [word.format(made) for word in COMMANDS[command]]
    path = made / file
    content = path.read_bytes()
    try:
        may_pass, place = damage(path, raw, number, new)
        named = {place: new, path.name: path.name}
        verdict = judge(lambda: said_of(words, path, capsys), named, None)
        assert_good(verdict)
        if verdict[0] == "correct" and command == "table" and not may_pass:
            whole = results(command, made)
            assert whole.items() <= tables(made, capsys).items()  # rows with damaged answers are left out
        elif verdict[0] == "correct":
            results(command, made)
    finally:
        path.write_bytes(content)
        (made / "page.html").unlink(missing_ok=True)


def said_of(words, path, capsys):
    """As `said`; a line that names the file's folder names the file."""
    try:
        said(words, capsys)
    except ValueError as error:
        line = str(error)
        named = path.name in line or f"{path.parent} " in line
        raise ValueError(f"{line} {path.name if named else ''}") from error


_TABLES = {}


def tables(folder, capsys):
    return _TABLES[folder]


@pytest.fixture(autouse=True)
def whole_table(made, capsys):
    if made not in _TABLES:
        assert main([word.format(made) for word in COMMANDS["table"]]) == 0
        _TABLES[made] = results("table", made)


@pytest.mark.parametrize(("command", "file"), CASES)
@pytest.mark.parametrize("kind", ["missing", "a directory"])
def test_a_file_that_is_not_there(command, file, kind, made, capsys):
    words = [word.format(made) for word in COMMANDS[command]]
    path, aside = made / file, made / "aside"
    path.rename(aside)
    try:
        if kind == "a directory":
            path.mkdir()
        verdict = judge(lambda: said_of(words, path, capsys), {path.name: path.name}, None)
        assert_good(verdict, "has no state.json", str(path.parent))
        if verdict[0] == "correct":
            results(command, made)
    finally:
        shutil.rmtree(path, ignore_errors=True)
        aside.rename(path)
        (made / "page.html").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("value", "shape", "reason"),
    [
        ({"a": 1}, {"a": int}, None),
        ({"a": True}, {"a": int}, "a is true, not a whole number"),
        ({"a": 1.0}, {"a": float, "?b": str}, None),
        ({"a": math.nan}, {"a": float}, "a is NaN, not a number"),
        ({"a": 0}, {"a": COUNT}, "a is 0, not a whole number of at least 1"),
        ({}, {"a": int}, "a is missing"),
        ([], {}, "it is [], not an object"),
        ({"a": [1, "x"]}, {"a": [int]}, 'a[1] is "x", not a whole number'),
        ({"a": {"b": 1, "c": "x"}}, {"a": {...: int}}, 'a.c is "x", not a whole number'),
        ({"a": None}, {"a": (str, None)}, None),
        ({"a": 3}, {"a": (str, None)}, "a is 3, not a text"),
        ({"a": "y"}, {"a": frozenset(("x", "z"))}, 'a is "y", not one of x, z'),
    ],
)
def test_where_a_value_has_another_shape(value, shape, reason):
    assert misfit(value, shape) == reason


PICTURES = {"empty": b"", "text": b"hello", "half": None, "zeroed": bytes(500), "a directory": None}


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("command", ["count", "compare", "trajectory", "generate"])
def test_a_damaged_picture(command, kind, image_file, tmp_path, capsys):
    path = tmp_path / "damaged.png"
    whole = Path(image_file).read_bytes()
    path.mkdir() if kind == "a directory" else path.write_bytes(PICTURES[kind] or whole[: len(whole) // 2])
    words = {
        "count": ["count", "--image", str(path)],
        "generate": ["generate", "--image", str(path), "--question", "what ?"],
    }.get(command, [command, str(path), "what ?"])
    assert_good(judge(lambda: said(words, capsys), {path.name: path.name}, False))
