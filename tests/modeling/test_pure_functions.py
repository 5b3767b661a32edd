"""Keep masks, deletion and restoring: tensors in, tensors out."""

import pytest
import torch

from tprl_hf.modeling.budget import Budget, keep_counts
from tprl_hf.modeling.columns import (
    gather_columns,
    kept_columns,
    left_padded_index,
    pad_rows,
    pad_rows_left,
    restore_prompt,
    run_lengths,
)
from tprl_hf.modeling.keep_mask import (
    keep_above_threshold,
    keep_entropy,
    keep_logprobs,
    keep_top_k,
    sample_keep_mask,
)

SCORES = torch.tensor([[0.1, 0.9, 0.5, 0.7], [0.3, 0.2, 0.0, 0.0]])
VALID = torch.tensor([[True] * 4, [True, True, False, False]])


def test_counts_are_per_sample():
    visual = torch.tensor([576, 10, 1, 0])
    assert keep_counts(visual, Budget(keep_ratio=1 / 3)).tolist() == [192, 3, 1, 0]
    assert keep_counts(visual, Budget(keep_ratio=0.01)).tolist() == [6, 1, 1, 0]
    assert keep_counts(visual, Budget(keep_ratio=0.5, max_keep=100, min_keep=8)).tolist() == [100, 8, 1, 0]
    assert keep_counts(visual[[0, 1, 3]], Budget(num_keep=10)).tolist() == [10, 10, 0]


def test_top_k_keeps_the_highest_and_never_padding():
    kept = keep_top_k(SCORES, VALID, torch.tensor([2, 2]))
    assert kept.tolist() == [[False, True, False, True], [True, True, False, False]]
    ties = keep_top_k(torch.zeros(1, 5), torch.ones(1, 5, dtype=torch.bool), torch.tensor([2]))
    assert ties.tolist() == [[True, True, False, False, False]]


def test_separators_come_first_and_count():
    protected = torch.tensor([[True, False, False, False], [False, True, False, False]])
    kept = keep_top_k(SCORES, VALID, torch.tensor([2, 1]), protected)
    assert kept.tolist() == [[True, True, False, False], [True, True, False, False]]
    assert keep_top_k(SCORES, VALID, torch.tensor([0, 0]), protected).sum() == 0


def test_threshold_and_its_bounds():
    assert keep_above_threshold(SCORES, VALID, Budget(threshold=0.5)).sum(1).tolist() == [2, 1]
    assert keep_above_threshold(SCORES, VALID, Budget(threshold=0.99, min_keep=0)).sum() == 0
    assert keep_above_threshold(SCORES, VALID, Budget(threshold=0.0, max_keep=1)).sum(1).tolist() == [1, 1]


@pytest.mark.parametrize("discount", [1.0, 0.5, 0.25])
def test_probabilities_of_samples(discount):
    logits = torch.randn(1, 6, generator=torch.Generator().manual_seed(0)) * 3
    valid = torch.ones(1, 6, dtype=torch.bool)
    generator = torch.Generator().manual_seed(1)
    draws = torch.cat([sample_keep_mask(logits, valid, discount, generator) for _ in range(4000)])
    probs = discount * logits.sigmoid()
    assert (draws.float().mean(0) - probs[0]).abs().max() < 0.03
    for bit, p in ((True, probs), (False, 1 - probs)):
        found = keep_logprobs(logits, torch.full((1, 6), bit), valid, discount)
        assert torch.allclose(found, p.log(), atol=1e-5)
    expected = torch.distributions.Bernoulli(probs).entropy()
    assert torch.allclose(keep_entropy(logits, valid, discount), expected, atol=1e-5)


def test_extreme_logits_are_finite_and_padding_is_silent():
    logits = torch.tensor([[80.0, -80.0, 0.0]], requires_grad=True)
    valid = torch.tensor([[True, True, False]])
    for discount in (1.0, 0.5):
        for bits in (torch.tensor([[True, False, True]]), torch.tensor([[False, True, True]])):
            logprobs = keep_logprobs(logits, bits, valid, discount)
            entropy = keep_entropy(logits, valid, discount)
            assert logprobs.isfinite().all()
            assert entropy.isfinite().all()
            assert logprobs[0, 2] == entropy[0, 2] == 0
            (gradient,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), logits)
            assert gradient.isfinite().all()


def test_deletion_keeps_order_and_pads_left():
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    visual = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]]).bool()
    keep = torch.tensor([True, False, True, False, False])
    columns = kept_columns(mask, visual, keep)
    index, valid = left_padded_index(columns)
    values = torch.arange(12).view(2, 6)
    assert gather_columns(values, index, valid, -1).tolist() == [[1, 2, 4, 5], [-1, -1, 6, 9]]
    wider, valid = left_padded_index(columns, torch.tensor([3, 0]))
    assert gather_columns(values, wider, valid, -1).tolist() == [[-1] * 3 + [1, 2, 4, 5], [-1] * 5 + [6, 9]]
    three = gather_columns(values.expand(3, 2, 6), index, left_padded_index(columns)[1])
    assert three.shape == (3, 2, 4)


def test_restoring():
    sequences = torch.tensor([[9, 9, 7], [9, 9, 8], [9, 9, 6], [9, 9, 5]])
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert restore_prompt(sequences, prompt, 2).tolist() == [[1, 2, 3, 7], [1, 2, 3, 8], [4, 5, 6, 6], [4, 5, 6, 5]]


def test_padding_of_rows():
    rows, counts = torch.arange(1, 6).float()[:, None], torch.tensor([2, 0, 3])
    right, valid = pad_rows(rows, counts)
    assert right[..., 0].tolist() == [[1, 2, 0], [0, 0, 0], [3, 4, 5]]
    assert valid.sum(1).tolist() == [2, 0, 3]
    assert pad_rows_left(rows, counts, 3)[0][..., 0].tolist() == [[0, 1, 2], [0, 0, 0], [3, 4, 5]]
    assert run_lengths(torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1]]).bool()) == [2, 1, 1, 2]
    assert run_lengths(torch.zeros(2, 3, dtype=torch.bool)) == []
