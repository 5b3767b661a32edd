"""The embedded checkpoint: what must hold on real weights, and that it answers."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

import tprl_hf
from tests.reference import delete_by_hand
from tprl_hf.data import easy_vqa, mosaic_vqa
from tprl_hf.evaluation.answers import chat_inputs
from tprl_hf.pruners import CDPruner, DivPrune, QuerySimilarityPruner, VisPruner
from tprl_hf.training.answer_batches import SampleEncoder

TOLERANCE = 2e-5
NUM_ANSWERED = 240
MAX_MEGABYTES = 10


@pytest.fixture(scope="module")
def path():
    return tprl_hf.embedded_checkpoint()


@pytest.fixture(scope="module")
def processor(path):
    return AutoProcessor.from_pretrained(path)


@pytest.fixture(scope="module")
def model(path):
    return AutoModelForImageTextToText.from_pretrained(path).eval()


@pytest.fixture(scope="module")
def samples():
    return mosaic_vqa(split="test", seed=1, num_samples=NUM_ANSWERED)


def encode(processor, samples, padding_side="left"):
    prompts = [
        processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}] * len(row["images"]) + [{"type": "text", "text": row["prompt"]}],
                }
            ],
            add_generation_prompt=True,
        )
        for row in samples
    ]
    images = [image for row in samples for image in row["images"]]
    return processor(images=images or None, text=prompts, padding=True, padding_side=padding_side, return_tensors="pt")


def deviation(a, b):
    return (a.double() - b.double()).abs().max().item()


def test_it_is_small_and_in_half_precision(path):
    files = list(Path(path).rglob("*"))
    assert sum(file.stat().st_size for file in files if file.is_file()) <= MAX_MEGABYTES * 1e6
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pkl", ".py")]
    with safe_open(Path(path) / "model.safetensors", "pt") as weights:
        dtypes = {name.startswith("lvlm."): weights.get_slice(name).get_dtype() for name in weights.keys()}
    assert dtypes == {True: "F16", False: "F32"}  # the policy stays in float32


def test_pages_say_how_large_it_is(model):
    """Photo-LLaVA's number is held where its parts are, in test_bed/test_photo_recipe.py."""
    count = sum(weight.numel() for weight in model.lvlm.parameters())
    assert f"{count / 1e6:.1f} million parameters" == "3.4 million parameters"
    root = Path(__file__).parents[1]
    for page in ("docs/reproduction.md", "model_cards/mosaic-llava.md", "tprl_hf/__init__.py"):
        assert "3.4 million parameters" in (root / page).read_text(encoding="utf-8"), page
    llm = sum(weight.numel() for weight in model.lvlm.model.language_model.parameters())
    assert f"{llm / 1e6:.1f} million parameters" in (root / "docs/your_model.md").read_text(encoding="utf-8")
    for page in ("README.md", "tprl_hf/cli/demo.py"):
        assert "152 million parameters" in (root / page).read_text(encoding="utf-8"), page


@torch.no_grad()
def test_keep_all_equals_base(model, processor, samples):
    inputs = encode(processor, samples.select(range(12)))
    attended = inputs["attention_mask"].bool()
    # Left to itself a direct `forward` of LLaVA counts positions from the padding on, unlike `generate`; shifted
    # rotary embeddings round differently, here by 1e-4.
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = model.lvlm(**inputs, position_ids=positions).logits[attended]
    assert deviation(model(**inputs, keep_ratio=1.0).logits[attended], expected) <= TOLERANCE
    tokens = model.lvlm.generate(**inputs, max_new_tokens=4)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, keep_ratio=1.0), tokens)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, prune=False), tokens)


@pytest.mark.parametrize("position_ids", ["original", "contiguous"])
@torch.no_grad()
def test_pruned_equals_deletion_by_hand(path, processor, samples, position_ids):
    model = tprl_hf.TPRLForConditionalGeneration.from_base_model(
        path, dtype=torch.float32, position_ids=position_ids
    ).eval()
    inputs = encode(processor, samples.select([0]))
    with model.using(VisPruner(keep_ratio=1 / 3)):
        keep_mask = model.prune(**inputs).keep_mask
    assert keep_mask.sum() == 48
    expected, tokens = delete_by_hand(model.lvlm, inputs, keep_mask, position_ids, new_tokens=4)
    assert deviation(model(**inputs, keep_mask=keep_mask, compact=True).logits, expected) <= TOLERANCE
    for use_cache in (True, False):
        sequences = model.generate(
            **inputs, keep_mask=keep_mask, max_new_tokens=4, min_new_tokens=4, use_cache=use_cache, eos_token_id=-1
        )
        assert sequences[0, -4:].tolist() == tokens


