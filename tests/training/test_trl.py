"""TRL's trainers around a wrapped model: they run, pruned, and learn what `forward` would teach.

TRL runs the head itself, on the hidden states of `model.base_model`. So what counts is the width of what the LLM saw,
the loss against that of `forward`, and the gradients; a run that is not pruned looks as healthy.
"""

import contextlib

import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
)

from tests.families.stock_processors import save
from tests.families.tiny_models import IMAGE, VIDEO, build
from tests.stand_ins.noise import noise
from tprl_hf import TPRLForConditionalGeneration

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
Dataset = pytest.importorskip("datasets").Dataset

FAMILIES = ["llava", "gemma3", "qwen2_5_vl"]
LORA = {"r": 2, "target_modules": r".*language_model.*(q_proj|v_proj)", "task_type": "CAUSAL_LM"}
QUESTIONS = ["what is the colour of the cat ?", "where is the dog ?"] * 2
ANSWERS = ["red", "left of the cat", "blue", "right"]


class ImagesOnly(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's, without the processor of videos, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = IMAGE, VIDEO


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def base(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"{family}-base")
    build(family).save_pretrained(folder)
    save(family, folder)
    return folder


@pytest.fixture
def processor(family, base):
    if family != "qwen2_5_vl":
        return AutoProcessor.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    return ImagesOnly(AutoImageProcessor.from_pretrained(base), tokenizer, tokenizer.chat_template)


@pytest.fixture
def model(base, tmp_path):
    """Loaded from a checkpoint, where TRL finds the model it compares with once more."""
    torch.manual_seed(0)
    settings = {"latent_dim": 8, "keep_ratio": 0.5, "policy_training": {"stage": "lfd"}}
    TPRLForConditionalGeneration.from_base_model(base, **settings).save_pretrained(tmp_path / "start")
    return AutoModelForImageTextToText.from_pretrained(tmp_path / "start")


def pictures():
    return [noise((24, 24), seed=number) for number in range(len(QUESTIONS))]


def said(role, text):
    return [{"role": role, "content": text}]


def rows(kind):
    made = [{"images": [picture]} for picture in pictures()]
    if kind == "image":
        made = [{"image": row["images"][0]} for row in made]
    for row, question, answer in zip(made, QUESTIONS, ANSWERS, strict=True):
        asked = said("user", question)
        if kind == "messages":
            row["messages"] = asked + said("assistant", answer)
        elif kind in ("completion", "image"):
            row |= {"prompt": asked, "completion": said("assistant", answer)}
        elif kind == "preference":
            row |= {
                "prompt": asked,
                "chosen": said("assistant", answer),
                "rejected": said("assistant", "the green dog"),
            }
        else:
            row |= {"prompt": asked, "answer": answer}
    return Dataset.from_list(made)


def settings(kind, folder, **changes):
    common = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-3}
    common |= {"report_to": [], "use_cpu": True, "save_strategy": "no", "bf16": False}
    return kind(str(folder), **{**common, **changes})


@contextlib.contextmanager
def watched(model):
    """Widths of what the LLM was given, and the keep masks."""
    widths, masks = [], []

    def note(module, args, kwargs):
        given = kwargs.get("inputs_embeds")
        widths.append((args[0] if given is None else given).shape[1])

    handle = model.adapter.core.language_model.register_forward_pre_hook(note, with_kwargs=True)
    plan, model._plan = model._plan, lambda *args: masks.append(plan(*args)) or masks[-1]
    try:
        yield widths, masks
    finally:
        handle.remove()
        del model._plan


def full_width(processor, question=QUESTIONS[0]):
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(chat, tokenize=False)
    return processor(images=[pictures()[0]], text=[text], return_tensors="pt")["input_ids"].shape[1]


def lora_gradients(model):
    found = {name: weight.grad for name, weight in model.named_parameters() if "lora_" in name}
    assert found
    return found


# ---- supervised ----


