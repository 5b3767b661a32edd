"""Models and pruners by the names that users write. The functions import torch, this module does not."""

from typing import TYPE_CHECKING, Any

import tprl_hf

if TYPE_CHECKING:
    import torch

    from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
    from tprl_hf.modeling.token_pruner import TokenPruner


def load_model(
    path: str | None = None, device: "torch.device | str | None" = None
) -> tuple["TPRLForConditionalGeneration", Any]:
    """
    A model, ready to answer, and its processor.

    Args:
        path (`str`, *optional*):
            A TPRL checkpoint, or any LVLM, which is wrapped; a directory or a name on the Hub. Defaults to the
            embedded checkpoint.
        device (`torch.device` or `str`, *optional*):
            Where it goes. Defaults to the accelerator, if there is one.

    Returns:
        `tuple`: The model in evaluation mode, in float32 on the CPU or in the checkpoint's own dtype on an
        accelerator, and its processor.

    Raises:
        `OSError`, `ValueError`: If there is no such checkpoint, it is damaged, its family is not supported, or its
            processor needs packages that are not installed.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig
    from transformers.utils import logging

    from tprl_hf.missing_packages import load_processor

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    path = path or tprl_hf.embedded_checkpoint()
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = torch.device(device or "cpu")
    dtype = torch.float32 if device.type == "cpu" else "auto"
    model_class = tprl_hf.TPRLForConditionalGeneration
    is_ours = AutoConfig.from_pretrained(path).model_type == tprl_hf.TPRLConfig.model_type
    load = model_class.from_pretrained if is_ours else model_class.from_base_model
    try:
        model = load(path, dtype=dtype)
    except SafetensorError as error:
        raise ValueError(f"The weights in {path} are truncated or damaged ({error}): download them again.") from error
    except RuntimeError as error:
        raise ValueError(
            f"The weights in {path} do not fit its config.json ({error}): download both again."
        ) from error
    return model.to(device).eval(), load_processor(path)


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
