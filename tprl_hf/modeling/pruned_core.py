"""The model without its head, as others call it: TRL's trainers ask `model.base_model` for hidden states and run the
head themselves."""

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from .cached_prompt import CACHE_NAME, cache_argument, is_filled
from .outputs_tprl import TPRLOutput
from .sequence_inputs import check_call, count_no_placeholders
from .virtual_tokens import ids_of_embeddings, is_prefix

if TYPE_CHECKING:
    from .modeling_tprl import TPRLForConditionalGeneration

CHOICES = ("keep_ratio", "num_keep", "threshold", "prune", "keep_mask")
OF_THE_HEAD = ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep")
# The ids or embeddings of the call in progress and their labels, which TRL keeps to itself.
labels_of_call: ContextVar[tuple[Tensor, Tensor] | None] = ContextVar("labels_of_call", default=None)


def note_labels(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Before a forward whose head and loss are TRL's: labels of visual tokens do not count, as in our own."""
    input_ids, embeds, labels = (kwargs.get(name) for name in ("input_ids", "inputs_embeds", "labels"))
    given = embeds if input_ids is None else input_ids
    if not kwargs.get("fused_lm_head") or given is None or labels is None:
        return None
    if input_ids is None:
        assert embeds is not None
        input_ids = ids_of_embeddings(embeds, model.get_input_embeddings(), model.adapter.token_ids.values())
    kwargs = count_no_placeholders(kwargs, model.adapter.find_visual(input_ids.cpu()))
    labels_of_call.set((given, kwargs["labels"]))
    return args, kwargs


class PrunedCore:
    """
    The base model without its head, on pruned prompts. All else is the base model's: `model.base_model.config`.

    Args:
        model ([`TPRLForConditionalGeneration`]): whose base model it is.
    """

    def __init__(self, model: "TPRLForConditionalGeneration"):
        self.__dict__["model"] = model

    def __getattr__(self, name: str) -> Any:
        if "model" not in self.__dict__:  # while it is copied
            raise AttributeError(name)
        return getattr(self.__dict__["model"].lvlm, name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PrunedCore) and other.__dict__["model"] is self.__dict__["model"]

    def __hash__(self) -> int:
        return id(self.__dict__["model"])

    def __call__(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **inputs
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            input_ids, attention_mask (`int64 [B, L]`), inputs: as in [`~TPRLForConditionalGeneration.forward`].

        Returns:
            `BaseModelOutputWithPast` whose `last_hidden_state` `[B, L, D]` is in the columns of `input_ids`: the state
            of a pruned column is that of the last kept one before it, so that each column predicts the next.

        Raises:
            `ValueError`: for a filled cache that is not PEFT's prefix, and for router logits.
        """
        model = self.__dict__["model"]
        inputs |= cache_argument(inputs.pop("past_key_values", None), inputs.pop("cache", None))
        cache = inputs.get(CACHE_NAME)
        if is_filled(cache) and not is_prefix(cache, input_ids, attention_mask):
            raise ValueError("base_model takes whole prompts, without a cache: call the model itself.")
        inputs.pop("return_dict", None)
        choice = model._choice(*(inputs.pop(name, None) for name in CHOICES))
        query_mask, features = inputs.pop("query_mask", None), inputs.pop("visual_features", None)
        check_call(input_ids, attention_mask, query_mask, features, inputs)
        if model._leaves_alone(input_ids, choice, features, None):
            inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
            return BaseModelOutputWithPast(last_hidden_state=last_states(model, inputs)["hidden_states"][-1])
        noted = labels_of_call.get()
        if noted is not None and noted[0] is (inputs.get("inputs_embeds") if input_ids is None else input_ids):
            inputs["labels"] = noted[1]  # they tell the question from the answer
        output = model._run(input_ids, attention_mask, inputs, choice, query_mask, features, False, last_states)
        return BaseModelOutputWithPast(last_hidden_state=output.hidden_states[-1])


def last_states(model: "TPRLForConditionalGeneration", inputs: dict[str, Any]) -> TPRLOutput:
    """Runs the base model without its head; of hidden states it gives the last only."""
    if inputs.get("output_router_logits"):
        raise ValueError(
            "Router logits belong to the columns that were kept, which TRL's load-balancing loss does not know: pass "
            "router_aux_loss_coef=0.0."
        )
    inputs = {name: value for name, value in inputs.items() if name not in OF_THE_HEAD}
    core = model.adapter.core
    if core is model.lvlm:  # a family whose head is not beside it
        states = core(**inputs, return_dict=True, output_hidden_states=True).hidden_states[-1]
    else:
        states = core(**inputs, return_dict=True).last_hidden_state
    return TPRLOutput(hidden_states=(states,))
