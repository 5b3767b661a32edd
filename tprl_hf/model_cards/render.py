"""Fill a card's template: `python -m tprl_hf.model_cards.render mosaic_llava card.md training.json results.json …`.

Every number of a card comes from the JSON files given, so that the card can be made again, and a test can compare.
"""

from __future__ import annotations

import argparse
import json
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("template")
    parser.add_argument("card", type=Path)
    parser.add_argument("values", nargs="+", type=Path, help="JSON files; each becomes a value named as the file is")
    arguments = parser.parse_args()
    values = {path.stem.replace("-", "_"): json.loads(path.read_text(encoding="utf-8")) for path in arguments.values}
    arguments.card.write_text(render_card(arguments.template, **values), encoding="utf-8")


if __name__ == "__main__":
    main()
