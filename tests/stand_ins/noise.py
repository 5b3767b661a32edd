"""Pictures of noise, the same in each run: `PIL.Image.effect_noise` draws others each time."""

import numpy as np
from PIL import Image


def noise(size: tuple[int, int], spread: float = 90, seed: int = 0) -> Image.Image:
    """An RGB picture of grey noise around the middle."""
    width, height = size
    values = np.random.default_rng(seed).normal(128, spread, (height, width)).clip(0, 255)
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")
