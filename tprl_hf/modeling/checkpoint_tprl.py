"""Reading and writing of checkpoints: the policy alone with the name of its base, or everything in one place."""

import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file, logging

from .configuration_tprl import TPRLConfig

logger = logging.get_logger(__name__)

POLICY_PREFIXES = ("autoencoder.", "policy.")


def policy_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights that are ours: autoencoder and policy."""
    return {name: value for name, value in model.state_dict().items() if name.startswith(POLICY_PREFIXES)}


def cast_base(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights, those of the base model in `dtype`; tensors that share memory still do."""
    cast: dict[int, Tensor] = {}
    state = {}
    for name, value in model.state_dict().items():
        if name.startswith("lvlm.") and value.is_floating_point():
            value = cast.setdefault(value.data_ptr(), value.to(dtype))
        state[name] = value
    return state


def move_into(source: Path, target: Path) -> None:
    """Moves all files below `source` into `target`, each at once, so that no reader sees half of one."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            destination = target / path.relative_to(source)
            destination.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, destination)


def scratch_directory(beside: Path) -> "tempfile.TemporaryDirectory[str]":
    """A temporary directory on the same disk as `beside`."""
    beside.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=beside, prefix=".writing-")


def read_policy(path: str | os.PathLike, hub_kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Weights of a policy-only checkpoint.

    Raises:
        `OSError`: when there is no weight file.
        `ValueError`: when it cannot be read.
    """
    filename = cached_file(str(path), SAFE_WEIGHTS_NAME, **hub_kwargs)
    try:
        return load_file(filename)
    except SafetensorError as error:
        size = os.path.getsize(filename)
        raise ValueError(
            f"{filename} ({size} bytes) is truncated or no safetensors file ({error}): copy or download it again."
        ) from error


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


