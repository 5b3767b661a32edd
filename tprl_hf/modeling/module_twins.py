"""A second view of a module: its weights, but a way to compute attention of its own.

A call that needs another attention works on such a twin, so that threads that use the same model see nothing of it.
"""

import copy
from collections.abc import Iterable
from functools import partial
from types import MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


def copied_configs(config: PreTrainedConfig, attention: str) -> dict[int, PreTrainedConfig]:
    """Copies of a config and of those inside it that ask for the implementation `attention`, by the ids of theirs."""
    memo: dict[int, Any] = {}
    copy.deepcopy(config, memo)._attn_implementation = attention
    return {key: value for key, value in memo.items() if isinstance(value, PreTrainedConfig)}


def twin_of(module: nn.Module, configs: dict[int, PreTrainedConfig], shared: Iterable[nn.Module | None] = ()) -> Any:
    """
    Args:
        module (`nn.Module`): stays as it is.
        configs (`dict[int, PreTrainedConfig]`): what stands in the place of a config, by its `id`.
        shared (`Iterable[nn.Module]`, *optional*): parts that do not run, and are taken as they are.

    Returns:
        `nn.Module`: A copy of the module and of all in it that shares its tensors and has its hooks. What is set on
        it, and hooks added to it, are its own. A compiled module's is not compiled.
    """
    return _twin(module, configs, {id(part): part for part in shared if part is not None and part is not module})


def _twin(module: nn.Module, configs: dict[int, PreTrainedConfig], made: dict[int, nn.Module]) -> nn.Module:
    module = module._modules.get("_orig_mod") or module  # what `torch.compile(module)` has wrapped
    if id(module) in made:
        return made[id(module)]
    # neither the module's own way to copy itself nor that of its class: some of these copy weights
    twin = made[id(module)] = object.__new__(type(module))
    own = twin.__dict__
    for name, value in vars(module).items():
        if isinstance(value, dict):
            own[name] = value.copy()
        elif id(value) in configs:
            own[name] = configs[id(value)]
        else:
            own[name] = _rebound(value, module, twin) if callable(value) else value
    own.pop("_compiled_call_impl", None)
    for name, child in module._modules.items():
        if child is not None:
            own["_modules"][name] = _twin(child, configs, made)
    return twin


def _rebound(value: Any, module: nn.Module, twin: nn.Module) -> Any:
    """A method that was put on the module itself, as accelerate's hooks do with `forward`, as one of the twin."""
    value = getattr(value, "_torchdynamo_orig_callable", value)
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(value.__func__, twin)
    if isinstance(value, partial) and value.args and value.args[0] is module:
        return partial(value.func, twin, *value.args[1:], **value.keywords)
    return value
