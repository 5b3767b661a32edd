"""What vLLM is told about a pruned model, and what is refused before it starts."""

import copy
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedConfig
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.multimodal.processing import InputProcessingContext

from tprl_hf.modeling.checkpoint_checks import find_base, refuse_untrained
from tprl_hf.modeling.configuration_tprl import TPRLConfig
from tprl_hf.modeling.token_pruner import TokenPruner
from tprl_hf.pruners import PRUNERS

from . import ARCHITECTURE
from .requests import PRUNERS_HERE, request_budget, split_budget

# The field of a base model's config (`--hf-overrides`) that says how it is pruned.
SETTINGS = "tprl"
EXAMPLE = '{"architectures": ["TPRLForConditionalGeneration"], "tprl": {"pruner": "divprune", "keep_ratio": 0.333}}'


def pruned_config(config: PreTrainedConfig) -> TPRLConfig:
    """
    The config of the pruned model: that of a checkpoint of ours, or of a base model that is pruned by a flag.

    Args:
        config: as vLLM read it.

    Raises:
        `ValueError`: for settings that [`TPRLConfig`] does not know.
    """
    if isinstance(config, TPRLConfig):
        return config
    settings = getattr(config, SETTINGS, None) or {}
    unknown = sorted(set(settings) - set(TPRLConfig().to_dict()))
    if unknown or not settings.get("pruner"):
        raise ValueError(f"To prune a base model pass --hf-overrides '{EXAMPLE}'; got {settings!r} for {SETTINGS!r}.")
    return TPRLConfig(base_config=config, architectures=[ARCHITECTURE], **settings)


def named_pruner(config: TPRLConfig) -> TokenPruner | None:
    """
    The pruner that stands in for the policy, if the config names one.

    Raises:
        `ValueError`: for one that cannot run inside vLLM.
    """
    if not isinstance(config.pruner, dict):  # a name has become one
        return None
    settings = dict(config.pruner)
    name = settings.pop("name")
    if name not in PRUNERS_HERE:
        raise ValueError(
            f"The pruner {name!r} does not run inside vLLM, where a pruner sees the visual tokens and the question "
            f"only: choose from {', '.join(sorted(PRUNERS_HERE))}, or ask `tprl serve`."
        )
    return PRUNERS[name](**settings)


def reads_question(config: TPRLConfig) -> bool:
    """Whether the choice depends on the question, so that it is part of what tokens are cached by."""
    if isinstance(config.pruner, dict):
        return PRUNERS_HERE[config.pruner["name"]]
    return not config.query_agnostic


def base_source(model: str, config: TPRLConfig) -> str:
    """Where tokenizer, processor and weights of the base model are; `model` itself where it holds them."""
    if config.includes_base_model:
        return model
    base = find_base(config, model)
    if base is None:
        raise ValueError(f"{model} holds a policy only and does not say for which base model.")
    return base


def base_context(ctx: InputProcessingContext) -> InputProcessingContext:
    """`ctx` as the base model's own processor wants it: its config, its place, and no budget among its arguments."""
    model_config = copy.copy(ctx.model_config)
    config = pruned_config(model_config.hf_config)
    model_config.hf_config = config.base_config
    if not config.includes_base_model:
        model_config.model = base_source(model_config.model, config)
        model_config.revision = config.base_model_revision
    multimodal = copy.copy(model_config.get_multimodal_config())
    multimodal.mm_processor_kwargs = split_budget(multimodal.mm_processor_kwargs or {})[1]
    model_config.multimodal_config = multimodal
    return replace(ctx, model_config=model_config)


class PrunedEngineConfig(VerifyAndUpdateConfig):
    """vLLM calls these two when it has read a checkpoint's config, and when it knows all its settings."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        from .families import family_of

        config = pruned_config(model_config.hf_config)
        family = family_of(config)
        if getattr(config.base_config, "quantization_config", None) is not None:
            raise ValueError(
                "The base model's weights are quantised, which is not possible here: take others, or `tprl serve`."
            )
        pruner = named_pruner(config)
        server = model_config.get_multimodal_config().mm_processor_kwargs or {}
        budget = request_budget({}, server, config, pruner)
        if pruner is None and budget is not None:
            refuse_untrained(config)
        model_config.hf_config = config
        if config.position_ids == "original" and not family.has_three_axes:
            # A model that says so gets positions row by row from `get_mrope_input_positions`.
            config.mrope_section = [1, 1, 1]
        own = Path(model_config.model)
        has_tokenizer = not own.is_dir() or any(own.glob("tokenizer*"))
        if not config.includes_base_model and model_config.tokenizer == model_config.model and not has_tokenizer:
            model_config.tokenizer = base_source(model_config.model, config)
            model_config.tokenizer_revision = config.base_model_revision
            # vLLM asked before now, found no tokenizer, and took that for a model without images.
            model_config._supports_multimodal_inputs_cache = {}

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        parallel = vllm_config.parallel_config
        size = parallel.pipeline_parallel_size
        if parallel.use_ubatching:
            raise ValueError(
                "A pruned model cannot run in micro-batches, since the second one would get the first one's places of "
                "tokens: leave out --enable-dbo and --ubatch-size."
            )
        if size > 1:
            raise ValueError(
                f"A pruned model cannot be cut into {size} pipeline stages, since later ones do not learn which "
                "tokens were kept: use --tensor-parallel-size, or several servers."
            )
