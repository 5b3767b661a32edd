"""The embedded checkpoint inside vLLM, as it is: the same tokens as `generate` with the same budget."""

import random
from dataclasses import replace

import pytest
import torch

from tests.serving.vllm.engine import Request, answers, ask, engine, generated, model_inputs
from tests.stand_ins.noise import noise
from tprl_hf import embedded_checkpoint
from tprl_hf.data import mosaic_vqa
from tprl_hf.loading import load_model

BUDGETS = [{"prune": False}, {"num_keep": 48}, {"keep_ratio": 2 / 9}, {"num_keep": 16}, {"num_keep": 8}]
KEPT = [144, 48, 32, 16, 8]
MANY = 8  # images whose full prompt is longer than the LLM's 1024 positions
# As users start it; and so that images are cut when they are read, without any cache.
WHOLE = {"block_size": 32, "enable_prefix_caching": True, "max_num_seqs": 64}
CHUNKS = {"block_size": 32, "enable_prefix_caching": False, "mm_processor_cache_gb": 0, "max_num_batched_tokens": 40}
ENGINES = {
    "original": WHOLE,
    "original, chunked": {**CHUNKS, "max_num_seqs": 8},
    "contiguous": {**WHOLE, "hf_overrides": {"position_ids": "contiguous"}},
    "contiguous, chunked": {**CHUNKS, "max_num_seqs": 8, "hf_overrides": {"position_ids": "contiguous"}},
}


@pytest.fixture(scope="module", params=ENGINES)
def llm(request):
    with engine(embedded_checkpoint(), limit_mm_per_prompt={"image": MANY}, **ENGINES[request.param]) as llm:
        llm.way = request.param
        yield llm


@pytest.fixture(scope="module")
def loaded(llm):
    model, processor = load_model()
    model.config.position_ids = llm.way.split(",")[0]
    return model, processor


@pytest.fixture(scope="module")
def samples() -> list[Request]:
    rows = mosaic_vqa(split="test", seed=7, num_samples=60)
    return [Request(row["prompt"], row["images"]) for row in rows]


@pytest.fixture(scope="module")
def crossed(samples) -> list[Request]:
    """Twelve images with five questions each; an image comes again after twelve requests."""
    draw = random.Random(0)
    pictures = draw.sample(samples, 12)
    asked = [[one, *draw.sample([other for other in samples if other is not one], 4)] for one in pictures]
    return [
        Request(other.question, one.images)
        for others in zip(*asked, strict=True)
        for one, other in zip(pictures, others, strict=True)
    ]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_the_same_tokens_at_five_budgets(llm, loaded, samples, budget):
    requests = [replace(sample, budget=budget) for sample in samples]
    outputs = ask(llm, loaded[1], requests)
    assert answers(outputs) == generated(*loaded, requests)
    kept = KEPT[BUDGETS.index(budget)]
    for request, output in zip(requests, outputs, strict=True):
        assert output.prompt_token_ids.count(loaded[0].config.image_token_id) == kept
        assert len(output.prompt_token_ids) < kept + len(request.question)


def test_one_image_and_five_questions_each_with_its_own_tokens(llm, loaded, crossed):
    requests = [replace(request, budget={"num_keep": 8}) for request in crossed]
    wanted = generated(*loaded, requests)
    assert answers(ask(llm, loaded[1], requests)) == wanted
    # the question matters: with the tokens of the image's first question, some answers would be others
    masks = [loaded[0].prune(**model_inputs(loaded[1], [request]), num_keep=8).keep_mask for request in requests]
    assert any(not torch.equal(mask, masks[index % 12]) for index, mask in enumerate(masks))


def test_mixed_budgets_in_one_batch_and_again_from_the_caches(llm, loaded, crossed):
    draw = random.Random(1)
    requests = [replace(request, budget=draw.choice(BUDGETS)) for request in crossed]
    wanted = generated(*loaded, requests)
    assert answers(ask(llm, loaded[1], requests)) == wanted
    outputs = ask(llm, loaded[1], requests)
    assert answers(outputs) == wanted
    if "chunked" not in llm.way:
        assert sum(output.num_cached_tokens or 0 for output in outputs) > 0


