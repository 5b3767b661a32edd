"""A trained policy's directory to the Hub: weights, config, processor, code and a card made of what was measured."""

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, EvalResult, HfApi
from huggingface_hub.utils import get_session, hf_raise_for_status
from transformers import AutoConfig, TrainingArguments
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from tprl_hf.json_files import read_json
from tprl_hf.model_cards import dataset_card, eval_results_yaml, model_index, policy_card, without_paths
from tprl_hf.modeling.checkpoint_checks import check_weight_files, refuse_other_base
from tprl_hf.modeling.configuration_tprl import TPRLConfig
from tprl_hf.modeling.hub_tprl import (
    AUTO_MAP,
    TAGS,
    WEIGHT_PATTERNS,
    base_licence,
    card_metadata,
    card_on_hub,
    code_files,
    full_card,
    is_hub_name,
    pinned_revision,
    prepare_repo,
    update_card,
)
from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
from tprl_hf.modeling.peft_adapter import FOLDER, WEIGHTS
from tprl_hf.modeling.pruner_choice import name_with_settings
from tprl_hf.modeling.saved_files import finish_saving

# What is published of a directory besides weights and config: by name, so that nothing goes along by chance.
PROCESSOR_FILES = (
    *(
        "processor_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "image_processor_config.json",
    ),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *(
        "spiece.model",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
        "additional_chat_templates/*.jinja",
    ),
)
RESULTS = ".eval_results/*.yaml"  # of benchmarks
LORA_FILES = (f"{FOLDER}/adapter_config.json", f"{FOLDER}/{WEIGHTS}")


def training_data(stage: str, settings: Mapping[str, Any]) -> Any:
    """The section of `data`, or the list of sections, that a stage learned from: its own, or `train`."""
    data = settings.get("data", {})
    return data.get(stage, data.get("train", {}))


def changed_settings(args: TrainingArguments) -> dict[str, Any]:
    """The settings of a training config that are not its defaults, without names of places and tokens."""
    # another config would set up the devices anew, for the run that has begun too, which then forgets its processes
    default = type(args)(output_dir=args.output_dir, accelerator_config={"use_configured_state": True}).to_dict()
    private = ("hub_", "push_to_hub", "logging_dir", "run_name", "unpruned_answers_dir")
    changed = {name: value for name, value in args.to_dict().items() if value != default.get(name)}
    return {name: value for name, value in changed.items() if not name.startswith(private)}


def files_to_publish(
    directory: str | Path,
    repo_id: str,
    api: HfApi,
    *,
    base_model: str | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    benchmark_results: Sequence[EvalResult] = (),
    benchmarks: Mapping[int, tuple[str, str]] | None = None,
    latency: Mapping[str, Any] | None = None,
    flops: Mapping[str, Any] | None = None,
    stages: Sequence[Mapping[str, Any]] = (),
    tags: Sequence[str] = (),
    licence: str | None = None,
    existing_card: str | None = None,
) -> dict[str, Path | bytes]:
    """
    All files of a publication, by their path in the repository.

    Args:
        directory (`str` or `Path`): A checkpoint that `save_pretrained` or a trainer wrote.
        repo_id (`str`): Where it goes.
        api (`HfApi`): With which the base model is looked up.
        base_model (`str`, *optional*): Its name on the Hub, where the checkpoint names a path.
        results, benchmark_results, latency, flops, stages, tags, licence: See [`publish`].
        benchmarks (`Mapping`, *optional*): By number of the results, the benchmark's dataset on the Hub and its task.
        existing_card (`str`, *optional*): The card that is to be brought up to date; by default that of `directory`.

    Raises:
        `OSError`: If it is not a checkpoint, or has no safetensors.
        `ValueError`: If others could not load it.
    """
    directory = Path(directory)
    finish_saving(directory)
    if not (directory / CONFIG_NAME).is_file():
        raise OSError(f"{directory} holds no checkpoint: there is no {CONFIG_NAME}.")
    cure = "save the checkpoint again."
    written = read_json(directory / CONFIG_NAME, {"?model_type": str, "?base_config": {}}, cure)
    if written.get("model_type") != TPRLConfig.model_type:
        raise ValueError(
            f"{directory} holds a {written.get('model_type')!r}, no TPRL checkpoint, and only these are pushed: wrap "
            "it by from_base_model with a pruner, and save that."
        )
    if "base_config" not in written:
        raise ValueError(f"{directory / CONFIG_NAME} is damaged (base_config is missing): {cure}")
    check_weight_files(str(directory), {})
    config = TPRLConfig.from_pretrained(directory)
    if base_model is not None:
        config.base_model_name_or_path, config.base_model_revision = base_model, None
    if not config.includes_base_model:
        config.base_model_revision = pinned_revision(api, config)
        name, revision = str(config.base_model_name_or_path), config.base_model_revision
        base = AutoConfig.from_pretrained(name, revision=revision, token=api.token, trust_remote_code=False)
        refuse_other_base(config, base, str(directory), name)
    found_licence = {"license": licence} if licence else base_licence(api, config)
    if not is_hub_name(config.base_model_name_or_path):  # a path is of this machine only
        config.base_model_name_or_path = config.base_model_revision = None
    written["base_config"].pop("_name_or_path", None)
    written["auto_map"] = AUTO_MAP
    config.base_model_relative_path = None
    for key in ("base_model_name_or_path", "base_model_revision", "base_model_relative_path"):
        written[key] = getattr(config, key)

    classes = TPRLForConditionalGeneration.pruner_classes
    files: dict[str, Path | bytes] = {name: text.encode() for name, text in code_files(config, classes).items()}
    files[CONFIG_NAME] = (json.dumps(written, indent=2, sort_keys=True) + "\n").encode()
    lora = LORA_FILES if config.includes_adapter else ()
    for pattern in (*WEIGHT_PATTERNS, *lora, GENERATION_CONFIG_NAME, *PROCESSOR_FILES):
        files.update({path.relative_to(directory).as_posix(): path for path in directory.glob(pattern)})
    own = name_in_results(config)
    for number, (dataset_id, task_id) in (benchmarks or {}).items():
        name = re.sub(r"[^\w-]+", "-", f"{dataset_id} {task_id}")  # nobody's name is a path here
        files[f".eval_results/{name}.yaml"] = eval_results_yaml(results[number], dataset_id, task_id, own).encode()

    metadata = card_metadata(config, found_licence, list(tags))
    if results or benchmark_results:
        index = model_index(repo_id, results, benchmark_results, own)
        metadata.update({"model-index": index, "model_name": repo_id.split("/")[-1]})
    card = full_card(metadata, policy_card(repo_id, written, results, latency, flops, stages, benchmark_results, own))
    readme = directory / "README.md"
    if existing_card is None and readme.is_file():
        existing_card = readme.read_text(encoding="utf-8")
    explicit = ("license",) if licence else ()
    files["README.md"] = update_card(existing_card, card, explicit=explicit).encode()
    return files


