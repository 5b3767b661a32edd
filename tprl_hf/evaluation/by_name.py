"""Pruners by the names that users write. The functions import torch, this module does not."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
    from tprl_hf.modeling.token_pruner import TokenPruner


def has_trained_policy(model: "TPRLForConditionalGeneration") -> bool:
    """A checkpoint whose policy is trained names a budget in its config; a fresh policy comes without one."""
    config = model.config
    return any(budget is not None for budget in (config.keep_ratio, config.num_keep, config.threshold))


def make_pruner(model: "TPRLForConditionalGeneration", name: str, seed: int = 0) -> "TokenPruner | None":
    """
    Args:
        model ([`TPRLForConditionalGeneration`]):
            The model.
        name (`str`):
            A pruner's name in the shell; docs/pruners.md lists them.
        seed (`int`, *optional*, defaults to 0):
            Seed of the random pruner.

    Returns:
        [`TokenPruner`]: The pruner, without a budget; `None` for "none" and "learned", which leave the model as it is.

    Raises:
        `ValueError`: For an unknown name, and for "learned" where the policy is not trained.
    """
    from tprl_hf import pruners

    if name == "learned" and not has_trained_policy(model):
        raise ValueError("This checkpoint has no trained policy: pass --pruner vispruner, uniform or random.")
    if name in ("none", "learned"):
        return None
    if name == "random":
        return pruners.RandomPruner(seed=seed)
    if name in ("fastv", "sparsevlm"):
        return (pruners.FastVPruner if name == "fastv" else pruners.SparseVLMPruner)(model.lvlm)
    classes: dict[str, type[TokenPruner]] = {
        "uniform": pruners.UniformPruner,
        "feature-norm": pruners.FeatureNormPruner,
        "query-similarity": pruners.QuerySimilarityPruner,
        "divprune": pruners.DivPrune,
        "cdpruner": pruners.CDPruner,
        "tome": pruners.ToMePruner,
        "visionzip": pruners.VisionZip,
        "prumerge": pruners.PruMerge,
        "vispruner": pruners.VisPruner,
    }
    if name not in classes:
        known = ("none", "learned", "random", "fastv", "sparsevlm", *classes)
        raise ValueError(f"There is no pruner {name!r}; choose from {', '.join(known)}.")
    return classes[name]()
