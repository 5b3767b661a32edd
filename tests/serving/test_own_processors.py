"""Families whose processors need packages of their own, from disk to the server, with transformers' own classes."""

from importlib.util import find_spec

import pytest
import torch

from tests.families.processor_needs import of_processor
from tests.families.stock_processors import STOCK, save
from tests.families.tiny_models import build
from tests.serving.test_serve import data_url, serving
from tests.stand_ins.noise import noise
from tprl_hf.evaluation.answers import chat_inputs, generate_answers
from tprl_hf.loading import load_model
from tprl_hf.pruners import DivPrune

KEEP_RATIO, NEW_TOKENS = 0.4, 6
PICTURE = noise((40, 30))
SAMPLE = {"images": [PICTURE], "prompt": "what colour is the cat ?"}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm"])
@torch.no_grad()
def test_from_disk_wrapped_pruned_saved_loaded_and_served(family, tmp_path):
    if absent := sorted(name for name in of_processor(family) if find_spec(name) is None):
        pytest.skip(f"its processor needs {', '.join(absent)}: pip install 'tprl_hf[processors]'")
    base, saved = tmp_path / "base", tmp_path / "saved"
    build(family).save_pretrained(base)
    save(family, base)

    model, processor = load_model(str(base), "cpu")
    assert type(processor).__name__ == STOCK[family].processor
    inputs = chat_inputs(processor, [SAMPLE])
    with model.using(DivPrune(keep_ratio=KEEP_RATIO)):
        plan = model.prune(**inputs)
        made = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
        answer = generate_answers(model, processor, [SAMPLE], max_new_tokens=NEW_TOKENS)[0]
    assert 0 < plan.num_kept < plan.num_visual
    unpruned = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS, prune=False)
    inputs.pop("query_mask")
    assert torch.equal(unpruned, model.lvlm.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS))

    model.save_pretrained(saved, save_base_model=True)
    processor.save_pretrained(saved)
    loaded, same = load_model(str(saved), "cpu")
    assert type(same) is type(processor)
    again = chat_inputs(same, [SAMPLE])
    with loaded.using(DivPrune(keep_ratio=KEEP_RATIO)):
        assert torch.equal(loaded.generate(**again, do_sample=False, max_new_tokens=NEW_TOKENS), made)

    words = (str(saved), "--name", family, "--pruner", "divprune", "--keep-ratio", str(KEEP_RATIO))
    with serving(*words) as (line, client):
        assert f"(divprune, keep_ratio={KEEP_RATIO})" in line
        content = [
            {"type": "image_url", "image_url": {"url": data_url(PICTURE)}},
            {"type": "text", "text": SAMPLE["prompt"]},
        ]
        messages = [{"role": "user", "content": content}]
        served = client.chat.completions.create(model=family, messages=messages, max_tokens=NEW_TOKENS)
    assert served.choices[0].message.content.strip() == answer
