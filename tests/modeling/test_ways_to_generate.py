"""Every way to generate, on families that `test_generation.py` does not go through one by one.

docs/families.md has the others, each of which is like one of these.
"""

import pytest
import torch

from tests.families.more import OTHERS
from tests.families.special import SPECIAL
from tests.families.tiny_models import FAMILIES
from tests.families.ways_to_generate import ARGUMENTS, CANNOT, WAYS, Trial

# One for each adapter, container of features and kind of state that the first fourteen families do not have.
KINDS = ("dots3_note", "ernie4_5_vl_moe", "exaone4_5", "glm4v", "glm5_next", "hy_v4_vl", "inkling2_loop", "lfm2_vl")
KINDS += ("minicpmv4_7", "muse_glimmer", "nemotron_h_omni", "qwen2_5_omni_thinker", "qwen3_5", "video_llava")
THERE = {*FAMILIES, *OTHERS}  # with this release of transformers


@pytest.mark.parametrize("family", [family for family in (*KINDS, *SPECIAL) if family in THERE])
@torch.no_grad()
def test_ways_to_generate(family):
    trial = Trial.of(family)
    for way, holds in WAYS.items():
        if way not in CANNOT.get(family, {}):
            assert holds(trial), way


@pytest.mark.parametrize(
    ("family", "way"),
    [(family, way) for family, ways in CANNOT.items() if family in THERE for way in ways if way in ARGUMENTS],
)
@torch.no_grad()
def test_what_the_base_models_cannot_they_cannot(family, way):
    """Fails when the library has learned it, so that the exception can go."""
    trial = Trial.of(family)
    batch = trial.one if way == "prompt lookup" else trial.batch
    expected = trial.made(batch, trial.base)
    try:
        made = trial.made(batch, trial.base, **ARGUMENTS[way])
    except (AttributeError, IndexError, KeyError, ValueError):
        return
    assert not torch.equal(made, expected)
