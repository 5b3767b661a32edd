"""Recipes of older versions, read as those of today. Imports no torch."""

from collections.abc import Mapping
from typing import Any

# What `ppo` was by default where `advantages: counterfactual` made it something else.
_OLD_DEFAULTS: dict[str, Any] = {
    "num_rollouts": 1,
    "rollout_keep_ratios": None,
    "shared_budget": 0.0,
    "score": "correct",
    "beta": 0.1,
    "num_flips": 16,
    "whiten_advantages": True,
    "weight_by_budget": False,
    "min_spread": 0.0,
    "num_ppo_epochs": 4,
    "num_mini_batches": 4,
    "cliprange": 0.2,
    "vf_coef": 0.5,
    "entropy_coef": 0.01,
    "kl_coef": 0.0,
    "learning_rate": 1e-5,
    "num_train_epochs": 200,
}
_NEW_NAMES = {
    "num_rollouts": "num_generations",
    "max_new_tokens": "max_completion_length",
}
_COUNTERFACTUAL_NAMES = {
    **_NEW_NAMES,
    "beta": "efficiency_coef",
    "whiten_advantages": "scale_advantages",
    "num_ppo_epochs": "num_iterations",
    "cliprange": "epsilon",
    "kl_coef": "beta",
}
# Settings that are gone, with the only value that today's code stands for.
_PPO_GONE = {
    "advantages": "gae",
    "rollout_keep_ratios": None,
    "shared_budget": 0,
    "weight_by_budget": False,
    "min_spread": 0,
    "kl_coef": 0,
    "efficiency_while_right": False,
    "target_keep_ratio": None,
}
_COUNTERFACTUAL_GONE = {
    "advantages": "counterfactual",
    "ratio": "token",
    "num_steps": 1,
    "alpha": 1,
    "vf_coef": 0,
    "entropy_coef": 0,
    "efficiency_while_right": False,
    "target_keep_ratio": None,
}
# Settings that had no effect on what the stage learned.
_PPO_UNREAD = ("num_flips", "price_step", "max_price")
_COUNTERFACTUAL_UNREAD = (
    *("lambda_disc", "gamma", "lam", "score_every_step", "cliprange_value", "critic_learning_rate"),
    *("price_step", "max_price"),
)


def renewed(recipe: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """
    A recipe of an older version as one of today.

    Returns:
        The recipe, and what was read otherwise, in words.

    Raises:
        `ValueError`: where a setting has no equivalent.
    """
    recipe = {name: dict(value) if isinstance(value, dict) else value for name, value in recipe.items()}
    changes = []
    if recipe.get("policy", {}).pop("lambda_disc", None) is not None:
        changes.append("policy.lambda_disc is read by nobody; rollouts have that of their stage.")
    section = recipe.get("ppo")
    if not section:
        return recipe, changes
    if section.get("advantages") == "counterfactual":
        if "counterfactual" in recipe:
            raise ValueError("ppo with advantages: counterfactual is the stage counterfactual, which is there too.")
        section = _without({**_OLD_DEFAULTS, **section}, _COUNTERFACTUAL_GONE, _COUNTERFACTUAL_UNREAD)
        section = {_COUNTERFACTUAL_NAMES.get(name, name): value for name, value in section.items()}
        recipe = {"counterfactual" if name == "ppo" else name: value for name, value in recipe.items()}
        recipe["counterfactual"] = section
        data = recipe.get("data", {})
        if "ppo" in data:
            data["counterfactual"] = data.pop("ppo")
        changes.append("ppo with advantages: counterfactual is now the stage counterfactual, with its own directory.")
    elif section.get("advantages") in ("leave_one_out", "group"):
        raise ValueError(f"ppo with advantages: {section['advantages']} is now the stage grpo, see scale_rewards.")
    else:
        new = _without(section, _PPO_GONE, _PPO_UNREAD)
        new = {_NEW_NAMES.get(name, name): value for name, value in new.items()}
        gone = sorted(section.keys() - new.keys())
        if gone:
            changes.append(f"ppo.{', ppo.'.join(gone)} left out or renamed, see docs/training.md.")
        recipe["ppo"] = new
    return recipe, changes


def _without(section: Mapping[str, Any], gone: Mapping[str, Any], unread: tuple[str, ...]) -> dict[str, Any]:
    """`section` without settings that are gone. Raises `ValueError` where one had another value than today's code."""
    for name, value in gone.items():
        if section.get(name, value) != value:
            raise ValueError(
                f"ppo.{name}={section[name]} is no longer possible: set it to {value}, or use the version it is of."
            )
    return {name: value for name, value in section.items() if name not in gone and name not in unread}
