"""From prune plans to pictures. The functions import torch, this module does not."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from tprl_hf.modeling import PrunePlan
    from tprl_hf.visualization import Figure, Panel


def make_figures(
    image: "Image.Image",
    processor: Any,
    inputs: Any,
    plan: "PrunePlan",
    panels: Sequence["Panel"],
    title: str,
    boxes: Sequence[Sequence[float]] = (),
) -> "list[Figure]":
    """
    The figures of one image: over the square that the vision tower sees, or over each tile that it sees. Where tokens
    of several grids lie over the whole image, as of an overview and of crops, each grid has its figure.

    Args:
        image (`PIL.Image.Image`):
            The image as it was given.
        processor ([`ProcessorMixin`]):
            What made the pixels.
        inputs (`Mapping`):
            What it made of this image alone.
        plan ([`PrunePlan`]):
            Of a batch of this image alone.
        panels (`Sequence[Panel]`):
            The pictures; their masks are those of plans for this image.
        title (`str`):
            The line above.
        boxes (`Sequence`, *optional*):
            Boxes to outline, [x0, y0, x1, y1] in pixels of `image`; not on tiles.
    """
    from tprl_hf.visualization import figures_by_block, seen_pictures

    seen = seen_pictures([image], processor, inputs, plan.layout)
    return figures_by_block(seen, plan.layout, panels, title, boxes)


def name_of_model(name: str) -> str:
    """A model's name for pages that are shown to others: of a directory the last part, never a path of this disk."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def write_pictures(figures: Sequence["Figure"], directory: str | Path, title: str, notes: Sequence[str]) -> list[Path]:
    """Writes kept_tokens.png and kept_tokens.html and returns their paths."""
    from tprl_hf.visualization import draw_figures, figures_to_html

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    png, page = directory / "kept_tokens.png", directory / "kept_tokens.html"
    draw_figures(figures, scale=1.5).save(png)
    page.write_text(figures_to_html(figures, title, notes), encoding="utf-8")
    return [png, page]
