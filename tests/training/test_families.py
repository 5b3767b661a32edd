"""Training looks at every family in the same way: scores, saliency and rollouts on models of each."""

import pytest
import torch

from tests.families.tiny_models import FAMILIES, Sample, build, collate, sample
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.modeling.token_pruner import read_similarity
from tprl_hf.training.answer_batches import EncodedSample, SampleEncoder
from tprl_hf.training.answer_scores import gradient_saliency, score_answers
from tprl_hf.training.rollouts import (
    Budgets,
    collect_rollouts,
    logits_at_budget,
    replayed_logprobs,
    take_inputs,
)

ANSWERS = [[7, 8], [9]]


class ReadyEncoder(SampleEncoder):
    """Encodes samples that need no processor."""

    def __init__(self, model, family):
        self.model, self.family, self.with_attention = model, family, False

    def encode_rows(self, rows):
        return [self.encoded(row) for row in rows]

    def encoded(self, row):
        inputs = collate(self.family, [row["sample"]])
        ids = inputs.pop("input_ids")
        inputs.pop("attention_mask")
        types = {name: value[0] for name, value in inputs.items() if value.shape == ids.shape}
        with torch.no_grad():
            features = self.model.adapter.encode(ids, inputs)
        query_mask = torch.isin(ids[0], torch.arange(5, 60))
        return EncodedSample(ids[0], torch.tensor(row["answer"]), query_mask, types, features)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_a_family(family):
    torch.manual_seed(0)
    base = build(family)
    model = TPRLForConditionalGeneration.from_base_model(
        base,
        latent_dim=16,
        policy_training={"stage": "lfd"},
        policy_num_heads=4,
        policy_dim=16,
        policy_similarity=True,
    )
    model.requires_grad_(False)
    samples = [sample(family, num_images=1, seed=0), sample(family, num_images=2, seed=1, text=3)]
    rows = [{"sample": s, "answer": answer} for s, answer in zip(samples, ANSWERS, strict=True)]
    batch = ReadyEncoder(model, family)(rows)

    rollouts = collect_rollouts(
        model.policy,
        model.autoencoder,
        batch.inputs,
        2,
        2,
        1.0,
        torch.Generator().manual_seed(0),
        Budgets(torch.tensor([0.5, 0.3])),
    )
    inputs = take_inputs(read_similarity(model.policy, batch.inputs), rollouts.sample_index)
    keep_masks = rollouts.keep_masks
    codes = model.autoencoder.encode(batch.inputs.tokens)[rollouts.sample_index]
    positions = inputs.layout.positions()
    question = inputs.query, inputs.query_valid
    logits = [
        model.policy(codes, keep_masks[t], *question, t, positions, None, inputs.known_similarity).logits
        for t in range(2)
    ]
    replayed = replayed_logprobs(rollouts, logits_at_budget(rollouts, torch.stack(logits), 1.0), 1.0)
    torch.testing.assert_close(replayed, rollouts.logprobs, atol=1e-5, rtol=1e-5)
    protected = inputs.layout.protected & inputs.valid
    assert (keep_masks[-1] & protected).equal(protected)  # separators stay

    scores = score_answers(model, batch, keep_masks[-1], rollouts.sample_index.tolist())
    for row, index in enumerate(rollouts.sample_index.tolist()):
        given = collate(family, [Sample(samples[index].ids + ANSWERS[index], samples[index].images)])
        if "token_type_ids" in given:
            last = given["token_type_ids"][0, -len(ANSWERS[index]) :]
            last.fill_(int(base.config.model_type == "paligemma"))
        mask = keep_masks[-1][row][batch.inputs.valid[index]]
        with torch.no_grad():
            output = model(**given, keep_mask=mask).logits[0, -len(ANSWERS[index]) - 1 : -1]
        expected = output.log_softmax(-1).gather(1, torch.tensor(ANSWERS[index])[:, None]).mean()
        torch.testing.assert_close(scores.logprobs[row], expected, atol=2e-5, rtol=1e-3)

    saliency = gradient_saliency(model, batch, batch.inputs.valid)
    assert saliency.isfinite().all() and (saliency > 0).any(1).all() and not saliency[~batch.inputs.valid].any()
