"""What the page shows of a reply: true numbers, escaped words, bars from 0, pictures of the kept tokens."""

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tprl_hf.app.asking import Answered
from tprl_hf.app.cards import (
    answered_card,
    conversation_card,
    nice_end,
    notice,
    steps_card,
    time_bars,
    two_questions_card,
)
from tprl_hf.app.drawing import HEAT, heat_picture, score_range
from tprl_hf.evaluation.benchmark import PrefillTime
from tprl_hf.visualization import Figure, Panel

EVIL = '<script>alert(1)</script> & "more"'


@pytest.fixture(scope="module")
def answered(asker, examples):
    return asker.ask(examples[0].image, examples[0].question, ["learned", "divprune"], 16)


def pictures(card: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/webp;base64,([^"]+)"', card)
    return [Image.open(io.BytesIO(base64.b64decode(one))) for one in found]


def test_a_card_tells_answers_tokens_and_times(answered):
    card = answered_card(answered)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", card)
    assert cells[0::4] == ["unpruned", "learned", "divprune"]
    assert cells[2::4] == ["144 of 144", "16 of 144", "16 of 144"]
    assert [int(cell) for cell in cells[3::4]] == [reply.num_read for reply in answered.replies]
    assert answered.replies[1].answer in cells[5]
    # kept tokens and heat map of the policy, kept tokens of a pruner that scores none
    assert [picture.size for picture in pictures(card)] == [(336, 336)] * 3
    assert "Keep probability of each token" in card and "divprune chooses tokens together" in card
    assert len(re.findall('<img src="data:[^"]+" alt="[^"]+">', card)) == 3 and "http" not in card


def test_bars_begin_at_0_and_are_as_long_as_the_times(answered):
    times = [PrefillTime(llm_ms=60, total_ms=80), PrefillTime(llm_ms=10, total_ms=40)]
    replies = [replace(reply, time=time) for reply, time in zip(answered.replies, times, strict=False)]
    bars = time_bars(replies)
    assert re.findall(r"width: ([\d.]+)%", bars) == ["25.00", "75.00", "37.50", "12.50"]
    assert re.findall(r"<span>([\d.]+)</span>", bars) == ["0", "40", "80"]
    assert (
        "80.0 ms" in bars and "40.0 ms" in bars and 'aria-label="vision tower and pruner 20.0 ms, LLM 60.0 ms"' in bars
    )


@pytest.mark.parametrize(
    ("value", "end"), [(0.3, 0.3), (1, 1), (1.2, 1.5), (7, 8), (99, 100), (214, 250), (3001, 4000)]
)
def test_an_axis_ends_at_a_short_number(value, end):
    assert nice_end(value) == pytest.approx(end)


def test_words_of_people_and_models_are_words(answered, examples, asker):
    replies = [replace(reply, answer=EVIL) for reply in answered.replies]
    found = [Answered(EVIL, replies, EVIL)] * 2
    steps, figures = asker.steps(examples[0].image, examples[0].question, 16, 2)
    steps = [replace(step, answer=EVIL) for step in steps]
    for card in (
        answered_card(found[0]),
        two_questions_card(found, 3),
        conversation_card([(EVIL, EVIL, EVIL)], replies[:2]),
        steps_card(steps, figures),
        notice(EVIL),
    ):
        assert "<script" not in card and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; " in card


def test_steps_are_drawn_from_the_first_to_the_last(asker, examples):
    card = steps_card(*asker.steps(examples[0].image, examples[0].question, 16, 3))
    assert re.findall(r"(\d+) tokens<br>", card) == ["144", "69", "33", "16"]
    assert len(pictures(card)) == 4 + 3 and "after step 3 of 3" in card


def test_a_heat_map_has_the_colours_of_its_scale_at_each_token():
    rows, columns = torch.arange(2).repeat_interleave(3), torch.arange(3).repeat(2)
    scores = torch.tensor([0.0, 0.5, 1.0, 1.0, 0.0, 0.5])
    figure = Figure(Image.new("RGB", (60, 40), "black"), rows, columns, [Panel("", scores=scores)])
    drawing = heat_picture(figure, 0, 1)
    assert drawing.size == (336, 224)
    seen = np.array([drawing.getpixel((int(56 + 112 * c), int(56 + 112 * r))) for r in range(2) for c in range(3)])
    share = np.array([HEAT[round(8 * score)] for score in scores.tolist()])
    assert np.abs(seen - 0.85 * share).max() <= 1
    assert score_range([figure], "probability") == (0, 1) and score_range([figure], "score") == (0, 1)


def test_colours_differ_in_lightness_so_that_nobody_needs_hues():
    lightness = HEAT @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 10).all()
