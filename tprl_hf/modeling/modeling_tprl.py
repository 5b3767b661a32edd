"""TPRL around any LVLM: between projector and LLM a policy decides which visual tokens the LLM gets to see."""

import copy
import os
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput, logging

from .cached_prompt import CACHE_NAME, CachedPrompt, cache_argument
from .checkpoint_checks import (
    absolute_path,
    check_weight_files,
    loaded_commit,
    refuse_other_formats,
)
from .checkpoint_tprl import HUB_NAMES, TPRLPreTrainedModel
from .columns import find_visual, restore_prompt, unpad_rows
from .configuration_tprl import TPRLConfig
from .family_adapters import adapter_for
from .generation_tprl import convert_lengths, setting, wrap_for_original_prompt
from .keep_mask import Budget
from .prune_plan import PrunePlan, TPRLOutput, layout_of, pruning_inputs
from .pruned_batch import PromptBatch, PrunedBatch, prune_batch
from .pruner_choice import PrunerChoiceMixin
from .pruning_policy import PruningPolicy
from .text_query import config_special_ids, default_query_mask
from .token_autoencoder import TokenAutoencoder
from .token_pruner import PruningInputs, TokenPruner
from .visual_features import VisualFeatures

logger = logging.get_logger(__name__)


class TPRLForConditionalGeneration(PrunerChoiceMixin, TPRLPreTrainedModel, GenerationMixin):
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

    def __init__(self, config: TPRLConfig, lvlm: PreTrainedModel | None = None):
        if config.base_config is None:
            raise ValueError("TPRLConfig.base_config is missing: use from_base_model(name, path or live model).")
        super().__init__(config)
        self.lvlm = AutoModelForImageTextToText.from_config(config.base_config) if lvlm is None else lvlm
        assert config.token_dim and config.autoencoder_dim and config.latent_dim
        self.autoencoder = TokenAutoencoder(config.token_dim, config.autoencoder_dim, config.latent_dim)
        self.policy = PruningPolicy(
            config.latent_dim,
            config.token_dim,
            config.policy_dim,
            config.policy_num_heads,
            config.policy_num_layers,
            config.policy_positions,
            config.policy_steps,
            config.policy_budget,
        )
        self.autoencoder.float()
        self.policy.float()
        self.adapter = adapter_for(self.lvlm)
        if config.position_ids == "original" and not self.adapter.keeps_positions:
            raise ValueError(
                f"Models of type {self.lvlm.config.model_type!r} do not respect gaps in positions, so that kept "
                "tokens cannot keep theirs: pass position_ids='contiguous'."
            )
        self._init_pruner()
        self.post_init()

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
        given = settings.pop("pruner") if isinstance(settings.get("pruner"), TokenPruner) else None
        known = set(TPRLConfig().to_dict()) | {"base_model_revision"}
        fields = {name: settings.pop(name) for name in list(settings) if name in known and name != "dtype"}
        if isinstance(base_model, PreTrainedModel):
            if settings:
                raise TypeError(f"Unknown settings {sorted(settings)}; TPRLConfig has {sorted(known)}.")
            base = base_model
            fields.setdefault("base_model_name_or_path", absolute_path(base.config.name_or_path or None))
        else:
            refuse_other_formats(settings.get("use_safetensors"))
            settings["use_safetensors"] = True
            hub_kwargs = {name: settings[name] for name in HUB_NAMES if name in settings}
            check_weight_files(str(base_model), hub_kwargs, settings.get("variant"), are_needed=False)
            base = AutoModelForImageTextToText.from_pretrained(base_model, **settings)
            fields.setdefault("base_model_name_or_path", absolute_path(str(base_model)))
            fields.setdefault("base_model_revision", loaded_commit(str(base_model), hub_kwargs))
        base = base.lvlm if isinstance(base, cls) else base
        if given is None and cls.takes_default_pruner(fields):
            fields["pruner"] = cls.default_pruner
            logger.warning_once(f"No policy has been trained for this model: {cls.default_pruner} chooses its tokens.")
        config = TPRLConfig(base_config=copy.deepcopy(base.config), **fields)
        model = cls._around(base, config)
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
        wanted = self.pruner.needs_attention if with_attention is None else with_attention
        return self.adapter.encode(input_ids, inputs, wanted)

    def _batch(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        visual_features: VisualFeatures | None,
        inputs: dict[str, Any],
        record: CachedPrompt | None = None,
        with_attention: bool = False,
    ) -> PromptBatch:
        if input_ids is None:
            raise ValueError("`input_ids` are needed: they say where the visual tokens are. `inputs_embeds` do not.")
        if attention_mask is None:
            attention_mask = self._infer_attention_mask(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must be two-dimensional as input_ids, {tuple(input_ids.shape)}; got "
                f"{tuple(attention_mask.shape)}."
            )
        device, input_ids, attention_mask = input_ids.device, input_ids.cpu(), attention_mask.cpu()
        visual = find_visual(input_ids, list(self.adapter.token_ids.values()))
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
            [`PruningInputs`] with the N visual tokens of each sample, padded on the right.

        Raises:
            `ValueError`: when no prompt has a visual token.
        """
        if with_attention is None:
            with_attention = self.pruner.needs_attention
        batch = self._batch(input_ids, attention_mask, visual_features, inputs, None, with_attention)
        if batch.features is None:
            raise ValueError("The prompts have no visual tokens: there is nothing to prune.")
        query_mask = self._query_mask(batch, query_mask)
        return pruning_inputs(batch, self.adapter, layout_of(batch, self.adapter), query_mask, with_attention)[0]

    def _infer_attention_mask(self, input_ids: Tensor) -> Tensor:
        # as the base model's generate does: only a pad token that is no end token can be told from text
        pad, eos = self.generation_config.pad_token_id, self.generation_config.eos_token_id
        ends = eos if isinstance(eos, list) else [eos]
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
        elif choice is not None and batch.features is not None:
            query_mask = self._query_mask(batch, query_mask)
            inputs, new = pruning_inputs(batch, self.adapter, layout, query_mask, self.pruner.needs_attention)
            chosen, chosen_scores = self.pruner.choose(inputs, choice)
            merged = self.pruner.merge(inputs, chosen)
            if merged is not None:
                batch.replace_rows(unpad_rows(merged, inputs.num_visual), new, self.adapter)
            chosen_scores = unpad_rows(chosen_scores, inputs.num_visual).float()
            scores = chosen_scores if new.all() else chosen_scores.new_ones(total).index_put((new,), chosen_scores)
            keep_mask[new] = unpad_rows(chosen.cpu(), inputs.num_visual)
        if batch.record is not None:
            keep_mask[~batch.new] = torch.cat(batch.record.keep_masks)
        kept = [int(mask.sum()) for mask in keep_mask.split(batch.num_visual.tolist())]
        num_kept = torch.tensor(kept, device="cpu")
        return PrunePlan(keep_mask, scores, num_kept, batch.num_visual, layout)

    def _query_mask(self, batch: PromptBatch, query_mask: Tensor | None) -> Tensor:
        if self.config.query_agnostic:
            return torch.zeros_like(batch.visual)
        if query_mask is None:
            special = config_special_ids(self.adapter.config, self.generation_config)
            special += self.config.special_token_ids or []
            return default_query_mask(batch.input_ids, batch.attention_mask, batch.visual, special)
        if query_mask.shape != batch.input_ids.shape:
            raise ValueError(
                f"query_mask must have the shape of input_ids, {tuple(batch.input_ids.shape)}; got "
                f"{tuple(query_mask.shape)}."
            )
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
        """
        choice = self._choice(keep_ratio, num_keep, threshold, prune, keep_mask)
        batch = self._batch(input_ids, attention_mask, visual_features, inputs, None, self._looks(choice))
        return self._plan(batch, choice, query_mask).to(batch.device)

    # ---- running the base model ----

    def _pruned(self, batch: PromptBatch, plan: PrunePlan, **options) -> PrunedBatch:
        pad = self.generation_config.pad_token_id
        return prune_batch(
            batch,
            plan.keep_mask,
            self.adapter,
            contiguous=self.config.position_ids == "contiguous",
            pad_token_id=0 if pad is None else pad,
            **options,
        )

    def _leaves_alone(self, input_ids: Tensor | None, choice: Budget | Tensor | None, features, record) -> bool:
        """Whether the base model can have the inputs as they are."""
        if features is not None or record is not None:
            return False
        if choice is None:
            return True
        return input_ids is not None and not find_visual(input_ids.cpu(), list(self.adapter.token_ids.values())).any()

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
        return_dict: bool | None = None,
        cache: Any = None,
        **kwargs,
    ) -> TPRLOutput | tuple:
        r"""
        Args:
            input_ids, attention_mask, position_ids, labels (`int64 [B, L]`): of the full prompt; the rows of pruned
                tokens are removed from all of them.
            pixel_values: as the processor returned them, like all other `kwargs`.
            past_key_values (`Cache`, *optional*): a filled one must come from this model; `input_ids` are then the new
                tokens only, without images. `cache` is another name for it, with every release of transformers.
            keep_ratio, num_keep, threshold, prune, keep_mask: one of them, see [`TPRLForConditionalGeneration`].
            query_mask (`bool [B, L]`, *optional*): which tokens are the question.
            visual_features ([`VisualFeatures`], *optional*): from [`encode_images`], in place of pixels.

        Returns:
            [`TPRLOutput`], whose logits are those of the pruned, left-padded sequence. Where nothing is to be pruned,
            the base model gets the inputs as they are.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        given = {"pixel_values": pixel_values, "position_ids": position_ids, "labels": labels}
        inputs = kwargs | {name: value for name, value in given.items() if value is not None}
        choice = self._choice(keep_ratio, num_keep, threshold, prune, keep_mask)
        inputs |= cache_argument(past_key_values, cache)
        cache = inputs.get(CACHE_NAME)
        filled = cache is not None and int(cache.get_seq_length()) > 0
        if filled and (prune is not False or hasattr(cache, "tprl_cached_prompt")):
            assert input_ids is not None
            return self._forward_cached(input_ids, attention_mask, inputs, return_dict)
        if self._leaves_alone(input_ids, choice, visual_features, None):
            output = self.lvlm(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **inputs)
            output = self._output(output)
            return output if return_dict else output.to_tuple()

        batch = self._batch(input_ids, attention_mask, visual_features, inputs, None, self._looks(choice))
        plan = self._plan(batch, choice, query_mask)
        pruned = self._pruned(batch, plan)
        pruned.inputs["position_ids"] = pruned.inputs["position_ids"] + self.adapter.forward_position_offset
        output = self._output(self.lvlm(**pruned.inputs, return_dict=True), plan, pruned)
        self.adapter.remember_positions(pruned.next_position, pruned.attention_mask.sum(1))
        if output.get(CACHE_NAME) is not None:
            record = CachedPrompt(pruned.input_ids, pruned.attention_mask, pruned.keep_masks, pruned.next_position)
            record.attach(output[CACHE_NAME])
        return output if return_dict else output.to_tuple()

    def _forward_cached(self, input_ids, attention_mask, inputs, return_dict):
        """New tokens behind a cache: positions and mask go on from what the cache holds."""
        record = CachedPrompt.of(inputs[CACHE_NAME])
        assert record is not None
        device, ids = input_ids.device, input_ids.cpu()
        if find_visual(ids, list(self.adapter.token_ids.values())).any():
            raise ValueError(
                "New images behind a filled cache are for `generate`: pass it the whole conversation with "
                "`past_key_values`. `forward` takes new text tokens only."
            )
        new = torch.ones_like(ids)
        if attention_mask is not None:
            new = attention_mask[:, -ids.shape[1] :].cpu().long()
        record.check_padding(new)
        positions = record.next_position[:, None] + new.cumsum(1) - 1
        attended = torch.cat([record.attention_mask, new], 1)
        inputs.setdefault("position_ids", self.adapter.spread_positions(positions, new).to(device))
        inputs["position_ids"] = inputs["position_ids"] + self.adapter.forward_position_offset
        for name in self.adapter.consumed_names():
            inputs.pop(name, None)
        output = self.lvlm(
            input_ids=input_ids,
            attention_mask=attended.to(device),
            return_dict=True,
            **inputs,
        )
        record = record.extend(ids, new, positions[:, -1] + 1)
        record.attach(output[CACHE_NAME])
        self.adapter.remember_positions(record.next_position, attended.sum(1))
        output = self._output(output)
        return output if return_dict else output.to_tuple()

    def _output(self, output: ModelOutput, plan: PrunePlan | None = None, pruned: PrunedBatch | None = None):
        given = ("loss", "logits", CACHE_NAME, "hidden_states", "attentions")
        whole = TPRLOutput(**{name: output.get(name) for name in given})
        if plan is not None and pruned is not None:
            device = pruned.inputs["input_ids"].device
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
        **kwargs,
    ) -> Any:
        r"""
        The base model's own `generate` on the pruned prompt. Whatever is returned or shown to the user's processors,
        criteria and streamers begins with the ORIGINAL prompt, and `max_length` and `min_length` count it.

        Args:
            inputs (`int64 [B, L]`, *optional*): the prompts, also as `input_ids`.
            keep_ratio, num_keep, threshold, prune, keep_mask: one of them, see [`TPRLForConditionalGeneration`].
            query_mask (`bool [B, L]`, *optional*): which tokens are the question.
            visual_features ([`VisualFeatures`], *optional*): from [`encode_images`], in place of pixels.
            generation_config, kwargs: as in [`~transformers.GenerationMixin.generate`]. With `past_key_values` (also
                called `cache`) of an earlier call pass the whole conversation; tokens already in it stay as they were.

        Returns:
            As [`~transformers.GenerationMixin.generate`]; a dict also has `keep_mask`, `num_kept` and `num_visual`.
        """
        self.lvlm.generation_config = self.generation_config
        input_ids = kwargs.pop("input_ids", inputs)
        choice = self._choice(keep_ratio, num_keep, threshold, prune, keep_mask)
        kwargs |= cache_argument(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        cache = kwargs.get(CACHE_NAME)
        record = None
        if cache is not None and (prune is not False or hasattr(cache, "tprl_cached_prompt")):
            record = CachedPrompt.of(cache)
        if self._leaves_alone(input_ids, choice, visual_features, record):
            return self.lvlm.generate(input_ids, generation_config=generation_config, **kwargs)

        batch = self._batch(
            input_ids, kwargs.pop("attention_mask", None), visual_features, kwargs, record, self._looks(choice)
        )
        plan = self._plan(batch, choice, query_mask)
        configs = (generation_config, self.generation_config)
        copies = max(setting(name, kwargs, *configs) or 1 for name in ("num_beams", "num_return_sequences"))
        no_cache = setting("use_cache", kwargs, *configs) is False
        pruned = self._pruned(batch, plan, same_length=copies > 1, min_padding=int(no_cache))
        prompt, length = batch.input_ids.to(batch.device), pruned.input_ids.shape[1]
        arguments = pruned.inputs
        generation_config = convert_lengths(
            arguments, generation_config, self.generation_config, prompt.shape[1], length
        )
        wrap_for_original_prompt(arguments, prompt, length)
        output = self.lvlm.generate(generation_config=generation_config, **arguments)

        sequences = output if torch.is_tensor(output) else output.sequences
        cache = (arguments if torch.is_tensor(output) else output).get(CACHE_NAME)
        if cache is not None and len(sequences) == len(prompt):
            self._remember(cache, sequences, pruned, length)
        restored = restore_prompt(sequences, prompt, length)
        if torch.is_tensor(output):
            return restored
        output.sequences = restored
        for name in ("keep_mask", "num_kept", "num_visual"):
            output[name] = getattr(plan, name).to(batch.device)
        return output

    def _remember(self, cache: Any, sequences: Tensor, pruned: PrunedBatch, length: int) -> None:
        """Notes on the cache what it holds after `generate`."""
        held = int(cache.get_seq_length())
        attended = pruned.attention_mask
        attended = torch.cat([attended, attended.new_ones(len(attended), max(held - length, 0))], 1)[:, :held]
        next_position = pruned.next_position + held - length
        CachedPrompt(sequences[:, :held].cpu(), attended, pruned.keep_masks, next_position).attach(cache)
        self.adapter.remember_positions(next_position, attended.sum(1))

    # ---- the base model's embeddings are ours ----

    def get_input_embeddings(self):
        return self.lvlm.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.lvlm.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lvlm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings):
        self.lvlm.set_output_embeddings(new_embeddings)
