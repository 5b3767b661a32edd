"""Looking again: where the first token of an answer is unsure, the prompt is asked once more with more tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from .budget import Budget, bounds_of, keep_counts
from .generation_tprl import filler_of_answers, setting
from .sequence_inputs import OTHER_PROMPTS
from .values import FRACTION, KEPT_FRACTION, check_fields, wrong
from .visual_features import VisualFeatures

# Of these there is one for each look, of other samples, and none for the whole batch.
_OF_ONE_LOOK = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
# What these read or show at the first look cannot be taken back.
_NOT_TAKEN_BACK = ("past_key_values", "cache", "streamer", "mm_encoder_outputs", "assistant_model")


@dataclass(frozen=True)
class Escalation:
    """
    When `generate` looks again, and at how many tokens.

    Args:
        keep_ratio (`float`): Fraction of each sample's visual tokens that is KEPT at the second look, in (0, 1].
        below (`float`): A sample is looked at again where its likeliest first token has a smaller probability, in
            (0, 1]. [`~tprl_hf.training.calibrate_escalation`] finds it for a mean number of tokens.

    Raises:
        `ValueError`: when one is out of its range.
    """

    keep_ratio: float
    below: float

    def __post_init__(self):
        check_fields(self, {"keep_ratio": KEPT_FRACTION, "below": FRACTION})


class FirstTokenNotes(LogitsProcessor):
    """
    Notes the probability of the likeliest first token, and changes nothing. One for each call of `generate`.

    Args:
        num_samples (`int`): B; beams and several returned sequences are copies of these.

    Attributes:
        probability (float32 `[B]`, *optional*): after the call's processors, without its temperature.
    """

    def __init__(self, num_samples: int):
        self.num_samples = num_samples
        self.probability: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.probability is None:
            self.probability = scores.float().softmax(-1).amax(-1).view(self.num_samples, -1)[:, 0]
        return scores


class StopsUnsure(StoppingCriteria):
    """Ends answers that will be asked for again after their first token."""

    def __init__(self, notes: FirstTokenNotes, below: float, can_grow: Tensor):
        self.notes, self.below, self.can_grow = notes, below, can_grow

    @property
    def is_unsure(self) -> Tensor:
        """Samples that are looked at again, `bool [B]`."""
        assert self.notes.probability is not None
        return (self.notes.probability < self.below) & self.can_grow.to(self.notes.probability.device)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return self.is_unsure.repeat_interleave(len(input_ids) // len(self.can_grow))


def refuse_with_escalation(
    escalation: Any, input_ids: Tensor | None, choice: Any, call: Mapping[str, Any], *configs: GenerationConfig | None
) -> None:
    """
    Raises `ValueError` for a second look at what has one look only.

    Args:
        escalation: what the call passes as `escalate`.
        input_ids: the prompts.
        choice: what the first look keeps, see [`resolve_choice`].
        call: the other arguments of `generate`; configs: where `generate` looks for those that are not there.
    """
    if not isinstance(escalation, Escalation):
        raise wrong("escalate", escalation, "an Escalation(keep_ratio=..., below=...)")
    if input_ids is None:
        raise ValueError("escalate needs `input_ids`: they say where the visual tokens are.")
    if not isinstance(choice, Budget) or choice.threshold is not None:
        raise ValueError(
            "escalate looks again at more tokens than the first look: pass keep_ratio or num_keep for the first, and "
            "neither threshold, keep_mask nor prune=False."
        )
    if choice.keep_ratio is not None and choice.keep_ratio >= escalation.keep_ratio:
        raise ValueError(
            f"The second look keeps more than the first: got keep_ratio={choice.keep_ratio} and {escalation}. Swap "
            "them, or leave escalate out."
        )
    for name in _NOT_TAKEN_BACK:
        if call.get(name) is not None:
            raise ValueError(
                f"`{name}` does not go with escalate, because the first look of an unsure sample is thrown away: "
                "leave one of them out."
            )
    if setting("prompt_lookup_num_tokens", dict(call), *configs):
        raise ValueError("`prompt_lookup_num_tokens` does not go with escalate: leave one of them out.")
    for name in _OF_ONE_LOOK:
        if setting(name, dict(call), *configs):
            raise ValueError(
                f"`{name}` has no value for a batch whose samples have one look or two: leave it out, or pass the "
                "samples once more with the `keep_mask` that comes back."
            )


def generate_escalated(
    model: Any,
    input_ids: Tensor,
    escalation: Escalation,
    choice: Budget,
    first_look: dict[str, Any],
    generation_config: GenerationConfig | None,
    query_mask: Tensor | None,
    visual_features: VisualFeatures | None,
    inputs: dict[str, Any],
) -> GenerateDecoderOnlyOutput:
    """
    `generate` for all samples, and once more for those that are unsure. The vision tower runs once. The second look
    has the tokens that its budget has by itself: policies that are told their budget choose anew.

    Args:
        model ([`TPRLForConditionalGeneration`]): whose `generate` answers.
        input_ids (`int64 [B, L]`), query_mask, visual_features: as in `generate`.
        first_look: the arguments that say how much the first look keeps, and `choice` what they come to.
        inputs: the other arguments of `generate`.

    Returns:
        `GenerateDecoderOnlyOutput`: `sequences`, and of the last look at each sample `keep_mask`, `num_kept` and
        `num_visual`; `is_escalated` (`bool [B]`), and `num_read` (`int64 [B]`), the visual tokens of both looks.
    """
    adapter, configs = model.adapter, (generation_config, model.generation_config)
    used_up = adapter.consumed_names()
    if visual_features is None:
        pixels = {name: value for name, value in inputs.items() if name in used_up}
        visual_features = model.encode_images(input_ids, **pixels)
    inputs = {name: value for name, value in inputs.items() if name not in used_up}
    inputs["return_dict_in_generate"] = True

    num_visual = adapter.find_visual(input_ids.cpu()).sum(1)
    second_budget = Budget(escalation.keep_ratio, **bounds_of(model.config))
    can_grow = keep_counts(num_visual, second_budget) > keep_counts(num_visual, choice)
    notes = FirstTokenNotes(len(input_ids))
    stop = StopsUnsure(notes, escalation.below, can_grow)
    criteria = inputs.get("stopping_criteria") or []
    criteria = [criteria] if isinstance(criteria, StoppingCriteria) else criteria
    watched = {
        "logits_processor": LogitsProcessorList([*(inputs.get("logits_processor") or []), notes]),
        "stopping_criteria": StoppingCriteriaList([*criteria, stop]),
    }
    first = model.generate(
        input_ids,
        generation_config,
        query_mask=query_mask,
        visual_features=visual_features,
        **first_look,
        **(inputs | watched),
    )
    escalated = stop.is_unsure.cpu()
    whole = GenerateDecoderOnlyOutput(sequences=first.sequences)
    for name in ("keep_mask", "num_kept", "num_visual"):
        whole[name] = first[name]
    whole["is_escalated"] = escalated.to(input_ids.device)
    whole["num_read"] = first.num_kept
    rows = escalated.nonzero()[:, 0]
    if not len(rows):
        return whole

    of_rows = {
        name: value[..., rows.to(value.device), :]
        if torch.is_tensor(value) and (value.shape[-2:] == input_ids.shape or name in OTHER_PROMPTS)
        else value
        for name, value in {**inputs, "input_ids": input_ids, "query_mask": query_mask}.items()
    }
    allowed: Any = of_rows.get("prefix_allowed_tokens_fn")
    if allowed is not None:  # it is called with the row of the batch that was passed
        places = rows.tolist()
        of_rows["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(places[row], ids)
    second = model.generate(
        generation_config=generation_config,
        keep_ratio=escalation.keep_ratio,
        visual_features=visual_features.take(rows.tolist()),
        **of_rows,
    )
    filler = filler_of_answers(inputs, *configs) or 0
    whole.sequences = with_rows(first.sequences, rows.to(input_ids.device), second.sequences, len(input_ids), filler)
    rows = rows.to(first.num_kept.device)
    whole["num_kept"] = first.num_kept.index_copy(0, rows, second.num_kept)
    whole["num_read"] = first.num_kept.index_add(0, rows, second.num_kept)
    masks = list(first.keep_mask.split(first.num_visual.tolist()))
    for row, mask in zip(rows.tolist(), second.keep_mask.split(second.num_visual.tolist()), strict=True):
        masks[row] = mask
    whole["keep_mask"] = torch.cat(masks)
    return whole


def with_rows(sequences: Tensor, rows: Tensor, new: Tensor, num_samples: int, filler: int) -> Tensor:
    """`sequences [B * R, T]`, in which samples `rows [E]` have those of `new [E * R, T2]`; filled up at their end."""
    copies = len(sequences) // num_samples
    of_rows = rows.repeat_interleave(copies) * copies + torch.arange(copies, device=rows.device).repeat(len(rows))
    whole = sequences.new_full((len(sequences), max(new.shape[1], sequences.shape[1])), filler)
    whole[:, : sequences.shape[1]] = sequences
    whole[of_rows] = filler
    whole[of_rows, : new.shape[1]] = new
    return whole
