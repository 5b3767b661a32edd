"""Pictures of the page: kept tokens and heat maps over what the vision tower saw, as `data:` addresses."""

import base64
import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from tprl_hf.visualization import Figure, draw_kept_tokens

WIDTH = 336  # pixels of a drawing
GAP = 6  # pixels between frames
# Nine colours of equal steps from low to high: people who do not tell red from green read them as others do.
HEAT = np.array(
    [
        *((0, 34, 78), (26, 56, 111), (67, 78, 108), (97, 101, 111), (125, 124, 120)),
        *((155, 148, 118), (188, 174, 108), (222, 201, 88), (254, 232, 56)),
    ],
    dtype=float,
)
HEAT_SHARE = 0.85  # of the colour in a heat map; the rest is the picture in grey


def kept_picture(figure: Figure, panel: int = 0) -> Image.Image:
    """The grid of a figure with its pruned tokens hatched."""
    mask = figure.panels[panel].keep_mask
    assert mask is not None
    return draw_kept_tokens(figure.image, mask, figure.rows, figure.columns, WIDTH, figure.boxes)


def heat_picture(figure: Figure, low: float, high: float, panel: int = 0) -> Image.Image:
    """
    The scores of a figure's panel as colours, dark blue for `low` and yellow for `high`, over the picture in grey.

    Args:
        figure (`Figure`): Whose panel has scores of its N tokens.
        low, high (`float`): What the ends of the scale mean.
        panel (`int`, *optional*, defaults to 0): Which panel.
    """
    scores = figure.panels[panel].scores
    assert scores is not None
    values, rows, columns = (
        torch.as_tensor(one).detach().float().cpu().numpy() for one in (scores, figure.rows, figure.columns)
    )
    rows, columns = rows.astype(int), columns.astype(int)
    grid = np.full((rows.max() + 1, columns.max() + 1), float(low))
    grid[rows, columns] = values
    share = np.clip((grid - low) / max(high - low, 1e-12), 0, 1)
    marks = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(share, marks, HEAT[:, channel]) for channel in range(3)], axis=-1)
    height = max(1, round(figure.image.height * WIDTH / figure.image.width))
    cells = Image.fromarray(colours.round().astype(np.uint8))
    heat = cells.resize((WIDTH, height), Image.Resampling.NEAREST)
    grey = figure.image.convert("L").convert("RGB").resize((WIDTH, height), Image.Resampling.BICUBIC)
    return Image.blend(grey, heat, HEAT_SHARE)


def frames_picture(frames: Sequence[Image.Image]) -> Image.Image:
    """The frames of a video side by side, in rows of at most four."""
    columns = min(4, len(frames))
    width = 2 * WIDTH // columns
    height = max(1, round(frames[0].height * width / frames[0].width))
    right, down, rows = width + GAP, height + GAP, math.ceil(len(frames) / columns)
    sheet = Image.new("RGB", (right * columns - GAP, down * rows - GAP), "white")
    for number, frame in enumerate(frames):
        small = frame.resize((width, height), Image.Resampling.BICUBIC)
        sheet.paste(small, (right * (number % columns), down * (number // columns)))
    return sheet


def score_range(figures: list[Figure], meaning: str, panel: int = 0) -> tuple[float, float]:
    """The ends of the scale: 0 and 1 for probabilities, else the least and the greatest score of all grids."""
    if meaning == "probability":
        return 0.0, 1.0
    values = torch.cat([torch.as_tensor(figure.panels[panel].scores).float().flatten() for figure in figures])
    finite = values[values.isfinite()]
    return (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)


def as_address(picture: Image.Image) -> str:
    """A `data:` address, so that no file of one person lies where another one could ask for it."""
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=90)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
