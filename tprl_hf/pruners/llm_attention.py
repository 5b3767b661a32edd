"""The base of pruners that read the attention of an early layer of the LLM; it runs that part of the LLM first."""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tprl_hf.modeling.module_twins import copied_configs, twin_of
from tprl_hf.modeling.token_pruner import PruningInputs, TokenPruner
from tprl_hf.modeling.values import COUNT


class _Attention(Exception):
    """Carries the attention of the layer out of the decoder, whose later layers need not run."""

    def __init__(self, weights: Tensor):
        super().__init__()
        self.weights = weights


class LLMAttentionPruner(TokenPruner):
    """`score_i` = attention that token i gets in a layer of the LLM: mean over heads, then over the raters.

    The LLM's first layers run on all visual tokens and the question, without the template around them. That is a cost
    of its own, on top of the pruned prefill: `layer - 1` layers, and the attention of one more. A method is a subclass
    that says whose attention counts, [`raters`].

    Args:
        lvlm (`PreTrainedModel`, *optional*): the base model. A model that uses the pruner passes its own.
        layer (`int`, defaults to 2): the layer whose attention is read, counted from 1.
        **budget: see [`TokenPruner`].

    Raises:
        `ValueError`: for a layer that the LLM does not have or that has no attention, and for an LLM that does not run
            on embeddings alone.
    """

    not_settings = ("lvlm",)

    def __init__(self, lvlm: PreTrainedModel | None = None, layer: int = 2, **budget):
        super().__init__(**budget)
        self.layer = COUNT("layer", layer)
        self.lvlm = lvlm
        if lvlm is not None:
            self.attach(lvlm)

    def attach(self, lvlm: PreTrainedModel) -> None:
        self.decoder_of(lvlm)

    def decoder_of(self, lvlm: PreTrainedModel) -> Any:
        """The layers of the LLM. Raises `ValueError` where they do not work with this pruner."""
        # some families call the LLM with its output layer their decoder
        decoder = next(module for module in lvlm.get_decoder().modules() if hasattr(module, "layers"))
        name, layer, layers = type(self).__name__, self.layer, decoder.layers
        if not 1 <= layer <= len(layers):
            raise ValueError(f"layer={layer}, but the LLM has layers 1 to {len(layers)}.")
        if not hasattr(layers[layer - 1], "self_attn"):
            having = [str(number) for number, one in enumerate(layers, start=1) if hasattr(one, "self_attn")]
            raise ValueError(
                f"{name} reads attention, and layer {layer} of this LLM has none; "
                + (f"layers that do: {', '.join(having)}." if having else "nor has any other.")
            )
        if decoder.config.to_dict().get("hidden_size_per_layer_input"):
            raise ValueError(
                f"{name} runs the LLM on visual tokens, but every layer of {lvlm.config.model_type!r} also reads the "
                "prompt's ids: use a pruner that does not need the LLM."
            )
        return decoder

    def raters(self, inputs: PruningInputs) -> Tensor:
        """Whose attention counts: `bool [B, N + L]`, at least one of each sample's visual tokens and question."""
        raise NotImplementedError(f"{type(self).__name__} must define `raters`.")

    def score(self, inputs: PruningInputs) -> Tensor:
        mask = torch.cat([inputs.valid, inputs.query_valid], dim=1)
        tokens = inputs.tokens.to(inputs.query.dtype)  # that of the LLM: under autocast the tower's is another
        embeddings = torch.cat([tokens, inputs.query], dim=1)
        weights = self.attention(embeddings, mask, inputs.lvlm)  # (B, N + L, N + L)
        raters = self.raters(inputs)
        received = (weights * raters[:, :, None]).sum(1) / raters.sum(1)[:, None]
        return received[:, : inputs.valid.shape[1]]

    def attention(self, embeddings: Tensor, mask: Tensor, lvlm: PreTrainedModel | None = None) -> Tensor:
        """Attention of the layer, mean over heads, float32 `[B, S, S]`, for `embeddings [B, S, D]`.

        The base model is `lvlm`, by default that of the pruner.
        """
        lvlm = self.lvlm if lvlm is None else lvlm
        assert lvlm is not None
        decoder = self.decoder_of(lvlm)

        def catch(module: nn.Module, arguments: Any, output: Any) -> NoReturn:
            if not isinstance(output, tuple) or not torch.is_tensor(output[1]):
                raise ValueError(f"{type(module).__name__} returns no attention weights for {type(self).__name__}.")
            raise _Attention(output[1])

        # a twin, so that the LLM of other threads computes attention as before
        twin = twin_of(decoder, copied_configs(decoder.config, "eager"), decoder.layers[self.layer :])
        twin.layers[self.layer - 1].self_attn.register_forward_hook(catch)
        try:
            with torch.no_grad():
                twin(
                    inputs_embeds=embeddings,
                    attention_mask=mask.long(),
                    position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
                    use_cache=False,
                )
        except _Attention as caught:
            return caught.weights.float().mean(1)
        raise RuntimeError("The decoder did not run its layer.")


def last_token(inputs: PruningInputs) -> Tensor:
    """Each sample's last token of visual tokens and question, `bool [B, N + L]`."""
    mask = torch.cat([inputs.valid, inputs.query_valid], dim=1)
    last = (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(dim=1)
    return nn.functional.one_hot(last, mask.shape[1]).bool()
