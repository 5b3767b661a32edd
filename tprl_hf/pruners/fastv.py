"""FastV as a score: attention from the last token to the visual tokens in an early layer of the LLM.

Chen et al., "An Image is Worth 1/2 Tokens After Layer 2" (arXiv 2403.06764), drop tokens inside the LLM, after its
first layers have seen all of them. Here the same attention is read before the LLM runs. It is biased towards the last
tokens and towards sinks; in public comparisons FastV falls below random keeping.
"""

from torch import Tensor

from tprl_hf.modeling.token_pruner import PruningInputs

from .llm_attention import LLMAttentionPruner, last_token


class FastVPruner(LLMAttentionPruner):
    """`score_i` = attention from the last token to token i, mean over heads, in layer K of the LLM.

    Args:
        lvlm (`PreTrainedModel`, *optional*): the base model. A model that uses the pruner passes its own.
        layer (`int`, defaults to 2): FastV's K, counted from 1.
        **budget: see [`TokenPruner`].
    """

    def raters(self, inputs: PruningInputs) -> Tensor:
        return last_token(inputs)
