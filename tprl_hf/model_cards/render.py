"""Fill a card's template.

Every number of a card comes from the JSON files given, so that the card can be made again, and a test can compare.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"


def percent(share: float) -> str:
    """A share in [0, 1] as percent with one decimal: `0.9375` to `"93.8"`."""
    return f"{100 * share:.1f}"


def points(share: float) -> str:
    """A difference of shares in percentage points: `-0.0125` to `"-1.2"`."""
    return f"{100 * share:+.1f}"


def plain_text(value: Any) -> str:
    """
    Someone's words as one line of Markdown that shows them as they are: no markup, link, HTML or end of a table cell.

    Example:

    ```python
    >>> plain_text("<b>a|b</b>")
    '&lt;b&gt;a&#124;b&lt;/b&gt;'
    ```
    """
    words = " ".join(one_line(value).split())
    words = words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "&#124;")
    return re.sub(r"([\\`*_\[\]~!])", r"\\\1", words)


def inline_code(value: Any) -> str:
    """The same as inline code, in which nothing is markup but backticks and, in tables, bars."""
    words = " ".join(one_line(value).split()).replace("`", "'").replace("|", "\\|").replace("<!--", "< !--")
    return f"`{words}`" if words else ""


def one_line(value: Any) -> str:
    """Strings as they are; lists and dicts as `a=1, b=[2, 3]`."""
    if isinstance(value, dict):
        return ", ".join(f"{name}={json.dumps(one, ensure_ascii=False)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)


def render_card(template: str, **values: Any) -> str:
    """
    Fill a template of this folder.

    Args:
        template (`str`): Its name without `.md.jinja`.
        values: What the template names; a missing one is an error, not an empty place.

    Returns:
        `str`: The card in Markdown, with its YAML header.
    """
    environment = Environment(  # Markdown; `text` and `code` escape  # nosec B701
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True
    )
    environment.filters.update(percent=percent, points=points, text=plain_text, code=inline_code)
    return environment.get_template(f"{template}.md.jinja").render(**values)
