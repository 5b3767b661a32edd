"""One style for all pictures, plots and pages: colours that colour-blind readers tell apart, and the CSS of pages.

The colours are those of Okabe and Ito, which differ for every common kind of colour blindness; without their yellow,
which is too pale for lines on white. Dashes and markers tell apart what shares a colour. Imports no torch.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK = "#E69F00", "#56B4E9", "#000000"
# In the order in which series of a plot take them.
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)

INK, GREY, RIM = "#1f2933", "#5c6874", "#c4ccd4"
# Green and vermillion, dark enough for small letters on white; ✓ and ✗ say the same without colour.
CORRECT, WRONG = "#00734f", "#b04700"
BOX = ORANGE  # around what a question is about
PAPER = (255, 255, 255)
DIMMING = 0.84  # how far a pruned patch is faded towards paper
HATCH, HATCH_STEP = "#c9d1d9", 7  # lines over pruned patches, which tell them from kept ones of a pale picture
PANEL_WIDTH = 176  # of a picture of a page drawn at scale 1


def colour_of(name: str, others: Sequence[str]) -> int:
    """
    The place in [`PALETTE`] of the series `name` among `others`. The learned policy is always black.

    Example:

    ```python
    >>> names = ["random", "learned", "uniform"]
    >>> [PALETTE[colour_of(name, names)] == colour for name, colour in zip(names, (BLUE, BLACK, VERMILLION))]
    [True, True, True]
    ```
    """
    if name == "learned":
        return PALETTE.index(BLACK)
    free = [place for place, colour in enumerate(PALETTE) if colour != BLACK]
    return free[[one for one in others if one != "learned"].index(name) % len(free)]


def repeats_colour(name: str, others: Sequence[str]) -> bool:
    """
    Whether a series before `name` in `others` has its colour, so that it needs a dash.

    Example:

    ```python
    >>> names = ["learned", *"abcdefg"]
    >>> [name for name in names if repeats_colour(name, names)]
    ['g']
    ```
    """
    before = others[: list(others).index(name)]
    return colour_of(name, others) in [colour_of(one, others) for one in before]


_COLOURS = "".join(f" --c{number}: {colour};" for number, colour in enumerate(PALETTE))
_DARK_COLOURS = _COLOURS.replace(BLACK, "#f1f3f5").replace(BLUE, "#2f95d0")
# The first block has a variable for each colour, the second gives each another value on dark screens.
CSS = f"""
:root {{ color-scheme: light dark; --ink: {INK}; --grey: {GREY}; --page: #f4f6f8; --card: #fff; --rim: #dfe4e8;
  --correct: {CORRECT}; --wrong: {WRONG}; --veil: rgba(226, 232, 238, {DIMMING}); --hatch: #9aa6b2;
  --grid: #e4e9ed; --bar: #cfe3f1;{_COLOURS} }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6e9ec; --grey: #a3adb7; --page: #14181c; --card: #1e2429;
  --rim: #353d45; --correct: #4fd0a4; --wrong: #ff9a5c; --veil: rgba(24, 29, 33, {DIMMING}); --hatch: #5b6671;
  --grid: #2e363d; --bar: #24506e;{_DARK_COLOURS} }} }}
body {{ font: 15px/1.4 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem; }}
h1 {{ font-size: 1.4rem; margin: 0 0 .4rem; }} h2 {{ font-size: 1.05rem; margin: 0 0 .7rem; }}
h3 {{ font-size: .95rem; margin: 1.2rem 0 .5rem; }}
.note {{ color: var(--grey); margin: .1rem 0; overflow-wrap: anywhere; }}
section {{ background: var(--card); border: 1px solid var(--rim); border-radius: 8px; padding: 1rem 1.2rem;
  margin: 1rem 0; }}
.panels {{ display: grid; grid-template-columns: repeat(auto-fill, {PANEL_WIDTH}px); gap: 1rem; }}
figure {{ margin: 0; min-width: 0; }}
figcaption {{ color: var(--grey); overflow-wrap: anywhere; }}
figcaption b {{ display: block; margin-top: .3rem; color: var(--ink); }}
.correct {{ color: var(--correct); }} .wrong {{ color: var(--wrong); }}
.correct::before {{ content: "✓ "; }} .wrong::before {{ content: "✗ "; }}
.picture {{ position: relative; background-size: 100% 100%; display: grid; outline: 1px solid var(--rim); }}
.box {{ position: absolute; border: 2px solid {BOX}; border-radius: 4px; box-sizing: border-box; }}
.box {{ pointer-events: none; }}
.pruned {{ background: repeating-linear-gradient(135deg, var(--hatch) 0 1px, transparent 1px 5px), var(--veil); }}
.patch:hover {{ outline: 2px solid {BOX}; z-index: 1; }}
.patch:hover::after {{ content: attr(data-tip); position: absolute; left: 0; top: 100%; z-index: 2;
  padding: .2rem .5rem; background: var(--ink); color: var(--card); border-radius: 4px; font-size: 12px;
  max-width: 100%; box-sizing: border-box; pointer-events: none; }}
@media (max-width: 30rem) {{ body {{ margin: .6rem; }} section {{ padding: .8rem; }}
  .panels {{ grid-template-columns: 1fr 1fr; gap: .7rem; }} }}
"""


def html_page(title: str, notes: Sequence[str], body: str, css: str = "", refresh: int | None = None) -> str:
    """
    A whole HTML page that loads nothing from elsewhere.

    Args:
        title (`str`): Of the page.
        notes (`Sequence[str]`): Lines under the title.
        body (`str`): HTML; title and notes are escaped, this is not.
        css (`str`, *optional*): More rules behind those of all pages.
        refresh (`int`, *optional*): The browser loads the page again after so many seconds.
    """
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    head += f"<title>{html.escape(title)}</title><style>{CSS}{css}</style>"
    lines = "".join(f'<p class="note">{html.escape(note)}</p>\n' for note in notes)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n<h1>{html.escape(title)}</h1>\n{lines}{body}\n'
        "</body></html>\n"
    )


def name_of_type(question_type: str, by_type: Mapping[str, Any]) -> str:
    """Its name in tables: questions without a type, where others have one, are not all."""
    return "untyped" if question_type == "all" and len(by_type) > 1 else question_type
