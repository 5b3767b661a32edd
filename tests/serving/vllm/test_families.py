"""Tiny random models of each family: the same tokens as `generate`, for images of several sizes."""

from types import SimpleNamespace

import pytest

from tests.serving.vllm.engine import INTERPRETED, Request, answers, ask, engine, generated, model_inputs, save_tiny
from tests.stand_ins.noise import noise
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.loading import load_model
from tprl_hf.missing_packages import load_processor
from tprl_hf.serving.vllm_plugin.engine_config import PrunedEngineConfig

BUDGETS = [{"prune": False}, {}, {"keep_ratio": 0.3}, {"num_keep": 3}, {"num_keep": 9}]
QUESTIONS = ["what colour is the cat ?", "where is the dog", "red left green"]
SIZES = [(40, 30), (30, 60), (24, 24), (70, 30)]
POLICY = {
    **{"policy_training": {"stage": "lfd"}, "policy_positions": True, "policy_budget": True},
    **{"policy_num_heads": 4, "policy_input_norm": True, "policy_similarity": True},
}
WAYS = [
    ("llava_next", {}),
    ("llava_onevision", {}),
    ("qwen2_5_vl", {}),
    ("qwen2_5_vl", {"position_ids": "contiguous"}),
    ("qwen3_vl", {"num_steps": 2, "policy_steps": 2}),
]


@pytest.fixture(scope="module", params=WAYS, ids=str)
def checkpoint(request, tmp_path_factory):
    family, settings = request.param
    folder = tmp_path_factory.mktemp(family)
    save_tiny(family, folder / "base")
    model = TPRLForConditionalGeneration.from_base_model(
        str(folder / "base"), keep_ratio=0.5, policy_dim=32, **POLICY, **settings
    )
    processor = load_processor(str(folder / "base"))
    model.read_chat_template(processor)
    model.save_pretrained(folder / "merged", save_base_model=True)
    processor.save_pretrained(folder / "merged")
    return folder / "merged"


LIMITS = {"max_model_len": 256, "max_num_seqs": 8, "limit_mm_per_prompt": {"image": 2}}


# The LLM compiled, as users start it, for positions of one axis and of three.
@pytest.fixture(scope="module", params=["eager", "compiled"])
def llm(request, checkpoint):
    compiled = request.param == "compiled"
    if compiled and INTERPRETED:
        pytest.skip("Triton's interpreter does not go with compiling")
    if compiled and not any(family in str(checkpoint) for family in ("llava_next", "qwen3_vl")):
        pytest.skip("two families are compiled, which takes a minute each")
    with engine(checkpoint, enforce_eager=not compiled, **LIMITS) as llm:
        yield llm


def test_the_same_tokens_at_five_budgets(llm, checkpoint):
    model, processor = load_model(str(checkpoint), "cpu")
    pictures = [noise(size, seed=number) for number, size in enumerate(SIZES)]
    requests = [
        Request(question, [picture], budget) for budget in BUDGETS for picture in pictures for question in QUESTIONS
    ]
    outputs = ask(llm, processor, requests)
    wanted = generated(model, processor, requests)
    assert answers(outputs) == wanted
    assert len({tuple(answer) for answer in wanted}) > len(pictures)  # images, questions and budgets matter
    for request, output in zip(requests, outputs, strict=True):
        plan = model.prune(**model_inputs(processor, [request]), **request.budget)
        assert output.prompt_token_ids.count(model.config.image_token_id) == int(plan.num_kept)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"enable_dbo": True}, "cannot run in micro-batches"),
        ({"ubatch_size": 2}, "cannot run in micro-batches"),
        ({"pipeline_parallel_size": 2}, "cannot be cut into 2 pipeline stages"),
    ],
    ids=str,
)
def test_ways_to_cut_a_batch_or_the_llm_are_refused(settings, message):
    from vllm.config import ParallelConfig

    with pytest.raises(ValueError, match=message):
        PrunedEngineConfig.verify_and_update_config(SimpleNamespace(parallel_config=ParallelConfig(**settings)))
