"""`python -m tprl_hf.model_cards mosaic_llava card.md training.json mosaic.json easy_vqa.json`."""

import argparse
import json
from pathlib import Path

from .render import render_card


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
