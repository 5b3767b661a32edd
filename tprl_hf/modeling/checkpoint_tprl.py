"""Reading and writing of checkpoints: the policy alone with the name of its base, or everything in one place."""

import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel, initialization
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from .base_weights import (
    changed_weights,
    digests,
    is_quantised,
    refuse_adapters,
    refuse_quantised,
    refuse_what_no_checkpoint_holds,
    weight_files,
)
from .checkpoint_checks import (
    POLICY_PREFIXES,
    absolute_path,
    check_weight_files,
    fields_of,
    find_base,
    recorded_of_base,
    refuse_endless,
    refuse_kernels,
    refuse_other_base,
    refuse_other_formats,
    refuse_untrained,
    relative_path,
    saved_generation_config,
    with_base_in,
)
from .configuration_tprl import TPRLConfig, own_fields
from .hub_tprl import (
    WEIGHT_PATTERNS,
    base_licence,
    card_metadata,
    card_on_hub,
    code_files,
    full_card,
    is_hub_name,
    pinned_revision,
    prepare_repo,
    set_code,
    update_card,
)
from .peft_adapter import (
    FOLDER,
    TPRLAdapterMixin,
    has_adapter,
    load_own_adapter,
    refuse_unless_one_lora,
    save_adapter,
    without_adapter,
)
from .policy_linear import PolicyLinear
from .policy_weights import (
    load_policy,
    place_beside_embeddings,
    policy_in_files,
    policy_state,
    read_policy,
    refuse_broken,
)
from .saved_files import finish_saving, written_whole
from .values import refuse_misspelled, wrong

logger = logging.get_logger(__name__)

BASE_PREFIX = "lvlm."
HUB_NAMES = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# Of a call that loads a policy, what does not concern its base model. Trust in the code beside a policy is not trust
# in the code beside the base model that its config names.
NOT_FOR_THE_BASE = (
    *("revision", "subfolder", "force_download", "output_loading_info", "adapter_kwargs", "code_revision"),
    *("trust_remote_code", "use_safetensors", "variant"),
)
QUANTISED = ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method")


def base_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The base model's weights, by its own names."""
    return {name.removeprefix(BASE_PREFIX): value for name, value in state.items() if name.startswith(BASE_PREFIX)}


