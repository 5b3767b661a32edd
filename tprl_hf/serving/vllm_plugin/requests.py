"""What a request asks for and what follows for its images, in plain numbers. Nothing here knows vLLM."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tprl_hf.modeling.budget import Budget, keep_counts, resolve_choice
from tprl_hf.modeling.configuration_tprl import TPRLConfig
from tprl_hf.modeling.text_query import default_query_mask
from tprl_hf.modeling.token_layout import Block
from tprl_hf.modeling.token_pruner import TokenPruner

# Pruners that read a prompt's tokens only, and whether they read its question.
PRUNERS_HERE = {
    "uniform": False,
    "feature-norm": False,
    "divprune": False,
    "pool": False,
    "tome": False,
    "query-similarity": True,
    "cdpruner": True,
}
BUDGET_NAMES = ("keep_ratio", "num_keep", "threshold", "prune")


def split_budget(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`mm_processor_kwargs` as the budget in them, and the rest."""
    budget = {name: kwargs[name] for name in BUDGET_NAMES if kwargs.get(name) is not None}
    return budget, {name: value for name, value in kwargs.items() if name not in BUDGET_NAMES}


def request_budget(
    request: Mapping[str, Any], server: Mapping[str, Any], config: TPRLConfig, pruner: TokenPruner | None = None
) -> Budget | None:
    """
    The budget of a request: its own, else the server's default, else the checkpoint's.

    Args:
        request, server: `mm_processor_kwargs` of the request, and those that the server was started with.
        config ([`TPRLConfig`]): of the checkpoint.
        pruner ([`TokenPruner`], *optional*): the one that stands in for the policy.

    Returns:
        [`Budget`] with a `keep_ratio` or `num_keep`; `None` where all tokens stay.

    Raises:
        `ValueError`: for several budgets, for values out of range, for a threshold, and for a pruner without any.
    """
    asked, default = split_budget(request)[0], split_budget(server)[0]
    if not asked or (asked == {"prune": True} and default.get("prune") is not False):
        asked = default or asked
    own = {name: asked.get(name) for name in BUDGET_NAMES}
    default_budget = None if pruner is None else pruner.budget
    choice = resolve_choice(
        **own, keep_mask=None, pruner_budget=default_budget, pruner_was_chosen=pruner is not None, config=config
    )
    assert choice is None or isinstance(choice, Budget)
    if choice is not None and choice.threshold is not None:
        raise ValueError(
            f"threshold={choice.threshold} cannot be used with vLLM, which must know how many tokens an image has "
            "before the policy has seen it: pass keep_ratio or num_keep, or ask `tprl serve`."
        )
    return choice


def counts_of_images(budget: Budget | None, images: Sequence[Sequence[Block]]) -> list[int]:
    """
    How many tokens of each image of a prompt are kept.

    The budget is the prompt's, as in `generate`. vLLM handles each image alone, so several images share the budget in
    proportion to their sizes; images of the same size keep equally many. Each keeps at least one token besides its
    separators.

    Args:
        budget ([`Budget`], *optional*): `None` keeps all.
        images: the grids of each image.
    """
    sizes = [sum(block.num_tokens for block in blocks) for blocks in images]
    if budget is None:
        return sizes
    total = sum(sizes)
    kept = int(keep_counts(torch.tensor([total]), budget))
    counts = []
    for size, blocks in zip(sizes, images, strict=True):
        separators = sum(block.height if block.row_newline else int(block.separator) for block in blocks)
        share = max(round(kept * size / total), separators + (size > separators))
        counts.append(min(share, size))
    return counts


def question_ids(
    prompt: list[int],
    image_token_id: int,
    special_ids: list[int],
    start_ids: list[int] | None = None,
    end_ids: list[int] | None = None,
) -> list[int]:
    """The tokens of a prompt that are its last question, as `generate` finds them, see [`default_query_mask`]."""
    ids = torch.tensor([prompt])
    mask = default_query_mask(ids, torch.ones_like(ids), ids == image_token_id, special_ids, start_ids, end_ids)
    return ids[mask].tolist()


def towers_by_vllm_names(name: str) -> str:
    """A weight of CLIP's or SigLIP's tower: transformers 5 has one level less than vLLM."""
    return re.sub(r"^((?:model\.)?vision_tower\.)(?!vision_model\.)", r"\1vision_model.", name)
