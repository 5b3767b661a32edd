"""Model cards: Jinja templates, and the filling of them from the files that training and evaluation write."""

from .dataset_card import dataset_card
from .policy_card import eval_results_yaml, model_index, policy_card, without_paths
from .render import percent, render_card

__all__ = [
    "dataset_card",
    "eval_results_yaml",
    "model_index",
    "percent",
    "policy_card",
    "render_card",
    "without_paths",
]
