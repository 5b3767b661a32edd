"""transformers' Trainer and PEFT around a wrapped model, as around its base."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
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


KINDS = ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"]
# PEFT looks for the cache under its old name, and begins each new token of a base model with the virtual ones again.
BASE_ANSWERS = Version(transformers.__version__) < Version("5.24") or Version(peft.__version__) >= Version("0.22")


def with_virtual_tokens(model, kind, seed=0):
    """PEFT around a model, and what it trains, the same for each seed."""
    torch.manual_seed(seed)
    settings = {"encoder_hidden_size": 16} if kind == "PromptEncoderConfig" else {}
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4, **settings)
    tuned = peft.get_peft_model(model, config)
    for parameter in tuned.prompt_encoder.parameters():
        parameter.data.normal_(std=0.5)
    return tuned.train()


def loss_and_gradient(tuned, batch, **call):
    loss = tuned(**batch, **call).loss
    tuned.zero_grad()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in tuned.prompt_encoder.parameters()])


@torch.no_grad()
def greedy_by_forward(tuned, inputs, new_tokens):
    """What `generate` of a model should give for one sample, without a cache."""
    for _ in range(new_tokens):
        token = tuned(**inputs).logits[:, -1].argmax(-1, keepdim=True)
        added = {"input_ids": token, "attention_mask": torch.ones_like(token)}
        of_columns = [name for name, value in inputs.items() if value.shape == inputs["input_ids"].shape]
        longer = {n: torch.cat([inputs[n], added.get(n, torch.zeros_like(token))], 1) for n in of_columns}
        inputs = {**inputs, **longer}
    return inputs["input_ids"]


@pytest.mark.filterwarnings("ignore:Token type ids are not supported", "ignore:Position ids are not supported")
@pytest.mark.parametrize("kind", KINDS)
def test_virtual_tokens(model, family, kind):
    """Of prompt tuning, P-tuning and prefix tuning: they learn and answer as around the base model."""
    batch, call = batch_of(family, [0]), {"keep_ratio": 1.0}
    tuned, of_base = with_virtual_tokens(model, kind), with_virtual_tokens(copy.deepcopy(model.lvlm), kind)
    kept = loss_and_gradient(tuned, batch, **call)
    if (
        family != "qwen2_5_vl"
    ):  # of which transformers forgets the positions, or fails, without input_ids or behind a cache
        torch.testing.assert_close(kept, loss_and_gradient(of_base, batch), atol=1e-5, rtol=1e-4)
    answer = tuned.eval().generate(**inputs_alone(batch), **call, max_new_tokens=3)
    if BASE_ANSWERS:
        assert torch.equal(answer, of_base.eval().generate(**inputs_alone(batch), max_new_tokens=3))
    elif family != "qwen2_5_vl":
        assert torch.equal(answer, greedy_by_forward(of_base.eval(), inputs_alone(batch), 3))
    beams = tuned.generate(**inputs_alone(batch), max_new_tokens=3, num_beams=2)
    assert beams.shape == answer.shape

    # pruned: what is generated is what `forward` finds most likely, and a batch is its samples
    tuned = with_virtual_tokens(model, kind)
    loss, gradient = loss_and_gradient(tuned, batch)
    assert (loss - kept[0]).abs() > 1e-6 and gradient.any()
    tuned.eval()
    one, other = (inputs_alone(batch_of(family, [seed])) for seed in (0, 3))
    answers = tuned.generate(**one, max_new_tokens=4)
    length = one["input_ids"].shape[1]
    with torch.no_grad():
        types = {n: v for n, v in one.items() if v.shape == one["input_ids"].shape and n.endswith("type_ids")}
        longer = {n: torch.nn.functional.pad(v, (0, 4)) for n, v in types.items()}
        whole = {**one, **longer, "input_ids": answers, "attention_mask": torch.ones_like(answers)}
        keep_mask = model.prune(**one).keep_mask
        assert keep_mask.sum() == len(keep_mask) / 2
        logits = tuned(**whole, keep_mask=keep_mask).logits
        found = logits[:, -5:-1].argmax(-1)
        assert torch.equal(found, answers[:, length:])
    both = tuned.generate(**inputs_alone(batch_of(family, [0, 3])), max_new_tokens=4)
    assert torch.equal(both[0, -4:], answers[0, -4:])
    assert torch.equal(both[1, -4:], tuned.generate(**other, max_new_tokens=4)[0, -4:])
    assert torch.equal(both[:1, :-4][:, -length:], one["input_ids"])
    # of the model by itself nothing is left behind
    alone = model.generate(**one, max_new_tokens=4)
    assert alone.shape == answers.shape and not hasattr(model, "peft_config")
