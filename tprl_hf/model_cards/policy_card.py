"""The card of a trained policy: its text, and its results as the Hub reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index

from .render import render_card

OWN_ANSWERS = "the unpruned model's own answers are the references"  # of data without answers, as `score` says it
# What a results.json of `tprl evaluate` must say.
RESULT_FIELDS = ("command", "device", "versions", "data", "split", "seed", "num_samples", "weights", "rows")

BUDGETS = {
    "keep_ratio": "a fraction of {:.4g} of the visual tokens is kept",
    "num_keep": "{} visual tokens are kept",
    "threshold": "the visual tokens with a keep probability above {:.4g} are kept",
}


def without_paths(value: Any) -> Any:
    """
    Paths of the machine on which something was measured, in strings, lists and dicts, shortened to their last part.

    Example:

    ```python
    >>> without_paths("tprl evaluate /data/runs/ppo --keep-ratios 1/3 --data me/name")
    'tprl evaluate ppo --keep-ratios 1/3 --data me/name'
    ```
    """
    if isinstance(value, str):
        return re.sub(r"(?<![^\s\"'=(\[])(?:~|\.\.?)?/(?:[^\s/,]+/)*([^\s/,]+)/?", r"\1", value)
    if isinstance(value, Mapping):
        return {name: without_paths(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(one) for one in value]
    return value


def policy_card(
    repo_id: str,
    config: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]] = (),
    latency: Mapping[str, Any] | None = None,
    flops: Mapping[str, Any] | None = None,
    stages: Sequence[Mapping[str, Any]] = (),
    benchmark_results: Sequence[EvalResult] = (),
    own: str = "learned",
) -> str:
    """
    The text of the card of a policy, or of a checkpoint with another pruner, without header.

    Args:
        repo_id (`str`): Where it is published.
        config (`Mapping`): Its `config.json`.
        results (`Sequence[Mapping]`, *optional*): What `tprl evaluate` wrote (`results.json`).
        latency (`Mapping`, *optional*): What `tprl benchmark --json` printed.
        flops (`Mapping`, *optional*): What `tprl flops --json` printed.
        stages (`Sequence[Mapping]`, *optional*): `stage`, `settings`, `metrics` and `seconds` of each training stage.
        benchmark_results (`Sequence[EvalResult]`, *optional*): What lmms-eval measured, see `lmms_eval_results`.
        own (`str`, *optional*, defaults to `"learned"`): What the results call the checkpoint's pruner.

    Returns:
        `str`: Markdown. All that comes from outside is escaped.

    Raises:
        `ValueError`: If results lack the rows `none` and `random`, without which a number says nothing.
    """
    for result in results:
        check_results(result)
    pruner = config.get("pruner") or {}
    budget = pruner if any(pruner.get(name) is not None for name in BUDGETS) else config
    named = [text.format(budget[name]) for name, text in BUDGETS.items() if budget.get(name) is not None]
    widths = ("token_dim", "autoencoder_dim", "latent_dim", "num_steps", "query_agnostic", "position_ids")
    return render_card(
        "policy",
        repo_id=repo_id,
        title=repo_id.split("/")[-1],
        merged=config["includes_base_model"],
        base_model=config.get("base_model_name_or_path"),
        config=config,
        own=own,
        has_lora=bool(config.get("includes_adapter")),
        is_tuned=any(stage["stage"] == "tune" for stage in stages),
        budget=named[0] if named else None,
        budget_argument="" if named else ", keep_ratio=1 / 3",
        results=[{"score": result.get("metric", ""), **without_paths(result)} for result in results],
        benchmark_results=benchmark_results,
        latency=without_paths(latency),
        flops=without_paths(flops),
        stages=[{"seconds": None, "metrics": {}, **without_paths(stage)} for stage in stages],
        policy={name: value for name, value in config.items() if name in widths or name.startswith("policy_")},
    )


def check_results(result: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless `result` is a `results.json` with its baselines."""
    missing = [name for name in RESULT_FIELDS if name not in result]
    if missing:
        raise ValueError(f"These are not results of `tprl evaluate`: {', '.join(missing)} are missing.")
    pruners = {row["pruner"] for row in result["rows"]}
    if not {"none", "random"} <= pruners:
        raise ValueError(f"A table needs the rows none and random beside the policy's; there are {sorted(pruners)}.")


def has_own_references(result: Mapping[str, Any]) -> bool:
    """Whether a `results.json` says how often the unpruned model gives the same answer, and not a right one."""
    return OWN_ANSWERS in str(result.get("score"))


def model_index(
    repo_id: str,
    results: Sequence[Mapping[str, Any]],
    benchmark_results: Sequence[EvalResult] = (),
    own: str = "learned",
) -> list[dict[str, Any]]:
    """
    Accuracy of the checkpoint's pruner `own` at each budget, of the unpruned model, and benchmarks as the header's
    `model-index`.
    """
    found = list(benchmark_results)
    for result in results:
        check_results(result)
        data, agrees = without_paths(str(result["data"])), has_own_references(result)
        for row in result["rows"]:
            if row["pruner"] not in (own, *(() if agrees else ("none",))):
                continue
            kept = "unpruned" if row["pruner"] == "none" else f"visual tokens kept: {row['budget']}"
            found.append(
                EvalResult(
                    task_type="image-text-to-text",
                    dataset_type=data,
                    dataset_name=data,
                    dataset_split=result["split"],
                    dataset_args={"seed": result["seed"], "num_samples": result["num_samples"]},
                    metric_type="agreement" if agrees else "accuracy",
                    metric_name=f"{'Agreement with unpruned' if agrees else 'Accuracy'} ({kept})",
                    metric_value=round(row["accuracy"]["value"], 4),
                )
            )
    return eval_results_to_model_index(repo_id.split("/")[-1], found)


def eval_results_yaml(result: Mapping[str, Any], dataset_id: str, task_id: str, own: str = "learned") -> str:
    """
    The accuracy of the checkpoint's pruner at each budget as a file for `.eval_results/`, for a benchmark that is on
    the Hub.

    Args:
        result (`Mapping`): A `results.json`.
        dataset_id, task_id (`str`): The benchmark's dataset on the Hub, and its task.
        own (`str`, *optional*, defaults to `"learned"`): What the results call its pruner.

    Raises:
        `ValueError`: If the results have no row of it, or are of no reference answers.
    """
    check_results(result)
    if has_own_references(result):
        raise ValueError(
            f"{result['data']} was measured without reference answers: how often the unpruned model agrees is "
            f"not a result of {dataset_id}. Leave out --benchmark, or evaluate data with `answer`."
        )
    entries = [
        EvalResultEntry(
            dataset_id=dataset_id,
            task_id=task_id,
            value=round(100 * row["accuracy"]["value"], 2),
            notes=f"{row['budget']} of the visual tokens kept; {result['num_samples']} questions",
        )
        for row in result["rows"]
        if row["pruner"] == own
    ]
    if not entries:
        raise ValueError(f"The results have no row `{own}`: run tprl evaluate with --pruners {own}.")
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
