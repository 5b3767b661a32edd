"""Requests that share a call of the model: which inputs fit together, and that each row is answered as if alone."""

import os
from types import SimpleNamespace

import pytest
import torch

from tests.families.more import OTHERS
from tests.families.tiny_models import FAMILIES, build, collate, entry, sample
from tprl_hf.modeling import TPRLForConditionalGeneration
from tprl_hf.serving.batches import ALONE, fit, merged


def job_of(inputs):
    return SimpleNamespace(inputs=inputs, processor=SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0)))


ALL = sorted({*FAMILIES, *OTHERS} - ALONE)


@pytest.mark.parametrize("family", ALL if os.environ.get("TPRL_TEST_ALL_FAMILIES") else sorted(FAMILIES))
@torch.no_grad()
def test_merged_inputs_give_each_request_what_it_gets_alone(family):
    numbering = "contiguous" if entry(family).own_positions else "original"
    model = TPRLForConditionalGeneration.from_base_model(
        build(family), latent_dim=8, policy_training={"stage": "lfd"}, position_ids=numbering
    ).eval()
    alone = [collate(family, [one]) for one in (sample(family, 1, 1, text=3), sample(family, 1, 1, text=9))]
    assert all(fit(name, *alone) for name in alone[0])
    together = merged([job_of(inputs) for inputs in alone])
    logits = model(**together, num_keep=3, compact=True).logits
    for row, inputs in enumerate(alone):
        expected = model(**inputs, num_keep=3, compact=True).logits[0]
        assert (logits[row, -len(expected) :] - expected).abs().max() < 2e-5


def test_what_does_not_fit_stays_alone():
    one, two = (collate("llava", [sample("llava", images, 1)]) for images in (1, 0))
    assert set(one) != set(two)  # without an image there are no pixels
    large = {**one, "pixel_values": one["pixel_values"].repeat(1, 1, 2, 2)}
    assert not fit("pixel_values", one, large) and fit("input_ids", one, large)
    assert not fit("sizes", {**one, "sizes": [1]}, {**one, "sizes": [1]})
    assert set(ALONE) <= {*FAMILIES, *OTHERS}
