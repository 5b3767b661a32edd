"""lmms-eval's own commands with the embedded model. `make test-lmms` runs these where lmms-eval is installed."""

import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from datasets import Dataset, Features, Image, Value
from huggingface_hub import ModelCardData

from tests.families.tiny_models import build
from tests.families.tiny_processor import make_processor
from tprl_hf.data import mosaic_vqa
from tprl_hf.evaluation.lmms_eval.results import lmms_eval_results

try:
    import lmms_eval
except ImportError:
    pytest.skip("lmms-eval is not installed: make test-lmms", allow_module_level=True)

NUM_QUESTIONS = 24
SCRIPTS = Path(sys.executable).parent


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder with the stock POPE task on local questions, and a task of its own with exact match."""
    folder = tmp_path_factory.mktemp("tasks")
    data = mosaic_vqa(split="test", seed=7, num_samples=6 * NUM_QUESTIONS)
    for name, rows in {
        "pope": [row for row in data if row["question_type"] == "existence"],
        "color": [row for row in data if row["question_type"] == "color"],
    }.items():
        rows = [
            {"question_id": str(i), "image": row["images"][0], "question": row["prompt"], "answer": row["answer"]}
            for i, row in enumerate(rows[:NUM_QUESTIONS])
        ]
        features = {name: Value("string") for name in rows[0]} | {"image": Image()}
        Dataset.from_list(rows, features=Features(features)).to_parquet(folder / f"{name}.parquet")
    shared = "dataset_path: parquet\ndataset_kwargs:\n  data_files:\n    test: {file}\n"
    stock = Path(lmms_eval.__file__).parent / "tasks" / "pope" / "pope.yaml"
    (folder / "local_pope.yaml").write_text(
        f"include: {stock}\ntask: local_pope\n"
        + shared.format(file=folder / "pope.parquet")
        + "lmms_eval_specific_kwargs:\n  default:\n    pre_prompt: ''\n    post_prompt: ''\n"
    )
    (folder / "local_color.yaml").write_text(
        "task: local_color\n"
        + shared.format(file=folder / "color.parquet")
        + "test_split: test\noutput_type: generate_until\ndoc_to_visual: !function local.images\n"
        "doc_to_text: question\ndoc_to_target: answer\ngeneration_kwargs:\n  max_new_tokens: 4\n  until: ['zzz']\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    # a filter takes the first letter, and only the letter is right
    (folder / "local_letter.yaml").write_text(
        "include: local_color.yaml\ntask: local_letter\ndoc_to_target: '{{answer[0]}}'\n"
        "filter_list:\n  - name: letter\n    filter:\n      - function: regex\n        regex_pattern: '^(\\w)'\n"
        "      - function: take_first\n"
    )
    (folder / "local.py").write_text('def images(doc):\n    return [doc["image"].convert("RGB")]\n')
    return folder


ARGUMENTS = {
    "none": "pruner=none",
    "third": "pruner=divprune,keep_ratio=1/3",
    "sixteen": "pruner=random,num_keep=16,seed=3",
}
TASKS = "local_pope,local_color"


@pytest.fixture(scope="module")
def results(tasks, tmp_path_factory) -> dict[str, Path]:
    """Results files on both tasks: unpruned and pruned. One comes from lmms-eval's command, the others from Python."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    out = tmp_path_factory.mktemp("results")
    command = ["--model", "tprl", "--model_args", ARGUMENTS["third"], "--tasks", TASKS, "--batch_size", "8"]
    command += ["--include_path", str(tasks), "--output_path", str(out)]
    done = subprocess.run([SCRIPTS / "lmms-eval", *command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "avg_visual_tokens_kept" in done.stdout
    (file,) = out.glob("*_results.json")
    files = {"third": file}
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    for name in ("none", "sixteen"):
        found = simple_evaluate(
            "tprl", model_args=ARGUMENTS[name], tasks=TASKS.split(","), task_manager=manager, batch_size=5
        )
        files[name] = out / f"{name}.json"
        files[name].write_text(json.dumps(found, default=str))
    return files


def values(path: Path) -> dict[str, float]:
    return {f"{entry.dataset_name}/{entry.metric_type}": entry.metric_value for entry in lmms_eval_results(path)}


def test_the_entry_point_names_our_model():
    from lmms_eval.models import MODEL_REGISTRY_V2

    assert MODEL_REGISTRY_V2.get_manifest("tprl").chat_class_path == "tprl_hf.evaluation.lmms_eval.model.TPRL"


def test_stock_pope_scores_what_the_model_says(results, tasks):
    """Unpruned the embedded model is nearly always right; random keeping of a ninth is not."""
    found = {name: values(path) for name, path in results.items()}
    assert found["none"]["local_pope/pope_accuracy"] >= 0.9 and found["none"]["local_color/exact_match"] >= 0.9
    assert found["third"]["local_pope/pope_accuracy"] >= 0.9
    assert found["sixteen"]["local_color/exact_match"] < 0.75
    # our own POPE, on the answers that it logged
    from tprl_hf.evaluation.metrics import POPE

    logged = json.loads(results["sixteen"].read_text())["samples"]["local_pope"]
    answers = [sample["filtered_resps"][0] for sample in logged]
    ours = POPE().compute(predictions=answers, references=[sample["target"] for sample in logged])
    for metric in ("accuracy", "precision", "recall"):
        assert found["sixteen"][f"local_pope/pope_{metric}"] == pytest.approx(ours[metric])


def test_tokens_and_times_are_in_the_results(results):
    kept = {"none": 144, "third": 48, "sixteen": 16}
    for name, path in results.items():
        throughput = json.loads(path.read_text())["throughput"]
        assert throughput["avg_visual_tokens"] == 144 and throughput["avg_visual_tokens_kept"] == kept[name]
        assert 0 < throughput["avg_prefill_ms"] < 1000 * throughput["total_elapsed_time"]
        assert throughput["avg_vision_ms"] > 0
        assert throughput["avg_latency"] * 2 * NUM_QUESTIONS == pytest.approx(throughput["total_elapsed_time"])


def test_results_become_entries_of_a_card(results):
    entries = lmms_eval_results(results["third"])
    assert {entry.dataset_name for entry in entries} == {"local_pope", "local_color"} and len(entries) == 6
    arguments = entries[0].metric_args
    assert arguments["model_args"] == "pruner=divprune,keep_ratio=1/3" and arguments["avg_visual_tokens_kept"] == 48
    assert arguments["num_questions"] == NUM_QUESTIONS and arguments["avg_prefill_ms"] > 0
    card = ModelCardData(model_name="Mosaic-LLaVA", eval_results=entries).to_yaml()
    assert "pope_f1_score" in card and "stderr" not in card and "local_color" in card


def test_tprl_evaluate_takes_a_task(results, tasks, tmp_path, capsys):
    """It asks the same questions, prunes alike, and scores as the task does."""
    from tprl_hf.cli.main import main

    words = ["--include-path", str(tasks), "--pruners", "divprune", "--keep-ratios", "1/3"]
    assert main(["evaluate", "--data", "local_pope", *words, "--output-dir", str(tmp_path / "pope")]) == 0
    rows = json.loads((tmp_path / "pope" / "results.json").read_text())["rows"]
    accuracy = {row["pruner"]: row["accuracy"]["value"] for row in rows}
    assert accuracy["none"] == values(results["none"])["local_pope/pope_accuracy"]
    assert accuracy["divprune"] == values(results["third"])["local_pope/pope_accuracy"]
    out, err = capsys.readouterr()
    assert "pope_accuracy of the task local_pope" in out
    assert "local_pope lets an answer have 128 tokens; --max-new-tokens 16 cuts longer ones off." in err
    assert main(["evaluate", "--data", "nope", *words]) == 2
    assert "'nope' is not a task of lmms-eval" in capsys.readouterr().err


def test_tprl_evaluate_filters_answers_as_the_task_does(tasks, tmp_path):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from tprl_hf.cli.main import main

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate("tprl", model_args="pruner=none", tasks=["local_letter"], task_manager=manager)
    theirs = found["results"]["local_letter"]["exact_match,letter"]
    words = ["--include-path", str(tasks), "--pruners", "none", "--output-dir", str(tmp_path / "letter")]
    assert main(["evaluate", "--data", "local_letter", *words]) == 0
    rows = json.loads((tmp_path / "letter" / "results.json").read_text())["rows"]
    assert {row["pruner"]: row["accuracy"]["value"] for row in rows}["none"] == theirs >= 0.9


def test_what_cannot_be_run_is_refused(tmp_path):
    from tprl_hf.evaluation.lmms_eval.model import TPRL

    build("llava").save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs a pruner"):
        TPRL(keep_ratio="1/3", pruner="none")
    with pytest.raises(ValueError, match="'vispruner' needs a budget"):
        TPRL(pretrained=str(tmp_path), pruner="vispruner")
    with pytest.raises(ValueError, match="no pruner 'magic'"):
        TPRL(pruner="magic", num_keep=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_ratio": "a third"}, "keep_ratio must be the fraction that is KEPT.*; got 'a third'"),
        ({"keep_ratio": "4/3"}, r"keep_ratio must be .*; got 1\.33"),
        ({"num_keep": 0.5}, r"num_keep must be .*; got 0\.5"),
        ({"keep_ratio": 0.5, "num_keep": 16}, "keep_ratio.*num_keep"),
        ({"batch_size": "auto"}, "batch_size must be a whole number of at least 1; got 'auto'"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(monkeypatch, arguments, message):
    from tprl_hf.evaluation.lmms_eval import model

    monkeypatch.setattr(model, "load_model", lambda *_: pytest.fail("it loads a model"))
    with pytest.raises(ValueError, match=message):
        model.TPRL(**arguments)


def test_answers_end_where_the_task_says():
    from tprl_hf.evaluation.lmms_eval.model import cut, generation_arguments, stops_of

    assert [cut("yes USER: x", ["USER:"]), cut(" yes ", ["USER:"]), cut("a.b;c", [";", "."])] == ["yes", "yes", "a"]
    assert stops_of({"until": "USER:"}) == ["USER:"]
    assert stops_of({}) == stops_of({"until": None}) == stops_of({"until": ["", None]}) == []
    nulls = dict.fromkeys(("temperature", "top_p", "num_beams", "max_new_tokens", "do_sample"))
    assert generation_arguments(nulls) == {"max_new_tokens": 1024, "do_sample": False}
    assert generation_arguments({"temperature": 0, "top_p": 1.0, "num_beams": 1, "image_aspect_ratio": "pad"}) == {
        "max_new_tokens": 1024,
        "do_sample": False,
    }
    wanted = {"temperature": 0.2, "top_p": None, "num_beams": 3, "max_new_tokens": 5}
    assert generation_arguments(wanted) == {
        "max_new_tokens": 5,
        "num_beams": 3,
        "do_sample": True,
        "temperature": 0.2,
    }


def test_the_empty_line_that_lmms_eval_fills_in_ends_no_answer():
    """Most tasks that ask for reasoning say no `until`: their answers have paragraphs, and the result comes last."""
    from lmms_eval.api.task import TaskConfig

    from tprl_hf.evaluation.lmms_eval.model import cut, stops_of

    for said in ({"max_new_tokens": 4096}, None):
        filled = TaskConfig(task="own", output_type="generate_until", generation_kwargs=said).generation_kwargs
        assert filled["until"]
        assert cut("There are two shapes.\n\nAnswer: B", stops_of(filled)) == "There are two shapes.\n\nAnswer: B"


PIECES = (
    "yes no the a two none 10 1,000 3.5 dont can't red-blue girl's 2:50 5% 0.05 -9.6 ten, Yes. (x) a/b ? ! É".split()
)


@pytest.fixture
def texts() -> list[str]:
    """Random answers of words, numbers and marks."""
    generator = random.Random(0)
    return [
        generator.choice(["", " "]).join(generator.choices(PIECES, k=generator.randint(1, 4))) for _ in range(3000)
    ]


def test_our_metrics_are_the_fields(texts):
    """Against lmms-eval's copies of the official scripts, on random texts."""
    from lmms_eval.api.metrics import anls
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results

    from tprl_hf.answer_rules import anls_score, normalize_vqa, relaxed_score, vqa_score

    official = EvalAIAnswerProcessor()
    for text, other in pairwise(texts):
        cleaned = text.replace("\n", " ").replace("\t", " ").strip()
        assert normalize_vqa(text) == official.process_digit_article(official.process_punctuation(cleaned)), text
        assert anls_score(text, other) == pytest.approx(anls([other], [text])["anls"]), (text, other)
        stripped = text.strip(), other.strip()
        assert relaxed_score(*stripped) == float(relaxed_correctness(*stripped)), stripped
    for start in range(0, len(texts) - 10, 10):
        people = [*texts[start : start + 6], *texts[start : start + 2] * 2]
        document = {"question_id": 0, "answers": [{"answer": text, "answer_id": i} for i, text in enumerate(people)]}
        for text in texts[start : start + 7]:
            assert vqa_score(text, people) == pytest.approx(vqav2_process_results(document, [text])["exact_match"])