@torch.no_grad()
def test_batch_equals_singles_on_either_padding_side(model, processor, samples):
    chosen = samples.select([0, 3, 7, 10])
    batches = {side: encode(processor, chosen, side) for side in ("left", "right")}
    with model.using(VisPruner(keep_ratio=1 / 3)):
        logits = {side: model(**batch, compact=True).logits for side, batch in batches.items()}
        for row in range(len(chosen)):
            alone = model(**encode(processor, chosen.select([row])), compact=True).logits[0]
            for side in batches:
                assert deviation(logits[side][row, -len(alone) :], alone) <= TOLERANCE


@torch.no_grad()
def test_saved_equals_loaded(path, model, processor, samples, tmp_path):
    inputs = encode(processor, samples.select(range(3)))
    expected = model(**inputs, keep_ratio=1 / 3)
    for name, whole in (("policy", False), ("merged", True)):
        model.save_pretrained(tmp_path / name, save_base_model=whole)
        base = {} if whole else {"base_model": path}  # the LVLM of a checkpoint that holds it has no other name
        loaded = tprl_hf.TPRLForConditionalGeneration.from_pretrained(tmp_path / name, dtype=torch.float32, **base)
        output = loaded(**inputs, keep_ratio=1 / 3)
        assert torch.equal(output.keep_mask, expected.keep_mask)
        assert torch.equal(output.logits, expected.logits)


@torch.no_grad()
def test_returned_sequences_begin_with_the_original_prompt(model, processor, samples):
    inputs = encode(processor, samples.select(range(4)))
    with model.using(VisPruner(keep_ratio=1 / 3)):
        sequences = model.generate(**inputs, max_new_tokens=3)
    assert torch.equal(sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])


@torch.no_grad()
def test_text_without_an_image_is_answered(model, processor):
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": "How many circles are there?"}], add_generation_prompt=True
    )
    inputs = processor(text=prompt, return_tensors="pt")
    expected = model.lvlm.generate(**inputs, max_new_tokens=3)
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, keep_ratio=1 / 3), expected)


def accuracy(model, processor, samples, **budget):
    correct = []
    for start in range(0, len(samples), 40):
        part = samples.select(range(start, min(start + 40, len(samples))))
        inputs = encode(processor, part)
        sequences = model.generate(**inputs, max_new_tokens=4, **budget)
        answers = processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        correct += [answer == row["answer"] for answer, row in zip(answers, part, strict=True)]
    return sum(correct) / len(correct)


@torch.no_grad()
def test_it_answers(model, processor, samples):
    # The card says how well; here it is enough that answers come from the image.
    full = accuracy(model, processor, samples, prune=False)
    assert full >= 0.75
    pruned = accuracy(model, processor, samples, keep_ratio=1 / 3)
    with model.using(VisPruner(num_keep=1)):
        blind = accuracy(model, processor, samples)
    assert blind < pruned <= full + 0.05
    pytest.importorskip("easy_vqa")
    assert accuracy(model, processor, easy_vqa("test", num_samples=80), prune=False) >= 0.85


@torch.no_grad()
def test_its_policy_prunes_by_default_and_beats_rules(model, processor, samples):
    assert model.prune(**encode(processor, samples.select([0]))).num_kept.tolist() == [48]
    learned = accuracy(model, processor, samples, keep_ratio=1 / 9)
    for pruner in (VisPruner(keep_ratio=1 / 9), DivPrune(keep_ratio=1 / 9)):
        with model.using(pruner):
            assert accuracy(model, processor, samples) < learned


@torch.no_grad()
def test_its_policy_reads_the_question(model, processor, samples):
    image, prompts = samples[0]["images"], [row["prompt"] for row in samples.select(range(6))]
    assert len(set(prompts)) == 6
    rows = Dataset.from_list([{"images": image, "prompt": prompt} for prompt in prompts])
    masks = model.prune(**encode(processor, rows), keep_ratio=1 / 9).keep_mask.view(6, -1)
    assert len({tuple(mask.tolist()) for mask in masks}) == 6


def test_trainers_commands_and_plain_calls_read_the_same_question(model, processor, samples):
    rows = [samples[i] for i in range(0, 12, 2)]
    asked = chat_inputs(processor, rows)
    for row, ids, mask in zip(rows, asked["input_ids"], asked["query_mask"], strict=True):
        assert ids[mask].tolist() == processor.tokenizer(row["prompt"], add_special_tokens=False).input_ids
    trained = SampleEncoder(model, processor)(rows).inputs
    words = model.get_input_embeddings()(asked["input_ids"][asked["query_mask"]])
    assert torch.equal(trained.query[trained.query_valid], words)
    for pruner in (QuerySimilarityPruner(keep_ratio=0.2), CDPruner(keep_ratio=0.2), model.pruner):
        with model.using(pruner):
            plain = model.prune(**encode(processor, rows)).keep_mask
            assert torch.equal(plain, model.prune(**asked).keep_mask)