def cast_base(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights, those of the base model in `dtype`; tensors that share memory still do."""
    cast: dict[int, Tensor] = {}
    state = {}
    for name, value in weights.items():
        if name.startswith(BASE_PREFIX) and value.is_floating_point():
            value = cast.setdefault(value.data_ptr(), value.to(dtype))
        state[name] = value
    return state


def refuse_unless_whole(info: dict[str, Any], source: str, tolerant: bool) -> None:
    """Raises `ValueError` where the loading info of a merged checkpoint tells of a hole."""
    for name, shape, wanted in sorted(info["mismatched_keys"]) if not tolerant else ():
        raise ValueError(
            f"{name} has shape {tuple(shape)} in {source}, but the model needs {tuple(wanted)}: its config.json was "
            "changed, or belongs to another checkpoint."
        )
    foreign = sorted(name for name in info["unexpected_keys"] if name.startswith(POLICY_PREFIXES))
    missing = sorted(info["missing_keys"])
    if missing or foreign:
        raise ValueError(
            f"{len(missing)} weights are missing in {source} (such as {missing[:3]}) and {len(foreign)} are unknown "
            f"({foreign[:3]}): copy or download it again, with its own config.json."
        )


def attention_of(config: TPRLConfig) -> dict[str, str]:
    """The attention that was asked for, of the base model (`""`) and of each of its parts. No checkpoint says any."""
    base: Any = config.base_config
    parts = {} if base is None else {name: getattr(base, name, None) for name in base.sub_configs}
    asked = {"": config._attn_implementation}
    asked |= {name: part._attn_implementation for name, part in parts.items() if part is not None}
    return {name: value for name, value in asked.items() if value is not None}


class TPRLPreTrainedModel(TPRLAdapterMixin, PreTrainedModel):
    """Base class for loading and saving."""

    config_class = TPRLConfig
    base_model_prefix = "lvlm"
    _quantised_weights: dict[str, tuple] | None = None
    _base_cache_dir: str | os.PathLike | None = None
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ("autoencoder", "policy")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PolicyLinear):  # as transformers starts an nn.Linear
            std = getattr(self.config.get_text_config(), "initializer_range", 0.02)
            initialization.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                initialization.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, base_model=None, **kwargs):
        r"""
        Loads a TPRL checkpoint. Of a policy-only one, the base model is loaded first, from the place that its config
        names; `dtype`, `device_map`, `attn_implementation` and the like then apply to the base.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a directory or a name on the Hub.
            config ([`TPRLConfig`], *optional*): replaces the checkpoint's own.
            base_model (`str`, `os.PathLike` or `PreTrainedModel`, *optional*): where to take the base model from
                instead, or the live base model itself, which keeps its generation settings. Only for policy-only
                checkpoints.
            kwargs: as in [`~transformers.PreTrainedModel.from_pretrained`]. Fields of [`TPRLConfig`] replace those of
                the checkpoint.

        Raises:
            `OSError`: when config or weights are missing.
            `ValueError`: when weights are truncated, not finite, of another shape, or the base model is unknown.
        """
        if not isinstance(pretrained_model_name_or_path, (str, os.PathLike)):
            raise wrong("pretrained_model_name_or_path", pretrained_model_name_or_path, "a name on the Hub or a path")
        if base_model is not None and not isinstance(base_model, (str, os.PathLike, PreTrainedModel)):
            raise wrong("base_model", base_model, "a name on the Hub, a path, or a live model")
        refuse_misspelled(kwargs, own_fields(), "from_pretrained")
        changes = {name: kwargs.pop(name) for name in own_fields() if name in kwargs}
        hub_kwargs = {name: kwargs[name] for name in HUB_NAMES if kwargs.get(name) is not None}
        source = str(pretrained_model_name_or_path)
        refuse_other_formats(kwargs.get("use_safetensors"))
        if finish_saving(Path(source, kwargs.get("subfolder") or "")) and isinstance(
            config, PreTrainedConfig
        ):  # read before, so of another save
            raise OSError(f"A save into {source} was cut off; its files are in their places now: load it again.")
        # As remote code the config is of a class of the same name from another module.
        if not isinstance(config, PreTrainedConfig):
            config = TPRLConfig.from_pretrained(config or source, **hub_kwargs)
        config = copy.deepcopy(config)
        for name, value in changes.items():
            setattr(config, name, value)
        config.check()
        if config.base_config is None and config.includes_base_model:
            raise OSError(f"{source} has no config.json of a TPRL model: it names no base model.")
        if config.includes_base_model:
            wants_info = kwargs.pop("output_loading_info", False)
            tolerant = kwargs.pop("ignore_mismatched_sizes", False)
            files = check_weight_files(source, hub_kwargs, kwargs.get("variant"))
            try:
                refuse_broken(policy_in_files(source, files, hub_kwargs), source)
                kwargs.update(config=config, output_loading_info=True, ignore_mismatched_sizes=True)
                kwargs["use_safetensors"] = True
                model, info = super().from_pretrained(source, *model_args, **kwargs)
            except SafetensorError as error:
                raise ValueError(
                    f"model.safetensors in {source} is truncated or no safetensors file ({error}): copy or download "
                    "it again."
                ) from error
            refuse_unless_whole(info, source, tolerant)
            place_beside_embeddings(model)
            if config.includes_adapter:
                load_own_adapter(model, source, hub_kwargs)
            return (model, info) if wants_info else model

        state = read_policy(source, hub_kwargs)
        refuse_kernels(fields_of(source, hub_kwargs), source)
        if base_model is None and config.base_model_name_or_path is None:
            raise ValueError(
                f"{source} holds a policy only and does not say for which base model: pass base_model=NAME_OR_PATH."
            )
        named = config.base_model_name_or_path
        if base_model is None:
            config.base_model_name_or_path = find_base(config, source)
        elif not isinstance(base_model, PreTrainedModel) and named is not None and os.path.isabs(named):
            config.base_model_name_or_path = absolute_path(str(base_model))  # where it is now
        settings = None
        if not isinstance(base_model, PreTrainedModel):
            base_model = cls._load_base(str(base_model or config.base_model_name_or_path), config, source, kwargs)
            settings = kwargs.get("generation_config") or saved_generation_config(source, hub_kwargs)
        refuse_other_base(config, base_model.config, source, base_model.config.name_or_path or "this model")
        model = cls._around(base_model, config)
        load_policy(model, state, source)
        if settings is not None:
            model.generation_config = settings
        model._base_cache_dir = hub_kwargs.get("cache_dir")
        model.name_or_path = source
        if config.includes_adapter:
            load_own_adapter(model, source, hub_kwargs)
        model.eval()
        return (model, {}) if kwargs.get("output_loading_info") else model

    @classmethod
    def _load_base(cls, name: str, config: TPRLConfig, source: str, kwargs: dict[str, Any]) -> PreTrainedModel:
        """The base model `name`, at the pinned revision if it is the one that `config` names."""
        base_kwargs = {key: value for key, value in kwargs.items() if key not in NOT_FOR_THE_BASE}
        if kwargs.get("attn_implementation") is not None:  # Auto classes put it into the config before they call us
            config._attn_implementation = kwargs["attn_implementation"]
        if attention := attention_of(config):
            base_kwargs["attn_implementation"] = attention
        pinned = config.base_model_revision if name == config.base_model_name_or_path else None
        if pinned is not None:
            base_kwargs["revision"] = pinned
        base_kwargs.update(trust_remote_code=False, use_safetensors=True)
        hub_kwargs = {key: base_kwargs[key] for key in HUB_NAMES if base_kwargs.get(key) is not None}
        try:
            check_weight_files(name, hub_kwargs, base_kwargs.get("variant"), are_needed=False)
            refuse_endless(name, hub_kwargs)
            base_kwargs = {**recorded_of_base(config, name, hub_kwargs), **base_kwargs}
            base = AutoModelForImageTextToText.from_pretrained(name, **base_kwargs)
            return base.lvlm if isinstance(base, cls) else base
        except OSError as error:
            revision = "" if pinned is None else f" at revision {pinned}"
            raise OSError(
                f"{source} is the policy of {name}{revision}, which could not be loaded: {error} Pass "
                "base_model=NAME_OR_PATH to take the base model from elsewhere. Only safetensors are read."
            ) from error

    def save_pretrained(
        self,
        save_directory,
        save_base_model: bool | None = None,
        base_dtype=None,
        include_code: bool = False,
        **kwargs,
    ):
        r"""
        Saves what is needed to get this model back: the policy with the base model's name and revision where the base
        model is as it was loaded from there, else everything; and the LoRA that `load_adapter` put into it. Nothing
        trained is lost.

        Args:
            save_directory (`str` or `os.PathLike`): where to; made when missing.
            save_base_model (`bool`, *optional*): save the base model's weights too. By default, if they are not those
                of the checkpoint that the config names, or cannot be compared with them.
            base_dtype (`torch.dtype`, *optional*): store the base model's weights in this precision, e.g.
                `torch.float16` for half the size. The config keeps the live model's dtype, in which they are loaded.
            include_code (`bool`, defaults to `False`): put our code beside the weights, so that the checkpoint loads
                with `trust_remote_code=True` where `tprl_hf` is not installed. A model that was loaded so, or was
                registered with `register_for_auto_class`, always takes its code along.
            kwargs: as in [`~transformers.PreTrainedModel.save_pretrained`]; `state_dict`, `push_to_hub=True` and the
                arguments of [`push_to_hub`] among them. Weights keep the names that they have in memory, so that
                `Trainer` can resume from them, unless `save_original_format=True`.

        Raises:
            `ValueError`: for `save_base_model=False` when the base model was changed; and for a base model whose
                weights `from_pretrained` would not bring back: a quantised one that was changed, or with adapters
                other than one LoRA that `load_adapter` put there.
        """
        directory = Path(save_directory)
        upload = kwargs.pop("push_to_hub", False)
        hub = {name: kwargs.pop(name) for name in ("repo_id", "token", "private", "commit_message") if name in kwargs}
        if not kwargs.get("is_main_process", True):
            return
        given = kwargs.pop("state_dict", None)
        state = self._weights() if given is None else given
        tuned = has_adapter(self)
        if tuned:
            refuse_unless_one_lora(self)
            given = state = without_adapter(state)
        whole = self._needs_base(state, with_base_in(directory, self.config, save_base_model))
        if whole:
            refuse_quantised(self)
            refuse_what_no_checkpoint_holds(self.lvlm, base_state(self.state_dict() if given is None else given))
            if base_dtype is not None:
                given = cast_base(state, base_dtype)
            kwargs.setdefault("save_original_format", False)
        config = self.config
        before = config.includes_base_model, config.base_model_relative_path, config.includes_adapter
        config.includes_base_model, config.includes_adapter = whole, tuned
        config.base_model_name_or_path = absolute_path(config.base_model_name_or_path)
        config.base_model_relative_path = relative_path(config.base_model_name_or_path, directory)
        try:
            with written_whole(directory) as scratch:
                if tuned:
                    save_adapter(self, Path(scratch), config.base_model_name_or_path)
                if whole:
                    self._hf_peft_config_loaded = False  # else only the adapter would be saved
                    super().save_pretrained(scratch, state_dict=given, **kwargs)
                else:
                    self._save_policy(Path(scratch), state)
                takes_code = include_code or self._auto_class is not None
                set_code(Path(scratch), code_files(self.config, self.pruner_classes) if takes_code else {})
        finally:
            config.includes_base_model, config.base_model_relative_path, config.includes_adapter = before
            self._hf_peft_config_loaded = tuned
        if upload:
            hub.setdefault("repo_id", directory.name)
            self.push_to_hub(**hub, save_base_model=whole, base_dtype=base_dtype)

    def _weights(self) -> dict[str, Tensor]:
        """All weights, of which those that lie on a disk until they are needed can only be had by writing them."""
        state = self.state_dict()
        if not any(value.is_meta for value in state.values()):
            return state
        with tempfile.TemporaryDirectory() as scratch:
            super().save_pretrained(scratch, save_original_format=False)
            files = [load_file(path) for path in Path(scratch).glob("*.safetensors")]
        return {name: value for file in files for name, value in file.items()}

    def dequantize(self, dtype=None) -> None:
        """As [`~transformers.PreTrainedModel.dequantize`], of the base model."""
        if getattr(self.lvlm, "hf_quantizer", None) is None:  # quantised as a whole, from a merged checkpoint
            super().dequantize(dtype)
            return
        self.lvlm.dequantize(dtype)
        for name in QUANTISED:
            self.__dict__.pop(name, None)

    def _needs_base(self, state: dict[str, Tensor], wanted: bool | None) -> bool:
        """Whether the base model's weights are to be saved, and refuses to lose any."""
        refuse_adapters(state)
        if wanted:
            return True
        config, base = self.config, base_state(state)
        if is_quantised(self):
            known, changed = self._quantised_weights is not None, []
            if self._quantised_weights is not None:
                found = digests(base)
                changed = sorted(name for name in found if found[name] != self._quantised_weights.get(name))
        else:
            cache_dir = self._base_cache_dir
            files = weight_files(config.base_model_name_or_path, config.base_model_revision, cache_dir)
            known = bool(files)
            changed = changed_weights(self.lvlm, base, files) if known else []
        if not changed and (known or wanted is False):
            self._tell_what_the_policy_needs(known)
            return False
        if wanted is False:
            raise ValueError(
                f"save_base_model=False would lose {len(changed)} weights of the base model that are not those of "
                f"{config.base_model_name_or_path} (such as {changed[0]}): leave it out, or pass True."
            )
        refuse_quantised(self)
        if not known and config.base_model_name_or_path is not None:
            logger.warning(
                f"The weights of the base model, {config.base_model_name_or_path}, are not on this machine to compare "
                "with, so that they are saved too. Pass save_base_model=False if they were not changed."
            )
        return True

    def _tell_what_the_policy_needs(self, known: bool) -> None:
        name = self.config.base_model_name_or_path
        if name is None:
            logger.warning(
                "The base model has no name or path, so the saved policy cannot find it again: load it with "
                "from_pretrained(..., base_model=MODEL), or save with save_base_model=True."
            )
        elif not known:
            logger.warning(f"The base model is not saved, and could not be compared with {name}, from which it loads.")

    def _save_policy(self, directory: Path, state: dict[str, Tensor]) -> None:
        # Not by the library's own saving: it would rename weights as the base model's family wants them renamed.
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(directory)
        self.generation_config.save_pretrained(directory)
        own = {name: value.detach().contiguous().cpu() for name, value in policy_state(state).items()}
        save_file(own, directory / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})

    def push_to_hub(
        self,
        repo_id: str,
        *,
        save_base_model: bool | None = None,
        base_dtype: torch.dtype | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
    ) -> CommitInfo:
        r"""
        Publishes the policy with the name and commit of its base model, or everything; with our code, so that it loads
        without `tprl_hf`, and a card. A card that is there keeps its text; `tprl push` writes a longer one.

        Args:
            repo_id (`str`): `NAME` or `USER/NAME`; made when missing.
            save_base_model, base_dtype: as in [`save_pretrained`].
            commit_message, commit_description, private, token, revision, create_pr, max_shard_size, tags: as in
                [`~transformers.PreTrainedModel.push_to_hub`].

        Raises:
            `ValueError`: when the policy was never trained and no pruner stands in for it; and when the policy alone
                is pushed and its base model has no name that others can load.
        """
        if self.config.pruner is None:
            refuse_untrained(self.config)
        api = HfApi(token=token)
        before = self.config.base_model_name_or_path, self.config.base_model_revision
        weights = self._weights()
        save_base_model = self._needs_base(without_adapter(weights) if has_adapter(self) else weights, save_base_model)
        if save_base_model:
            if not is_hub_name(before[0]):  # a path is of this machine only
                self.config.base_model_name_or_path = self.config.base_model_revision = None
        else:
            self.config.base_model_revision = pinned_revision(api, self.config)
        try:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch)
                self.save_pretrained(folder, save_base_model, base_dtype, True, max_shard_size=max_shard_size)
                config = copy.copy(self.config)
                config.includes_base_model, config.includes_adapter = save_base_model, has_adapter(self)
                repo_id = prepare_repo(api, repo_id, private, revision)
                card = full_card(card_metadata(config, base_licence(api, config), tags), repo_id=repo_id)
                card = update_card(card_on_hub(api, repo_id, revision), card, replace=False)
                (folder / "README.md").write_text(card, encoding="utf-8")
                return api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    commit_message=commit_message or "Upload model",
                    commit_description=commit_description,
                    revision=revision,
                    create_pr=create_pr,
                    delete_patterns=[*WEIGHT_PATTERNS, f"{FOLDER}/*"],
                )
        finally:
            self.config.base_model_name_or_path, self.config.base_model_revision = before

    @classmethod
    def _around(cls, base: PreTrainedModel, config: TPRLConfig) -> Any:
        # Making a model around a config resets the attention implementation of that config and of its parts, so it
        # gets a copy; afterwards the live config takes its place, so that there is one truth.
        config.base_config = copy.deepcopy(base.config)
        config.dtype = base.dtype
        config._attn_implementation_internal = base.config._attn_implementation
        # The live model is not to be initialised a second time, whatever was done to it since it was made.
        for module in base.modules():
            module._is_hf_initialized = True
        model = cls(config, lvlm=base)
        # There are no files to compare these with later on.
        model._quantised_weights = digests(base.state_dict()) if is_quantised(base) else None
        for name in QUANTISED:  # PEFT, TRL and `Trainer` look at the outer model
            if hasattr(base, name):
                setattr(model, name, getattr(base, name))
        if hasattr(base, "hf_device_map"):  # for `Trainer` and for saving, which look at the outer model
            places = base.hf_device_map.items()
            model.hf_device_map = {f"{BASE_PREFIX}{name}".rstrip("."): place for name, place in places}
        model.config.base_config = base.config
        model.generation_config = base.generation_config
        place_beside_embeddings(model)
        return model
