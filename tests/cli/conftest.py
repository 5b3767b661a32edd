from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.families.tiny_models import build
from tests.families.tiny_processor import make_processor


@pytest.fixture(scope="session")
def base_checkpoint(tmp_path_factory) -> Path:
    """A tiny random LLaVA with its processor, as a directory."""
    path = tmp_path_factory.mktemp("base")
    build("llava").save_pretrained(path)
    make_processor().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def image_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(path)
    return path
