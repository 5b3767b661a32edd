"""The model as a Hugging Face model: dtypes, checkpoints, PEFT, offload, compilation, pipelines."""

import copy
import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

import tprl_hf  # noqa: F401  registers the Auto classes
from tests.families.tiny_models import PAD, build, collate, sample
from tprl_hf.modeling import TPRLConfig, TPRLForConditionalGeneration

pytestmark = pytest.mark.short

BATCH = [sample("llava", 1, 1), sample("llava", 2, 2), sample("llava", 0, 3)]


def wrap(**settings):
    base = build("llava")
    return TPRLForConditionalGeneration.from_base_model(
        base, latent_dim=8, policy_training={"stage": "lfd"}, keep_ratio=0.4, **settings
    ).eval()


@pytest.fixture
def model():
    return wrap()


@pytest.fixture
def batch():
    return collate("llava", BATCH)


# ---- config ----


def test_the_papers_widths_are_the_default():
    text = {"hidden_size": 4096, "num_attention_heads": 32, "model_type": "llama"}
    config = TPRLConfig(base_config={"model_type": "llava", "text_config": text})
    assert (config.token_dim, config.autoencoder_dim, config.latent_dim) == (4096, 1024, 256)
    assert (config.policy_dim, config.policy_num_heads, config.policy_num_layers) == (512, 8, 1)


@pytest.mark.parametrize(
    ("given", "widths"),
    [
        ({"token_dim": 192}, (256, 256)),  # a 16th of narrow tokens would be too narrow a policy
        ({"token_dim": 192, "policy_num_heads": 12}, (264, 264)),
        ({"token_dim": 8192}, (2048, 512)),
        ({"token_dim": 192, "latent_dim": 16}, (48, 16)),
        ({"token_dim": 192, "latent_dim": 96, "autoencoder_dim": 24}, (24, 96)),
    ],
)
def test_widths_of_the_codes(given, widths):
    config = TPRLConfig(**given)
    assert (config.autoencoder_dim, config.latent_dim) == widths


def test_config_round_trip(tmp_path, model):
    model.config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is TPRLConfig
    assert loaded.keep_ratio == 0.4
    assert loaded.get_text_config().hidden_size == 32
    assert type(loaded.base_config) is type(model.config.base_config)


@pytest.mark.parametrize("asked", [{"text_config": "eager"}, {"base_config": {"text_config": "eager"}}, {"": "eager"}])
def test_attention_of_parts(tmp_path, model, asked):
    """A dict does what it does in the base model."""
    base = build("llava")
    base.set_attn_implementation(asked.get("base_config", asked))
    model.save_pretrained(tmp_path, save_base_model=True)
    for one in (model, AutoModel.from_pretrained(tmp_path)):
        one.set_attn_implementation(asked)
        for part in ("text_config", "vision_config"):
            found, expected = (getattr(config, part) for config in (one.lvlm.config, base.config))
            assert found._attn_implementation == expected._attn_implementation
        text = one.lvlm.model.language_model.config
        assert text._attn_implementation == base.config.text_config._attn_implementation
        assert one.config._attn_implementation == base.config._attn_implementation


@torch.no_grad()
def test_another_placeholder_is_taken_from_the_config(model, batch):
    expected, old = model(**batch), model.config.image_token_id
    ids = batch["input_ids"]
    model.config.image_token_id = 95
    found = model(**{**batch, "input_ids": ids.masked_fill(ids == old, 95)})
    assert torch.equal(found.keep_mask, expected.keep_mask) and torch.equal(found.logits, expected.logits)


def test_positions_that_a_family_does_not_keep_are_refused_later_too():
    base = build("molmo2")
    model = TPRLForConditionalGeneration.from_base_model(base, position_ids="contiguous", pruner="uniform")
    one = collate("molmo2", [sample("molmo2", 1, 1)])
    model.config.position_ids = "original"
    for call in (model, model.prune, model.generate):
        with pytest.raises(ValueError, match="pass position_ids='contiguous'"):
            call(**one, keep_ratio=0.5)


