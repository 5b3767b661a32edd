"""What goes to the Hub besides weights and config: the code of this folder, and a card."""

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from transformers.utils import CONFIG_NAME

from .configuration_tprl import TPRLConfig
from .processing_tprl import TPRLProcessor  # noqa: F401  so that remote code brings all of this folder along

AUTO_MAP = {
    "AutoConfig": "configuration_tprl.TPRLConfig",
    "AutoModel": "modeling_tprl.TPRLForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_tprl.TPRLForConditionalGeneration",
    "AutoProcessor": "processing_tprl.TPRLProcessor",
}
TAGS = ("tprl", "visual-token-pruning")
# What lies between these is ours; a card's other text is the user's.
BEGIN, END = "<!-- tprl_hf: written anew at each push, up to the closing mark -->", "<!-- /tprl_hf -->"
WEIGHT_PATTERNS = ("model*.safetensors", "model*.safetensors.index.json")

SHORT_CARD = """\
# {title}

It prunes the visual tokens of a vision-language model before its LLM, with
[tprl_hf](https://arxiv.org/abs/2603.13394).

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{repo_id}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{repo_id}", trust_remote_code=True)
```

With `import tprl_hf` before, `trust_remote_code` is not needed.
"""


def code_files(config: TPRLConfig, pruner_classes: Mapping[str, type]) -> dict[str, str]:
    """Names and texts of the files that a checkpoint needs where `tprl_hf` is not installed, its pruner's among them.

    Raises:
        `ValueError`: when the pruner's code needs files that do not travel.
    """
    paths = sorted(path for path in Path(__file__).parent.glob("*.py") if path.name != "__init__.py")
    texts = {path.name: path.read_text(encoding="utf-8") for path in paths}
    if isinstance(config.pruner, dict):
        name = config.pruner["name"]
        pruner_class = pruner_classes[name]
        texts |= pruner_files(pruner_class)
        module = Path(inspect.getfile(pruner_class)).stem
        texts["pruner_classes.py"] = (
            f"from .{module} import {pruner_class.__name__}\n\n"
            f"PRUNER_CLASSES = {{{json.dumps(name)}: {pruner_class.__name__}}}\n"
        )
    return texts


def pruner_files(pruner_class: type) -> dict[str, str]:
    """Names and texts of the files that define a pruner, for a folder in which all code lies flat."""
    texts: dict[str, str] = {}
    missing = [Path(inspect.getfile(pruner_class))]
    while missing:
        path = missing.pop()
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"^from tprl_hf\.modeling\.(\w+) import", r"from .\1 import", text, flags=re.M)
        if re.search(r"^\s*(from|import) tprl_hf", text, re.M):
            raise ValueError(
                f"{path.name} imports more of tprl_hf than single modules of its modeling, so the pruner "
                f"{pruner_class.__name__} cannot travel with a checkpoint: change its imports, or save without code."
            )
        texts[path.name] = text
        siblings = [path.with_name(f"{name}.py") for name in re.findall(r"^from \.(\w+) import", text, re.M)]
        missing += [one for one in siblings if one.is_file() and one.name not in texts]
    return texts


def set_code(directory: Path, code: Mapping[str, str]) -> None:
    """Puts code beside a saved config and names it there, or names none where it is empty.

    Takes local paths out of the base model's config.
    """
    path = directory / CONFIG_NAME
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    config["base_config"].pop("_name_or_path", None)  # it may be a path, and `base_model_name_or_path` says it
    for stale in directory.glob("*.py"):
        stale.unlink()
    if code:
        config["auto_map"] = AUTO_MAP
        for name, text in code.items():
            (directory / name).write_text(text, encoding="utf-8")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def is_hub_name(name: str | None) -> bool:
    """Whether `name` can only be that of a model on the Hub."""
    if name is None or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def pinned_revision(api: HfApi, config: TPRLConfig) -> str | None:
    """
    The commit of a policy's base model: that of the config, or else the one that its name stands for now.

    Raises:
        `ValueError`: when others could not find the base model.
    """
    name = config.base_model_name_or_path
    if name is None or not is_hub_name(name):
        raise ValueError(
            f"The policy's base model is {name!r}, which others cannot load: set model.config.base_model_name_or_path "
            "to its name on the Hub (tprl push --base-model NAME), or push its weights too, with save_base_model=True "
            "(tprl push --merged)."
        )
    return config.base_model_revision or api.model_info(name).sha


