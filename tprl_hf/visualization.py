"""Which visual tokens are kept, drawn over the image: as PNG, and as one HTML page that needs nothing else."""

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from tprl_hf.style import (
    BOX,
    CORRECT,
    DIMMING,
    GREY,
    HATCH,
    HATCH_STEP,
    INK,
    PANEL_WIDTH,
    PAPER,
    RIM,
    WRONG,
    html_page,
)
from tprl_hf.tower_pictures import image_from_pixel_values as image_from_pixel_values
from tprl_hf.tower_pictures import seen_frames as seen_frames
from tprl_hf.tower_pictures import seen_pictures as seen_pictures
from tprl_hf.tower_pictures import tile_pictures as tile_pictures
from tprl_hf.tower_pictures import token_grids

if TYPE_CHECKING:
    from tprl_hf.modeling import TokenLayout

CELL = 14  # pixels of a token that has no place in a picture


@dataclass
class Panel:
    """
    One picture of a figure: the image, with or without tokens pruned.

    Args:
        title (`str`):
            The line under the picture, for instance the pruner or the step.
        text (`str`, *optional*, defaults to `""`):
            The line under the title, for instance the answer or the score.
        keep_mask (`torch.Tensor` or sequence, *optional*):
            Bool [N], True where a token is kept. None draws the image as it is.
        scores (`torch.Tensor` or sequence, *optional*):
            Float [N], higher is kept; the HTML page shows each under the pointer.
        is_correct (`bool`, *optional*):
            Colours the text as correct or wrong; None leaves it grey.
    """

    title: str
    text: str = ""
    keep_mask: torch.Tensor | Sequence[bool] | None = None
    scores: torch.Tensor | Sequence[float] | None = None
    is_correct: bool | None = None


@dataclass
class Figure:
    """
    One image and its panels, from left to right.

    Args:
        image (`PIL.Image.Image`):
            What the vision tower sees; see [`image_from_pixel_values`].
        rows (`torch.Tensor` or sequence):
            Int [N], the patch row each visual token comes from, 0 at the top.
        columns (`torch.Tensor` or sequence):
            Int [N], the patch column each visual token comes from, 0 at the left.
        panels (`list[Panel]`):
            The pictures.
        title (`str`, *optional*, defaults to `""`):
            The line above the pictures, for instance the question.
        boxes (`list`, *optional*):
            Boxes to outline, each [x0, y0, x1, y1] in pixels of `image`.
    """

    image: Image.Image
    rows: torch.Tensor | Sequence[int]
    columns: torch.Tensor | Sequence[int]
    panels: list[Panel]
    title: str = ""
    boxes: Sequence[Sequence[float]] = field(default_factory=list)


def figures_by_block(
    pictures: Sequence[Image.Image],
    layout: "TokenLayout",
    panels: Sequence[Panel],
    title: str = "",
    boxes: Sequence[Sequence[float]] = (),
) -> list[Figure]:
    """
    A figure for each grid of tokens: of an image that stays whole, or of its overview, crops, tiles or frames.
    Separators have no place in an image and are left out. Where no token has one, as of models whose queries gather
    them from the whole image, they are drawn in their order, over white.

    Args:
        pictures (`Sequence[PIL.Image.Image]`):
            One for each grid, or one for each image, over which all its grids are then drawn.
        layout ([`TokenLayout`]):
            Where all N tokens lie: the `layout` of a [`PrunePlan`].
        panels (`Sequence[Panel]`):
            With masks and scores of all N tokens.
        title (`str`, *optional*, defaults to `""`):
            The line above; which grid it is is added where there are several.
        boxes (`Sequence`, *optional*):
            Boxes to outline, in pixels of the pictures; only on pictures of whole images.

    Raises:
        `ValueError`: If there are neither as many pictures as grids nor as many as images.

    Example:

    ```python
    >>> figures = figures_by_block([image], plan.layout, [Panel("kept", keep_mask=plan.keep_mask)])
    >>> draw_figures(figures).save("kept.png")
    ```
    """
    grids = token_grids(layout)
    images = sorted({image for image, _ in grids})
    if len(pictures) not in (len(images), len(grids)):
        raise ValueError(
            f"The tokens lie in {len(grids)} grids of {len(images)} images, but there are {len(pictures)} pictures: "
            "pass one for each image or one for each grid."
        )
    figures = []
    for number, (image, block) in enumerate(grids):
        inside = ~layout.protected & (layout.image == image) & (layout.block == block)
        shares = len(pictures) == len(images)
        picture = pictures[images.index(image)] if shares else pictures[number]
        height, width = int(layout.height[inside][0]), int(layout.width[inside][0])
        name = f"{title}  [{number + 1} of {len(grids)}: {height} × {width} tokens]" if len(grids) > 1 else title
        placed = [
            replace(panel, keep_mask=_part(panel.keep_mask, inside), scores=_part(panel.scores, inside))
            for panel in panels
        ]
        rows, columns = layout.row[inside], layout.column[inside]
        if is_without_places(picture, height, width):
            figures.append(figure_of_a_row(columns, placed, title))
            continue
        figures.append(Figure(picture, rows, columns, placed, name, boxes if shares else ()))
    return figures


