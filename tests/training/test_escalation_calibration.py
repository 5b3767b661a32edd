"""The threshold of a second look reads as many tokens as were asked for, and no answers are needed."""

import pytest
import torch

from tests.training.test_scores import rows_of
from tprl_hf.training import calibrate_escalation
from tprl_hf.training.answer_batches import SampleEncoder, left_pad

FIRST, SECOND = 0.25, 0.5


def read_with(model, processor, dataset, escalation):
    """Tokens that are really read, by sample."""
    batch = SampleEncoder(model, processor)(rows_of(dataset))
    output = model.generate(
        **batch.prompts(range(len(batch))),
        query_mask=left_pad([sample.query_mask for sample in batch.samples]),
        keep_ratio=FIRST,
        escalate=escalation,
        max_new_tokens=2,
        return_dict_in_generate=True,
    )
    return output.num_read


def trained(make_model, processor):
    model = make_model(policy_training={"stage": "lfd"})
    model.read_chat_template(processor)
    return model.eval()


@pytest.mark.parametrize("mean", [0.32, 0.5, 0.74])
def test_as_many_tokens_are_read_as_were_asked_for(mean, make_model, processor, dataset):
    model, unlabelled = trained(make_model, processor), dataset.remove_columns("answer")
    escalation = calibrate_escalation(model, processor, unlabelled, FIRST, SECOND, mean, batch_size=3)
    assert escalation.keep_ratio == SECOND
    num_read = read_with(model, processor, dataset, escalation)
    assert set(num_read.tolist()) <= {4, 12}  # of 16 tokens, once or twice
    affordable = int((mean - FIRST) / SECOND * len(dataset))
    assert int((num_read == 12).sum()) == affordable
    assert float(num_read.float().mean()) / 16 <= mean < (float(num_read.sum()) + 8) / (16 * len(dataset))


def test_the_least_sure_are_looked_at_again(make_model, processor, dataset):
    model = trained(make_model, processor)
    few, many = (
        read_with(model, processor, dataset, calibrate_escalation(model, processor, dataset, FIRST, SECOND, mean))
        for mean in (0.4, 0.6)
    )
    assert torch.all(many[few == 12] == 12) and (few == 12).any()


@pytest.mark.parametrize(
    ("ratios", "what"),
    [
        ((0.5, 0.25, 0.6), "escalate_keep_ratio must be a fraction above keep_ratio=0.5"),
        ((0.25, 0.5, 0.25), "mean_keep_ratio must be between 0.25"),
        ((0.25, 0.5, 0.8), "mean_keep_ratio must be between 0.25"),
        ((0.0, 0.5, 0.3), "keep_ratio must be"),
    ],
)
def test_means_that_cannot_be_are_refused(ratios, what, make_model, processor, dataset):
    with pytest.raises(ValueError, match=what):
        calibrate_escalation(trained(make_model, processor), processor, dataset, *ratios)


def test_too_few_samples_for_a_mean(make_model, processor, dataset):
    with pytest.raises(ValueError, match="Looking again at one of 2 samples reads more"):
        calibrate_escalation(trained(make_model, processor), processor, dataset.select(range(2)), FIRST, SECOND, 0.3)
