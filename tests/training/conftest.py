import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from tests.families.tiny_models import build
from tests.families.tiny_processor import make_processor
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.data import SAMPLE_FEATURES
from tprl_hf.data.samples import png_bytes

POLICY = {"latent_dim": 16, "policy_num_heads": 4, "policy_dim": 16}


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> str:
    """A tiny random LLaVA as a directory: 16 visual tokens an image."""
    path = tmp_path_factory.mktemp("base")
    model = build("llava")
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    make_processor().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def processor():
    return make_processor()


def make_dataset() -> Dataset:
    """Eight questions about four images of noise, with answers of one to three words."""
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 255, (24, 24, 3), dtype=np.uint8) for _ in range(4)]
    rows = [
        {
            "images": [{"bytes": png_bytes(Image.fromarray(pixels[i // 2])), "path": None}],
            "prompt": " ".join(f"word{w}" for w in rng.integers(5, 60, 2 + i % 3)),
            "answer": " ".join(f"word{w}" for w in rng.integers(5, 60, 1 + i % 3)),
            "question_type": "existence",
            "boxes": [],
            "image_id": f"noise-{i // 2}",
            "objects": [],
        }
        for i in range(8)
    ]
    return Dataset.from_list(rows, features=SAMPLE_FEATURES)


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    return make_dataset()


@pytest.fixture
def make_model(base):
    """The same untrained policy around the same LLaVA, as often as asked."""

    def make(**settings) -> TPRLForConditionalGeneration:
        torch.manual_seed(1)
        return TPRLForConditionalGeneration.from_base_model(base, **{**POLICY, **settings})

    return make
