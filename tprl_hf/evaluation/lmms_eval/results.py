"""Results of lmms-eval as entries of a model card."""

from numbers import Real
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from tprl_hf.json_files import misfit, read_json
from tprl_hf.model_cards.policy_card import without_paths

# of lmms-eval's `throughput`, what [`~tprl_hf.evaluation.lmms_eval.model.TPRL`] puts there
MEASURED = ("avg_visual_tokens_kept", "avg_visual_tokens", "avg_vision_ms", "avg_prefill_ms")
WRITTEN = {
    "results": {...: {}},
    "configs": {...: {"dataset_path": str}},
    "config": {"model_args": object},
    "n-samples": {...: {"effective": int}},
    "?throughput": {},
}


def lmms_eval_results(path: str | Path) -> list[EvalResult]:
    """
    Reads the results file of an lmms-eval run (`--output_path`).

    Args:
        path (`str` or `Path`):
            The file, `..._results.json`.

    Returns:
        `list[EvalResult]`: One entry a task and metric, without standard errors, for
        `ModelCardData(model_name=..., eval_results=...)`. Groups of tasks have none, their tasks do. `metric_args` has
        the model's arguments (of paths the last part), the number of questions, and the tokens kept and times of the
        whole run.

    Raises:
        `ValueError`: If the file is not of lmms-eval.
    """
    cure = "pass the results file that lmms-eval wrote in its --output_path."
    found = read_json(Path(path), {}, cure)
    missing = [name for name in ("results", "configs", "config", "n-samples") if name not in found]
    if missing:
        raise ValueError(f"{path} is not a results file of lmms-eval: it lacks {', '.join(missing)}.")
    reason = misfit(found, WRITTEN)
    if reason is not None:
        raise ValueError(f"{path} is damaged ({reason}): {cure}")
    throughput = found.get("throughput", {})
    shared = {
        "model_args": without_paths(found["config"]["model_args"]),
        **{name: throughput[name] for name in MEASURED if name in throughput},
    }
    entries = []
    for task, values in found["results"].items():
        if task not in found["configs"]:
            continue
        config = found["configs"][task]
        for key, value in values.items():
            metric, _, chosen = key.partition(",")
            if not chosen or "_stderr" in metric or not isinstance(value, Real):
                continue
            arguments = {**shared, "num_questions": found["n-samples"][task]["effective"]}
            entries.append(_entry(task, config, metric, value, arguments))
    return entries


def _entry(task: str, config: dict[str, Any], metric: str, value: Any, arguments: dict[str, Any]) -> EvalResult:
    source = config["dataset_path"]
    return EvalResult(
        task_type="image-text-to-text",
        # a task on local files names the reader of them, not a data set on the Hub
        dataset_type=source if "/" in source else task,
        dataset_name=task,
        dataset_config=config.get("dataset_name"),
        dataset_split=config.get("test_split") or config.get("validation_split"),
        metric_type=metric,
        metric_value=value,
        metric_args=arguments,
        source_name="lmms-eval",
        source_url="https://github.com/EvolvingLMMs-Lab/lmms-eval",
    )
