"""The LoRA of a tuned checkpoint, added to the base model's weights while vLLM reads them."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import cached_file

from tprl_hf.modeling.checkpoint_tprl import BASE_PREFIX
from tprl_hf.modeling.peft_adapter import FOLDER, WEIGHTS

# What a LoRA may have besides two matrices a layer: names of PEFT's config, and the values that mean "not used".
PLAIN: dict[str, Any] = {"bias": "none", "fan_in_fan_out": False, "use_dora": False, "alpha_pattern": {}}


def read_adapter(source: str, revision: str | None) -> dict[str, tuple[Tensor, Tensor]]:
    """
    The LoRA of the checkpoint `source`: float32 `[out, r]` and `[r, in]`, whose product is what it adds, by the
    weight's name in the base model, as transformers calls it.

    Raises:
        `ValueError`: for a LoRA that is more than two matrices a layer.
    """
    files = [cached_file(source, f"{FOLDER}/{name}", revision=revision) for name in ("adapter_config.json", WEIGHTS)]
    with open(files[0], encoding="utf-8") as file:
        config = json.load(file)
    state = load_file(files[1])
    used = {name: config[name] for name, plain in PLAIN.items() if (config.get(name) or plain) != plain}
    strange = sorted(name for name in state if not name.endswith((".lora_A.weight", ".lora_B.weight")))
    if used or strange:
        raise ValueError(
            f"The LoRA in {source}/{FOLDER} has {used or strange[0]}; inside vLLM it may have lora_A and lora_B of "
            "linear layers only. Ask `tprl serve`, or train it with the defaults of peft.LoraConfig."
        )
    added = {}
    for name, down in state.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            scale = config["lora_alpha"] / (math.sqrt(len(down)) if config.get("use_rslora") else len(down))
            weight = layer.removeprefix("base_model.model.").removeprefix(BASE_PREFIX) + ".weight"
            added[weight] = scale * state[f"{layer}.lora_B.weight"].float(), down.float()
    return added


def with_adapter(
    weights: Iterable[tuple[str, Tensor]],
    added: dict[str, tuple[Tensor, Tensor]],
    name_in_vllm: Callable[[str], str],
    source: str,
) -> Iterator[tuple[str, Tensor]]:
    """
    The base model's weights with what its LoRA adds.

    Args:
        weights: names and values, as they lie in files.
        added: as [`read_adapter`] returns it.
        name_in_vllm: from either name of a weight to vLLM's; files can have older names than transformers.
        source (`str`): of the LoRA, for the message.

    Raises:
        `ValueError`: at the end, when a part of the LoRA had no weight to be added to.
    """
    left = {name_in_vllm(name): value for name, value in added.items()}
    for name, value in weights:
        own = left.pop(name_in_vllm(name), None)
        if own is not None:  # one product at a time: together they are as large as the model
            up, down = (matrix.to(value.device) for matrix in own)
            value = (value.float() + up @ down).to(value.dtype)
        yield name, value
    if left:
        raise ValueError(
            f"{len(left)} weights of the LoRA in {source}/{FOLDER} have no place in the base model (as {min(left)}): "
            "copy the checkpoint again."
        )
