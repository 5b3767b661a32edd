"""What was changed in the LVLM is in each checkpoint, or saving refuses and says what to do.

Three families: LLaVA, whose images are a list, Gemma 3, whose images are a tensor, and Qwen2.5-VL with its positions.
"""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig, Trainer, TrainingArguments
from transformers.utils import logging

from tests.families.tiny_models import FAMILIES as FAMILY_MODELS
from tests.families.tiny_models import build, collate, sample
from tprl_hf import TPRLConfig, TPRLForConditionalGeneration
from tprl_hf.modeling.checkpoint_checks import recorded_of_base

peft = pytest.importorskip("peft")

FAMILIES = ["llava", "gemma3", "qwen2_5_vl"]
LORA = {"r": 2, "target_modules": r".*language_model.*(q_proj|v_proj)"}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def base(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"{family}-base")
    build(family).save_pretrained(folder)
    return folder


@pytest.fixture
def model(base):
    return wrap(base)


def wrap(base):
    torch.manual_seed(0)
    return TPRLForConditionalGeneration.from_base_model(base, latent_dim=8, pruner="divprune", keep_ratio=0.5).eval()


def inputs_of(family, seed):
    inputs = collate(family, [sample(family, 1, seed)])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -4:] = inputs["input_ids"][:, -4:]
    return {**inputs, "labels": labels}


def together(rows):
    names = rows[0]
    return {name: torch.cat([row[name] for row in rows]) for name in names}


def trainer_of(model, family, folder, **settings):
    settings = {"max_steps": 4, "learning_rate": 0.01, "report_to": [], "use_cpu": True, **settings}
    arguments = TrainingArguments(
        str(folder),
        remove_unused_columns=False,
        per_device_train_batch_size=1,
        dataloader_pin_memory=False,
        **settings,
    )
    rows = [inputs_of(family, 3) for _ in range(4)]
    return Trainer(model, arguments, data_collator=together, train_dataset=rows)


# ---- ways to change the LVLM; each gives the model to save ----


def by_hand(model, family):
    optimizer = torch.optim.SGD(model.lvlm.parameters(), 0.5)
    model(**inputs_of(family, 1)).loss.backward()
    optimizer.step()
    return model


def lora_merged_into(model):
    tuned = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return tuned.merge_and_unload().requires_grad_(True)


def merged_lora(model, family):
    return lora_merged_into(model)


def merged_lora_inside(model, family):
    model.lvlm = lora_merged_into(model.lvlm)
    return model


def one_value(model, family):
    """Written past autograd's version counter."""
    model.get_input_embeddings().weight.data[7, 3] += 1
    return model


def two_rows_swapped(model, family):
    weight = model.get_input_embeddings().weight.data
    weight[[7, 8]] = weight[[8, 7]]
    return model


def another_tensor(model, family):
    weight = next(weight for name, weight in model.lvlm.named_parameters() if "v_proj" in name)
    weight.data = weight.data + 1
    return model


def other_weights(model, family):
    model.lvlm.load_state_dict(build(family, seed=5).state_dict())
    return model


def more_words(model, family):
    torch.manual_seed(0)
    model.resize_token_embeddings(110)
    return model


def tuned_in_half(model, family):
    return one_value(model.bfloat16(), family)


CHANGES = [
    by_hand,
    merged_lora,
    merged_lora_inside,
    one_value,
    two_rows_swapped,
    another_tensor,
    other_weights,
    more_words,
    tuned_in_half,
]
STRUCTURE = {more_words: more_words, tuned_in_half: lambda model, family: model.bfloat16()}


def assert_same(found, expected):
    state, wanted = found.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value), name


