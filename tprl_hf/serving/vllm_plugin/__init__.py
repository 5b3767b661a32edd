"""tprl_hf inside vLLM: a plug-in that vLLM loads by itself, in each of its processes (`vllm.general_plugins`).

`vllm serve CHECKPOINT` then serves a checkpoint of this package, pruned as its config says. docs/serving.md tells how.
This folder is the only place that imports vllm.
"""

import logging

logger = logging.getLogger(__name__)

ARCHITECTURE = "TPRLForConditionalGeneration"
# Names inside vLLM change with each minor release.
VLLM_RELEASES = ("0.32", "0.33")


def register() -> None:
    """Makes vLLM know checkpoints of model type "tprl". May be called several times."""
    import vllm

    known = tuple(f"{release}." for release in VLLM_RELEASES)
    if not vllm.__version__.startswith(known):  # it is to serve other models all the same
        logger.warning(
            f"tprl_hf works inside vLLM {' and '.join(VLLM_RELEASES)}, not {vllm.__version__}, and leaves this one "
            f'alone. For checkpoints of tprl_hf install "vllm=={VLLM_RELEASES[-1]}.*", or use `tprl serve`.'
        )
        return
    from transformers import AutoConfig, AutoProcessor  # noqa: F401  (once they are loaded, tprl_hf joins them)
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .engine_config import PrunedEngineConfig

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # As a name: vLLM imports the class where it needs it.
        ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = PrunedEngineConfig
