"""Fill a card's template.

Every number of a card comes from the JSON files given, so that the card can be made again, and a test can compare.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"


def percent(share: float) -> str:
    """A share in [0, 1] as percent with one decimal: `0.9375` to `"93.8"`."""
    return f"{100 * share:.1f}"


def render_card(template: str, **values: Any) -> str:
    """
    Fill a template of this folder.

    Args:
        template (`str`): Its name without `.md.jinja`.
        values: What the template names; a missing one is an error, not an empty place.

    Returns:
        `str`: The card in Markdown, with its YAML header.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True
    )
    environment.filters["percent"] = percent
    return environment.get_template(f"{template}.md.jinja").render(**values)