def name_in_results(config: TPRLConfig) -> str:
    """What `tprl evaluate` calls the pruner of a checkpoint."""
    return name_with_settings(config.pruner) if isinstance(config.pruner, dict) else "learned"


def write_card(
    directory: Path,
    model: TPRLForConditionalGeneration,
    name: str,
    *,
    stages: Sequence[Mapping[str, Any]] = (),
    tags: Sequence[str] = (),
    dataset_name: str | None = None,
) -> None:
    """
    Writes `README.md` of a model that is not published yet, or brings it up to date; text of its user stays.

    Args:
        directory (`Path`): Where the model is, or will be.
        model ([`TPRLForConditionalGeneration`]): Of which it is.
        name (`str`): Its title.
        stages, tags: See [`publish`].
        dataset_name (`str`, *optional*): The name on the Hub of what it was trained on.
    """
    metadata = card_metadata(model.config, {}, list(tags))
    if dataset_name is not None:
        metadata["datasets"] = [dataset_name]
    path = directory / "README.md"
    existing = path.read_text(encoding="utf-8") if path.is_file() else None
    own = name_in_results(model.config)
    card = full_card(metadata, policy_card(name, model.config.to_dict(), stages=stages, own=own))
    path.write_text(update_card(existing, card), encoding="utf-8")


def publish(
    directory: str | Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    **facts: Any,
) -> CommitInfo:
    """
    Pushes a checkpoint's directory in one commit.

    Args:
        directory (`str` or `Path`): A checkpoint that `save_pretrained` or a trainer wrote. It is left as it is, but a
            save that was cut off is finished.
        repo_id (`str`): `NAME` or `USER/NAME`; made when missing.
        token, private, revision, commit_message: As in `HfApi.create_repo` and `HfApi.create_commit`.
        facts: What the card says: `results` (a list of what `tprl evaluate` wrote), `benchmark_results` (a list of
            [`~huggingface_hub.EvalResult`], as `lmms_eval_results` reads them), `latency` and `flops` (what
            `tprl benchmark --json` and `tprl flops --json` printed), `stages` (what
            [`~tprl_hf.training.training_record.recorded_stages`] reads), `benchmarks`, `tags`, `licence` (by default
            that of the base model's card), `base_model`; see [`files_to_publish`].

    Returns:
        `CommitInfo`

    Raises:
        `OSError`: If it is not a checkpoint, or has no safetensors.
        `ValueError`: If others could not load it, or the Hub does not take its card.
    """
    api = HfApi(token=token)
    name = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
    there = api.repo_exists(name)
    # a branch that is made begins with the main one's card
    existing = card_on_hub(api, name, revision if branch_exists(api, name, revision) else None) if there else None
    files = files_to_publish(directory, name, api, existing_card=existing, **facts)
    card = files["README.md"]
    assert isinstance(card, bytes)
    check_card(api, card.decode())
    name = prepare_repo(api, name, private, revision)
    others = [path for path in api.list_repo_files(name, revision=revision) if path not in files]
    stale = [path for path in others if is_weights_of_a_checkpoint(path)]
    results = [path for path in others if fnmatch(path, RESULTS)]
    if results and has_other_weights(api, name, files, revision):  # they are not this policy's
        stale += results
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path_in_repo=path, path_or_fileobj=content) for path, content in sorted(files.items())
    ]
    operations += [CommitOperationDelete(path_in_repo=path) for path in stale]
    return api.create_commit(
        name, operations, commit_message=commit_message or "Upload TPRL checkpoint", revision=revision
    )