@pytest.mark.parametrize("kind", ["messages", "completion", "image"])
@pytest.mark.parametrize("lora", [False, True])
def test_sft(model, processor, tmp_path, kind, lora):
    model.read_chat_template(processor)
    args = settings(trl.SFTConfig, tmp_path, max_length=None, learning_rate=0.0, max_steps=1)
    trainer = trl.SFTTrainer(
        model,
        args,
        train_dataset=rows(kind),
        processing_class=processor,
        peft_config=peft.LoraConfig(**LORA) if lora else None,
    )
    assert args.gradient_checkpointing  # TRL's default
    batch = trainer.data_collator(list(trainer.train_dataset.select(range(2))))
    items = (batch["labels"] != -100).sum()
    model.train()
    with torch.no_grad():
        expected = model(**batch, num_items_in_batch=items).loss
        unpruned = model(**batch, num_items_in_batch=items, prune=False).loss
        found = model(**batch, num_items_in_batch=items, fused_lm_head=True).loss
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, unpruned, atol=1e-4)

    with watched(model) as (widths, masks):
        trainer.train()
    assert max(widths) < full_width(processor) and masks
    (loss,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert loss > 0


def test_each_lora_pair_learns_and_the_base_stays(model, processor, tmp_path):
    args = settings(trl.SFTConfig, tmp_path, max_length=None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trl.SFTTrainer(
        model, args, train_dataset=rows("completion"), processing_class=processor, peft_config=peft.LoraConfig(**LORA)
    )
    trainer.train()
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            assert weight.abs().max() > 0, name
        elif "lora_A" not in name:
            assert not weight.requires_grad
    trainer.save_model(str(tmp_path / "adapter"))
    tuned = trainer.model.merge_and_unload()
    tuned.save_pretrained(tmp_path / "merged")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert any(not torch.equal(value, before[name]) for name, value in again.state_dict().items())
    for name, value in tuned.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("change", [{"gradient_checkpointing": False}, {"bf16": True}])
def test_sft_settings(model, processor, tmp_path, change):
    args = settings(trl.SFTConfig, tmp_path, max_length=None, **change)
    trainer = trl.SFTTrainer(model, args, train_dataset=rows("messages"), processing_class=processor)
    with watched(model) as (widths, _):
        trainer.train()
    assert max(widths) < full_width(processor)
    trainer.save_model(str(tmp_path / "out"))
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens(model, processor, tmp_path, kind):
    args = settings(trl.SFTConfig, tmp_path, max_length=None, gradient_checkpointing=False)
    trainer = trl.SFTTrainer(
        model, args, train_dataset=rows("completion"), processing_class=processor,
        peft_config=getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=2),
    )  # fmt: skip
    before = [parameter.detach().clone() for parameter in trainer.model.prompt_encoder.parameters()]
    with watched(model) as (widths, masks):
        trainer.train()
    full = [trainer.data_collator([row])["input_ids"].shape[1] for row in trainer.train_dataset]
    num_virtual = 2 if kind == "PromptTuningConfig" else 0
    assert masks and max(widths) < max(full) + num_virtual
    after = [*trainer.model.prompt_encoder.parameters()]
    assert any(not torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_evaluation(model, processor, tmp_path):
    args = settings(trl.SFTConfig, tmp_path, max_length=None, per_device_eval_batch_size=2)
    data = rows("completion")
    trainer = trl.SFTTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=processor)
    metrics = trainer.evaluate()
    batches = [trainer.data_collator(list(trainer.eval_dataset.select(range(i, i + 2)))) for i in (0, 2)]
    with torch.no_grad():
        losses = [model(**batch).loss * (batch["labels"] != -100).sum() for batch in batches]
    labels = sum((batch["labels"] != -100).sum() for batch in batches)
    assert metrics["eval_loss"] > 0 and torch.isfinite(sum(losses) / labels)


# ---- preferences ----


@pytest.mark.parametrize("lora", [False, True])
def test_dpo(model, processor, tmp_path, lora):
    args = settings(trl.DPOConfig, tmp_path, max_length=None)
    trainer = trl.DPOTrainer(
        model, args=args, train_dataset=rows("preference"), processing_class=processor,
        peft_config=peft.LoraConfig(**LORA) if lora else None,
    )  # fmt: skip
    assert lora or type(trainer.ref_model) is type(model)
    with watched(model) as (widths, masks):
        trainer.train()
    full = [trainer.data_collator([row])["input_ids"].shape[1] for row in trainer.train_dataset]
    assert max(widths) < max(full)
    for plan in masks:
        chosen, rejected = plan.keep_mask.view(2, -1)  # of a batch all chosen come first
        assert torch.equal(chosen, rejected)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[1] != losses[0]
    assert all(entry["grad_norm"] > 0 for entry in trainer.state.log_history if "grad_norm" in entry)


# ---- rewards ----


def long_answers(completions, **columns):
    return [float(len(completion[0]["content"])) for completion in completions]


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
@pytest.mark.parametrize("lora", [False, True])
def test_online(model, processor, tmp_path, name, lora):
    online = {"num_generations": 2, "max_completion_length": 5, "num_iterations": 2, "beta": 0.04}
    args = settings(getattr(trl, f"{name}Config"), tmp_path, per_device_train_batch_size=4, **online)
    trainer = getattr(trl, f"{name}Trainer")(
        model, reward_funcs=long_answers, args=args, train_dataset=rows("question"), processing_class=processor,
        peft_config=peft.LoraConfig(**LORA) if lora else None,
    )  # fmt: skip
    with watched(model) as (widths, masks):
        trainer.train()
    assert max(widths) < full_width(processor) + 5
    by_question = {tuple(plan.num_kept.tolist()) for plan in masks}
    assert by_question and all(kept > 0 for counts in by_question for kept in counts)
    first = next(entry for entry in trainer.state.log_history if "kl" in entry)
    assert first["kl"] == pytest.approx(0, abs=1e-6)  # scored as it was generated


# ---- what they rely on ----


def test_states_of_the_core_are_those_of_forward(model, processor):
    inputs = processor(
        images=[[picture] for picture in pictures()[:2]],
        text=[processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}], tokenize=False
        ) for text in QUESTIONS[:2]],
        padding=True,
        return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        for call in ({}, {"prune": False}, {"keep_ratio": 1.0}, {"num_keep": 3}):
            states = model.base_model(**inputs, **call).last_hidden_state
            expected = model(**inputs, **call, output_hidden_states=True).hidden_states[-1]
            assert torch.equal(states, expected)
        unpruned = model.base_model(**inputs, prune=False).last_hidden_state
        assert torch.equal(unpruned, model.lvlm.base_model(**inputs).last_hidden_state)
    assert model.base_model.config is model.lvlm.config
    assert model.base_model == model.base_model and model.base_model.get_input_embeddings() is not None
    assert model.config.image_token_id == model.lvlm.config.image_token_id
    assert model.get_decoder() is model.lvlm.get_decoder()
