"""transformers' Trainer and PEFT around a wrapped model, as around its base."""

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.families.tiny_models import build, collate, sample
from tprl_hf import TPRLForConditionalGeneration

peft = pytest.importorskip("peft")

FAMILIES = ["llava", "gemma3", "qwen2_5_vl"]
LORA = {"r": 2, "target_modules": r".*language_model.*(q_proj|v_proj)"}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    torch.manual_seed(0)
    settings = {"latent_dim": 8, "keep_ratio": 0.5, "policy_training": {"stage": "lfd"}}
    return TPRLForConditionalGeneration.from_base_model(build(family), **settings).eval()


def batch_of(family, seeds):
    inputs = collate(family, [sample(family, 1, seed) for seed in seeds])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -5:] = inputs["input_ids"][:, -5:]
    return {**inputs, "labels": labels}


def trainer_of(model, family, folder, **settings):
    metrics = settings.pop("compute_metrics", None)
    arguments = TrainingArguments(
        str(folder), report_to=[], use_cpu=True, remove_unused_columns=False, dataloader_pin_memory=False,
        per_device_train_batch_size=2, per_device_eval_batch_size=2, save_strategy="no", **settings,
    )  # fmt: skip
    return Trainer(
        model,
        arguments,
        data_collator=lambda seeds: batch_of(family, seeds),
        train_dataset=[0, 0, 3, 3],
        eval_dataset=[0, 3, 6],  # images of one size
        compute_metrics=metrics,
    )


def test_predictions_belong_to_labels(model, family, tmp_path):
    seen = {}

    def compare(prediction):
        logits, labels = prediction.predictions, prediction.label_ids
        assert logits.shape[:2] == labels.shape
        chosen = labels[:, 1:] != -100
        seen["correct"] = (logits[:, :-1].argmax(-1) == labels[:, 1:])[chosen].mean()
        return {"accuracy": float(seen["correct"])}

    metrics = trainer_of(model, family, tmp_path, compute_metrics=compare).evaluate()
    assert metrics["eval_accuracy"] == seen["correct"]
    predicted = trainer_of(model, family, tmp_path).predict([0, 3])
    batch = batch_of(family, [0, 3])
    with torch.no_grad():
        output = model(**batch)
    assert torch.allclose(torch.tensor(predicted.predictions), output.logits, atol=1e-5)
    assert predicted.metrics["test_loss"] == pytest.approx(output.loss.item(), abs=1e-5)


def test_label_smoothing(model, family, tmp_path):
    """transformers compares each column's logits with its own label, unless it knows the class for a causal LM's."""
    trainer = trainer_of(model, family, tmp_path, label_smoothing_factor=0.1, max_steps=1, learning_rate=0.0)
    batch = batch_of(family, [0, 0])
    with torch.no_grad():
        logits = model(**inputs_alone(batch)).logits
    chosen = batch["labels"] != -100
    given = torch.log_softmax(logits[chosen], -1)
    wanted = -0.9 * given.gather(1, batch["labels"][chosen][:, None]).mean() - 0.1 * given.mean()
    assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(wanted.item(), abs=1e-5)
    trainer.train()


# ---- PEFT ----


@pytest.mark.parametrize("targets", ["all-linear", "ALL-LINEAR"])
def test_all_linear_leaves_policy_and_autoencoder_alone(model, targets):
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    names = [name for name, _ in tuned.named_parameters() if "lora_" in name]
    assert any("language_model" in name for name in names)
    assert not [name for name in names if ".policy." in name or ".autoencoder." in name]


def test_adapters_load_again_exactly(model, family, tmp_path):
    whole = copy.deepcopy(model)
    tuned = peft.get_peft_model(model, peft.LoraConfig(modules_to_save=["policy"], **LORA))
    assert trainer_of(tuned, family, tmp_path / "run", max_steps=2, learning_rate=0.01).train().global_step == 2
    for name, weight in tuned.named_parameters():
        assert "lora_B" not in name or weight.abs().max() > 0, name
    tuned.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()
    batch = batch_of(family, [0, 3])
    tuned.eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, tuned(**batch).logits)
        assert torch.equal(again(**batch, keep_ratio=0.3).keep_mask, tuned(**batch, keep_ratio=0.3).keep_mask)
        assert torch.equal(
            again.generate(**inputs_alone(batch), max_new_tokens=3),
            tuned.generate(**inputs_alone(batch), max_new_tokens=3),
        )


def inputs_alone(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_virtual_tokens_are_refused(model, family, kind):
    """In `generate` they would be left out without a word."""
    sizes = {"num_layers": 2, "token_dim": 32, "num_attention_heads": 4}
    if kind == "PrefixTuningConfig":
        sizes |= {"token_dim": 16, "num_attention_heads": 2}
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4, **sizes)
    tuned, batch = peft.get_peft_model(model, config), batch_of(family, [0])
    with pytest.raises(ValueError, match="take LoRA"):
        tuned.generate(**inputs_alone(batch), max_new_tokens=2)
    with pytest.raises(ValueError, match="take LoRA"):
        tuned(**batch)
