"""The pruner and the budget that the options of a command ask for. Imports no torch."""

import argparse
import contextlib
from typing import TYPE_CHECKING, Any

from tprl_hf.evaluation.by_name import has_trained_policy, make_pruner

from .arguments import DEFAULT_KEEP_RATIO, budget_of

if TYPE_CHECKING:
    from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration


def pruner_and_budget(
    model: "TPRLForConditionalGeneration", arguments: argparse.Namespace
) -> tuple[str, dict[str, Any]]:
    """
    What `--pruner` and the options of [`add_budget_arguments`] ask for.

    Returns:
        `tuple`: The name of a pruner, by default learned where the policy is trained, else vispruner; and keyword
        arguments of `generate`, empty where the checkpoint's own budget counts.

    Raises:
        `ValueError`: If the pruner that keeps everything is given a budget.
    """
    pruner = arguments.pruner or ("learned" if has_trained_policy(model) else "vispruner")
    budget: dict[str, Any] = budget_of(arguments)
    if arguments.no_prune or pruner == "none":
        if budget:
            (name,) = budget
            raise ValueError(f"--pruner none keeps all tokens: leave out --{name.replace('_', '-')}.")
        return "none", {"prune": False}
    if not budget and not has_trained_policy(model):
        budget = {"keep_ratio": DEFAULT_KEEP_RATIO}
    return pruner, budget


def using_pruner(model: "TPRLForConditionalGeneration", name: str, seed: int = 0) -> contextlib.AbstractContextManager:
    """
    Args:
        model ([`TPRLForConditionalGeneration`]):
            The model.
        name (`str`):
            One of the pruners of `--pruner`. "none" and "learned" leave the model as it is.
        seed (`int`, *optional*, defaults to 0):
            Seed of the random pruner.

    Returns:
        A context inside which the model prunes with that method.

    Raises:
        `ValueError`: If the learned pruner is asked of a model whose policy is not trained.
    """
    pruner = make_pruner(model, name, seed)
    return contextlib.nullcontext() if pruner is None else model.using(pruner)
