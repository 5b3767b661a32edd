"""Wrapping a base model, and planning which of its visual tokens stay."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import logging

from .budget import Budget
from .cached_prompt import CachedPrompt
from .checkpoint_checks import (
    absolute_path,
    check_weight_files,
    loaded_commit,
    refuse_other_formats,
)
from .checkpoint_tprl import HUB_NAMES, TPRLPreTrainedModel
from .columns import unpad_rows
from .configuration_tprl import TPRLConfig, own_fields
from .family_adapters import LVLMAdapter, adapter_for
from .frozen_head import watch_head
from .generation_tprl import padding_of
from .outputs_tprl import PrunePlan
from .pruned_batch import PromptBatch
from .pruned_core import note_labels
from .pruner_choice import PrunerChoiceMixin, refuse_unknown_pruner
from .pruner_inputs import layout_of, pruning_inputs
from .pruning_policy import PruningPolicy
from .sequence_inputs import check_call, check_values, refuse_other_than_bits
from .text_query import config_special_ids, default_query_mask, template_ids
from .token_autoencoder import TokenAutoencoder, without_autocast
from .token_pruner import PruningInputs, TokenPruner
from .values import flag, optional, refuse_misspelled, wrong
from .virtual_tokens import VIRTUAL, ids_of_embeddings, types_before_tokens
from .visual_features import VisualFeatures

logger = logging.get_logger(__name__)


class TPRLPlanningModel(PrunerChoiceMixin, TPRLPreTrainedModel):
    """The part of [`TPRLForConditionalGeneration`] that decides: it wraps a base model and says which tokens stay."""

    def __init__(self, config: TPRLConfig, lvlm: PreTrainedModel | None = None):
        config.check()  # its fields may have been set since
        if config.base_config is None:
            raise ValueError("TPRLConfig.base_config is missing: use from_base_model(name, path or live model).")
        super().__init__(config)
        self.lvlm = AutoModelForImageTextToText.from_config(config.base_config) if lvlm is None else lvlm
        assert config.token_dim and config.autoencoder_dim and config.latent_dim
        self.autoencoder = TokenAutoencoder(config.token_dim, config.autoencoder_dim, config.latent_dim)
        self.policy = PruningPolicy.of(config)
        self.autoencoder.float()
        self.policy.float()
        watch_head(self.lvlm)
        self._adapter = adapter_for(self.lvlm)
        self._check_config()
        self._init_pruner()
        self.register_forward_pre_hook(note_labels, with_kwargs=True)
        self.post_init()

    def _check_config(self) -> None:
        super()._check_config()
        if self.config.position_ids == "original" and not self.adapter.keeps_positions:
            raise ValueError(
                f"Models of type {self.lvlm.config.model_type!r} do not respect gaps in positions, so that kept "
                "tokens cannot keep theirs: pass position_ids='contiguous'."
            )

    @property
    def adapter(self) -> LVLMAdapter:
        """What differs between families, for the base model that is there now: `nn.DataParallel` makes copies."""
        if self._adapter.base is not self.lvlm and type(self._adapter.base) is type(self.lvlm):
            self._adapter = adapter_for(self.lvlm)
        return self._adapter

    @classmethod
    def from_base_model(cls, base_model: str | os.PathLike | PreTrainedModel, **settings) -> Any:
        r"""
        Wraps a base model with a new, untrained policy. Until it is trained, a `pruner` chooses: by default, where
        there is a `keep_ratio` or `num_keep`, "divprune".

        Args:
            base_model (`str`, `os.PathLike` or `PreTrainedModel`): a name on the Hub, a path, or a live model, which
                is used as it is. Of a TPRL model the LVLM is taken, without its policy.
            settings: fields of [`TPRLConfig`], such as `keep_ratio` and `pruner` (a name or a [`TokenPruner`]); for a
                name or a path, all else goes to the base model's `from_pretrained` (`dtype`, `device_map`, ...).

        Raises:
            `ValueError`: for a base model of an unsupported kind.
        """
        if not isinstance(base_model, (str, os.PathLike, PreTrainedModel)):
            raise wrong("base_model", base_model, "a name on the Hub, a path, or a live model")
        given = settings.pop("pruner") if isinstance(settings.get("pruner"), TokenPruner) else None
        known = set(TPRLConfig().to_dict()) | {"base_model_revision"}
        fields = {name: settings.pop(name) for name in list(settings) if name in known and name != "dtype"}
        refuse_misspelled(settings, own_fields(), "from_base_model")
        named: Any = TPRLConfig(**fields).pruner  # before the base model is read, which may take long
        if named is not None:
            refuse_unknown_pruner(named["name"], cls.pruner_classes)
        if isinstance(base_model, PreTrainedModel):
            if settings:
                raise TypeError(f"Unknown settings {sorted(settings)}; TPRLConfig has {sorted(known)}.")
            base = base_model
            fields.setdefault("base_model_name_or_path", absolute_path(base.config.name_or_path or None))
        else:
            refuse_other_formats(settings.get("use_safetensors"))
            settings["use_safetensors"] = True
            inside = Path(base_model, settings.get("subfolder") or "")
            if settings.get("subfolder") and inside.is_dir():
                base_model, settings["subfolder"] = inside, ""  # so that its path is the name that is kept
            hub_kwargs = {name: settings[name] for name in HUB_NAMES if name in settings}
            check_weight_files(str(base_model), hub_kwargs, settings.get("variant"), are_needed=False)
            base = AutoModelForImageTextToText.from_pretrained(base_model, **settings)
            if not settings.get("subfolder"):  # else there is no name by which it would be found
                fields.setdefault("base_model_name_or_path", absolute_path(str(base_model)))
                fields.setdefault("base_model_revision", loaded_commit(str(base_model), hub_kwargs))
        base = base.lvlm if isinstance(base, cls) else base
        if given is None and cls.takes_default_pruner(fields):
            fields["pruner"] = cls.default_pruner
            logger.warning_once(f"No policy has been trained for this model: {cls.default_pruner} chooses its tokens.")
        config = TPRLConfig(base_config=copy.deepcopy(base.config), **fields)
        model = cls._around(base, config).train(base.training)
        model._base_cache_dir = settings.get("cache_dir")
        if given is not None:
            model.set_pruner(given)
        return model

    # ---- encoding and planning ----

    def encode_images(self, input_ids: Tensor, with_attention: bool | None = None, **inputs) -> VisualFeatures:
        r"""
        Runs vision tower and projector once. Pass the result as `visual_features` to `prune`, `forward` and
        `generate`, with any question about the same images.

        Args:
            input_ids (`int64 [B, L]`): prompts with all their placeholders.
            with_attention (`bool`, *optional*): whether the tower takes notes of its attention, for pruners that read
                it; it then runs eagerly. By default as the pruner in use needs it.
            inputs: what the processor returned besides (`pixel_values`, `image_sizes`, `image_grid_thw`, ...).
        """
        check_call(input_ids, None, None, None, inputs)
        wanted = self._wants_attention(with_attention)
        return self.adapter.encode(input_ids, inputs, wanted)

    def _wants_attention(self, with_attention: bool | None) -> bool:
        """What a caller says, or what the pruner in use needs."""
        given = optional(flag)("with_attention", with_attention)
        return self.pruner.needs_attention if given is None else given

    @property
    def num_ids(self) -> int:
        """Entries of the base model's table of words. Where its rows are shared out, the config tells their number."""
        return max(len(self.get_input_embeddings().weight), self.config.get_text_config().vocab_size)

    def _batch(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        visual_features: VisualFeatures | None,
        inputs: dict[str, Any],
        record: CachedPrompt | None = None,
        with_attention: bool = False,
        has_virtual: bool = False,
    ) -> PromptBatch:
        if input_ids is None:
            embeds = inputs.get("inputs_embeds")
            if embeds is None:
                raise ValueError("`input_ids` are needed: they say where the visual tokens are.")
            input_ids = ids_of_embeddings(embeds, self.get_input_embeddings(), self.adapter.token_ids.values())
            input_ids, inputs = input_ids.to(embeds.device), types_before_tokens(inputs, embeds.shape[1])
            has_virtual = True
            if attention_mask is not None and attention_mask.shape == input_ids.shape:
                input_ids = input_ids.masked_fill(attention_mask == 0, VIRTUAL)  # padding may look like a placeholder
        if attention_mask is None:
            attention_mask = self._infer_attention_mask(input_ids, {})
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must be two-dimensional as input_ids, {tuple(input_ids.shape)}; got "
                f"{tuple(attention_mask.shape)}."
            )
        device, input_ids, attention_mask = input_ids.device, input_ids.cpu(), attention_mask.cpu()
        visual = self.adapter.find_visual(input_ids)
        not_looked_up = visual | (input_ids == VIRTUAL) if has_virtual else visual
        check_values(input_ids, attention_mask, not_looked_up, self.num_ids)
        attention_mask = attention_mask.long()
        batch = PromptBatch(input_ids, attention_mask, visual, visual_features, inputs, device, record)
        if batch.new.any() or (not visual.any() and self.adapter.has_pixels(inputs)):
            if batch.features is None:
                batch.features = self.adapter.encode(input_ids, inputs, with_attention)
            else:
                self.adapter.check(input_ids, batch.features)
        else:
            batch.features = None
        return batch

    @torch.no_grad()
    def pruning_inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        visual_features: VisualFeatures | None = None,
        with_attention: bool | None = None,
        **inputs,
    ) -> PruningInputs:
        r"""
        What a pruner or the policy gets to see of a batch of prompts: what `prune` shows to the pruner in use.

        Args:
            input_ids, attention_mask (`int64 [B, L]`), inputs: as the processor returned them.
            query_mask (`bool [B, L]`, *optional*): which tokens are the question.
            visual_features ([`VisualFeatures`], *optional*): from [`encode_images`], in place of pixels.
            with_attention (`bool`, *optional*): with the vision tower's attention. By default, if the pruner in use
                needs it.

        Returns:
            [`PruningInputs`] with the N visual tokens of each sample, padded on the right; N is 0 where no prompt has
            a picture.
        """
        check_call(input_ids, attention_mask, query_mask, visual_features, inputs)
        with_attention = self._wants_attention(with_attention)
        batch = self._batch(input_ids, attention_mask, visual_features, inputs, None, with_attention)
        query_mask = self._query_mask(batch, query_mask)
        return pruning_inputs(batch, self.adapter, layout_of(batch, self.adapter), query_mask, with_attention)[0]

    def _infer_attention_mask(self, input_ids: Tensor, call: dict[str, Any], *configs: Any) -> Tensor:
        # as the base model's generate does: only a pad token that is not an end token can be told from text
        pad, ends = padding_of(call, *configs, self.generation_config)
        return torch.ones_like(input_ids) if pad is None or pad in ends else (input_ids != pad).long()

    @torch.no_grad()
    def _plan(self, batch: PromptBatch, choice: Budget | Tensor | None, query_mask: Tensor | None) -> PrunePlan:
        """The plan on the CPU, but for its scores, which nothing waits for."""
        total = len(batch.visual_ids)
        keep_mask = torch.ones(total, dtype=torch.bool, device="cpu")
        scores = keep_mask.float()
        layout = layout_of(batch, self.adapter)
        if isinstance(choice, Tensor):
            if choice.dtype != torch.bool or choice.shape != (total,):
                raise ValueError(
                    f"keep_mask must be bool of shape ({total},), one entry for each visual token of the batch in "
                    f"placeholder order; got {choice.dtype} of shape {tuple(choice.shape)}."
                )
            keep_mask = choice.cpu().clone()
            scores = keep_mask.float()
        elif choice is not None and batch.features is not None and (batch.new & batch.shown).any():
            query_mask = self._query_mask(batch, query_mask)
            inputs, new = pruning_inputs(batch, self.adapter, layout, query_mask, self.pruner.needs_attention)
            with without_autocast(inputs.tokens.device):
                chosen, chosen_scores = self.pruner.choose(inputs, choice)
                merged = self.pruner.merge(inputs, chosen)
            if merged is not None:
                batch.replace_rows(unpad_rows(merged, inputs.num_visual), new, self.adapter)
            chosen_scores = unpad_rows(chosen_scores, inputs.num_visual).float()
            # one transfer, as each is waited for
            on_cpu = torch.cat([chosen.flatten(), chosen_scores.isnan().any()[None]]).cpu()
            if on_cpu[-1]:
                raise ValueError(
                    f"{type(self.pruner).__name__} gave scores that are NaN: look for broken weights or features. A "
                    "score of -inf is for tokens that go first."
                )
            scores = chosen_scores if new.all() else chosen_scores.new_ones(total).index_put((new,), chosen_scores)
            keep_mask[new] = unpad_rows(on_cpu[:-1].view(chosen.shape), inputs.num_visual)
        if batch.record is not None:
            decided = torch.cat(batch.record.keep_masks)
            differs = int((keep_mask[~batch.new] != decided).sum())
            if isinstance(choice, Tensor) and differs:
                raise ValueError(
                    f"keep_mask says otherwise about {differs} visual tokens than the cache, which has them or not by "
                    "now. Begin it with the `keep_mask` of the last turn, or leave it out."
                )
            keep_mask[~batch.new] = decided
        keep_mask &= batch.shown
        kept = [int(mask.sum()) for mask in keep_mask.split(batch.num_visual.tolist())]
        num_kept = torch.tensor(kept, device="cpu")
        return PrunePlan(keep_mask, scores, num_kept, batch.num_visual, layout)

    def read_chat_template(self, processor: Any) -> None:
        r"""
        Notes in the config what the chat template puts around a question, so that `generate` and `forward` tell it
        from the rest of a prompt by ids alone. Trainers, `tprl` and its server do it.

        Args:
            processor: the base model's processor, or its tokenizer, with a chat template.
        """
        tokenizer = getattr(processor, "tokenizer", processor)
        self.config.special_token_ids = sorted(tokenizer.all_special_ids)
        self.config.question_start_ids, self.config.question_end_ids = template_ids(processor)

    def _query_mask(self, batch: PromptBatch, query_mask: Tensor | None) -> Tensor:
        if self.config.query_agnostic:
            return torch.zeros_like(batch.visual)
        if query_mask is None:
            config, labels = self.config, batch.inputs.get("labels")
            special = config_special_ids(self.adapter.config, self.generation_config)
            return default_query_mask(
                batch.input_ids,
                batch.attention_mask,
                batch.visual,
                special + (config.special_token_ids or []),
                config.question_start_ids,
                config.question_end_ids,
                None if labels is None else labels.cpu(),
            )
        if query_mask.shape != batch.input_ids.shape:
            raise ValueError(
                f"query_mask must have the shape of input_ids, {tuple(batch.input_ids.shape)}; got "
                f"{tuple(query_mask.shape)}."
            )
        refuse_other_than_bits("query_mask", query_mask)
        return query_mask.cpu().bool() & ~batch.visual

    @torch.no_grad()
    def prune(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        keep_ratio: float | None = None,
        num_keep: int | None = None,
        threshold: float | None = None,
        prune: bool | None = None,
        keep_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        visual_features: VisualFeatures | None = None,
        **inputs,
    ) -> PrunePlan:
        r"""
        Says which visual tokens `forward` and `generate` would keep, without running the LLM.

        Args:
            input_ids, attention_mask (`int64 [B, L]`), inputs: as the processor returned them.
            keep_ratio, num_keep, threshold, prune, keep_mask: one of them, see [`TPRLForConditionalGeneration`].
            query_mask (`bool [B, L]`, *optional*): which tokens are the question.
            visual_features ([`VisualFeatures`], *optional*): from [`encode_images`], in place of pixels.

        Returns:
            [`PrunePlan`]

        Raises:
            `ValueError`: for more than one budget or one out of its range, a keep mask of another length, a policy
                that was not trained, and prompts whose placeholders are not as many as the visual tokens.
        """
        check_call(input_ids, attention_mask, query_mask, visual_features, inputs)
        choice = self._choice(keep_ratio, num_keep, threshold, prune, keep_mask)
        batch = self._batch(input_ids, attention_mask, visual_features, inputs, None, self._looks(choice))
        return self._plan(batch, choice, query_mask).to(batch.device)

    # ---- the base model's attention and embeddings are ours ----

    def set_attn_implementation(self, attn_implementation: str | dict[str, Any], *arguments: Any, **options: Any):
        """As in the base model, whose parts a dict names; `base_config` is all of them, as in [`TPRLConfig`]."""
        if not isinstance(attn_implementation, dict):
            super().set_attn_implementation(attn_implementation, *arguments, **options)
            return
        of_base = attn_implementation.get("base_config", attn_implementation)
        self.lvlm.set_attn_implementation(of_base, *arguments, **options)
        if "" in attn_implementation:
            self.config._attn_implementation_internal = self.lvlm.config._attn_implementation

    def get_input_embeddings(self):
        return self.lvlm.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.lvlm.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lvlm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings):
        self.lvlm.set_output_embeddings(new_embeddings)
