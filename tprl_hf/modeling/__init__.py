"""What travels with the weights: model, config, adapters, pruner base. Imports torch and transformers only."""

from .checkpoint_tprl import TPRLPreTrainedModel
from .configuration_tprl import TPRLConfig
from .family_adapters import adapter_for
from .keep_mask import Budget
from .lvlm_adapters import LVLMAdapter
from .modeling_tprl import TPRLForConditionalGeneration
from .processing_tprl import TPRLProcessor
from .prune_plan import PrunePlan, TPRLOutput
from .pruning_policy import PolicyOutput, PruningPolicy
from .text_query import question_mask
from .token_autoencoder import TokenAutoencoder
from .token_layout import Block, TokenLayout
from .token_pruner import LearnedPruner, PruningInputs, SetPruner, TokenPruner
from .visual_features import VisualFeatures

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
    "TPRLProcessor",
    "TokenAutoencoder",
    "TokenLayout",
    "TokenPruner",
    "VisualFeatures",
    "adapter_for",
    "question_mask",
]
