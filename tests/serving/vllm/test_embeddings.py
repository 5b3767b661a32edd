"""Adaptive budgets: images that are encoded and pruned outside, each with its own number of tokens."""

import pytest

from tests.serving.vllm.engine import Request, answers, engine, generated, model_inputs
from tprl_hf import embedded_checkpoint
from tprl_hf.data import mosaic_vqa
from tprl_hf.loading import load_model
from tprl_hf.serving.vllm_plugin.places import embedded_rows

from vllm import SamplingParams  # isort: skip  (engine skips where there is none)

THRESHOLD = {"threshold": 0.510}


@pytest.mark.parametrize("position_ids", ["original", "contiguous"])
def test_a_threshold_keeps_as_many_tokens_as_it_does_in_generate(position_ids):
    model, processor = load_model()
    model.config.position_ids = position_ids
    requests = [Request(row["prompt"], row["images"], THRESHOLD) for row in mosaic_vqa("test", seed=7, num_samples=60)]
    prompts, kept = [], []
    for request in requests:
        inputs = model_inputs(processor, [request])
        features = model.encode_images(**inputs)
        plan = model.prune(**inputs, visual_features=features, **THRESHOLD)
        rows = embedded_rows(features.modalities["image"].rows, plan.keep_mask, position_ids)
        kept.append(len(rows))
        ids = processor.tokenizer(request.prompt(processor), add_special_tokens=False)["input_ids"]
        prompts.append({"prompt_token_ids": ids, "multi_modal_data": {"image": [rows.detach()]}})
    assert len(set(kept)) > 5
    settings = {"enable_mm_embeds": True, "hf_overrides": {"position_ids": position_ids}}
    with engine(embedded_checkpoint(), **settings) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
        assert [output.prompt_token_ids.count(model.config.image_token_id) for output in outputs] == kept
        assert answers(outputs) == generated(model, processor, requests)
        budgeted = {**prompts[0], "mm_processor_kwargs": {"num_keep": 4}}
        with pytest.raises(ValueError, match="have been pruned: leave out num_keep"):
            llm.generate([budgeted], use_tqdm=False)
        cut = {**prompts[0], "multi_modal_data": {"image": [prompts[0]["multi_modal_data"]["image"][0][:, :-1]]}}
        with pytest.raises(ValueError, match="hidden dimension"):
            llm.generate([cut], use_tqdm=False)
        if position_ids == "original":
            (rows,) = prompts[0]["multi_modal_data"]["image"]
            for column, value in ((-4, 1e6), (-3, float("nan")), (-1, 500.0), (-2, -1.0)):
                strange = rows.clone()
                strange[:, column] = value
                with pytest.raises(ValueError, match="do not say where its tokens lay"):
                    llm.generate([{**prompts[0], "multi_modal_data": {"image": [strange]}}], use_tqdm=False)
