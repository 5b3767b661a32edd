"""Models and pruners by the names that users write. The functions import torch, this module does not."""

import contextlib
from typing import TYPE_CHECKING, Any

import tprl_hf

if TYPE_CHECKING:
    from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
    from tprl_hf.modeling.token_pruner import TokenPruner


def load_model(path: str | None = None) -> tuple["TPRLForConditionalGeneration", Any]:
    """
    A model, ready to answer, and its processor.

    Args:
        path (`str`, *optional*):
            A TPRL checkpoint, or any LVLM, which is wrapped; a directory or a name on the Hub. Defaults to the
            embedded checkpoint.

    Returns:
        `tuple`: The model in evaluation mode, in float32 on the CPU or in the checkpoint's own dtype on an
        accelerator, and its processor.

    Raises:
        `OSError`, `ValueError`: If there is no such checkpoint, it is damaged, or its family is not supported.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    path = path or tprl_hf.embedded_checkpoint()
    has_accelerator = torch.accelerator.is_available()
    device = (has_accelerator and torch.accelerator.current_accelerator()) or torch.device("cpu")
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
    return model.to(device).eval(), AutoProcessor.from_pretrained(path)


def has_trained_policy(model: "TPRLForConditionalGeneration") -> bool:
    """A checkpoint whose policy is trained names a budget in its config; a fresh policy comes without one."""
    config = model.config
    return any(budget is not None for budget in (config.keep_ratio, config.num_keep, config.threshold))


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


def make_pruner(model: "TPRLForConditionalGeneration", name: str, seed: int = 0) -> "TokenPruner | None":
    """As [`using_pruner`], but the pruner itself, without a budget; `None` where the model stays as it is."""
    from tprl_hf import pruners

    if name == "learned" and not has_trained_policy(model):
        raise ValueError("This checkpoint has no trained policy: pass --pruner vispruner, uniform or random.")
    if name in ("none", "learned"):
        return None
    if name == "random":
        return pruners.RandomPruner(seed=seed)
    if name == "fastv":
        return pruners.FastVPruner(model.lvlm)
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
    return classes[name]()
