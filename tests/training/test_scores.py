"""Scores, saliency and demonstrations, against plain calls of the model."""

from dataclasses import replace

import pytest
import torch

from tprl_hf.modeling.budget import Budget
from tprl_hf.pruners import RandomPruner, UniformPruner, VisPruner
from tprl_hf.training import BoxTeacher, GradientTeacher, LeaveOutTeacher, budget_steps, generate_demonstrations
from tprl_hf.training.answer_batches import SampleEncoder, undecoded
from tprl_hf.training.answer_scores import gradient_saliency, score_answers
from tprl_hf.training.feature_cache import join_features
from tprl_hf.training.lfd_trainer import demonstrated_steps, imitation_loss
from tprl_hf.training.rollouts import policy_on_kept


def rows_of(dataset):
    return [undecoded(dataset)[i] for i in range(len(dataset))]


def test_scores_equal_a_plain_forward_of_each_sample_alone(make_model, processor, dataset):
    model = make_model()
    encoder = SampleEncoder(model, processor)
    rows = rows_of(dataset)[:5]
    batch = encoder(rows)
    sample_index = [0, 0, 1, 2, 3, 4, 4]
    masks = torch.rand(len(sample_index), 16, generator=torch.Generator().manual_seed(0)) < 0.4
    masks[3] = True
    scores = score_answers(model, batch, masks, sample_index, batch_size=3)
    for row, sample in enumerate(sample_index):
        one = encoder.encode(rows[sample])
        ids = torch.cat([one.prompt_ids, one.answer_ids])[None]
        with torch.no_grad():
            output = model(input_ids=ids, visual_features=one.features, keep_mask=masks[row])
        logprobs = output.logits[0, -len(one.answer_ids) - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(1, one.answer_ids[:, None]).mean()
        torch.testing.assert_close(scores.logprobs[row], expected, atol=1e-5, rtol=1e-4)
        assert bool(scores.correct[row]) == bool((logprobs.argmax(-1) == one.answer_ids).all())


def test_an_answer_ends_with_the_end_token(make_model, processor, dataset):
    sample = SampleEncoder(make_model(), processor).encode(rows_of(dataset)[1])
    assert sample.answer_ids[-1] == 2 and len(sample.answer_ids) == len(dataset[1]["answer"].split()) + 1


def test_gradient_saliency_is_the_first_order_change_of_the_logprob(make_model, processor, dataset):
    model = make_model().double()
    model.lvlm.requires_grad_(False)
    batch = SampleEncoder(model, processor)(rows_of(dataset)[:2])
    keep = batch.inputs.valid.clone()
    keep[:, 3] = False
    saliency = gradient_saliency(model, batch, keep)
    assert not saliency[:, 3].any() and (saliency[:, :3] > 0).all()
    encoded = batch.features.modalities["image"]
    rows, epsilon = encoded.rows.clone(), 1e-2
    for token in (0, 7):
        logprobs = []
        for factor in (1 + epsilon, 1 - epsilon):
            encoded.rows = rows.clone()
            encoded.rows[[token, 16 + token]] *= factor
            logprobs.append(score_answers(model, batch, keep, [0, 1]).logprobs)
        change = (logprobs[0] - logprobs[1]).abs() / (2 * epsilon)
        torch.testing.assert_close(change, saliency[:, token], rtol=0.02, atol=2e-4)


def test_leave_out_teacher_is_the_loss_without_the_group(make_model, processor, dataset):
    model = make_model()
    batch = SampleEncoder(model, processor)(rows_of(dataset)[:2])
    scores = LeaveOutTeacher(group_size=5).score(model, batch, batch.inputs.valid)
    keep = batch.inputs.valid.clone()
    keep[:, 5:10] = False
    whole = score_answers(model, batch, batch.inputs.valid, [0, 1]).logprobs
    expected = whole - score_answers(model, batch, keep, [0, 1]).logprobs
    torch.testing.assert_close(scores[:, 5:10], expected[:, None].expand(-1, 5), atol=1e-5, rtol=1e-4)


def test_box_teacher_keeps_what_lies_on_the_boxes(make_model, processor, dataset):
    """On images of 24 pixels with a grid of 4 x 4; the answers are not read."""
    boxes = [[[6, 6, 18, 12]], [], [[0, 0, 5, 5], [20, 20, 24, 24]]]
    rows = dataset.select(range(3)).remove_columns("boxes").remove_columns("answer").add_column("boxes", boxes)
    made = generate_demonstrations(BoxTeacher(), make_model(), processor, rows, [1 / 8])
    kept = [[place for place, bit in enumerate(masks[0]) if bit] for masks in made["keep_masks"]]
    assert kept[0] == [5, 6] and kept[2] == [0, 15]
    even = generate_demonstrations(UniformPruner(), make_model(), processor, rows, [1 / 8])
    assert kept[1] == [place for place, bit in enumerate(even["keep_masks"][1][0]) if bit]
    with pytest.raises(ValueError, match=r"a row without `boxes`, only .*give each row a list"):
        generate_demonstrations(BoxTeacher(), make_model(), processor, rows.remove_columns("boxes"), [1 / 8])


@pytest.mark.parametrize("teacher", [VisPruner(), UniformPruner(), RandomPruner(), GradientTeacher()])
def test_demonstrations_are_nested_and_meet_their_budgets(make_model, processor, dataset, teacher, tmp_path):
    model = make_model()
    saved = generate_demonstrations(teacher, model, processor, dataset, output_dir=str(tmp_path), batch_size=3)
    loaded = type(saved).load_from_disk(str(tmp_path))
    assert loaded.column_names == [*dataset.column_names, "keep_masks"]
    assert loaded[0]["images"][0].size == (24, 24)
    for masks in loaded["keep_masks"]:
        first, second = (torch.tensor(mask) for mask in masks)
        assert (first.sum(), second.sum()) == (12, 8) and not (second & ~first).any()


def test_schedules_take_turns(make_model, processor, dataset):
    schedules = [budget_steps(1 / 4, 2), [0.75]]
    made = generate_demonstrations(GradientTeacher(), make_model(), processor, dataset, schedules)
    counts = [[sum(mask) for mask in masks] for masks in made["keep_masks"]]
    assert counts == [[8, 4], [12]] * 4


def test_a_teacher_leaves_the_pruner_of_the_model_and_its_gradients_alone(make_model, processor, dataset):
    model = make_model()
    generate_demonstrations(GradientTeacher(), model, processor, dataset.select(range(2)))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("ratios", [[0.5, 0.75], [1.0], [0.5, 0.0]])
def test_bad_schedules_are_refused(make_model, processor, dataset, ratios):
    with pytest.raises(ValueError, match=r"descending|keep_ratios\[1\] must be"):
        generate_demonstrations(VisPruner(), make_model(), processor, dataset, ratios)


def test_ragged_demonstrations_are_masked(make_model, processor, dataset):
    inputs = SampleEncoder(make_model(), processor)(rows_of(dataset)[:2]).inputs
    full = [True] * 12 + [False] * 4
    masks = [[full, [True] * 8 + [False] * 8], [full]]
    before, kept, label_mask = demonstrated_steps(masks, inputs)
    assert before.shape == (2, 2, 16)
    assert before[0].all() and before[1].sum(1).tolist() == [12, 12]
    assert label_mask.sum(-1).tolist() == [[16, 16], [12, 0]]
    logits = torch.randn(2, 2, 16)
    loss = imitation_loss(logits, kept, label_mask)
    one = torch.nn.functional.binary_cross_entropy_with_logits
    steps = [one(logits[0, 0], kept[0, 0].float()), one(logits[1, 0, :12], kept[1, 0, :12].float())]
    torch.testing.assert_close(loss[0], sum(steps) / 2)
    torch.testing.assert_close(loss[1], one(logits[0, 1], kept[0, 1].float()))
    with pytest.raises(ValueError, match="has 15 tokens, but its sample has 16"):
        demonstrated_steps([[full[:15]], [full]], inputs)


def test_features_join(make_model, processor, dataset):
    model = make_model()
    rows = rows_of(dataset)
    encoder = SampleEncoder(model, processor)
    parts = [encoder.encode(row).features for row in (rows[0], rows[2])]
    joined = join_features(parts)
    assert joined.modalities["image"].counts.tolist() == [16, 16]
    assert joined.take([1]).modalities["image"].rows.equal(parts[1].modalities["image"].rows)


def test_the_policy_sees_in_training_what_it_sees_at_inference(make_model, processor, dataset):
    model = make_model(
        policy_positions=True, policy_budget=True, policy_similarity=True, policy_training={"stage": "lfd"}
    )
    encoder = SampleEncoder(model, processor)
    batch = encoder(rows_of(dataset)[:3])
    keep, _ = model.pruner.choose(batch.inputs, Budget(keep_ratio=0.25))
    for index, row in enumerate(rows_of(dataset)[:3]):
        inputs = encoder.process(row)
        assert model.prune(**inputs, keep_ratio=0.25).keep_mask.equal(keep[index])


def test_the_policy_says_the_same_of_kept_tokens_when_it_sees_only_these(make_model, processor, dataset):
    model = make_model(policy_positions=True, policy_steps=2, policy_budget=True, policy_similarity=True)
    inputs = SampleEncoder(model, processor)(rows_of(dataset)[:3]).inputs
    inputs = replace(inputs, keep_ratio=torch.tensor([0.1, 0.5, 0.3]))
    codes = model.autoencoder.encode(inputs.tokens)
    keep = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) < torch.tensor([[0.2], [0.5], [0.0]])
    keep[2, 9] = True
    few = policy_on_kept(model.policy, codes, keep, inputs, step=1)
    every = model.policy(
        codes, keep, inputs.query, inputs.query_valid, 1, inputs.layout.positions(), inputs.keep_ratio,
        inputs.similarity(),
    )  # fmt: skip
    torch.testing.assert_close(few.logits, every.logits.masked_fill(~keep, 0.0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(few.values, every.values, atol=1e-5, rtol=1e-5)
    nothing = policy_on_kept(model.policy, codes, torch.zeros_like(keep), inputs, step=1)
    assert nothing.logits.isfinite().all() and nothing.values.isfinite().all()