def is_without_places(picture: Image.Image, rows: int, columns: int) -> bool:
    """Whether tokens are a mere row, as adapters give those that stand for no place; a strip has square patches."""
    return rows == 1 and columns > 2 and 3 * picture.width < columns * picture.height


def figure_of_a_row(columns: torch.Tensor, panels: list[Panel], title: str) -> Figure:
    """Tokens without a place, line by line over white, in place of a picture where they do not lie."""
    width = math.ceil(math.sqrt(len(columns)))
    paper = Image.new("RGB", (CELL * width, CELL * math.ceil(len(columns) / width)), PAPER)
    name = f"{title}  [{len(columns)} tokens in their order: they stand for no place in the image]"
    return Figure(paper, columns // width, columns % width, panels, name.strip())


def draw_kept_tokens(
    image: Image.Image,
    keep_mask: torch.Tensor | Sequence[bool],
    rows: torch.Tensor | Sequence[int],
    columns: torch.Tensor | Sequence[int],
    width: int = 336,
    boxes: Sequence[Sequence[float]] = (),
) -> Image.Image:
    """
    Draws the image with the patches of pruned tokens faded and hatched, and those of kept tokens outlined.

    Args:
        image (`PIL.Image.Image`):
            What the vision tower sees.
        keep_mask (`torch.Tensor` or sequence):
            Bool [N], True where a token is kept.
        rows, columns (`torch.Tensor` or sequence):
            Int [N], the patch each token comes from. A patch from which several tokens come is drawn as kept if one
            of them is; one from which none comes is drawn as pruned.
        width (`int`, *optional*, defaults to 336):
            Width of the drawing in pixels; the height follows.
        boxes (`Sequence`, *optional*):
            Boxes to outline, each [x0, y0, x1, y1] in pixels of `image`.

    Returns:
        `PIL.Image.Image`: RGB.

    Raises:
        `ValueError`: If `keep_mask`, `rows` and `columns` are not of one length.

    Example:

    ```python
    >>> draw_kept_tokens(image, plan.keep_mask, rows, columns).save("kept.png")
    ```
    """
    grid = _grid(keep_mask, rows, columns)
    picture = _scaled(image, width)
    height = picture.height
    edges_y = [round(height * row / grid.shape[0]) for row in range(grid.shape[0] + 1)]
    edges_x = [round(width * column / grid.shape[1]) for column in range(grid.shape[1] + 1)]
    faded = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, PAPER), DIMMING)
    hatching = ImageDraw.Draw(faded)
    for start in range(-height, width, HATCH_STEP):
        hatching.line([start, height, start + height, 0], fill=HATCH)
    kept = np.repeat(np.repeat(grid, np.diff(edges_y), axis=0), np.diff(edges_x), axis=1)
    drawing = Image.composite(picture, faded, Image.fromarray(kept.astype(np.uint8) * 255))

    pen = ImageDraw.Draw(drawing)
    bordered = np.pad(grid, 1)
    for row, column in np.argwhere(grid):
        left, right, top, bottom = edges_x[column], edges_x[column + 1], edges_y[row], edges_y[row + 1]
        neighbours = {  # lines only where a kept patch meets a pruned one or the rim
            (left, top, right, top): bordered[row, column + 1],
            (left, bottom, right, bottom): bordered[row + 2, column + 1],
            (left, top, left, bottom): bordered[row + 1, column],
            (right, top, right, bottom): bordered[row + 1, column + 2],
        }
        for line, is_kept in neighbours.items():
            if not is_kept:
                pen.line(
                    [min(value, limit - 1) for value, limit in zip(line, (width, height) * 2, strict=True)], fill=INK
                )
    return _framed(drawing, image, boxes)


