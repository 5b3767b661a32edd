"""What is refused before a checkpoint is read: other formats than safetensors, files elsewhere, another base model."""

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from .configuration_tprl import TPRLConfig, refuse_other_dtypes

POLICY_PREFIXES = ("autoencoder.", "policy.")  # of the weights that are ours
MOST_POLICIES = 8  # of which each names the next one as its base model
# Fields of a config, at any depth, that may name a repository whose code transformers would load.
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
# Two base models with equal values of these have weights of the same shape, words added to the vocabulary aside.
SHAPE_FIELDS = (
    *("model_type", "hidden_size", "embed_dim", "intermediate_size", "num_hidden_layers", "depth"),
    *("num_attention_heads", "num_heads", "num_key_value_heads", "head_dim", "image_size", "patch_size"),
)
# Of a base model's config, what a policy does not decide: where and how it is loaded, and its vocabulary.
OF_THE_BASE_ALONE = (
    *SHAPE_FIELDS,
    *("_name_or_path", "architectures", "auto_map", "transformers_version", "dtype", "quantization_config"),
    *("use_cache", "vocab_size", "tie_word_embeddings", "id2label", "label2id"),
)


def cached(source: str, name: str, hub_kwargs: dict[str, Any]) -> str | None:
    """The local path of a checkpoint's file; `None` when it has none of this name."""
    return cached_file(source, name, **hub_kwargs, _raise_exceptions_for_missing_entries=False)


