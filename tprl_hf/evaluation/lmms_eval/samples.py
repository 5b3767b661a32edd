"""The questions of an lmms-eval task as samples, scored as the task does; runs where lmms-eval is installed."""

from collections.abc import Callable, Sequence
from numbers import Real
from types import SimpleNamespace
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature

from tprl_hf.data import SAMPLE_FEATURES
from tprl_hf.pictures import to_rgb

# What lmms-eval writes into the `until` of a task that has none. It would end an answer that reasons before its
# result; lmms-eval's own models pass over it too.
FILLED_IN = "\n\n"
# What lmms-eval's command takes out of an answer before it is scored, unless the task says other tags, or none.
REASONING_TAGS = [["<think>", "</think>"], ["<analysis>", "</analysis>"]]


def lmms_eval_samples(
    task_name: str, num_samples: int | None = None, include_path: str | None = None
) -> tuple[Dataset, Callable[[str, Any], float], str, dict[str, Any]]:
    """
    Reads a task of lmms-eval.

    Args:
        task_name (`str`):
            A task on images with free answers, such as `"pope"` or `"gqa"`.
        num_samples (`int`, *optional*):
            Only the first so many documents.
        include_path (`str`, *optional*):
            A folder with tasks of your own, in which the task is then looked for.

    Returns:
        `tuple`: Rows of `SAMPLE_FEATURES`, whose `answer` is the document's number; the score of an answer, from that
        number and the answer, which is the first of the task's metrics that one answer has; it is of the answer up to
        where the task ends it, after the task's first filter and without reasoning, as lmms-eval's command has it;
        that metric's name; and how the task wants answers generated.

    Raises:
        `ValueError`: If lmms-eval is not installed or has no such task, or the task is of another kind.
    """
    try:
        from lmms_eval.api.reasoning import parse_reasoning_tags_config, strip_reasoning_tags
        from lmms_eval.tasks import TaskManager, get_task_dict
        from loguru import logger
    except ImportError:
        raise ValueError(
            f"{task_name!r} is neither mosaic, easy-vqa, photo nor a file that ends in .jsonl. Tasks of lmms-eval "
            "need it, which wants an environment of its own: docs/evaluation.md says how. There, the same "
            f"command works, and so does lmms-eval --model tprl --model_args keep_ratio=1/3 --tasks {task_name}."
        ) from None

    logger.disable("lmms_eval")  # a line for each file in its folders that is not a task
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    if task_name not in manager.all_subtasks:
        known = "is a group of tasks" if task_name in manager.all_tasks else "is not a task of lmms-eval"
        raise ValueError(
            f"{task_name!r} {known}, nor is it mosaic, easy-vqa, photo or a .jsonl file. `lmms-eval tasks subtasks` "
            "lists the tasks."
        )
    task = get_task_dict([task_name], manager)[task_name]
    if task.OUTPUT_TYPE != "generate_until":
        raise ValueError(
            f"Task {task_name!r} is of type {task.OUTPUT_TYPE}; only generate_until can be compared here."
        )
    documents = task.eval_docs
    total = len(documents) if num_samples is None else min(num_samples, len(documents))
    rows = [_row(task, documents[number], number) for number in range(total)]
    metric = _metric_of(task, documents[0])
    wanted = dict(task.config.generation_kwargs or {})
    stops = stops_of(wanted)

    tags = parse_reasoning_tags_config(REASONING_TAGS, getattr(task.config, "reasoning_tags", None)) or []

    def score(answer: str, number: Any) -> float:
        document = documents[int(number)]  # read anew each time: some tasks write into it
        result = filtered(task, document, cut(answer, stops))
        result = strip_reasoning_tags(result, tags) if tags and isinstance(result, str) else result
        return _number(task.process_results(document, [result])[metric])

    features = dict(SAMPLE_FEATURES) | {"images": List(ImageFeature()), "answer": Value("string")}
    return Dataset.from_list(rows, features=Features(features)), score, metric, wanted


def stops_of(wanted: dict[str, Any]) -> list[str]:
    """The texts by which a task itself ends an answer."""
    until = wanted.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop and stop != FILLED_IN]


def cut(text: str, stops: list[str]) -> str:
    """
    An answer up to the first of the texts that end it.

    Example:

    ```python
    >>> cut("yes USER: and", ["USER:", "."])
    'yes'
    ```
    """
    ends = [text.index(stop) for stop in stops if stop in text]
    return text[: min(ends)].strip() if ends else text.strip()


def filtered(task: Any, document: dict[str, Any], answer: str) -> Any:
    """What the task's first filter takes out of an answer, such as the letter of a choice."""
    request = SimpleNamespace(resps=[answer], filtered_resps={})  # all that filters read of a request
    task._filters[0].apply([request], [document])
    (found,) = request.filtered_resps.values()
    return found


def _row(task: Any, document: dict[str, Any], number: int) -> dict[str, Any]:
    visuals: Sequence[Any] = task.doc_to_visual(document) or []
    kinds = {type(one).__name__ for one in visuals if not hasattr(one, "convert")}
    if kinds:
        raise ValueError(f"Task {task.config.task!r} has other visuals than images: {', '.join(sorted(kinds))}.")
    return {
        "images": [to_rgb(image) for image in visuals],
        "prompt": task.doc_to_text(document),
        "answer": str(number),
        "question_type": "all",
        "boxes": [],
        "image_id": "",
        "objects": [],
    }


def _metric_of(task: Any, document: dict[str, Any]) -> str:
    found = task.process_results(document, ["yes"])
    for name, value in found.items():
        if _is_score(value):
            return name
    raise ValueError(
        f"Task {task.config.task!r} has no score of a single answer, only {', '.join(found)} over all of them: run "
        f"lmms-eval --model tprl --tasks {task.config.task} for each budget."
    )


def _is_score(value: Any) -> bool:
    return isinstance(value.get("score") if isinstance(value, dict) else value, Real)


def _number(value: Any) -> float:
    return float(value["score"] if isinstance(value, dict) else value)
