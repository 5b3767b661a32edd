"""What travels with the weights: model, config, adapters, pruner base. Imports torch and transformers only."""

from .budget import Budget
from .checkpoint_tprl import TPRLPreTrainedModel
from .configuration_tprl import TPRLConfig
from .escalation import Escalation
from .family_adapters import adapter_for
from .lvlm_adapters import LVLMAdapter
from .modeling_tprl import TPRLForConditionalGeneration
from .outputs_tprl import PrunePlan, TPRLOutput
from .processing_tprl import TPRLProcessor
from .pruning_policy import PolicyOutput, PruningPolicy
from .text_query import question_mask
from .token_autoencoder import TokenAutoencoder
from .token_layout import Block, TokenLayout
from .token_pruner import LearnedPruner, PruningInputs, SetPruner, TokenPruner
from .visual_features import VisualFeatures

__all__ = [
    "Block",
    "Budget",
    "Escalation",
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