def fields_of(source: str, hub_kwargs: dict[str, Any]) -> dict[str, Any]:
    """What config.json of a checkpoint says; nothing when it has none."""
    path = cached(source, CONFIG_NAME, hub_kwargs)
    return {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def saved_generation_config(source: str, hub_kwargs: dict[str, Any]) -> GenerationConfig | None:
    """The generation settings beside a policy, which its base model's own may differ from; `None` without any."""
    try:
        return GenerationConfig.from_pretrained(source, **hub_kwargs)
    except OSError:  # as transformers takes it
        return None


def refuse_unsafe_name(name: Any, said_by: str) -> None:
    """Raises `ValueError` unless `name` is a relative path that stays below its directory."""
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or "\\" in name or ":" in parts[0] or parts[0] == "/" or ".." in parts:
        raise ValueError(
            f"{said_by} names the file {name!r}, which is not the name of a file beside it. Nothing was read; do not "
            "use this checkpoint."
        )


def refuse_other_formats(use_safetensors: bool | None) -> None:
    """Raises `ValueError` when a caller asks for pickles."""
    if use_safetensors is False:
        raise ValueError(
            "use_safetensors=False is refused: only safetensors are read, since reading a pickle can run code. For a "
            "base model that has nothing else, load it yourself and pass it as base_model=MODEL."
        )


def check_weight_files(
    source: str, hub_kwargs: dict[str, Any], variant: str | None = None, are_needed: bool = True
) -> list[str]:
    """
    Looks at the names of a checkpoint's weight files before any is opened.

    Args:
        source (`str`): a directory or a name on the Hub.
        hub_kwargs (`dict`): where and how to look for it.
        variant (`str`, *optional*): as in `from_pretrained`.
        are_needed (`bool`, defaults to `True`): whether there must be some.

    Returns:
        `list[str]`: names of the files with weights of a policy, if any are.

    Raises:
        `OSError`: when there are none in safetensors.
        `ValueError`: when config or index name a file elsewhere, or one that is not a safetensors file; or when the
            config names a kernel, or a dtype that there is not.
    """
    fields = fields_of(source, hub_kwargs)
    refuse_kernels(fields, source)
    refuse_other_dtypes(fields, f"config.json in {source}")
    named = fields.get("transformers_weights")
    if named is not None:
        raise ValueError(
            f"config.json in {source} names the weights {named!r} (transformers_weights), which is refused: weights "
            f"are read from {SAFE_WEIGHTS_NAME}. Rename the file, if you trust it, and remove the entry."
        )
    infix = f".{variant}" if variant else ""
    name = SAFE_WEIGHTS_NAME.replace(".safetensors", f"{infix}.safetensors")
    if cached(source, name, hub_kwargs) is not None:
        return [name]
    index_name = SAFE_WEIGHTS_INDEX_NAME.replace(".index.json", f".index{infix}.json")
    index = cached(source, index_name, hub_kwargs)
    if index is None:
        if are_needed:
            raise no_safetensors(source, f"neither {name} nor {index_name}")
        return []
    weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    for shard in sorted(set(weight_map.values()), key=str):
        refuse_unsafe_name(shard, f"{index_name} in {source}")
        if not shard.endswith(".safetensors"):
            raise ValueError(f"{index_name} in {source} names {shard!r}: only safetensors files are read.")
    return sorted({shard for weight, shard in weight_map.items() if weight.startswith(POLICY_PREFIXES)})


def kernels_named(fields: Any) -> list[str]:
    """Repositories that a config, or a part of one, names for the code of attention or experts."""
    if isinstance(fields, list):
        return [name for part in fields for name in kernels_named(part)]
    if not isinstance(fields, dict):
        return []
    found = []
    for field, value in fields.items():
        if field.strip("_").removesuffix("_internal") in IMPLEMENTATIONS:
            values = value.values() if isinstance(value, dict) else [value]
            found += [one for one in values if isinstance(one, str) and "/" in one]
        else:
            found += kernels_named(value)
    return found


def refuse_kernels(fields: dict[str, Any], source: str) -> None:
    """Raises `ValueError` where the config in `source` asks for a kernel, which is code of a repository."""
    for name in kernels_named(fields):
        raise ValueError(
            f"config.json in {source} asks for the kernel {name!r}, which is code of another repository, and is "
            "refused. If you trust it, remove the entry and pass attn_implementation, or load the base model yourself "
            "and pass it as base_model=MODEL."
        )


def refuse_untrained(config: TPRLConfig) -> None:
    """Raises `ValueError` for a policy that was never trained, whose choice would be random."""
    if config.policy_training is None:
        raise ValueError(
            "This model's policy has not been trained: it would keep random tokens. Choose a pruner that needs no "
            'training, model.set_pruner("divprune", keep_ratio=1 / 3) or --pruner divprune, or train the policy '
            "(docs/training.md)."
        )


def absolute_path(name: str | None) -> str | None:
    """`name`, as an absolute path where it is that of a directory, so that it holds in any working directory."""
    return os.path.abspath(name) if name is not None and os.path.isdir(name) else name


def relative_path(name: str | None, directory: Path) -> str | None:
    """The directory `name`, seen from `directory`; `None` where it is none, or lies on another drive."""
    if name is None or not os.path.isdir(name):
        return None
    try:
        return Path(os.path.relpath(os.path.realpath(name), os.path.realpath(directory))).as_posix()
    except ValueError:
        return None


def find_base(config: TPRLConfig, source: str) -> str | None:
    """
    Where the base model of the checkpoint `source` is now: a directory, or a name on the Hub.

    Raises:
        `OSError`: when its config names a directory, and it is neither there nor as far from the checkpoint as it was.
    """
    name, relative = config.base_model_name_or_path, config.base_model_relative_path
    if name is not None and os.path.isabs(name) and os.path.isfile(os.path.join(name, CONFIG_NAME)):
        return name  # another one may lie beside a copied policy
    if relative is not None and os.path.isdir(source):
        beside = os.path.normpath(os.path.join(os.path.realpath(source), relative))
        if os.path.isfile(os.path.join(beside, CONFIG_NAME)):
            return beside
    if name is not None and os.path.isabs(name) and not os.path.isdir(name):
        places = name if relative is None else f"{name}, and not in {relative} seen from the checkpoint"
        raise OSError(
            f"The base model of {source} is not in {places}. Pass base_model=NAME_OR_PATH, "
            "or set base_model_name_or_path in its config.json."
        )
    return name


def with_base_in(directory: Path, config: TPRLConfig, wanted: bool | None) -> bool | None:
    """
    Whether a checkpoint in `directory` is wanted with its base model: also where this, or a policy on the way to it,
    lies there, and would be replaced by a policy.

    Raises:
        `ValueError`: where it lies there, and is not wanted.
    """
    for name in islice(bases_from(config.base_model_name_or_path, {}), MOST_POLICIES):
        if not os.path.isdir(name):
            break
        if os.path.realpath(name) == os.path.realpath(directory):
            if wanted is False:
                raise ValueError(
                    f"{directory} holds the base model, which save_base_model=False would replace by a policy: save "
                    "into another directory."
                )
            return True
    return wanted


def bases_from(name: str | None, hub_kwargs: dict[str, Any]) -> Iterator[str]:
    """The base model `name` and, while it is a policy of another one, that one: without an end where they name each
    other."""
    while name is not None:
        yield name
        fields = fields_of(name, hub_kwargs)
        if fields.get("model_type") != TPRLConfig.model_type or fields.get("includes_base_model", True):
            return
        config = TPRLConfig.from_pretrained(name, **hub_kwargs)
        name, hub_kwargs = find_base(config, name), {**hub_kwargs, "revision": config.base_model_revision}


def refuse_endless(name: str, hub_kwargs: dict[str, Any]) -> None:
    """
    Follows the base model `name` until it is more than a policy of another one.

    Raises:
        `OSError`: when it never is, because policies name each other or themselves.
    """
    names = list(islice(bases_from(name, hub_kwargs), MOST_POLICIES + 1))
    if len(names) > MOST_POLICIES:
        raise OSError(
            f"{names[0]} is a policy, its base model is a policy again, and so on without an end: "
            f"{', '.join(names[:4])}, ..."
        )


def no_safetensors(source: str, what: str) -> OSError:
    """The error for a checkpoint without safetensors, which says what lies there instead."""
    endings = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
    found = sorted(path.name for path in Path(source).glob("*") if path.name.endswith(endings))
    others = f", only {', '.join(found)}" if found else ""
    return OSError(
        f"{source} has {what}{others}. Only safetensors are read, since reading a pickle can run code: save the model "
        "again with save_pretrained, or download it again."
    )


def loaded_commit(name: str, hub_kwargs: dict[str, Any]) -> str | None:
    """The commit from which the config of a model on the Hub was just loaded; `None` for a directory."""
    if os.path.isdir(name):
        return None
    hub_kwargs = {**hub_kwargs, "local_files_only": True, "force_download": False}
    return extract_commit_hash(cached(name, CONFIG_NAME, hub_kwargs), None)


def shape_differences(expected: dict[str, Any], found: dict[str, Any], where: str = "") -> list[str]:
    """Each field of two configs that says that their weights have other shapes, with both values."""
    differences = []
    for name in expected.keys() & found.keys():
        ours, theirs = expected[name], found[name]
        if isinstance(ours, dict) and isinstance(theirs, dict):
            differences += shape_differences(ours, theirs, f"{where}{name}.")
        elif name in SHAPE_FIELDS and ours is not None and theirs is not None and ours != theirs:
            differences.append(f"{where}{name} {ours} instead of {theirs}")
    return sorted(differences)


def recorded_fields(recorded: PreTrainedConfig, own: PreTrainedConfig) -> dict[str, Any]:
    """
    What a policy's config says otherwise of its base model than the base model's own config, for `from_pretrained`: it
    was trained with that, such as another `vision_feature_layer`.

    Args:
        recorded (`PreTrainedConfig`): of the base model, as the policy's checkpoint has it.
        own (`PreTrainedConfig`): as the base model's checkpoint has it.
    """
    changes: dict[str, Any] = {}
    values = own.to_dict()
    for name, value in recorded.to_dict().items():
        if name in OF_THE_BASE_ALONE or name not in values or name.endswith(("_token_id", "_token_index")):
            continue
        ours, theirs = getattr(recorded, name, None), getattr(own, name, None)
        if isinstance(ours, PreTrainedConfig) and isinstance(theirs, PreTrainedConfig):
            if inner := recorded_fields(ours, theirs):
                changes[name] = {**theirs.to_dict(), **inner}
        elif value != values[name]:
            changes[name] = value
    return changes


def recorded_of_base(config: TPRLConfig, name: str, hub_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords with which `from_pretrained` makes of the base model `name` what the policy's `config` says of it."""
    own = AutoConfig.from_pretrained(name, **hub_kwargs, trust_remote_code=False)
    own_base: Any = own.base_config if isinstance(own, TPRLConfig) else own
    if not isinstance(config.base_config, PreTrainedConfig) or type(own_base) is not type(config.base_config):
        return {}  # refused afterwards
    changes = recorded_fields(config.base_config, own_base)
    if changes and isinstance(own, TPRLConfig):
        return {"base_config": type(own_base).from_dict(own_base.to_dict(), **changes)}
    return changes


def refuse_other_base(config: TPRLConfig, base: PreTrainedConfig, source: str, place: str) -> None:
    """
    Raises `ValueError` when `base` is not the base model that the policy was trained with.

    Args:
        config ([`TPRLConfig`]): of the policy.
        base (`PreTrainedConfig`): of the base model at hand.
        source, place (`str`): where the policy and the base model come from.
    """
    named = f"{config.base_model_name_or_path}"
    if config.base_model_revision is not None:
        named += f" at revision {config.base_model_revision}"
    if isinstance(config.base_config, PreTrainedConfig):
        differences = shape_differences(config.base_config.to_dict(), base.to_dict())
        if differences:
            raise ValueError(
                f"The policy in {source} was made for a base model with {', '.join(differences)} (that of {place}). "
                f"Use the base model it was trained with: {named}."
            )
    width = base.get_text_config().hidden_size
    if width != config.token_dim:
        raise ValueError(
            f"The policy in {source} was made for visual tokens of width {config.token_dim}, but the base model "
            f"({base.model_type}) has width {width}. Use the base model it was trained with: {named}."
        )
    commit = extract_commit_hash(f"{place}/{CONFIG_NAME}", None)  # of a path into the Hub's cache
    pinned = config.base_model_revision
    if commit is not None and pinned is not None and commit != pinned:
        raise ValueError(
            f"The policy in {source} was trained with {named}, but {place} is revision {commit}. Use that revision, "
            "or set base_model_revision of its config to None if the base models are the same."
        )
