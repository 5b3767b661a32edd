"""A frozen head reads a slice of the hidden states, and torch must not copy its weights for each prompt."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.families.tiny_models import build, collate, sample
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.modeling.frozen_head import contiguous_input


class CopiedHeads(TorchDispatchMode):
    """Counts batched products with the matrix of a head of so many words."""

    def __init__(self, words: int):
        super().__init__()
        self.words, self.count = words, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.default and self.words in args[1].shape:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["llava", "qwen2_vl", "internvl", "nemotron_h_omni"])
def frozen(request):
    base = build(request.param)
    model = TPRLForConditionalGeneration.from_base_model(base, pruner="divprune").eval()
    model.lvlm.requires_grad_(False)
    return model, collate(request.param, [sample(request.param, seed=seed, text=5 + seed) for seed in range(3)])


@pytest.mark.parametrize("budget", [{"keep_ratio": 0.5}, {"prune": False}])
@pytest.mark.parametrize("count", [1, 3])
def test_a_frozen_head_is_not_copied_for_each_prompt(frozen, budget, count):
    model, inputs = frozen
    head = model.lvlm.get_output_embeddings() or model.lvlm.language_model.get_output_embeddings()
    with torch.no_grad(), CopiedHeads(head.weight.shape[0]) as seen:
        logits = model(**inputs, **budget, logits_to_keep=count).logits
    assert seen.count == 0
    head._forward_pre_hooks.clear()
    with torch.no_grad(), CopiedHeads(head.weight.shape[0]) as seen:
        copied = model(**inputs, **budget, logits_to_keep=count).logits
    assert seen.count  # otherwise torch has mended it, and the hook can go
    torch.testing.assert_close(logits, copied)


def test_a_model_that_is_wrapped_twice_gets_one_hook():
    base = build("llava")
    for _ in range(2):
        TPRLForConditionalGeneration.from_base_model(base)
    assert list(base.get_output_embeddings()._forward_pre_hooks.values()) == [contiguous_input]
