"""Every layout of tokens that a processor makes of a picture is drawn: whole images, crops, tiles, dynamic grids."""

import io
import re
from base64 import b64decode

import pytest
from PIL import Image

from tests.families.stock_processors import STOCK, save
from tests.families.tiny_models import build
from tests.test_processors import absent
from tprl_hf.app.asking import Asker
from tprl_hf.app.cards import answered_card, two_questions_card
from tprl_hf.missing_packages import load_processor
from tprl_hf.modeling import TPRLForConditionalGeneration

QUESTIONS = "what colour is the cat ?", "where is the dog ?"


@pytest.mark.parametrize("family", STOCK)
def test_what_is_kept_of_a_picture_is_drawn(family, tmp_path):
    if names := absent(family):
        pytest.skip(f"its processor needs {', '.join(names)}: pip install 'tprl_hf[processors]'")
    save(family, tmp_path)
    model = TPRLForConditionalGeneration.from_base_model(build(family), latent_dim=8).eval()
    asker = Asker(model, load_processor(tmp_path), family, max_new_tokens=2)
    image = Image.new("RGB", (48, 24), "red")
    image.paste((0, 0, 255), (24, 0, 48, 24))
    num_visual = asker.count_visual(image)
    answered = asker.ask(image, QUESTIONS[0], ["divprune", "feature-norm"], num_visual // 2)
    full, *pruned = answered.replies
    assert full.num_visual == full.num_kept == num_visual
    for reply in pruned:
        separators = num_visual - len(reply.kept)
        assert separators >= 0 and reply.kept.sum() == reply.num_kept - separators > 0
        drawn_kept = sum(int(figure.panels[0].keep_mask.sum()) for figure in reply.figures)
        assert drawn_kept == reply.kept.sum()
        assert reply.num_read == full.num_read - num_visual + reply.num_kept
    drawn = re.findall(r'base64,([^"]+)"', answered_card(answered))
    assert len(drawn) == 3 * len(full.figures)  # divprune has no scores
    assert all(Image.open(io.BytesIO(b64decode(one))).width == 336 for one in drawn)
    found, num_both = asker.two_questions(image, QUESTIONS, "divprune", num_visual // 2)
    assert f"{num_both} of the {int(found[0].replies[1].kept.sum())}" in two_questions_card(found, num_both)