def policy_only(folder):
    return all(name.startswith(("policy.", "autoencoder.")) for name in load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("way", ["save_pretrained", "save_model"])
def test_what_was_changed_is_saved(model, family, tmp_path, change, way):
    changed = change(model, family)
    if way == "save_pretrained":
        changed.save_pretrained(tmp_path / "out")
    else:
        trainer_of(changed, family, tmp_path / "run").save_model(str(tmp_path / "out"))
    assert_same(AutoModelForImageTextToText.from_pretrained(tmp_path / "out"), changed)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    again.save_pretrained(tmp_path / "twice")  # neither its name nor its kind of checkpoint says that it was changed
    assert_same(AutoModelForImageTextToText.from_pretrained(tmp_path / "twice"), changed)


@pytest.mark.parametrize(
    "change",
    [None, by_hand, merged_lora, more_words, tuned_in_half],
    ids=lambda change: getattr(change, "__name__", "untouched"),
)
def test_a_checkpoint_of_trainer_resumes_exactly(base, family, tmp_path, change):
    """Four steps are two, and two more in another process."""

    def start(prepare):
        model = wrap(base)
        return model if prepare is None else prepare(model, family)

    settings = {"save_steps": 2, "seed": 3}
    straight = start(change)
    trainer_of(straight, family, tmp_path / "run", **settings).train()
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "run/checkpoint-4")
    assert_same(saved, straight)
    resumed = start(STRUCTURE.get(change))
    trainer = trainer_of(resumed, family, tmp_path / "other", **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert trainer.state.global_step == 4
    assert_same(resumed, straight)


# ---- what was not changed ----


def untouched(model):
    return model


def in_half(model):
    return model.half()


def there_and_back(model):
    return model.double().float()


def read_again(model):
    model.load_state_dict(model.state_dict())
    return model


def answered(model):
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, prune=False)
    return model


def copied(model):
    return copy.deepcopy(model)


@pytest.mark.parametrize("keep", [untouched, in_half, there_and_back, read_again, answered, copied])
def test_an_untouched_base_is_named(model, base, tmp_path, keep):
    kept = keep(model)
    kept.save_pretrained(tmp_path / "out")
    assert policy_only(tmp_path / "out")
    loaded = TPRLForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert_same(loaded.to(kept.dtype), kept)
    assert loaded.config.base_model_name_or_path == str(base)
    kept.save_pretrained(tmp_path / "merged", save_base_model=True)
    merged = TPRLForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert_same(merged, kept)
    merged.save_pretrained(tmp_path / "apart")
    assert policy_only(tmp_path / "apart")


@pytest.mark.parametrize("tuned", [False, True])
def test_a_live_base_is_compared_with_its_name(base, family, tmp_path, tuned):
    """It may have been tuned before it was wrapped."""
    live = AutoModelForImageTextToText.from_pretrained(base)
    if tuned:
        live = lora_merged_into(live)
    model = TPRLForConditionalGeneration.from_base_model(live, latent_dim=8, pruner="divprune")
    model.save_pretrained(tmp_path)
    assert policy_only(tmp_path) != tuned
    assert_same(TPRLForConditionalGeneration.from_pretrained(tmp_path), model)


def test_a_base_that_nobody_finds_again_is_saved(family, tmp_path):
    model = TPRLForConditionalGeneration.from_base_model(build(family), latent_dim=8, pruner="divprune")
    model.save_pretrained(tmp_path / "no-name")
    assert_same(TPRLForConditionalGeneration.from_pretrained(tmp_path / "no-name"), model)
    model.config.base_model_name_or_path = str(tmp_path / "gone")
    model.save_pretrained(tmp_path / "gone-base")
    assert_same(TPRLForConditionalGeneration.from_pretrained(tmp_path / "gone-base"), model)


# ---- words of one's own ----


