"""The processor of a TPRL checkpoint is that of its base model."""

import os
from typing import Any

from transformers import AutoProcessor, ProcessorMixin

from .checkpoint_checks import find_base, refuse_endless
from .configuration_tprl import TPRLConfig


class TPRLProcessor(ProcessorMixin):
    """Stands for the base model's processor where a policy-only checkpoint has none of its own."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """The processor of the base model that the checkpoint's config names, an instance of its own class.

        Raises:
            `ValueError`: when the config names no base model.
            `OSError`: when the base model is not where the config says.
        """
        hub_names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        hub_kwargs = {name: kwargs[name] for name in hub_names if kwargs.get(name) is not None}
        config = TPRLConfig.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
        if config.base_model_name_or_path is None:
            raise ValueError(
                f"{pretrained_model_name_or_path} has no processor and names no base model to take one from: save a "
                "processor beside it, or load that of the base model."
            )
        for name in ("revision", "subfolder", "force_download"):  # of this checkpoint, not of the base model
            kwargs.pop(name, None)
        if config.base_model_revision is not None:
            kwargs["revision"] = config.base_model_revision
        kwargs["trust_remote_code"] = False  # code beside a base model that a config names is never run
        base = find_base(config, str(pretrained_model_name_or_path))
        if base is not None:
            hub_kwargs = {name: kwargs[name] for name in hub_names if kwargs.get(name) is not None}
            refuse_endless(base, hub_kwargs)
        return AutoProcessor.from_pretrained(base, **kwargs)