def test_config_decides_by_default(batch):
    assert wrap().prune(**batch).num_kept.tolist() == [6, 13, 0]
    base = build("llava")
    quiet = TPRLForConditionalGeneration.from_base_model(base, latent_dim=8, policy_training={"stage": "lfd"}).eval()
    assert torch.equal(quiet(**batch).logits, base(**batch).logits)
    assert quiet(**batch).keep_mask is None
    assert torch.equal(quiet.generate(**batch, max_new_tokens=3), base.generate(**batch, max_new_tokens=3))


def test_wrapping_leaves_the_live_model_alone(batch):
    base = build("llava")
    expected, config = base(**batch).logits, copy.deepcopy(base.config)
    wrapped = TPRLForConditionalGeneration.from_base_model(base, latent_dim=8, policy_training={"stage": "lfd"})
    assert base.config._attn_implementation == config._attn_implementation == "sdpa"
    assert base.config.text_config._attn_implementation == "sdpa"
    assert torch.equal(base(**batch).logits, expected)
    assert wrapped.config.base_config is base.config


@torch.no_grad()
def test_copies_are_models_of_their_own(model, batch):
    """Of the model, and of what `base_model` gives trainers."""
    expected = model(**batch).logits
    for other in (copy.deepcopy(model), copy.deepcopy(model.base_model).model):
        assert other.adapter.base is other.lvlm and other.lvlm is not model.lvlm
        assert torch.equal(other(**batch).logits, expected)
        other.get_input_embeddings().weight.zero_()
        assert torch.equal(model(**batch).logits, expected)


# ---- checkpoints ----


@torch.no_grad()
def test_auto_classes_load_both_kinds(tmp_path, model, batch):
    model.lvlm.save_pretrained(tmp_path / "base")
    model.config.base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "policy")
    model.save_pretrained(tmp_path / "merged", save_base_model=True)
    expected = model(**batch).logits
    for auto in (AutoModel, AutoModelForImageTextToText):
        for kind in ("policy", "merged"):
            loaded = auto.from_pretrained(tmp_path / kind)
            assert type(loaded) is TPRLForConditionalGeneration
            assert not loaded.training
            assert torch.equal(loaded(**batch).logits, expected)
    eager = AutoModel.from_pretrained(tmp_path / "policy", attn_implementation="eager")
    assert eager.lvlm.config.text_config._attn_implementation == "eager"
    assert (tmp_path / "policy" / "model.safetensors").stat().st_size < 2e5


@torch.no_grad()
def test_another_policy_around_the_lvlm_of_a_tprl_model(tmp_path, model, batch):
    model.save_pretrained(tmp_path / "merged", save_base_model=True)
    expected = model(**batch, prune=False).logits
    for base in (model, tmp_path / "merged"):
        other = TPRLForConditionalGeneration.from_base_model(
            base, latent_dim=4, policy_num_heads=2, policy_training={"stage": "lfd"}
        )
        assert type(other.lvlm) is type(model.lvlm) and other.config.latent_dim == 4
        assert torch.equal(other(**batch, prune=False).logits, expected)
    other.save_pretrained(tmp_path / "policy")  # names the merged checkpoint as its base
    loaded = TPRLForConditionalGeneration.from_pretrained(tmp_path / "policy")
    assert type(loaded.lvlm) is type(model.lvlm)
    assert torch.equal(loaded(**batch, keep_ratio=0.5).logits, other(**batch, keep_ratio=0.5).logits)


def test_loaded_again_is_saved_alike(tmp_path, model, batch):
    model.lvlm.save_pretrained(tmp_path / "base")
    first = TPRLForConditionalGeneration.from_base_model(
        str(tmp_path / "base"), latent_dim=8, policy_training={"stage": "lfd"}, keep_ratio=0.4
    )
    first.save_pretrained(tmp_path / "one")
    second = TPRLForConditionalGeneration.from_pretrained(tmp_path / "one")
    second.save_pretrained(tmp_path / "two")
    one, two = (tmp_path / name / "config.json" for name in ("one", "two"))
    assert json.loads(one.read_text()) == json.loads(two.read_text())
    assert json.loads(one.read_text())["base_model_name_or_path"] == str(tmp_path / "base")
    assert torch.equal(first(**batch).logits, second(**batch).logits)


