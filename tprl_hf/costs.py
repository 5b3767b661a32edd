"""What a prompt costs: its tokens, how many of them are visual, and how many the LLM gets to see. Needs no weights."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tprl_hf.modeling.budget import Budget, keep_counts, resolve_choice
from tprl_hf.modeling.columns import find_visual


@dataclass(frozen=True)
class PromptCost:
    """
    Tokens of one prompt.

    Args:
        prompt_tokens (`int`): All of them.
        visual_tokens (`int`): Those that stand for images.
        kept_tokens (`int`, *optional*): The visual tokens that are kept; `None` for a threshold, which shows only when
            the pruner has seen the images.
    """

    prompt_tokens: int
    visual_tokens: int
    kept_tokens: int | None

    @property
    def llm_tokens(self) -> int | None:
        """What the LLM reads."""
        return None if self.kept_tokens is None else self.prompt_tokens - self.visual_tokens + self.kept_tokens


def placeholder_ids(base_config: Any) -> list[int]:
    """
    The token ids that stand for images and videos in prompts of a base model.

    Raises:
        `ValueError`: If its config names none.
    """
    ids = [getattr(base_config, f"{modality}_token_id", None) for modality in ("image", "video")]
    known = [token_id for token_id in ids if token_id is not None]
    if not known:
        raise ValueError(f"The config of {base_config.model_type!r} does not say which tokens stand for images.")
    return known


def own_budget(config: Any) -> Budget | None:
    """The budget of the pruner that a [`TPRLConfig`] names; `None` where that pruner has none of its own."""
    settings = config.pruner or {}
    named: dict[str, Any] = {name: settings.get(name) for name in ("keep_ratio", "num_keep", "threshold")}
    if all(value is None for value in named.values()):
        return None
    bounds = {name: settings[name] for name in ("min_keep", "max_keep") if name in settings}
    return Budget(**named, **bounds)


def budget_in_use(given: dict[str, Any], pruner_budget: Budget | None, config: Any) -> Budget | None:
    """
    The budget of a call of `generate`.

    Args:
        given (`dict`): What the call says: `keep_ratio`, `num_keep`, `threshold` or `prune`, or nothing.
        pruner_budget ([`Budget`], *optional*): The pruner's own.
        config ([`TPRLConfig`]): Of the model.

    Returns:
        [`Budget`]: `None` where all tokens stay.
    """
    values = {name: given.get(name) for name in ("keep_ratio", "num_keep", "threshold", "prune")}
    choice = resolve_choice(
        **values, keep_mask=None, pruner_budget=pruner_budget, pruner_was_chosen=False, config=config
    )
    assert not isinstance(choice, Tensor)  # no mask was given
    return choice


def prompt_cost(input_ids: Tensor, token_ids: Iterable[int], budget: Budget | None) -> PromptCost:
    """
    Args:
        input_ids (`int64 [1, L]`): The prompt, as the processor makes it.
        token_ids (`Iterable[int]`): See [`placeholder_ids`].
        budget ([`Budget`], *optional*): What is kept; all without one.
    """
    num_visual = int(find_visual(input_ids, list(token_ids)).sum())
    if budget is None:
        kept = num_visual
    elif budget.threshold is not None:
        return PromptCost(input_ids.shape[-1], num_visual, None if num_visual else 0)
    else:
        kept = int(keep_counts(torch.tensor([num_visual]), budget))
    return PromptCost(input_ids.shape[-1], num_visual, kept)