def is_weights_of_a_checkpoint(path: str) -> bool:
    """Whether a file of a repository has weights that `from_pretrained` would read. Those in other folders stay."""
    return path in LORA_FILES or ("/" not in path and any(fnmatch(path, pattern) for pattern in WEIGHT_PATTERNS))


def has_other_weights(api: HfApi, repo_id: str, files: Mapping[str, Path | bytes], revision: str | None) -> bool:
    """Whether a repository has other weights than those of `files`, or not all of them."""
    own = {path: content for path, content in files.items() if path.endswith(".safetensors")}
    there = {info.path: info for info in api.get_paths_info(repo_id, list(own), revision=revision)}
    for path, content in own.items():
        lfs = getattr(there.get(path), "lfs", None)
        with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
            if lfs is None or lfs.sha256 != hashlib.file_digest(file, "sha256").hexdigest():
                return True
    return False


def check_card(api: HfApi, card: str, repo_type: str = "model") -> None:
    """
    Asks the Hub whether it takes a card, before anything is made there.

    Raises:
        `ValueError`: If it does not; the message is the Hub's.
    """
    # not RepoCard.validate: in huggingface_hub 2.0 it asks huggingface.co, whatever HF_ENDPOINT says
    body = {"repoType": repo_type, "content": card}
    response = get_session().post(f"{api.endpoint}/api/validate-yaml", json=body, headers={"Accept": "text/plain"})
    if response.status_code == 400:
        raise ValueError(response.text)
    hf_raise_for_status(response)


def branch_exists(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Whether a repository has a branch; it always has `None`, the main one. A pull request is there already."""
    return (
        revision is None
        or revision.startswith("refs/pr")
        or any(branch.name == revision for branch in api.list_repo_refs(repo_id).branches)
    )


def push_demonstrations(
    dataset: Dataset | str | Path,
    repo_id: str,
    *,
    teacher: str = "not recorded",
    base_model: str | None = None,
    source: str | None = None,
    licence: str | None = None,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """
    Pushes demonstrations with a card.

    Args:
        dataset (`datasets.Dataset`, `str` or `Path`): What [`generate_demonstrations`] returned, or its directory;
            that of the stage `demonstrations` of `tprl train` says teacher, base model and source itself.
        repo_id (`str`): `NAME` or `USER/NAME`; made when missing.
        teacher, base_model, source (`str`, *optional*): Who demonstrated, for which model, on what.
        licence (`str`, *optional*): Of images, questions and answers; no default, as it is their source's.
        token, private, revision, commit_message: As in [`~datasets.Dataset.push_to_hub`].

    Raises:
        `ValueError`: If the dataset has no keep masks.
    """
    if not isinstance(dataset, Dataset):
        folder = Path(dataset)
        if (folder / "training.json").exists():
            again = f"delete {folder}, and make them again."
            done = read_json(folder / "training.json", {"teacher": str}, again)
            settings = read_json(folder / "settings.json", {"?base_model": (str, None), "?data": {}}, again)
            teacher, base_model = done["teacher"], base_model or settings.get("base_model")
            sections = training_data("demonstrations", settings)
            sections = sections if isinstance(sections, list) else [sections]
            source = source or ", ".join(section.get("source", "mosaic") for section in sections)
            folder = folder / "dataset"
        dataset = load_from_disk(str(folder))
    if "keep_masks" not in dataset.column_names:
        raise ValueError(f"The dataset has no column `keep_masks`, only {', '.join(dataset.column_names)}.")
    api = HfApi(token=token)
    name = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
    metadata: dict[str, Any] = {"task_categories": ["visual-question-answering"], "tags": list(TAGS)}
    if licence is not None:
        metadata["license"] = licence
    text = dataset_card(
        name, dataset["keep_masks"], dataset.column_names, teacher, without_paths(base_model), without_paths(source)
    )
    check_card(api, full_card(metadata, text), "dataset")  # before anything is made
    message = commit_message or "Upload demonstrations"
    dataset.push_to_hub(repo_id, token=token, private=private, revision=revision, commit_message=message)
    path = api.hf_hub_download(name, "README.md", repo_type="dataset", revision=revision)
    explicit = ("license",) if licence else ()
    card = update_card(Path(path).read_text(encoding="utf-8"), full_card(metadata, text), explicit=explicit)
    check_card(api, card, "dataset")
    return api.upload_file(
        repo_id=name,
        repo_type="dataset",
        path_in_repo="README.md",
        path_or_fileobj=card.encode(),
        revision=revision,
        commit_message="Update card",
    )