def test_the_policy_alone_of_a_tuned_model_is_refused(model, family, tmp_path):
    with pytest.raises(ValueError, match=r"would lose [12] weights .*\(such as .*embed_tokens.*\): leave it out"):
        one_value(model, family).save_pretrained(tmp_path, save_base_model=False)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_state_dict_that_is_given_is_what_counts(model, family, tmp_path):
    """As `Trainer` gives it under FSDP."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "same", state_dict=state)
    assert policy_only(tmp_path / "same")
    changed = one_value(copy.deepcopy(model), family)
    model.save_pretrained(tmp_path / "changed", state_dict=changed.state_dict())
    assert_same(TPRLForConditionalGeneration.from_pretrained(tmp_path / "changed"), changed)
    state["policy.query_proj.weight"] += 1
    model.save_pretrained(tmp_path / "policy", state_dict=state)
    loaded = TPRLForConditionalGeneration.from_pretrained(tmp_path / "policy")
    assert torch.equal(loaded.policy.query_proj.weight, state["policy.query_proj.weight"])
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "model.safetensors").exists()


# ---- what no checkpoint of ours holds ----


def lora_inside(model):
    peft.get_peft_model(model.lvlm, peft.LoraConfig(**LORA))


def adapter_of_the_base(model):
    """As transformers' `add_adapter` does it, which refuses PEFT 0.21 since transformers 5.24."""
    peft.inject_adapter_in_model(config := peft.LoraConfig(**LORA), model.lvlm)
    model.lvlm.peft_config, model.lvlm._hf_peft_config_loaded = {"default": config}, True


def lora_around(model):
    peft.get_peft_model(model, peft.LoraConfig(modules_to_save=["policy"], **LORA))


@pytest.mark.parametrize("add", [lora_inside, adapter_of_the_base, lora_around])
@pytest.mark.parametrize("save_base_model", [None, False, True])
def test_adapters_are_refused(model, family, tmp_path, add, save_base_model):
    add(model)
    with pytest.raises(ValueError, match=r"adapters \(such as .*\).*PeftModel.*merge_and_unload"):
        model.save_pretrained(tmp_path, save_base_model=save_base_model)
    with pytest.raises(ValueError, match="adapters"):
        trainer_of(model, family, tmp_path / "run").save_model(str(tmp_path))
    assert not list(tmp_path.glob("*.safetensors"))


def test_adapters_of_the_whole_are_refused_before_they_are_trained(model):
    with pytest.raises(ValueError, match="get_peft_model"):
        model.add_adapter(peft.LoraConfig(**LORA))


def test_modules_that_its_config_does_not_know_are_refused(model, tmp_path):
    model.lvlm.register_parameter("extra", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match=r"such as extra.*from_pretrained would not bring them back"):
        model.save_pretrained(tmp_path)


def test_a_comparison_that_cannot_be_made_is_told(model, tmp_path):
    model.config.base_model_name_or_path = "nobody/has-this"
    said = []
    logger = logging.get_logger("tprl_hf.modeling.checkpoint_tprl")
    logger.warning, before = said.append, logger.warning
    try:
        model.save_pretrained(tmp_path / "by-default")
        model.save_pretrained(tmp_path / "alone", save_base_model=False)
    finally:
        logger.warning = before
    assert not policy_only(tmp_path / "by-default") and policy_only(tmp_path / "alone")
    assert "not on this machine to compare with" in said[0] and "could not be compared" in said[1]


# ---- the config of the base ----


def part_of(config):
    return config.base_config.vision_config


def test_a_policy_remembers_what_its_base_models_config_was(base, tmp_path):
    """A policy that was trained with another layer of the tower would choose by features that it has never seen."""
    name, value = "hidden_act", "relu"
    text = AutoConfig.from_pretrained(base).get_text_config().rms_norm_eps * 10
    model = wrap(base)
    setattr(part_of(model.config), name, value)
    model.config.base_config.get_text_config().rms_norm_eps = text
    model.save_pretrained(tmp_path / "policy", save_base_model=False)
    TPRLForConditionalGeneration.from_base_model(tmp_path / "policy", latent_dim=8, pruner="divprune").save_pretrained(
        tmp_path / "second", save_base_model=False
    )
    wrap(base).save_pretrained(tmp_path / "merged", save_base_model=True)
    on_merged = TPRLForConditionalGeneration.from_base_model(tmp_path / "merged", latent_dim=8, pruner="divprune")
    setattr(part_of(on_merged.config), name, value)
    on_merged.config.base_config.get_text_config().rms_norm_eps = text
    on_merged.save_pretrained(tmp_path / "on_merged", save_base_model=False)
    for saved in ("policy", "second", "on_merged"):
        assert policy_only(tmp_path / saved)
        found = TPRLForConditionalGeneration.from_pretrained(tmp_path / saved)
        assert getattr(part_of(found.config), name) == value, saved
        assert "ReLU" in repr(found.lvlm) and f"eps={text}" in repr(found.lvlm), saved  # modules were made with it
    assert getattr(part_of(TPRLForConditionalGeneration.from_pretrained(tmp_path / "merged").config), name) != value