def load_policy(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Loads autoencoder and policy into `model`.

    Raises:
        `ValueError`: for missing or foreign weights, and for weights of another width.
    """
    own = policy_state(model)
    missing, foreign = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or foreign:
        raise ValueError(
            f"{source} does not fit the policy that its config describes: missing weights {missing[:3]}, unknown "
            f"weights {foreign[:3]}. Use the config.json that was saved with it."
        )
    for name, value in own.items():
        if state[name].shape != value.shape:
            raise ValueError(
                f"{name} has shape {tuple(state[name].shape)} in {source}, but the model needs {tuple(value.shape)}: "
                "this policy was made for a base model of another width, or its config.json was changed."
            )
    model.load_state_dict(state, strict=False)


class TPRLPreTrainedModel(PreTrainedModel):
    """Base class for loading and saving."""

    config_class = TPRLConfig
    base_model_prefix = "lvlm"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ("autoencoder", "policy")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, base_model=None, **kwargs):
        r"""
        Loads a TPRL checkpoint. Of a policy-only one, the base model is loaded first, from the place that its config
        names; `dtype`, `device_map`, `attn_implementation` and the like then apply to the base.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a directory or a name on the Hub.
            config ([`TPRLConfig`], *optional*): replaces the checkpoint's own.
            base_model (`str`, `os.PathLike` or `PreTrainedModel`, *optional*): where to take the base model from
                instead, or the live base model itself. Only for policy-only checkpoints.
            kwargs: as in [`~transformers.PreTrainedModel.from_pretrained`].

        Raises:
            `OSError`: when config or weights are missing.
            `ValueError`: when weights are truncated, of another shape, or the base model is unknown.
        """
        hub_names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        hub_kwargs = {name: kwargs[name] for name in hub_names if kwargs.get(name) is not None}
        source = str(pretrained_model_name_or_path)
        # As remote code the config is of a class of the same name from another module.
        if not isinstance(config, PreTrainedConfig):
            config = TPRLConfig.from_pretrained(config or source, **hub_kwargs)
        if config.base_config is None and config.includes_base_model:
            raise OSError(f"{source} has no config.json of a TPRL model: it names no base model.")
        if config.includes_base_model:
            wants_info = kwargs.pop("output_loading_info", False)
            tolerant = kwargs.pop("ignore_mismatched_sizes", False)
            try:
                kwargs.update(config=config, output_loading_info=True, ignore_mismatched_sizes=True)
                model, info = super().from_pretrained(source, *model_args, **kwargs)
            except SafetensorError as error:
                raise ValueError(
                    f"model.safetensors in {source} is truncated or no safetensors file ({error}): copy or download "
                    "it again."
                ) from error
            refuse_unless_whole(info, source, tolerant)
            return (model, info) if wants_info else model

        config = copy.deepcopy(config)
        state = read_policy(source, hub_kwargs)
        base_model = base_model if base_model is not None else config.base_model_name_or_path
        if base_model is None:
            raise ValueError(
                f"{source} holds a policy only and does not say for which base model: pass base_model=NAME_OR_PATH."
            )
        if not isinstance(base_model, PreTrainedModel):
            base_kwargs = {k: v for k, v in kwargs.items() if k not in ("revision", "subfolder", "force_download")}
            revision = config.base_model_revision
            # Auto classes put this argument into the config before they call us.
            attention = kwargs.get("attn_implementation", config._attn_implementation)
            if attention is not None:
                base_kwargs["attn_implementation"] = attention
            if revision is not None and base_model == config.base_model_name_or_path:
                base_kwargs["revision"] = revision
            base_kwargs.pop("output_loading_info", None)
            base_model = AutoModelForImageTextToText.from_pretrained(str(base_model), **base_kwargs)
        width = base_model.config.get_text_config().hidden_size
        if width != config.token_dim:
            raise ValueError(
                f"The policy in {source} was made for visual tokens of width {config.token_dim}, but the base model "
                f"({base_model.config.model_type}) has width {width}. Use the base model it was trained with: "
                f"{config.base_model_name_or_path}."
            )
        model = cls._around(base_model, config)
        load_policy(model, state, source)
        model.name_or_path = source
        model.eval()
        return (model, {}) if kwargs.get("output_loading_info") else model

    def save_pretrained(self, save_directory, save_base_model: bool = False, base_dtype=None, **kwargs):
        r"""
        Saves the policy with the base model's name and revision, or everything.

        Args:
            save_directory (`str` or `os.PathLike`): where to; made when missing.
            save_base_model (`bool`, defaults to `False`): save the base model's weights too.
            base_dtype (`torch.dtype`, *optional*): store the base model's weights in this precision, e.g.
                `torch.float16` for half the size. The config keeps the live model's dtype, in which they are loaded.
            kwargs: as in [`~transformers.PreTrainedModel.save_pretrained`], `push_to_hub` and `repo_id` among them.
        """
        directory = Path(save_directory)
        upload = kwargs.pop("push_to_hub", False)
        hub = {name: kwargs.pop(name, None) for name in ("repo_id", "token", "private", "commit_message")}
        if not save_base_model:
            if self.config.base_model_name_or_path is None:
                logger.warning(
                    "The base model has no name or path, so the saved policy cannot find it again: load it with "
                    "from_pretrained(..., base_model=MODEL), or save with save_base_model=True."
                )
        before = self.config.includes_base_model
        self.config.includes_base_model = save_base_model
        try:
            with scratch_directory(directory) as scratch:
                if save_base_model:
                    if base_dtype is not None:
                        kwargs["state_dict"] = cast_base(self, base_dtype)
                    super().save_pretrained(scratch, **kwargs)
                else:
                    self._save_policy(Path(scratch))
                move_into(Path(scratch), directory)
        finally:
            self.config.includes_base_model = before
        if upload:
            api = HfApi(token=hub["token"])
            repo = api.create_repo(hub["repo_id"] or directory.name, private=hub["private"], exist_ok=True)
            api.upload_folder(repo_id=repo.repo_id, folder_path=directory, commit_message=hub["commit_message"])

    def _save_policy(self, directory: Path) -> None:
        # Not by the library's own saving: it would rename weights as the base model's family wants them renamed.
        self.config.architectures = [type(self).__name__]
        if self._auto_class is not None:  # travels as remote code
            custom_object_save(self, directory, config=self.config)
        self.config.save_pretrained(directory)
        self.generation_config.save_pretrained(directory)
        state = {name: value.detach().contiguous().cpu() for name, value in policy_state(self).items()}
        save_file(state, directory / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})

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
        model.config.base_config = base.config
        model.generation_config = base.generation_config
        return model
