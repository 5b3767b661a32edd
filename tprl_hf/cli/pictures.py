"""From prune plans to pictures. The functions import torch, this module does not."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from tprl_hf.modeling import PrunePlan
    from tprl_hf.visualization import Figure, Panel


def make_figure(
    image: "Image.Image",
    processor: Any,
    pixel_values: Any,
    plan: "PrunePlan",
    panels: Sequence["Panel"],
    title: str,
    boxes: Sequence[Sequence[float]] = (),
) -> "Figure":
    """
    A figure of one image, over the square that the vision tower sees.

    Args:
        image (`PIL.Image.Image`):
            The image as it was given.
        processor ([`ProcessorMixin`]):
            What made the pixels.
        pixel_values (`torch.Tensor`):
            Of this image alone: [1, 3, H, W], or as the family has it.
        plan ([`PrunePlan`]):
            Of a batch of this image alone.
        panels (`Sequence[Panel]`):
            The pictures; their masks are those of plans for this image.
        title (`str`):
            The line above.
        boxes (`Sequence`, *optional*):
            Boxes to outline, [x0, y0, x1, y1] in pixels of `image`.

    Raises:
        `ValueError`: If the model cuts the image into several tiles, which no one picture can show.
    """
    import torch

    from tprl_hf.visualization import Figure, image_from_pixel_values

    layout = plan.layout
    num_blocks = int(layout.block.max()) + 1
    if num_blocks > 1:
        raise ValueError(f"This model cuts the image into {num_blocks} tiles; pictures show images that stay whole.")
    seen = image
    if pixel_values.ndim == 4:  # a processor may crop; one that hands over flattened patches takes the whole image
        image_processor = processor.image_processor
        seen = image_from_pixel_values(pixel_values[0], image_processor.image_mean, image_processor.image_std)
    # row ends are tokens without a place in the image
    inside = ~layout.protected
    placed = [
        replace(
            panel,
            keep_mask=None if panel.keep_mask is None else torch.as_tensor(panel.keep_mask)[inside],
            scores=None if panel.scores is None else torch.as_tensor(panel.scores)[inside],
        )
        for panel in panels
    ]
    return Figure(seen, layout.row[inside], layout.column[inside], placed, title, boxes)


def write_pictures(figures: Sequence["Figure"], directory: str | Path, title: str, notes: Sequence[str]) -> list[Path]:
    """Writes kept_tokens.png and kept_tokens.html and returns their paths."""
    from tprl_hf.visualization import draw_figures, figures_to_html

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    png, page = directory / "kept_tokens.png", directory / "kept_tokens.html"
    draw_figures(figures, scale=1.5).save(png)
    page.write_text(figures_to_html(figures, title, notes), encoding="utf-8")
    return [png, page]
