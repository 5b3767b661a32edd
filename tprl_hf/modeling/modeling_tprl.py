"""TPRL around any LVLM: between projector and LLM a policy decides which visual tokens the LLM gets to see."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput

from .budget import Budget
from .cached_prompt import CACHE_NAME, CachedPrompt, cache_argument, is_filled
from .columns import restore_prompt, source_columns
from .conversation_tprl import TPRLConversationModel
from .escalation import Escalation, generate_escalated, refuse_with_escalation
from .generation_tprl import convert_lengths, filler_of_answers, setting, wrap_for_original_prompt
from .outputs_tprl import PrunePlan, TPRLOutput, tell_kept
from .packed_rows import PackedRows
from .prompt_output import logits_wanted, to_prompt_output
from .pruned_batch import PromptBatch, PrunedBatch, prune_batch
from .pruned_core import PrunedCore
from .sequence_inputs import (
    check_call,
    count_no_placeholders,
    predicted_labels,
    refuse_other_forms,
    refuse_unknown_labels,
    shifted_labels,
)
from .values import flag
from .virtual_tokens import (
    embed_columns,
    embedded_as,
    is_prefix,
    peft_around,
    put_behind_prefix,
    with_virtual_tokens,
    without_prefix,
)
from .visual_features import VisualFeatures


def is_generated(output: Any) -> bool:
    """Whether it is what `generate` returns by itself; a `custom_generate` may return anything."""
    return isinstance(output, (Tensor, ModelOutput))


def run_base(model: Any, inputs: dict[str, Any]) -> ModelOutput:
    """The whole base model."""
    return model.lvlm(**inputs, return_dict=True)


class TPRLForConditionalGeneration(TPRLConversationModel, GenerationMixin):
    r"""
    An LVLM whose visual tokens are pruned before its LLM.

    Per call one of `keep_ratio`, `num_keep`, `threshold`, `keep_mask` or `prune=False` overrides the default budget of
    the config; without a default nothing is pruned.

    Args:
        config ([`TPRLConfig`]): which base model, which default budget, which widths.
        lvlm (`PreTrainedModel`, *optional*): a live base model. Made from `config.base_config` when absent.

    Example:

    ```python
    >>> from tprl_hf import TPRLForConditionalGeneration

    >>> name = "llava-hf/llava-1.5-7b-hf"
    >>> model = TPRLForConditionalGeneration.from_base_model(name, pruner="divprune", keep_ratio=1 / 3)
    >>> output = model.generate(**inputs, max_new_tokens=16)
    ```
    """

    @property
    def generation_config(self) -> GenerationConfig:
        """That of the base model, whose `generate` reads it."""
        return self.lvlm.generation_config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig | None) -> None:
        if "lvlm" in self._modules:  # transformers sets one before there is a base model
            self.lvlm.generation_config = config

    @property
    def base_model(self) -> Any:
        """[`PrunedCore`]: the base model without its head, pruned; for trainers that run the head themselves."""
        return PrunedCore(self) if "lvlm" in self._modules else self  # transformers asks before there is one

    def _pruned(self, batch: PromptBatch, plan: PrunePlan, **options) -> PrunedBatch:
        pad, num_ids = self.generation_config.pad_token_id, self.num_ids
        return prune_batch(
            batch,
            plan.keep_mask,
            self.adapter,
            contiguous=self.config.position_ids == "contiguous",
            # nothing attends to padding, but it is looked up; some checkpoints say -1
            pad_token_id=pad if pad is not None and 0 <= pad < num_ids else 0,
            **options,
        )

    def _leaves_alone(self, input_ids: Tensor | None, choice: Budget | Tensor | None, features, record) -> bool:
        """Whether the base model can have the inputs as they are."""
        if features is not None or record is not None or (isinstance(choice, Tensor) and len(choice)):
            return False
        if choice is None:
            return True
        return input_ids is not None and not self.adapter.find_visual(input_ids.cpu()).any()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        keep_ratio: float | None = None,
        num_keep: int | None = None,
        threshold: float | None = None,
        prune: bool | None = None,
        keep_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        visual_features: VisualFeatures | None = None,
        compact: bool = False,
        return_dict: bool | None = None,
        cache: Any = None,
        **kwargs,
    ) -> TPRLOutput | tuple:
        r"""
        Args:
            input_ids, attention_mask, position_ids, labels (`int64 [B, L]`): of the full prompt, padded on either
                side; positions also in the other forms that the base model takes. The columns of pruned tokens are
                removed from all of them. Labels of visual tokens do not count. Without `attention_mask`, positions
                that start again tell apart the samples of a packed row, as in the base model.
            pixel_values: as the processor returned them, like all other `kwargs`.
            past_key_values (`Cache`, *optional*): a filled one must come from this model; `input_ids` are then the new
                tokens only, without images. `cache` is another name for it, with every release of transformers.
            keep_ratio, num_keep, threshold, prune, keep_mask: one of them, see [`TPRLForConditionalGeneration`].
            query_mask (`bool [B, L]`, *optional*): which tokens are the question.
            visual_features ([`VisualFeatures`], *optional*): from [`encode_images`], in place of pixels.
            compact (`bool`, defaults to `False`): return logits, hidden states and attentions of the P columns that
                the LLM saw, left-padded, without a copy; `columns` says where they come from.

        Returns:
            [`TPRLOutput`], in the columns of `input_ids`: `logits[:, i]` predict the token behind column i. Where
            nothing is to be pruned, the base model gets the inputs as they are.

        Raises:
            `ValueError`: for inputs along the sequence in a form that cannot be pruned.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        given = {"pixel_values": pixel_values, "position_ids": position_ids, "labels": labels}
        inputs = kwargs | {name: value for name, value in given.items() if value is not None}
        if input_ids is not None and inputs.get("inputs_embeds") is not None:
            raise ValueError("`input_ids` and `inputs_embeds` say the same: pass one of them.")
        check_call(input_ids, attention_mask, query_mask, visual_features, inputs)
        compact = flag("compact", compact)
        choice = self._choice(keep_ratio, num_keep, threshold, prune, keep_mask)
        inputs |= cache_argument(past_key_values, cache)
        cache = inputs.get(CACHE_NAME)
        filled = is_filled(cache)
        if input_ids is not None and is_prefix(cache, input_ids, attention_mask):
            if choice is not None and self.adapter.find_visual(input_ids.cpu()).any():
                output = self._run(input_ids, attention_mask, inputs, choice, query_mask, visual_features, compact)
            else:
                inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
                output = self._output(self.lvlm(return_dict=True, **inputs))
            return output if return_dict else output.to_tuple()
        if filled and (choice is not None or CachedPrompt.is_on(cache)):
            if input_ids is None or isinstance(choice, Tensor):
                raise ValueError("Behind a filled cache pass the new tokens as `input_ids`, and no `keep_mask`.")
            return self._forward_cached(input_ids, attention_mask, inputs, return_dict)
        if self._leaves_alone(input_ids, choice, visual_features, None):
            output = self.lvlm(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **inputs)
            output = self._output(output)
            if not self.training and not filled:
                self._note_unpruned(output.get(CACHE_NAME), input_ids, attention_mask, inputs)
            return output if return_dict else output.to_tuple()

        output = self._run(input_ids, attention_mask, inputs, choice, query_mask, visual_features, compact)
        return output if return_dict else output.to_tuple()

    def _run(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs: dict[str, Any],
        choice: Budget | Tensor | None,
        query_mask: Tensor | None,
        visual_features: VisualFeatures | None,
        compact: bool,
        run: Callable[[Any, dict[str, Any]], ModelOutput] = run_base,
    ) -> TPRLOutput:
        """Prunes the prompts and runs the base model, or part of it, on what stays."""
        if input_ids is not None:
            refuse_other_forms(inputs, input_ids)
            packed = None if attention_mask is not None else self._packed_rows(input_ids, inputs)
            if packed is not None:
                given = packed.unpack_inputs({**inputs, "input_ids": input_ids, "query_mask": query_mask})
                ids, wanted = given.pop("input_ids"), given.pop("logits_to_keep", 0)
                mask = packed.valid.long().to(ids.device)
                output = self._run(ids, mask, given, choice, given.pop("query_mask"), visual_features, False, run)
                return packed.pack_output(output, wanted)
        prefix = inputs.get(CACHE_NAME) if is_filled(inputs.get(CACHE_NAME)) else None
        whole_mask = attention_mask
        if prefix is not None and attention_mask is not None:
            inputs, attention_mask = without_prefix(inputs, attention_mask, prefix)
        batch = self._batch(input_ids, attention_mask, visual_features, inputs, None, self._looks(choice))
        positions = self.adapter.forward_positions(batch.attention_mask)
        if positions is not None and "position_ids" not in inputs:
            first = batch.attention_mask.argmax(1, keepdim=True)
            batch.inputs = {**batch.inputs, "position_ids": (positions - first).clamp(min=0)}
        plan = self._plan(batch, choice, query_mask)
        wanted, length = batch.inputs.pop("logits_to_keep", 0), batch.input_ids.shape[1]
        batch.inputs = count_no_placeholders(batch.inputs, batch.visual)
        refuse_unknown_labels(batch.inputs, self.num_ids)
        pruned = self._pruned(batch, plan, in_parts=prefix is not None)
        if "labels" in batch.inputs:
            pruned.inputs["labels"] = predicted_labels(pruned.inputs["labels"], pruned.columns)
        if "shift_labels" in batch.inputs:
            pruned.inputs["shift_labels"] = shifted_labels(batch.inputs["shift_labels"], pruned.columns)
        offset = self.adapter.forward_position_offset
        if "position_ids" not in inputs:
            pruned.inputs["position_ids"] = pruned.inputs["position_ids"] + offset
        elif offset:  # given ones have it, those of a record do not
            pruned.record.positions = pruned.record.positions - offset
        if batch.inputs.get("inputs_embeds") is not None:
            del pruned.inputs["input_ids"]
            pruned.inputs["inputs_embeds"] = embed_columns(batch.inputs["inputs_embeds"], pruned.columns)
        needed, columns = wanted, pruned.columns
        if not compact:
            source = source_columns(columns, length)
            wanted, needed = logits_wanted(wanted, source, columns.shape[1])
        if torch.is_tensor(needed) or 0 < needed < columns.shape[1]:
            pruned.inputs["logits_to_keep"] = needed
        if prefix is not None and whole_mask is not None:
            put_behind_prefix(pruned.inputs, whole_mask, prefix, "position_ids" in inputs)
        output = self._output(run(self, pruned.inputs), plan, pruned)
        if not compact:
            own = torch.zeros_like(source, dtype=torch.bool).scatter_(1, columns.clamp(min=0), True)
            own[:, 0] = (columns == 0).any(1)  # padding pointed there
            to_prompt_output(output, source, wanted, needed, own)
        if prefix is None:
            self._note(output.get(CACHE_NAME), pruned.record)
        return output

    def _embeds_of(self, inputs_embeds: Tensor, pruned: PrunedBatch) -> Tensor:
        """Embeddings of the full prompts, given beside their ids, for the pruned prompts: `[B, P, D]`.

        The base model finds placeholders by their embeddings, those that stand in padding too.
        """
        rows = embed_columns(inputs_embeds, pruned.columns)
        added = ((pruned.columns < 0) & self.adapter.find_visual(pruned.input_ids)).to(rows.device)
        own = self.get_input_embeddings()(pruned.inputs["input_ids"]).to(rows)
        return torch.where(added[..., None], own, rows)

    def _packed_rows(self, input_ids: Tensor, inputs: dict[str, Any]) -> PackedRows | None:
        """The samples of packed rows, where the base model would tell them apart by their positions."""
        positions = inputs.get("position_ids")
        uses_cache = inputs.get("use_cache", getattr(self.adapter.config.get_text_config(), "use_cache", True))
        if positions is None or inputs.get(CACHE_NAME) is not None or uses_cache:
            return None
        if positions.ndim == 3:
            if len(positions) != 4:  # without an axis that counts text nothing tells samples apart
                return None
            positions = positions[0]
        return PackedRows.of(positions, (input_ids.shape[0], input_ids.shape[1]))

    def _forward_cached(self, input_ids, attention_mask, inputs, return_dict):
        """New tokens behind a cache: positions and mask continue those of the cache."""
        record = CachedPrompt.of(inputs[CACHE_NAME]).for_prompts(len(input_ids), 1)
        device, ids = input_ids.device, input_ids.cpu()
        if self.adapter.find_visual(ids).any() or self.adapter.has_pixels(inputs):
            raise ValueError(
                "New images behind a filled cache are for `generate`: pass it the whole conversation with "
                "`past_key_values`. `forward` takes new text tokens only."
            )
        new, cached = torch.ones_like(ids), record.attention_mask
        if attention_mask is not None:
            mask, num_new = attention_mask.cpu().long(), ids.shape[1]
            new, cached = mask[:, -num_new:], record.shown_by(mask, num_new)
        record.check_padding(new)
        attended = torch.cat([cached, new], 1)
        offset, given = self.adapter.forward_position_offset, inputs.get("position_ids")
        if given is None:
            positions = record.next_position[:, None] + new.cumsum(1) - 1
            inputs["position_ids"] = self.adapter.spread_positions(positions, new).to(device) + offset
        else:
            positions = self.adapter.complete_positions(given.cpu(), new)
            positions = self.adapter.largest_positions(positions) - offset
        for name in self.adapter.consumed_names():
            inputs.pop(name, None)
        output = self.lvlm(
            input_ids=input_ids,
            attention_mask=attended.to(device),
            return_dict=True,
            **inputs,
        )
        self._note(output[CACHE_NAME], record.extend(ids, new, positions))
        output = self._output(output)
        return output if return_dict else output.to_tuple()

    def _output(self, output: ModelOutput, plan: PrunePlan | None = None, pruned: PrunedBatch | None = None):
        given = ("loss", "logits", CACHE_NAME, "hidden_states", "attentions")
        whole = TPRLOutput(**{name: output.get(name) for name in given})
        if plan is None:  # unpruned: with what else the base model gives, such as `image_hidden_states`
            for name in output:
                if name not in given:
                    whole[name] = output[name]
        if plan is not None and pruned is not None:
            device = pruned.inputs["attention_mask"].device
            whole["keep_mask"], whole["num_kept"] = plan.keep_mask.to(device), plan.num_kept.to(device)
            whole["columns"] = pruned.columns.to(device)
        return whole

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        keep_ratio: float | None = None,
        num_keep: int | None = None,
        threshold: float | None = None,
        prune: bool | None = None,
        keep_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        visual_features: VisualFeatures | None = None,
        escalate: Escalation | None = None,
        **kwargs,
    ) -> Any:
        r"""
        The base model's own `generate` on the pruned prompt. Whatever is returned or shown to the user's processors,
        criteria and streamers begins with the ORIGINAL prompt, and `max_length` and `min_length` count it. Processors
        and criteria of just the types that `generate` makes itself replace its own, and see the pruned prompt.

        Args:
            inputs (`int64 [B, L]`, *optional*): the prompts, also as `input_ids`.
            keep_ratio, num_keep, threshold, prune, keep_mask: one of them, see [`TPRLForConditionalGeneration`].
            query_mask (`bool [B, L]`, *optional*): which tokens are the question.
            visual_features ([`VisualFeatures`], *optional*): from [`encode_images`], in place of pixels.
            escalate ([`Escalation`], *optional*): ask samples again, with more tokens, whose first token is unsure.
                Takes no cache and no streamer.
            generation_config, kwargs: as in [`~transformers.GenerationMixin.generate`]. With `past_key_values` (also
                called `cache`) of an earlier call pass the whole conversation; tokens already in it stay as they were.
                `mm_encoder_outputs`, such as a draft model gets from its target, are taken as they are.

        Returns:
            As [`~transformers.GenerationMixin.generate`]; a dict also has `keep_mask`, `num_kept` and `num_visual`;
            with `escalate` it has `sequences` and these, `is_escalated` and `num_read`, the tokens of both looks.
        """
        if inputs is not None and kwargs.get("input_ids") is not None:
            raise ValueError("`inputs` and `input_ids` are two names for the prompts: leave one out.")
        input_ids = kwargs.pop("input_ids", inputs)
        check_call(input_ids, kwargs.get("attention_mask"), query_mask, visual_features, kwargs)
        choice = self._choice(keep_ratio, num_keep, threshold, prune, keep_mask)
        if escalate is not None:
            refuse_with_escalation(escalate, input_ids, choice, kwargs, generation_config, self.generation_config)
            assert isinstance(choice, Budget) and input_ids is not None
            looks = {"keep_ratio": keep_ratio, "num_keep": num_keep, "prune": prune}
            escalated = generate_escalated(
                self, input_ids, escalate, choice, looks, generation_config, query_mask, visual_features, kwargs
            )
            as_dict = setting("return_dict_in_generate", kwargs, generation_config, self.generation_config)
            return escalated if as_dict else escalated.sequences
        if kwargs.get("mm_encoder_outputs") is not None:  # of the model whose draft this one is
            if prune or any(value is not None for value in (keep_ratio, num_keep, threshold, keep_mask)):
                raise ValueError("`mm_encoder_outputs` are not pruned: with a budget pass pixels.")
            return self.lvlm.generate(input_ids, generation_config=generation_config, **kwargs)
        kwargs |= cache_argument(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        configs = (generation_config, self.generation_config)
        is_paged = setting("cache_implementation", kwargs, *configs) == "paged"
        if is_paged and input_ids is not None and self.adapter.find_visual(input_ids.cpu()).any():
            raise ValueError(
                '`cache_implementation="paged"` hands no pixels to the model: leave it out, as it would answer '
                "without the picture. `tprl serve` answers several requests at once."
            )
        num_beams = setting("num_beams", kwargs, *configs) or 1
        copies = max(num_beams, setting("num_return_sequences", kwargs, *configs) or 1)
        cache, asked = kwargs.get(CACHE_NAME), kwargs.get("attention_mask")
        if asked is None and input_ids is not None:
            asked = self._infer_attention_mask(input_ids, kwargs, generation_config)
        record, filled = None, is_filled(cache)
        if filled and (prune is not False or CachedPrompt.is_on(cache)):
            if any(setting(name, kwargs, *configs) for name in ("assistant_model", "prompt_lookup_num_tokens")):
                raise ValueError(
                    "An assistant model and prompt lookup read the whole prompt again, behind what is cached: leave "
                    "them out, or pass the conversation without `past_key_values`."
                )
            record = self._read_cache(cache, input_ids, asked, kwargs, copies)
        filler = filler_of_answers(kwargs, *configs)
        prompt, peft_model, embeds = input_ids, peft_around(self), None
        if peft_model is not None and input_ids is not None:
            kwargs |= {"attention_mask": asked, "query_mask": query_mask}
            virtual = with_virtual_tokens(peft_model, input_ids, kwargs, self.get_input_embeddings(), copies)
            input_ids, kwargs, record = virtual.input_ids, virtual.inputs, virtual.record
            query_mask, cache, embeds = kwargs.pop("query_mask"), kwargs.get(CACHE_NAME), virtual.embeddings
        elif self._leaves_alone(input_ids, choice, visual_features, record):
            output = self.lvlm.generate(input_ids, generation_config=generation_config, **kwargs)
            if not filled and is_generated(output):
                self._note_unpruned_answer(cache, input_ids, asked, kwargs, output, copies, filler, num_beams)
            if input_ids is not None and asked is not None and isinstance(output, ModelOutput):
                visual = self.adapter.find_visual(input_ids.cpu())
                shown = visual & asked.cpu().bool() if asked.shape == visual.shape else visual
                tell_kept(output, shown[visual], shown.sum(1), visual.sum(1), input_ids.device)
            return output

        if prompt is None:
            raise ValueError("`generate` needs `input_ids`: they say where the visual tokens are.")
        mask, looks_on = kwargs.pop("attention_mask", None), self._looks(choice)
        mask = asked if mask is None else mask
        batch = self._batch(
            input_ids, mask, visual_features, kwargs, record, looks_on, has_virtual=peft_model is not None
        )
        plan = self._plan(batch, choice, query_mask)
        no_cache = setting("use_cache", kwargs, *configs) is False
        in_parts = (setting("prefill_chunk_size", kwargs, *configs) or 1) > 1
        pruned = self._pruned(batch, plan, same_length=copies > 1, min_padding=int(no_cache), in_parts=in_parts)
        arguments, length = pruned.inputs, pruned.input_ids.shape[1]
        generation_config = convert_lengths(
            arguments, generation_config, self.generation_config, prompt.shape[1], length
        )
        wrap_for_original_prompt(arguments, prompt, length)
        if arguments.get("inputs_embeds") is not None:
            arguments["inputs_embeds"] = self._embeds_of(arguments["inputs_embeds"], pruned)
        if embeds is None:
            output = self.lvlm.generate(generation_config=generation_config, **arguments)
        else:
            rows = embed_columns(embeds, pruned.columns)
            with embedded_as(self.get_input_embeddings(), arguments["input_ids"], rows):
                output = self.lvlm.generate(generation_config=generation_config, **arguments)

        if not is_generated(output):
            return output
        sequences = output if torch.is_tensor(output) else output.sequences
        self._note_answer(cache, pruned.record, output, copies, filler, num_beams)
        restored = restore_prompt(sequences, prompt, length)
        if torch.is_tensor(output):
            return restored
        output.sequences = restored
        tell_kept(output, plan.keep_mask, plan.num_kept, plan.num_visual, batch.device)
        return output
