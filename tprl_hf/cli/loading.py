"""The model, the pruner and the budget that the options of a command ask for. Imports no torch."""

import argparse
import contextlib
from typing import TYPE_CHECKING, Any

from tprl_hf.loading import load_model
from tprl_hf.pruners import DEFAULT_PRUNER
from tprl_hf.pruners.by_name import has_budget, make_pruner, own_pruner

from .arguments import DEFAULT_KEEP_RATIO, budget_of, loading_options, refuse_budget_of_none
from .progress import note

if TYPE_CHECKING:
    from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
    from tprl_hf.modeling.token_pruner import TokenPruner


def load_named_model(arguments: argparse.Namespace) -> "tuple[TPRLForConditionalGeneration, Any]":
    """The model that a command names, loaded as its options say, and its processor; see [`load_model`]."""
    note(f"Loading {arguments.model or 'the embedded model, which knows drawn shapes only'} ...")
    model, processor = load_model(arguments.model, **loading_options(arguments))
    if arguments.dtype is None:
        note(f"It computes in {dtype_name(model)} on {model.device.type}; --dtype asks for another one.")
    return model, processor


def load_model_for(data: str, arguments: argparse.Namespace) -> "tuple[TPRLForConditionalGeneration, Any]":
    """The same; where the command names no model, the embedded one that knows what `data` shows."""
    model = arguments.model
    if model is None and data == "photo":
        from tprl_hf.test_bed.photo_checkpoint import photo_policy_checkpoint

        model = str(photo_policy_checkpoint(note))
    return load_named_model(argparse.Namespace(**{**vars(arguments), "model": model}))


def dtype_name(model: "TPRLForConditionalGeneration") -> str:
    """That of the base model, as users write it."""
    return str(model.lvlm.dtype).removeprefix("torch.")


def pruner_and_budget(
    model: "TPRLForConditionalGeneration", arguments: argparse.Namespace
) -> "tuple[str, TokenPruner | None, dict[str, Any]]":
    """
    What `--pruner` and the options of [`add_budget_arguments`] ask for.

    Returns:
        `tuple`: The name of a pruner; the pruner itself, or `None` where the checkpoint's own is used; and keyword
        arguments of `generate`, empty where the checkpoint's own budget counts.

    Raises:
        `ValueError`: If the pruner that keeps everything is given a budget, or the policy is wanted and not trained.
    """
    budget: dict[str, Any] = budget_of(arguments)
    own = own_pruner(model)
    name = arguments.pruner or own or DEFAULT_PRUNER
    if arguments.no_prune or name == "none":
        refuse_budget_of_none(budget)
        # `tprl serve` also takes requests that have a budget of their own, which an untrained policy cannot serve
        return "none", None if own is not None else make_pruner(model, DEFAULT_PRUNER), {"prune": False}
    if not budget and not has_budget(model):
        budget = {"keep_ratio": DEFAULT_KEEP_RATIO}
    uses_own = arguments.pruner is None and own is not None
    return name, None if uses_own else make_pruner(model, name, arguments.seed), budget


def using_pruner(
    model: "TPRLForConditionalGeneration", pruner: "TokenPruner | None"
) -> contextlib.AbstractContextManager:
    """A context inside which the model prunes with `pruner`; `None` leaves it as it is."""
    return contextlib.nullcontext() if pruner is None else model.using(pruner)