def base_licence(api: HfApi, config: TPRLConfig) -> dict[str, str]:
    """`license` (and `license_name`, `license_link`) as the base model's own card says; empty when it does not."""
    name = config.base_model_name_or_path
    if name is None:
        return {}
    try:
        if Path(name).is_dir():
            text = (Path(name) / "README.md").read_text(encoding="utf-8")
        else:
            path = api.hf_hub_download(name, "README.md", revision=config.base_model_revision)
            text = Path(path).read_text(encoding="utf-8")
    except (OSError, HfHubHTTPError, EntryNotFoundError, OfflineModeIsEnabled):
        return {}
    data = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    return {key: data[key] for key in ("license", "license_name", "license_link") if data.get(key)}


def card_metadata(config: TPRLConfig, licence: dict[str, str], tags: list[str] | None = None) -> dict[str, Any]:
    """The header of a checkpoint's card, but for results."""
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        **licence,
        "tags": list(dict.fromkeys([*TAGS, *(tags or ())])),
    }
    if is_hub_name(config.base_model_name_or_path):
        metadata["base_model"] = config.base_model_name_or_path
        # A merged checkpoint runs alone; one of the policy sits on its base model as an adapter does.
        metadata["base_model_relation"] = "finetune" if config.includes_base_model else "adapter"
    return metadata


def full_card(metadata: dict[str, Any], body: str | None = None, repo_id: str = "") -> str:
    """A card with its header and our marks around its text; without one, it says how to load `repo_id`."""
    header = ModelCardData(**metadata).to_yaml()
    body = SHORT_CARD.format(title=repo_id.split("/")[-1], repo_id=repo_id) if body is None else body
    return f"---\n{header}\n---\n\n{BEGIN}\n{body.strip()}\n{END}\n"


def update_card(existing: str | None, new: str, replace: bool = True, explicit: tuple[str, ...] = ()) -> str:
    """
    A card that is there already, brought up to date.

    Args:
        existing (`str`, *optional*): the card that is there.
        new (`str`): the card as it would be written from nothing; its text lies between our marks.
        replace (`bool`, defaults to `True`): whether our text in `existing` gives way to that of `new`, or is added.
        explicit (`tuple[str]`, *optional*): metadata that the user asked for now, and which replaces earlier one.

    Returns:
        `str`: the user's text and metadata as they were, tags of both, and what `new` says besides.
    """
    if existing is None or not existing.strip():
        return new
    old_card, new_card = ModelCard(existing, ignore_metadata_errors=True), ModelCard(new)
    old, ours = old_card.data.to_dict(), new_card.data.to_dict()
    merged = {**ours, **{key: value for key, value in old.items() if value is not None}}
    if "tags" in ours or "tags" in old:
        merged["tags"] = list(dict.fromkeys([*(old.get("tags") or ()), *ours.get("tags", ())]))
    if "license" in explicit:  # the name and the link were those of the earlier one
        merged = {key: value for key, value in merged.items() if key not in ("license_name", "license_link")}
    for name in ("model-index", "base_model", "base_model_relation", *explicit):  # of what is pushed now
        if name in ours:
            merged[name] = ours[name]
    block = new_card.text[new_card.text.index(BEGIN) : new_card.text.index(END) + len(END)]
    text = old_card.text
    start, end = text.find(BEGIN), text.find(END)
    if replace and (start < 0 or end < start):
        text = f"{text.rstrip()}\n\n{block}\n"
    elif replace:
        text = text[:start] + block + text[end + len(END) :]
        if "model-index" not in ours:  # these numbers went with the text that is replaced
            merged.pop("model-index", None)
    header = ModelCardData(**merged, ignore_metadata_errors=True).to_yaml()
    return f"---\n{header}\n---\n{text if text.startswith(chr(10)) else chr(10) + text}"


def card_on_hub(api: HfApi, repo_id: str, revision: str | None = None) -> str | None:
    """The text of the card that a repository has."""
    try:
        path = api.hf_hub_download(repo_id, "README.md", revision=revision)
    except EntryNotFoundError:
        return None
    return Path(path).read_text(encoding="utf-8")


def prepare_repo(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> str:
    """Makes repository and branch where they are missing. Returns the full name."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id