def test_the_llm_reads_its_positions_at_one_place(llm, loaded, samples):
    """A CUDA graph of a part of the LLM reads them where they lay when it was captured, and says nothing if that is
    over. There are no such graphs on a CPU."""
    seen = set()

    def watch(model):
        return model.lvlm.register_forward_pre_hook(lambda lvlm, arguments: seen.add(arguments[1].data_ptr()))

    (handle,) = llm.apply_model(watch)
    requests = [replace(sample, budget=BUDGETS[index % 5]) for index, sample in enumerate(samples[:10])]
    ask(llm, loaded[1], requests)
    handle.remove()
    assert len(seen) == 1


def test_without_a_budget_the_checkpoint_says(llm, loaded, samples):
    assert loaded[0].config.keep_ratio == pytest.approx(1 / 3)
    assert answers(ask(llm, loaded[1], samples[:10])) == generated(*loaded, samples[:10])


def test_a_question_without_an_image(llm, loaded, samples):
    requests = [Request(sample.question, []) for sample in samples[:4]]
    assert answers(ask(llm, loaded[1], requests)) == generated(*loaded, requests)


def test_more_tokens_than_there_are_keeps_all(llm, loaded, samples):
    few = [replace(samples[0], budget={"num_keep": 500}), replace(samples[0], budget={"prune": False})]
    first, second = ask(llm, loaded[1], few)
    assert first.prompt_token_ids == second.prompt_token_ids and answers([first]) == answers([second])


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"num_keep": 16, "keep_ratio": 0.5}, "Pass only one of"),
        ({"threshold": 0.5}, "threshold=0.5 cannot be used with vLLM"),
        ({"keep_ratio": 2.0}, r"the fraction that is KEPT, in \(0, 1\]; got 2.0"),
        ({"num_keep": 0}, "num_keep must be a whole number of at least 1; got 0"),
        ({"num_keep": "8"}, "num_keep must be a whole number of at least 1; got '8'"),
        ({"prune": 1}, "prune must be True or False; got 1"),
    ],
    ids=str,
)
def test_a_bad_budget_is_refused_and_the_next_request_answered(llm, loaded, samples, budget, message):
    with pytest.raises(ValueError, match=message):
        ask(llm, loaded[1], [replace(samples[0], budget=budget)])
    assert answers(ask(llm, loaded[1], samples[:1])) == generated(*loaded, samples[:1])


def test_several_images_share_the_budget_and_are_judged_one_by_one(llm, loaded, samples):
    """`generate` judges all images of a prompt together; inside vLLM each is alone with the question."""
    model, processor = loaded
    first, second = samples[0].images[0], next(s.images[0] for s in samples if s.images != samples[0].images)
    request = Request(samples[0].question, [first, second], {"num_keep": 20})
    masks = [
        model.prune(**model_inputs(processor, [Request(request.question, [image])]), num_keep=10).keep_mask
        for image in request.images
    ]
    inputs = model_inputs(processor, [request])
    sequence = model.generate(**inputs, keep_mask=torch.cat(masks), max_new_tokens=8, do_sample=False)[0]
    wanted = sequence[inputs["input_ids"].shape[1] :].tolist()
    (output,) = ask(llm, processor, [request])
    assert output.prompt_token_ids.count(model.config.image_token_id) == 20
    assert answers([output])[0] == wanted[: len(answers([output])[0])] and answers([output])[0]


def test_a_prompt_with_more_positions_than_the_llm_knows(llm, loaded, samples):
    request = Request(samples[0].question, samples[0].images * MANY, {"num_keep": 16})
    if "contiguous" in llm.way:  # there, what is dropped leaves no gap
        assert answers(ask(llm, loaded[1], [request]))[0]
    else:
        with pytest.raises(ValueError, match=r"the LLM knows 1024 positions\. Kept tokens keep theirs"):
            ask(llm, loaded[1], [request])


def test_a_second_question_does_not_run_the_tower_again(llm, loaded, samples):
    if llm.way != "original":
        pytest.skip("one engine is enough")
    new = noise((48, 48))
    first, second = [Request(sample.question, [new]) for sample in samples[:2]]
    assert first.question != second.question
    ask(llm, loaded[1], [first])
    keys = llm.apply_model(num_rows_kept)
    assert answers(ask(llm, loaded[1], [second])) == generated(*loaded, [second])
    assert llm.apply_model(num_rows_kept) == keys


def num_rows_kept(model) -> int:
    return len(model.rows_cache.rows)
