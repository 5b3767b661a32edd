"""Short videos are asked about as pictures are, where the family reads them; elsewhere a sentence says that not."""

import io
import re
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.families.stock_processors import STOCK, save
from tests.families.tiny_models import VIDEO, build
from tests.test_processors import absent
from tests.test_videos import write_animation
from tprl_hf.app.asking import Asker, Refusal, frame_titles
from tprl_hf.app.cards import answered_card, conversation_card, two_questions_card
from tprl_hf.app.drawing import frames_picture
from tprl_hf.missing_packages import load_processor
from tprl_hf.modeling import TPRLForConditionalGeneration

COLOURS = [(240, 20, 20), (20, 240, 20), (20, 20, 240), (240, 240, 20)]
QUESTIONS = "what colour is the cat ?", "where is the dog ?"
READ_VIDEOS = [family for family, stock in STOCK.items() if VIDEO in stock.tokens.values()]


@pytest.fixture
def animation(tmp_path) -> Path:
    return write_animation(tmp_path / "a.webp", COLOURS, milliseconds=500, size=(48, 24))


@pytest.mark.parametrize("family", READ_VIDEOS)
def test_what_is_kept_of_each_frame_is_drawn(family, animation, tmp_path):
    if names := absent(family):
        pytest.skip(f"its processor needs {', '.join(names)}: pip install 'tprl_hf[processors]'")
    save(family, tmp_path / "model")
    model = TPRLForConditionalGeneration.from_base_model(build(family), latent_dim=8).eval()
    asker = Asker(model, load_processor(tmp_path / "model"), family, max_new_tokens=2)
    assert asker.why_no_videos is None
    video = asker.read(animation)
    assert len(video.frames) == 4 and video.fps == pytest.approx(2)
    num_visual = asker.count_visual(video)
    answered = asker.ask(video, QUESTIONS[0], ["divprune", "feature-norm"], num_visual // 2)
    full, *pruned = answered.replies
    assert full.num_visual == full.num_kept == num_visual
    shared = len(COLOURS) // len(full.figures)
    for reply in pruned:
        assert [figure.title for figure in reply.figures] == frame_titles(4, len(reply.figures))
        assert reply.kept.sum() == reply.num_kept - (num_visual - len(reply.kept)) > 0
        for figure, colour in zip(reply.figures, COLOURS[::shared], strict=True):
            assert np.abs(np.asarray(figure.image, int) - colour).max() <= 4
    card = answered_card(answered)
    drawn = re.findall(r'base64,([^"]+)"', card)
    assert len(drawn) == 3 * len(full.figures) and "of 4" in card  # divprune has no scores
    assert all(Image.open(io.BytesIO(b64decode(one))).width == 336 for one in drawn)
    found, num_both = asker.two_questions(video, QUESTIONS, "divprune", num_visual // 2)
    assert f"{num_both} of the" in two_questions_card(found, num_both)
    replies = asker.say(video, [(QUESTIONS[0], "red", "red")], QUESTIONS[1], "divprune", num_visual // 2)
    assert "base64" in conversation_card([(QUESTIONS[1], "red", "red")], replies)


def test_a_model_of_pictures_takes_the_first_frame_and_no_video_file(asker, animation, tmp_path):
    assert asker.why_no_videos == "its processor takes none"
    picture = asker.read(animation)
    assert picture.size == (48, 24) and picture.getpixel((5, 5)) == COLOURS[0]
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    with pytest.raises(Refusal, match=r"does not read videos \(its processor takes none\): upload a picture\."):
        asker.read(tmp_path / "a.mp4")


def test_frames_lie_beside_each_other_in_rows_of_four():
    frames = [Image.new("RGB", (48, 24), colour) for colour in COLOURS] * 2
    sheet = frames_picture(frames[:6])
    assert sheet.size == (4 * 168 + 3 * 6, 2 * 84 + 6)
    places = [(84 + 174 * (number % 4), 42 + 90 * (number // 4)) for number in range(6)]
    assert [sheet.getpixel(place) for place in places] == [*COLOURS, *COLOURS[:2]]
    assert sheet.getpixel((170, 42)) == sheet.getpixel((84, 87)) == (255, 255, 255)
    assert frames_picture(frames[:2]).size == (2 * 336 + 6, 168)
