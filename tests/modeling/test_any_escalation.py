"""Whatever a second look is given: the answers of the looks that it names, or one clear exception."""

import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, TextStreamer

from tests.any_values import (
    ANYTHING,
    all_good,
    assert_good,
    is_count,
    is_fraction,
    judge,
    scalar,
    several,
    some_of,
)
from tprl_hf import Escalation
from tprl_hf.training import calibrate_escalation

from .test_escalation import ask, batch_of, wrap

FRACTIONS = st.one_of(ANYTHING, st.floats(0.01, 1), st.floats(0.01, 1))


@several(200)
@given(values=st.fixed_dictionaries({"keep_ratio": FRACTIONS, "below": FRACTIONS}))
def test_an_escalation(values):
    def differs(one):
        found = {name: getattr(one, name) for name in values}
        expected = {name: scalar(value) for name, value in values.items()}
        same = found == expected and all(type(value) in (int, float) for value in found.values())
        return None if same and hash(one) == hash(Escalation(**expected)) else f"became {one}"

    is_valid = all(is_fraction(value) for value in values.values())
    assert_good(judge(lambda: Escalation(**values), values, is_valid, differs))


@functools.cache
def prepared():
    """A model and a batch."""
    model = wrap()
    _, batch = batch_of()
    return model, batch


@functools.cache
def look(name: str, value: Any):
    model, batch = prepared()
    return ask(model, batch, **{name: value})


@functools.cache
def sureness(name: str, value: Any) -> torch.Tensor:
    model, batch = prepared()
    output = model.generate(
        **batch, **{name: value}, max_new_tokens=1, return_dict_in_generate=True, output_logits=True
    )
    return output.logits[0].softmax(-1).amax(-1)


RATIOS = st.sampled_from([0.1, 0.3, 0.5, 0.8, 1.0])
FIRST = st.one_of(
    st.tuples(st.just("keep_ratio"), RATIOS),
    st.tuples(st.just("num_keep"), st.sampled_from([1, 5, 20, 40])),
    st.tuples(st.just("threshold"), st.sampled_from([0.2, 0.5])),
    st.just(("prune", False)),
    st.just(("keep_mask", None)),
)


@several(80)
@given(first=FIRST, second=RATIOS, rank=st.integers(0, 4))
def test_two_looks(first, second, rank):
    """Whatever the first keeps: contradictions are refused, and what is taken has the answers of its last look."""
    model, batch = prepared()
    name, value = first
    if name == "keep_mask":
        value = torch.ones(int(look("keep_ratio", 0.5).num_visual.sum()), dtype=torch.bool)
    is_valid = name == "num_keep" or (name == "keep_ratio" and value < second)
    sure = sureness(name, value) if is_valid else torch.full((4,), 0.5)
    edges = [0.0, *sure.sort().values.tolist()]
    below = (edges[rank] + (edges[rank + 1] if rank < 4 else 1.0)) / 2
    one = Escalation(second, below)

    def differs(found):
        once, again = look(name, value), look("keep_ratio", second)
        expected = (sure < below) & (again.num_kept > once.num_kept)
        if not torch.equal(found.is_escalated, expected):
            return f"looked again at {found.is_escalated}"
        same = torch.equal(found.num_kept, torch.where(expected, again.num_kept, once.num_kept))
        answers = torch.where(expected[:, None], again.sequences, once.sequences)
        return None if same and torch.equal(found.sequences, answers) else f"{found.sequences}, not {answers}"

    named = {"escalate": one, "keep_ratio": value, name: value}
    verdict = judge(lambda: ask(model, batch, **{name: value}, escalate=one), named, is_valid, differs)
    assert_good(verdict, "escalate looks again at more tokens than the first look: pass keep_ratio or num_keep")


@several(60)
@given(value=ANYTHING)
def test_an_escalate_of_any_kind(value):
    model, batch = prepared()

    def differs(found):
        return None if torch.equal(found.sequences, look("keep_ratio", 0.3).sequences) else "another answer"

    verdict = judge(
        lambda: ask(model, batch, keep_ratio=0.3, escalate=value), {"escalate": value}, value is None, differs
    )
    assert_good(verdict)


NOT_WITH = {
    "past_key_values": DynamicCache,
    "streamer": lambda: TextStreamer(None),
    "assistant_model": lambda: prepared()[0],
    "prompt_lookup_num_tokens": lambda: 2,
    **dict.fromkeys(("output_scores", "output_logits", "output_attentions", "output_hidden_states"), lambda: True),
}


@pytest.mark.parametrize("name", NOT_WITH)
def test_what_does_not_go_with_it(name):
    model, batch = prepared()
    one = Escalation(0.8, 0.5)
    verdict = judge(
        lambda: ask(model, batch, keep_ratio=0.3, escalate=one, **{name: NOT_WITH[name]()}), {name: name}, False
    )
    assert_good(verdict)


CALIBRATION = {
    "keep_ratio": is_fraction,
    "escalate_keep_ratio": is_fraction,
    "mean_keep_ratio": lambda value: (
        is_fraction(value) or (isinstance(scalar(value), float) and 1 < scalar(value) < 2)
    ),
    "batch_size": is_count,
}
BETWEEN = st.one_of(ANYTHING, st.floats(0.05, 1.2), st.floats(0.05, 1.2))
GOOD = {"keep_ratio": 0.1, "escalate_keep_ratio": 0.5, "mean_keep_ratio": 0.3, "batch_size": 4}


@several(150)
@given(values=some_of({**dict.fromkeys(CALIBRATION, BETWEEN), "batch_size": ANYTHING}, most=2))
def test_arguments_of_calibrate_escalation(values):
    """Valid ones come as far as the model, of which there is none here."""
    arguments = {**GOOD, **values}
    first, second, mean = (scalar(arguments[name]) for name in list(GOOD)[:3])
    is_valid = all_good(values, CALIBRATION) and first < second and first < mean < first + second

    def call():
        return calibrate_escalation(None, None, None, **arguments)

    if is_valid:
        with pytest.raises(AttributeError, match="chat_template"):
            call()
    else:
        assert_good(judge(call, arguments, False))
