"""Pruners by the names that users write. The functions import torch, this module does not."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
    from tprl_hf.modeling.token_pruner import TokenPruner


def own_pruner(model: "TPRLForConditionalGeneration") -> str | None:
    """The name of the pruner that the checkpoint comes with: "learned" where its policy is trained, or `None`."""
    config = model.config
    if isinstance(config.pruner, dict):
        return config.pruner["name"]
    return None if config.policy_training is None else "learned"


def has_budget(model: "TPRLForConditionalGeneration") -> bool:
    """Whether the checkpoint says how much it keeps."""
    config, own = model.config, model.pruner.budget
    return own is not None or (config.keep_ratio, config.num_keep, config.threshold) != (None, None, None)


def make_pruner(model: "TPRLForConditionalGeneration", name: str, seed: int = 0) -> "TokenPruner | None":
    """
    Args:
        model ([`TPRLForConditionalGeneration`]):
            The model.
        name (`str`):
            A pruner's name: "learned", or one of [`~tprl_hf.pruners.PRUNERS`].
        seed (`int`, *optional*, defaults to 0):
            Seed of the random pruner.

    Returns:
        [`TokenPruner`]: The pruner with its default settings and without a budget. `None` where the model needs none
        set: for "none", and for "learned" where its policy chooses anyway.

    Raises:
        `ValueError`: For an unknown name, and for "learned" where the policy is not trained.
    """
    from tprl_hf.modeling.checkpoint_checks import refuse_untrained

    from . import PRUNERS

    if name == "none":
        return None
    if name == "learned":
        refuse_untrained(model.config)
        return None if model.config.pruner is None else model.learned_pruner()
    if name not in PRUNERS:
        raise ValueError(f"There is no pruner {name!r}; choose from learned, {', '.join(PRUNERS)}.")
    return PRUNERS[name](**({"seed": seed} if name == "random" else {}))
