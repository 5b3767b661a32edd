"""Drawn pictures in place of the photographs of Photo-VQA, by the names of their files."""

import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from tprl_hf.data.photo_things import PICTURE_FILES, STAMPS


def write_photographs(root: Path) -> Path:
    """An opaque ellipse of a colour of its own for each thing, noise for each wallpaper, below `root`."""
    for name in PICTURE_FILES:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not name.startswith(STAMPS):
            Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path)
            continue
        height, width = rng.integers(20, 60, 2)
        rows, columns = np.mgrid[:height, :width]
        inside = ((rows + 0.5) / height - 0.5) ** 2 + ((columns + 0.5) / width - 0.5) ** 2 <= 0.25
        pixels = np.zeros((height, width, 4), dtype=np.uint8)
        pixels[..., :3] = rng.integers(0, 256, 3)
        pixels[..., 3] = 255 * inside
        Image.fromarray(pixels).save(path)
    return root
