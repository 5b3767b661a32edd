"""Pruners by the names that users write. The functions import torch, this module does not."""

import inspect
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
    from tprl_hf.modeling.token_pruner import TokenPruner


def own_pruner(model: "TPRLForConditionalGeneration") -> str | None:
    """The name of the pruner that the checkpoint comes with: "learned" where its policy is trained, or `None`."""
    config = model.config
    if isinstance(config.pruner, dict):
        return config.pruner["name"]
    return None if config.policy_training is None else "learned"


def own_pruner_with_settings(model: "TPRLForConditionalGeneration") -> str | None:
    """[`own_pruner`] as [`make_pruner`] reads it, with the settings that the checkpoint has: "fastv:layer=3"."""
    from tprl_hf.modeling.pruner_choice import name_with_settings

    pruner = model.config.pruner
    return name_with_settings(pruner) if isinstance(pruner, dict) else own_pruner(model)


def has_budget(model: "TPRLForConditionalGeneration") -> bool:
    """Whether the checkpoint says how much it keeps."""
    config, own = model.config, model.pruner.budget
    return own is not None or (config.keep_ratio, config.num_keep, config.threshold) != (None, None, None)


def make_pruner(model: "TPRLForConditionalGeneration", name: str, seed: int = 0) -> "TokenPruner | None":
    """
    Args:
        model ([`TPRLForConditionalGeneration`]):
            The model.
        name (`str`):
            A pruner's name: "learned", or one of [`~tprl_hf.pruners.PRUNERS`], which settings may follow:
            "fastv:layer=3", "learned:num_steps=3".
        seed (`int`, *optional*, defaults to 0):
            Seed of the random pruner.

    Returns:
        [`TokenPruner`]: The pruner with these settings and without a budget. `None` where the model needs none
        set: for "none", and for "learned" where its policy chooses anyway.

    Raises:
        `ValueError`: For an unknown name or setting, and for "learned" where the policy is not trained.
    """
    from tprl_hf.modeling.checkpoint_checks import refuse_untrained

    from . import PRUNERS

    if name == "none":
        return None
    name, settings = split_settings(name)
    if name == "learned":
        refuse_untrained(model.config)
        return learned_with(model, settings)
    if name not in PRUNERS:
        raise ValueError(f"There is no pruner {name!r}; choose from learned, {', '.join(PRUNERS)}.")
    refuse_unknown_settings(name, settings)
    return PRUNERS[name](**({"seed": seed} if name == "random" else {}) | settings)


def learned_with(model: "TPRLForConditionalGeneration", settings: dict[str, Any]) -> "TokenPruner | None":
    """The policy, in so many steps as the settings say; `None` where it chooses so anyway."""
    from tprl_hf.modeling.configuration_tprl import CHECKS

    if unknown := sorted(settings.keys() - {"num_steps"}):
        raise ValueError(f"learned has no setting {unknown[0]!r}; it has num_steps.")
    if not settings and model.config.pruner is None:
        return None
    pruner = model.learned_pruner()
    pruner.num_steps = CHECKS["num_steps"]("num_steps", settings.get("num_steps", pruner.num_steps))
    return pruner


def split_settings(text: str) -> tuple[str, dict[str, Any]]:
    """
    A pruner's name and its settings.

    Example:

    ```python
    >>> split_settings("query-similarity:reduce=max"), split_settings("fastv:layer=3")
    (('query-similarity', {'reduce': 'max'}), ('fastv', {'layer': 3}))
    ```

    Raises:
        `ValueError`: Where a setting has no value.
    """
    name, *parts = text.split(":")
    settings = {}
    for part in parts:
        setting, equals, value = part.partition("=")
        if not (setting and equals and value):
            raise ValueError(f"{text!r}: settings are written as in fastv:layer=3; got {part!r}.")
        try:
            settings[setting] = json.loads(value)
        except json.JSONDecodeError:
            settings[setting] = value
    return name, settings


def refuse_unknown_settings(name: str, settings: dict[str, Any]) -> None:
    """Raises `ValueError` for settings that a pruner does not have; a budget is not one of them."""
    from tprl_hf.modeling.token_pruner import TokenPruner

    from . import PRUNERS

    budget, kept = inspect.signature(TokenPruner.__init__).parameters, PRUNERS[name].not_settings
    parameters = inspect.signature(PRUNERS[name].__init__).parameters
    known = [one for one in parameters if one not in (*budget, *kept, "budget", "seed")]
    for setting in settings:
        if setting not in known:
            raise ValueError(f"{name} has no setting {setting!r}; it has {', '.join(known) or 'none'}.")