def test_a_keyword_goes_before_what_was_recorded(tmp_path):
    build("llava").save_pretrained(tmp_path / "base")
    model = TPRLForConditionalGeneration.from_base_model(
        tmp_path / "base", latent_dim=8, pruner="divprune", keep_ratio=0.5, vision_feature_layer=-2
    )
    model.save_pretrained(tmp_path / "policy", save_base_model=False)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "policy")
    assert again.lvlm.config.vision_feature_layer == -2
    inputs = collate("llava", [sample("llava", 1, 0)])
    assert torch.equal(again.eval()(**inputs).logits, model.eval()(**inputs).logits)
    other = TPRLForConditionalGeneration.from_pretrained(tmp_path / "policy", vision_feature_layer=-1)
    assert other.lvlm.config.vision_feature_layer == -1


@pytest.mark.parametrize("name", sorted(FAMILY_MODELS))
def test_an_unchanged_config_is_not_recorded_otherwise(name, tmp_path):
    """For each family: else loading would set what nobody had changed."""
    build(name).save_pretrained(tmp_path / "base")
    settings = {"latent_dim": 8, "pruner": "divprune", "keep_ratio": 0.5}
    model = TPRLForConditionalGeneration.from_base_model(tmp_path / "base", **settings)
    model.save_pretrained(tmp_path / "policy", save_base_model=False)
    config = TPRLConfig.from_pretrained(tmp_path / "policy")
    assert recorded_of_base(config, str(tmp_path / "base"), {}) == {}


# ---- quantised bases ----


def eight_bits(base, **settings):
    """Real ones, where the package is installed; it runs on CPUs."""
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_8bit=True)
    return TPRLForConditionalGeneration.from_base_model(base, quantization_config=config, device_map="cpu", **settings)


def said_to_be_quantised(base, **settings):
    """No package for it is among those of the tests: a model that says so, as transformers marks one."""
    live = AutoModelForImageTextToText.from_pretrained(base)
    live.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    live.is_loaded_in_8bit = live.is_quantized = True
    return TPRLForConditionalGeneration.from_base_model(live, **settings)


@pytest.mark.parametrize("quantised", [eight_bits, said_to_be_quantised])
def test_a_quantised_base(base, family, tmp_path, quantised):
    model = quantised(base, latent_dim=8, pruner="divprune", keep_ratio=0.5)
    assert model.is_loaded_in_8bit and model.is_quantized  # PEFT and Trainer look there
    model.save_pretrained(tmp_path / "policy")
    assert policy_only(tmp_path / "policy")
    with pytest.raises(ValueError, match="dequantize"):
        model.save_pretrained(tmp_path / "whole", save_base_model=True)
    one_value(model, family)
    with pytest.raises(ValueError, match="dequantize"):
        model.save_pretrained(tmp_path / "changed")
    with pytest.raises(ValueError, match="would lose"):
        model.save_pretrained(tmp_path / "changed", save_base_model=False)
    if quantised is eight_bits:
        model.dequantize()
        model.save_pretrained(tmp_path / "dequantised")
        assert_same(TPRLForConditionalGeneration.from_pretrained(tmp_path / "dequantised"), model)
