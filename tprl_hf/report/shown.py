"""Questions that pages show with their pictures and keep masks: how files have them, and how pages do."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from tprl_hf.style import PANEL_WIDTH

if TYPE_CHECKING:
    from PIL import Image

    from tprl_hf.modeling import TokenLayout

SIDE = 144  # width of a picture in units of its veil
SHOWN_CSS = f"""
.shown {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(45%, 9rem), 1fr)); gap: .8rem; }}
.large .shown {{ grid-template-columns: repeat(auto-fill, minmax(min(45%, 9.5rem), {PANEL_WIDTH}px)); }}
.shown figcaption {{ font-size: .8rem; }}
.grids {{ display: flex; flex-wrap: wrap; gap: 3px; }}
.grids .picture {{ flex: 1 1 30%; max-width: 100%; image-rendering: auto; }}
.picture svg {{ position: absolute; inset: 0; width: 100%; height: 100%; }}
.mask {{ fill: var(--veil); }} .hatched {{ fill: url(#hatch); }}
#hatch path {{ stroke: var(--hatch); stroke-width: 1; }}
details {{ margin: .6rem 0; }} summary {{ cursor: pointer; font-weight: 600; }}
.question {{ margin: 1.1rem 0 .4rem; overflow-wrap: anywhere; }} .question span {{ color: var(--grey); }}
"""
# Lines over pruned patches; it stands once in a page, and takes no room.
HATCH_SVG = (
    '<svg width="0" height="0" style="position: absolute"><pattern id="hatch" width="8" height="8" '
    'patternUnits="userSpaceOnUse"><path d="M-2 10L10 -2M-2 2L2 -2M6 10L10 6"/></pattern></svg>'
)

MOST_CELLS = 1_000_000  # of a grid; a file that names more is damaged
SAMPLE_SHAPE = {
    **dict.fromkeys(("question", "question_type"), str),
    "reference": (str, None),
    "num_visual": int,
    "grids": [
        {"picture": str, "height": int, "width": int, "tokens": [int], "rows": [int], "columns": [int]},
    ],
}


def fits(sample: Mapping[str, Any]) -> bool:
    """Whether each token of each grid of a sample in a file has its place."""
    grids = sample["grids"]
    for grid in grids:
        if not len(grid["tokens"]) == len(grid["rows"]) == len(grid["columns"]):
            return False
        bounds = (("tokens", sample["num_visual"]), ("rows", grid["height"]), ("columns", grid["width"]))
        if not all(0 <= number < bound for name, bound in bounds for number in grid[name]):
            return False
    return all(0 < grid["height"] * grid["width"] <= MOST_CELLS and grid["width"] > 0 for grid in grids)


@dataclass(frozen=True)
class ShownGrid:
    """
    A grid of visual tokens over the picture that the vision tower saw there.

    Args:
        picture (`str`): A `data:` address.
        height, width (`int`): Of the grid, in tokens.
        tokens (`list[int]`): Which of the sample's N tokens lie in it.
        rows, columns (`list[int]`): Where each of them lies.
    """

    picture: str
    height: int
    width: int
    tokens: list[int]
    rows: list[int]
    columns: list[int]


@dataclass(frozen=True)
class ShownSample:
    """
    A question and its pictures.

    Args:
        question (`str`), reference (`str`, *optional*), question_type (`str`): Of the dataset.
        num_visual (`int`): Visual tokens, separators included.
        grids (`list[ShownGrid]`): Of one image that stays whole one; of tiles and crops as many as there are.
    """

    question: str
    reference: str | None
    question_type: str
    num_visual: int
    grids: list[ShownGrid]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "ShownSample":
        return cls(**{**found, "grids": [ShownGrid(**grid) for grid in found["grids"]]})


def grids_of(pictures: "Sequence[Image.Image]", layout: "TokenLayout") -> list[ShownGrid]:
    """
    The grids of one sample.

    Args:
        pictures (`Sequence[PIL.Image.Image]`): What the tower saw, see [`~tprl_hf.visualization.seen_pictures`].
        layout ([`TokenLayout`]): Where all N tokens of the sample lie.
    """
    import torch

    from tprl_hf.visualization import Panel, figures_by_block

    numbers = torch.arange(len(layout.row))
    found = []
    for figure in figures_by_block(pictures, layout, [Panel("", scores=numbers)]):
        rows, columns = torch.as_tensor(figure.rows), torch.as_tensor(figure.columns)
        tokens = torch.as_tensor(figure.panels[0].scores)
        found.append(
            ShownGrid(
                as_address(figure.image),
                int(rows.max()) + 1,
                int(columns.max()) + 1,
                *(part.tolist() for part in (tokens, rows, columns)),
            )
        )
    return found


def shown_sample(
    question: str,
    reference: str | None,
    question_type: str,
    images: "Sequence[Image.Image]",
    processor: Any,
    inputs: Any,
    layout: "TokenLayout",
) -> ShownSample:
    """
    A sample as pages show it.

    Args:
        question (`str`), reference (`str`, *optional*), question_type (`str`): See [`ShownSample`].
        images (`Sequence[PIL.Image.Image]`): As they were given.
        processor ([`ProcessorMixin`]), inputs (`Mapping`): What made the pixels of these images, and what it made.
        layout ([`TokenLayout`]): Where all N tokens of the sample lie.
    """
    from tprl_hf.visualization import seen_pictures

    grids = grids_of(seen_pictures(images, processor, inputs, layout), layout)
    return ShownSample(question, reference, question_type, len(layout.row), grids)


def as_address(image: "Image.Image") -> str:
    """A picture as a `data:` address, no wider than pages show it on sharp screens."""
    image = image.convert("RGB")
    image.thumbnail((2 * PANEL_WIDTH, 4 * PANEL_WIDTH))
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=85, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def as_bits(keep_mask: Sequence[bool]) -> str:
    """
    Example:

    ```python
    >>> as_bits([True, False, True])
    '101'
    ```
    """
    return "".join("01"[bool(bit)] for bit in keep_mask)


class ShownPictures:
    """
    Panels of samples in a page, in which each picture stands once.

    Attributes:
        css (`str`): The pictures, as rules that panels share.
    """

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    @property
    def css(self) -> str:
        return "".join(f".{name} {{ background-image: url({address}); }}\n" for address, name in self.names.items())

    def panel(
        self, sample: ShownSample, bits: str | None, title: str, text: str = "", is_correct: bool | None = None
    ) -> str:
        """
        A sample's pictures with its pruned tokens faded.

        Args:
            sample ([`ShownSample`]): The sample.
            bits (`str`, *optional*): The keep mask of its N tokens, see [`as_bits`]; without one all are kept.
            title, text (`str`): The lines below.
            is_correct (`bool`, *optional*): Marks the text.
        """
        drawn = []
        for grid in sample.grids:
            name = self.names.setdefault(grid.picture, f"i{len(self.names)}")
            shape = f"aspect-ratio: {picture_shape(grid)}"
            veil = "" if bits is None else veil_of(grid, bits)
            drawn.append(f'<div class="picture {name}" style="{shape}">{veil}</div>')
        mark = {None: "", True: ' class="correct"', False: ' class="wrong"'}[is_correct]
        caption = f"<b>{html.escape(title)}</b><span{mark}>{html.escape(text)}</span>"
        return f'<figure><div class="grids">{"".join(drawn)}</div><figcaption>{caption}</figcaption></figure>'


def picture_shape(grid: ShownGrid) -> str:
    """Width and height of its picture, as CSS has it."""
    from PIL import Image

    content = base64.b64decode(grid.picture.partition(",")[2])
    with Image.open(io.BytesIO(content)) as image:
        return f"{image.width} / {image.height}"


def veil_of(grid: ShownGrid, bits: str) -> str:
    """What lies over the pruned patches of a grid. A patch is kept where one of its tokens is."""
    kept = {
        (row, column)
        for token, row, column in zip(grid.tokens, grid.rows, grid.columns, strict=True)
        if bits[token] == "1"
    }
    cell, path = SIDE / grid.width, ""
    for row in range(grid.height):
        patches = [(row, column) for column in range(grid.width)]
        for is_kept, run in groupby(patches, kept.__contains__):
            columns = [column for _, column in run]
            if not is_kept:
                width = cell * len(columns)
                path += f"M{cell * columns[0]:.4g} {cell * row:.4g}h{width:.4g}v{cell:.4g}h-{width:.4g}z"
    size = f"0 0 {SIDE} {cell * grid.height:.4g}"
    return (
        f'<svg viewBox="{size}" preserveAspectRatio="none"><path class="mask" d="{path}"/>'
        f'<path class="hatched" d="{path}"/></svg>'
    )