@torch.no_grad()
def test_generation_settings_are_those_of_the_checkpoint(tmp_path, batch):
    """Whether it holds the base model or names it; a live base model keeps its own."""
    model = wrap()
    model.lvlm.save_pretrained(tmp_path / "base")
    model.config.base_model_name_or_path = str(tmp_path / "base")
    model.generation_config.max_new_tokens, model.generation_config.repetition_penalty = 3, 1.5
    model.save_pretrained(tmp_path / "policy")
    model.save_pretrained(tmp_path / "merged", save_base_model=True)
    expected = model.generate(**batch)
    for kind in ("policy", "merged"):
        assert torch.equal(TPRLForConditionalGeneration.from_pretrained(tmp_path / kind).generate(**batch), expected)
    live = wrap().lvlm
    loaded = TPRLForConditionalGeneration.from_pretrained(tmp_path / "policy", base_model=live)
    assert loaded.generation_config is live.generation_config and live.generation_config.max_new_tokens is None


@torch.no_grad()
def test_base_stored_in_half_precision(tmp_path, batch):
    model = wrap()
    for weight in model.lvlm.parameters():
        weight.data = weight.data.half().float()  # held exactly by half precision
    model.save_pretrained(tmp_path / "half", save_base_model=True, base_dtype=torch.float16)
    model.save_pretrained(tmp_path / "full", save_base_model=True)
    half, full = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "full"))
    assert half < 0.75 * full
    loaded = TPRLForConditionalGeneration.from_pretrained(tmp_path / "half")
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


# ---- precision ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_policy_stays_in_float32(tmp_path, model, batch, dtype):
    model.lvlm.save_pretrained(tmp_path / "base")
    model.config.base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "policy")
    model.save_pretrained(tmp_path / "merged", save_base_model=True)
    weight = model.policy.query_proj.weight.clone()
    loaded = [TPRLForConditionalGeneration.from_pretrained(tmp_path / n, dtype=dtype) for n in ("policy", "merged")]
    for cast in (*loaded, copy.deepcopy(model).to(dtype), wrap().to(dtype)):
        assert cast.lvlm.dtype == dtype
        assert {p.dtype for m in (cast.policy, cast.autoencoder) for p in m.parameters()} == {torch.float32}
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
        assert cast.generate(**batch, max_new_tokens=2).shape[0] == 3
        assert cast(**batch).logits.dtype == dtype
    assert torch.equal(loaded[0].policy.query_proj.weight, weight)
    assert torch.equal(loaded[1].policy.query_proj.weight, weight)


# ---- training a base model through pruning ----


def test_labels_and_gradients(model, batch):
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][:, :-4] = -100
    output = model(**batch)
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    answers = batch["labels"][:, -4:]
    expected = torch.nn.functional.cross_entropy(logits[:, -5:-1].transpose(1, 2), answers)
    assert torch.allclose(output.loss, expected, atol=1e-5)
    output.loss.backward()
    assert model.lvlm.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_gradient_checkpointing(name, model, batch):
    if not hasattr(model.lvlm, f"{name}_enable"):
        pytest.skip("transformers has this name since 5.24")
    batch["labels"] = batch["input_ids"]
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            getattr(model, f"{name}_enable")()
        model.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        gradients.append(model.lvlm.lm_head.weight.grad.clone())
    assert getattr(model.lvlm, f"is_{name}")
    assert torch.allclose(*gradients, atol=1e-6)


@torch.no_grad()
def test_attention_implementation_and_embeddings(model, batch):
    sdpa = model(**batch).logits[:, -5:]
    model.set_attn_implementation("eager")
    assert model.lvlm.config.text_config._attn_implementation == "eager"
    assert (model(**batch).logits[:, -5:] - sdpa).abs().max() <= 2e-5
    model.resize_token_embeddings(120)
    assert model.lvlm.lm_head.weight.shape[0] == model.get_input_embeddings().weight.shape[0] == 120
    assert model.config.get_text_config().vocab_size == 120
    assert (model(**batch).logits[:, -5:, :99] - sdpa).abs().max() <= 2e-5


