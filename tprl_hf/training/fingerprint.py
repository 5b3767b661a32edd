"""Which weights a result was made with."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tprl_hf.modeling.checkpoint_checks import cached, check_weight_files
from tprl_hf.modeling.configuration_tprl import TPRLConfig
from tprl_hf.modeling.peft_adapter import FOLDER, WEIGHTS, without_adapter
from tprl_hf.modeling.policy_weights import policy_in_files, policy_state

if TYPE_CHECKING:
    from tprl_hf import TPRLForConditionalGeneration


def fingerprint(model: nn.Module) -> str:
    """A digest of some entries of every weight: another model, or the same one trained on, has another."""
    return digest_of_weights(model.state_dict())


def fingerprint_of_lvlm(model: "TPRLForConditionalGeneration") -> str:
    """That of the LVLM in a model, as it was before it got a LoRA."""
    return digest_of_weights(without_adapter(model.lvlm.state_dict()))


def policy_of_model(model: "TPRLForConditionalGeneration") -> str | None:
    """That of policy and autoencoder alone; `None` where they are not trained, and drawn anew each time."""
    return None if model.config.policy_training is None else _digest_of_policy(model.state_dict())


def policy_in_checkpoint(directory: Path) -> str | None:
    """
    [`policy_of_model`] of the model in a directory, whose base model is not needed.

    Raises:
        `OSError`: where there are no weights in safetensors.
        `ValueError`: where they are damaged.
    """
    if TPRLConfig.from_pretrained(directory).policy_training is None:
        return None
    try:
        return _digest_of_policy(policy_in_files(str(directory), check_weight_files(str(directory), {}), {}))
    except SafetensorError as error:
        raise ValueError(f"The weights in {directory} are damaged ({error}): save the checkpoint again.") from error


def lora_in_checkpoint(source: str) -> str | None:
    """A digest of the LoRA of a checkpoint, a directory or a name on the Hub; `None` where it has none."""
    path = cached(source, f"{FOLDER}/{WEIGHTS}", {})
    if path is None:
        return None
    weights = load_file(path)
    return digest_of_weights({name: weights[name] for name in sorted(weights)})


def _digest_of_policy(weights: Mapping[str, Tensor]) -> str:
    """In float32, as the policy computes in every model, and sorted by name, as files are."""
    own = policy_state(dict(weights))
    return digest_of_weights({name: own[name].float() for name in sorted(own)})


def digest_of_weights(weights: Mapping[str, Tensor]) -> str:
    """Of some entries of each, by name."""
    digest = hashlib.sha256()
    for name, weight in weights.items():
        flat = weight.detach().flatten()
        some = flat[:: max(1, flat.numel() // 256)].to("cpu", torch.float64)
        digest.update(f"{name} {tuple(weight.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def config_digest(model: "TPRLForConditionalGeneration") -> str:
    """A digest of how the LVLM computes: what its config says, and its dtype."""
    said = json.dumps(_told(model.lvlm.config.to_dict()), sort_keys=True, default=str)
    return hashlib.sha256(f"{model.lvlm.dtype} {said}".encode()).hexdigest()[:16]


def _told(value: Any) -> Any:
    """A config without what depends on where it was loaded from, and by which version."""
    if not isinstance(value, Mapping):
        return value
    aside = {"transformers_version", "architectures", "dtype"}
    told = {str(name): _told(one) for name, one in value.items()}
    return {name: one for name, one in told.items() if name not in aside and not name.startswith("_")}


def processor_digest(processor: Any) -> str:
    """A digest of how a processor puts pictures and words before the model, wherever it was loaded from."""
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    said = repr((processor.to_json_string(), processor.chat_template, words))
    return hashlib.sha256(said.encode()).hexdigest()[:16]
