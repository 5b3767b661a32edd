"""Probabilities of answers, and what they are worth."""

import json

import pytest
import torch

from tests.families.tiny_models import build, collate, sample
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.evaluation.compare_pruners import Record, Setting, parse_record
from tprl_hf.evaluation.confidence import ConfidenceNotes, confidence_of, expected_calibration_error
from tprl_hf.evaluation.tables import summarize
from tprl_hf.training.answer_ids import answer_lengths


@torch.no_grad()
def test_noted_probabilities_are_those_of_a_forward_pass():
    """Also where one answer of a batch ends before the others."""
    model = TPRLForConditionalGeneration.from_base_model(build("llava"), latent_dim=8, pruner="divprune").eval()
    inputs = collate("llava", [sample("llava", seed=seed) for seed in range(3)])
    length = inputs["input_ids"].shape[1]
    free = model.generate(**inputs, num_keep=5, do_sample=False, max_new_tokens=5)
    end = int(free[0, length + 1])  # the first answer ends with its second token
    notes = ConfidenceNotes()
    made = model.generate(
        **inputs, num_keep=5, do_sample=False, max_new_tokens=5, eos_token_id=end, logits_processor=[notes]
    )
    new_tokens = made[:, length:]
    found = notes.of_answers(answer_lengths(made, length, [end]))
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(new_tokens)], 1)
    given = {**inputs, "input_ids": made, "attention_mask": mask}
    query = torch.zeros_like(made, dtype=torch.bool)
    query[:, :length] = True  # DivPrune does not read it
    logits = model(**given, num_keep=5, query_mask=query).logits[:, length - 1 : -1]
    logprobs = logits.log_softmax(-1)
    for row, (probability, entropy) in enumerate(found):
        ids = new_tokens[row].tolist()
        count = ids.index(end) + 1 if end in ids else len(ids)
        chosen = logprobs[row, range(count), ids[:count]]
        assert probability == pytest.approx(float(chosen.sum().exp()), rel=1e-4)
        first = logprobs[row, 0]
        assert entropy == pytest.approx(float(-(first.exp() * first).sum()), rel=1e-4)
    assert new_tokens[0].tolist().index(end) == 1


def test_expected_calibration_error_by_hand():
    # bins 0.2 to 0.3 and 0.9 to 1.0: (0.45 - 1) of two and (1.9 - 1) of two, over four
    assert expected_calibration_error([0.22, 0.23, 0.9, 1.0], [0, 1, 1, 0]) == pytest.approx((0.55 + 0.9) / 4)
    assert expected_calibration_error([1.0, 1.0], [1.0, 1.0]) == 0


def record(number: int, answer: str, score: float, probability: float | None, pruner: str = "none") -> Record:
    entropy = None if probability is None else 1 - probability
    return Record(pruner, "1", number, answer, score, 4, 4, None, probability, entropy)


def test_confidence_by_hand():
    records = [
        record(0, "yes", 0.0, 0.8),
        record(1, "no", 1.0, 0.6),
        record(2, "yes", 1.0, 1.0),
        record(3, "3", 0.0, 0.5),
    ]
    one = confidence_of(records, ["existence", "existence", "existence", "counting"], ["no", ["no"], "yes", "no"])
    assert one is not None and one.brier == pytest.approx((0.64 + 0.16 + 0 + 0.25) / 4)
    assert (one.entropy_correct, one.entropy_wrong) == pytest.approx((0.2, 0.35))
    assert (one.false_positives, one.num_negatives) == (0.5, 2)
    # without the type, every question with the answer no is one
    other = confidence_of(records, ["all"] * 4, ["no", ["no"], "yes", "no"])
    assert other is not None and other.num_negatives == 3
    assert confidence_of([*records, record(4, "x", 0, None)], ["all"] * 5, ["x"] * 5) is None


def test_records_of_earlier_versions_are_read():
    old = '{"pruner": "none", "budget": "1", "sample": 0, "answer": "a", "score": 1.0, "num_kept": 3, "num_visual": 4}'
    assert parse_record(old.encode()) == Record("none", "1", 0, "a", 1.0, 3, 4)
    for value in ("1", '"0.5"', "NaN", "true"):
        assert parse_record((old[:-1] + f', "probability": {value}}}').encode()) is None
    whole = record(0, "a", 1.0, 0.25)
    assert parse_record(json.dumps(vars(whole)).encode()) == whole


def test_group_a_is_what_is_correct_at_full_size_and_wrong_when_shrunk():
    settings = [
        Setting("none", "1", None, {}),
        Setting("resize", "1/2", None, {}),
        Setting("uniform", "1/2", None, {}),
        Setting("uniform", "1/4", None, {}),
    ]
    scores = {"none": [1, 1, 1, 0], "resize": [1, 0, 0, 0], "uniform": [0, 1, 0, 1]}
    records = [
        Record(s.pruner, s.budget, number, "", float(score), 1, 4)
        for s in settings
        for number, score in enumerate(scores[s.pruner])
    ]
    rows = summarize(records, settings, ["all"] * 4, range(4))
    group = [row.group_a for row in rows]
    assert group[0] is None and group[3] is None  # no row `resize` of that budget
    assert (group[1].value, group[1].count) == (0, 2) and (group[2].value, group[2].count) == (0.5, 2)
    assert rows[2].accuracy.value == 0.5  # the whole stays beside it
