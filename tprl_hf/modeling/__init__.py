"""What travels with the weights: model, config, adapters, pruner base. Imports torch and transformers only."""

from .configuration_tprl import TPRLConfig
from .keep_mask import Budget
from .lvlm_adapters import Block, LVLMAdapter, TokenLayout, VisualFeatures, adapter_for
from .modeling_tprl import PrunePlan, TPRLForConditionalGeneration, TPRLOutput, TPRLPreTrainedModel
from .pruning_policy import PolicyOutput, PruningPolicy
from .token_autoencoder import TokenAutoencoder
from .token_pruner import LearnedPruner, PruningInputs, SetPruner, TokenPruner

__all__ = [
    "Block",
    "Budget",
    "LVLMAdapter",
    "LearnedPruner",
    "PolicyOutput",
    "PrunePlan",
    "PruningInputs",
    "PruningPolicy",
    "SetPruner",
    "TPRLConfig",
    "TPRLForConditionalGeneration",
    "TPRLOutput",
    "TPRLPreTrainedModel",
    "TokenAutoencoder",
    "TokenLayout",
    "TokenPruner",
    "VisualFeatures",
    "adapter_for",
]