@torch.no_grad()
def test_peft_on_the_base(tmp_path, model, batch):
    peft = pytest.importorskip("peft")
    expected = model(**batch).logits
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, modules_to_save=["policy"])
    tuned = peft.get_peft_model(copy.deepcopy(model), config).eval()
    assert torch.allclose(tuned(**batch).logits, expected, atol=1e-5)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    changed = tuned(**batch).logits
    assert (changed - expected).abs().max() > 1e-3
    tokens = tuned.generate(**batch, max_new_tokens=3)
    tuned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert torch.equal(again(**batch).logits, changed)
    assert torch.equal(again.generate(**batch, max_new_tokens=3), tokens)
    merged = again.merge_and_unload()
    assert torch.allclose(merged(**batch).logits, changed, atol=1e-5)
    loaded = copy.deepcopy(model)
    loaded.load_adapter(tmp_path)
    assert torch.allclose(loaded(**batch).logits, changed, atol=1e-5)


@torch.no_grad()
def test_wrapping_a_base_that_peft_changed(model, batch):
    peft = pytest.importorskip("peft")
    base = copy.deepcopy(model.lvlm)
    tuned = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    expected = tuned(**batch).logits
    wrapped = TPRLForConditionalGeneration.from_base_model(base, latent_dim=8, policy_training={"stage": "lfd"}).eval()
    assert torch.equal(wrapped(**batch).logits, expected)


@torch.no_grad()
def test_offload(tmp_path, model, batch):
    model.lvlm.save_pretrained(tmp_path / "base")
    model.config.base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "policy")
    model.save_pretrained(tmp_path / "merged", save_base_model=True)
    expected, tokens = model(**batch).logits, model.generate(**batch, max_new_tokens=3)
    base_map = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    base_map["model.language_model"] = "disk"
    merged_map = {f"lvlm.{name}": place for name, place in base_map.items()} | {"policy": "cpu", "autoencoder": "cpu"}
    for name, device_map in (("policy", base_map), ("merged", merged_map)):
        folder = tmp_path / f"offload-{name}"
        loaded = TPRLForConditionalGeneration.from_pretrained(
            tmp_path / name, device_map=device_map, offload_folder=str(folder)
        )
        assert torch.equal(loaded(**batch).logits, expected)
        assert torch.equal(loaded.generate(**batch, max_new_tokens=3), tokens)
        loaded.save_pretrained(tmp_path / f"again-{name}")
        assert (tmp_path / f"again-{name}" / "model.safetensors").stat().st_size < 2e5  # the policy alone
        loaded.save_pretrained(tmp_path / f"whole-{name}", save_base_model=True)
        whole = TPRLForConditionalGeneration.from_pretrained(tmp_path / f"whole-{name}")
        assert torch.equal(whole(**batch).logits, expected)


@torch.no_grad()
def test_a_policy_that_is_offloaded(tmp_path, batch):
    """Each of its weights is used by calling the module that has it, whose hook brings it."""
    inputs = ("policy_positions", "policy_budget", "policy_input_norm", "policy_similarity")
    model = wrap(policy_steps=3, num_steps=2, **dict.fromkeys(inputs, True))
    model.save_pretrained(tmp_path / "merged", save_base_model=True)
    device_map = {"lvlm": "cpu", "autoencoder": "disk", "policy": "disk"}
    loaded = TPRLForConditionalGeneration.from_pretrained(
        tmp_path / "merged", device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@torch.no_grad()
def test_a_fixed_budget_compiles_once(model):
    batches = [collate("llava", [sample("llava", 1, seed)]) for seed in (1, 2, 3)]
    expected = [model(**batch, num_keep=5).logits for batch in batches]
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    language_model = model.lvlm.model.language_model
    language_model.forward = torch.compile(language_model.forward, backend=count)
    torch._dynamo.reset()
    made = [model(**batch, num_keep=5, use_cache=False).logits for batch in batches[:1]]
    first = len(compiled)
    made += [model(**batch, num_keep=5, use_cache=False).logits for batch in batches[1:]]
    assert 0 < first == len(compiled)
    for a, b in zip(made, expected, strict=True):
        assert (a - b).abs().max() <= 2e-5


def test_without_an_attention_mask_padding_is_told_from_text(model, batch):
    masked = model(**batch).logits
    batch.pop("attention_mask")
    assert PAD == 0
    assert torch.equal(model(**batch).logits, masked)


@pytest.mark.parametrize("training", [False, True])
def test_a_wrapped_model_is_in_the_mode_of_its_base(training, batch):
    base = build("llava").train(training)
    wrapped = TPRLForConditionalGeneration.from_base_model(base, pruner="uniform", keep_ratio=0.4)
    assert wrapped.training == wrapped.policy.training == training