def draw_figures(figures: Sequence[Figure], scale: float = 1) -> Image.Image:
    """
    Draws figures under each other, each a row of panels with captions.

    Args:
        figures (`Sequence[Figure]`):
            One or more.
        scale (`float`, *optional*, defaults to 1):
            Makes pictures and text larger alike; a picture is 176 pixels wide at scale 1.

    Returns:
        `PIL.Image.Image`: RGB. Text that does not fit is wrapped in titles and shortened in captions.
    """
    if not figures:
        raise ValueError("There is no figure to draw.")
    panel_width, margin, gap, line = (round(scale * length) for length in (PANEL_WIDTH, 18, 14, 24))
    title_font, caption_font, text_font = (ImageFont.load_default(scale * size) for size in (17, 14, 13))
    most = max(len(figure.panels) for figure in figures)
    width = 2 * margin + most * panel_width + (most - 1) * gap
    strips = []
    for figure in figures:
        title = _wrapped(figure.title, title_font, width - 2 * margin)
        pictures = [_draw_panel(figure, panel, panel_width) for panel in figure.panels]
        top = line * len(title)
        strip = Image.new("RGB", (width, top + max(picture.height for picture in pictures) + 2 * line), PAPER)
        pen = ImageDraw.Draw(strip)
        for number, words in enumerate(title):
            pen.text((margin, line * number), words, font=title_font, fill=INK)
        for number, (panel, picture) in enumerate(zip(figure.panels, pictures, strict=True)):
            left, below = margin + number * (panel_width + gap), top + picture.height
            strip.paste(picture, (left, top))
            caption = _shortened(panel.title, caption_font, panel_width)
            pen.text((left, below + round(5 * scale)), caption, font=caption_font, fill=INK)
            row = below + round(23 * scale)
            room = _draw_mark(pen, left, row, round(13 * scale), panel.is_correct)
            text = _shortened(panel.text, text_font, panel_width - room)
            pen.text((left + room, row), text, font=text_font, fill=_colour(panel.is_correct))
        strips.append(strip)
    page = Image.new("RGB", (width, 2 * margin + sum(strip.height for strip in strips) - line // 3), PAPER)
    top = margin
    for strip in strips:
        page.paste(strip, (0, top))
        top += strip.height
    return page


def figures_to_html(figures: Sequence[Figure], title: str, notes: Sequence[str] = ()) -> str:
    """
    The figures as one HTML page that loads nothing from elsewhere. Under the pointer each patch tells its row, its
    column, whether it is kept, and its score.

    Args:
        figures (`Sequence[Figure]`):
            One or more.
        title (`str`):
            The page's title.
        notes (`Sequence[str]`, *optional*):
            Lines under the title, for instance seed, budget and command.

    Returns:
        `str`: The page. All texts are escaped.
    """
    parts = []
    for number, figure in enumerate(figures):
        image = _scaled(figure.image, 2 * PANEL_WIDTH)
        # each image stands in the page once, as a style that its panels share
        parts.append(f"<style>.image{number} {{ background-image: url({_data_uri(image)}); }}</style>")
        panels = "".join(_panel_to_html(figure, panel, number, image) for panel in figure.panels)
        parts.append(f'<section><h2>{html.escape(figure.title)}</h2><div class="panels">{panels}</div></section>')
    return html_page(title, notes, "\n".join(parts))


def _panel_to_html(figure: Figure, panel: Panel, number: int, image: Image.Image) -> str:
    patches, style = "", f"aspect-ratio: {image.width} / {image.height};"
    if panel.keep_mask is not None:
        grid = _grid(panel.keep_mask, figure.rows, figure.columns)
        style += f" grid-template: repeat({grid.shape[0]}, 1fr) / repeat({grid.shape[1]}, 1fr);"
        scores = {}
        if panel.scores is not None:
            positions = zip(_array(figure.rows), _array(figure.columns), _array(panel.scores), strict=True)
            scores = {(row, column): f", score {score:.3g}" for row, column, score in positions}
        for (row, column), is_kept in np.ndenumerate(grid):
            state = "kept" if is_kept else "pruned"
            tip = f"row {row}, column {column}: {state}{scores.get((row, column), '')}"
            patches += f'<div class="patch {state}" data-tip="{tip}"></div>'
    for x0, y0, x1, y1 in figure.boxes:
        left, width = 100 * (x0 - 1) / figure.image.width, 100 * (x1 - x0 + 2) / figure.image.width
        top, height = 100 * (y0 - 1) / figure.image.height, 100 * (y1 - y0 + 2) / figure.image.height
        place = f"left: {left:.2f}%; top: {top:.2f}%; width: {width:.2f}%; height: {height:.2f}%"
        patches += f'<div class="box" style="{place}"></div>'
    mark = {None: "", True: "correct", False: "wrong"}[panel.is_correct]
    caption = f'<b>{html.escape(panel.title)}</b><span class="{mark}">{html.escape(panel.text)}</span>'
    return (
        f'<figure><div class="picture image{number}" style="{style}">{patches}</div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _draw_panel(figure: Figure, panel: Panel, width: int) -> Image.Image:
    if panel.keep_mask is None:
        return _framed(_scaled(figure.image, width), figure.image, figure.boxes)
    return draw_kept_tokens(figure.image, panel.keep_mask, figure.rows, figure.columns, width, figure.boxes)


def _framed(drawing: Image.Image, image: Image.Image, boxes: Sequence[Sequence[float]]) -> Image.Image:
    pen = ImageDraw.Draw(drawing)
    for x0, y0, x1, y1 in boxes:
        scale_x, scale_y = drawing.width / image.width, drawing.height / image.height
        corners = [x0 * scale_x - 2, y0 * scale_y - 2, x1 * scale_x + 2, y1 * scale_y + 2]
        pen.rounded_rectangle(corners, radius=4, outline=BOX, width=max(2, drawing.width // 88))
    pen.rectangle([0, 0, drawing.width - 1, drawing.height - 1], outline=RIM)
    return drawing


def _part(values: torch.Tensor | Sequence | None, inside: torch.Tensor) -> torch.Tensor | None:
    return None if values is None else torch.as_tensor(values).to(inside.device)[inside]


def _array(values: torch.Tensor | Sequence) -> np.ndarray:
    return torch.as_tensor(values).detach().cpu().numpy()


def _grid(keep_mask: torch.Tensor | Sequence[bool], rows: torch.Tensor | Sequence, columns: torch.Tensor | Sequence):
    """Bool [rows of patches, columns of patches], True where a token of the patch is kept."""
    kept, row_of, column_of = _array(keep_mask).astype(bool), _array(rows), _array(columns)
    if not kept.shape == row_of.shape == column_of.shape or kept.ndim != 1 or not len(kept):
        raise ValueError(
            "keep_mask, rows and columns must be one-dimensional, of one length and not empty, got shapes "
            f"{kept.shape}, {row_of.shape} and {column_of.shape}."
        )
    grid = np.zeros((row_of.max() + 1, column_of.max() + 1), dtype=bool)
    grid[row_of[kept], column_of[kept]] = True
    return grid


def _scaled(image: Image.Image, width: int) -> Image.Image:
    height = max(1, math.floor(image.height * width / image.width + 0.5))
    return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _draw_mark(pen: ImageDraw.ImageDraw, left: int, top: int, size: int, is_correct: bool | None) -> int:
    """A tick or a cross before a text, which say without colour whether it is correct; returns how wide it is."""
    if is_correct is None:
        return 0
    ends = (
        [((0.05, 0.7), (0.35, 1.0), (0.85, 0.3))] if is_correct else [((0.1, 0.3), (0.8, 1)), ((0.8, 0.3), (0.1, 1))]
    )
    for line in ends:
        points = [(left + x * size, top + y * size) for x, y in line]
        pen.line(points, fill=_colour(is_correct), width=max(1, size // 7))
    return round(1.2 * size)


def _colour(is_correct: bool | None) -> str:
    return {None: GREY, True: CORRECT, False: WRONG}[is_correct]


def _shortened(text: str, font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _wrapped(text: str, font, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(_shortened(word, font, width))
    return lines
