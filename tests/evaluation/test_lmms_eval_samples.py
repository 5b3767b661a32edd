"""Tasks of lmms-eval as `tprl evaluate` reads them, with a pretended lmms-eval."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from tprl_hf.cli.evaluate import load_samples
from tprl_hf.cli.main import make_parser


def take_last_line(requests):
    for request in requests:
        request.filtered_resps["last"] = request.resps[0].split("RESULT:")[-1].strip()


@pytest.fixture
def task(monkeypatch):
    """A task with two documents; `process_results` notes what it was given."""
    seen: list[str] = []

    def process_results(document, results):
        seen.extend(results)
        return {"exact_match": float(results[0] == document["answer"])}

    task = SimpleNamespace(
        OUTPUT_TYPE="generate_until",
        eval_docs=[{"question": "who ?", "answer": "a cat"}, {"question": "where ?", "answer": "left"}],
        doc_to_visual=lambda document: [],
        doc_to_text=lambda document: document["question"],
        process_results=process_results,
        config=SimpleNamespace(task="own", generation_kwargs={}),
        _filters=[SimpleNamespace(apply=lambda requests, documents: take_last_line(requests))],
        seen=seen,
    )
    modules = {
        name: ModuleType(name) for name in ("lmms_eval", "lmms_eval.api.reasoning", "lmms_eval.tasks", "loguru")
    }
    modules["lmms_eval.api.reasoning"].parse_reasoning_tags_config = lambda usual, own: own or usual
    modules["lmms_eval.api.reasoning"].strip_reasoning_tags = lambda text, tags: text.rsplit(tags[0][1], 1)[-1].strip()
    modules["lmms_eval.tasks"].TaskManager = lambda **_: SimpleNamespace(all_subtasks=["own"], all_tasks=["own"])
    modules["lmms_eval.tasks"].get_task_dict = lambda names, manager: {"own": task}
    modules["loguru"].logger = SimpleNamespace(disable=lambda name: None)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return task


def load():
    return load_samples(make_parser().parse_args(["evaluate", "--data", "own"]))


@pytest.mark.parametrize(
    ("until", "answer", "scored"),
    [
        (["USER:", "\n"], "a cat\nUSER: and ?", "a cat"),
        ("###", " a cat ### it sits", "a cat"),
        (["\n\n"], "It purrs.\n\na cat", "It purrs.\n\na cat"),  # lmms-eval fills it in where a task says nothing
        (None, "a cat", "a cat"),
        ("###", "It purrs. RESULT: a cat ### it sits", "a cat"),  # the task's filter
        (None, "<think>a dog?</think> a cat", "a cat"),
    ],
)
def test_an_answer_ends_where_the_task_says(task, until, answer, scored):
    """As in `lmms-eval --model tprl`: else what a model goes on to say counts as wrong."""
    task.config.generation_kwargs = {"until": until, "max_new_tokens": 16}
    _, _, score, metric = load()
    assert score(answer, "0") == float(scored == "a cat") and task.seen[-1] == scored
    assert metric == "exact_match of the task own"


@pytest.mark.parametrize(
    ("wanted", "line"),
    [
        ({"do_sample": True, "temperature": 0.7}, "own draws its answers; here each is greedy"),
        ({"num_beams": 3}, "own searches with 3 beams; here each is greedy"),
        ({"do_sample": False, "temperature": 0, "num_beams": 1, "top_p": None}, None),
    ],
)
def test_how_a_task_generates_is_said_where_it_is_not_done(task, capsys, wanted, line):
    task.config.generation_kwargs = wanted
    load()
    err = capsys.readouterr().err
    assert line in err if line else "greedy" not in err
