"""What cannot work is refused with the value and the fix; what can, works."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BlipConfig, BlipForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from tests.families.tiny_models import build, collate, sample
from tprl_hf.modeling import TPRLConfig, TPRLForConditionalGeneration, adapter_for, family_adapters
from tprl_hf.pruners import RandomPruner, VisPruner


@pytest.fixture(scope="module")
def model():
    return TPRLForConditionalGeneration.from_base_model(
        build("llava"), latent_dim=8, policy_training={"stage": "lfd"}
    ).eval()


@pytest.fixture
def batch():
    return collate("llava", [sample("llava", 1, 1), sample("llava", 2, 2)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_ratio": 0.0}, r"\(0, 1\]; got 0.0"),
        ({"keep_ratio": 1.5}, r"\(0, 1\]; got 1.5"),
        ({"keep_ratio": float("nan")}, r"\(0, 1\]; got nan"),
        ({"num_keep": 0}, "at least 1; got 0"),
        ({"keep_ratio": 0.5, "num_keep": 3}, "keep_ratio=0.5, num_keep=3"),
        ({"keep_ratio": 0.5, "prune": False}, "keep_ratio=0.5, prune=False"),
        ({"prune": True}, "No budget"),
        ({"threshold": float("nan")}, "threshold must be a number"),
        ({"keep_mask": torch.ones(5, dtype=torch.bool)}, r"shape \(48,\).*got torch.bool of shape \(5,\)"),
        ({"keep_mask": torch.ones(48)}, "got torch.float32"),
        ({"query_mask": torch.ones(2, 3), "num_keep": 2}, r"query_mask must have the shape"),
    ],
)
def test_budgets(model, batch, settings, message):
    for method in (model.prune, model, model.generate):
        with pytest.raises(ValueError, match=message):
            method(**batch, **settings)


def test_more_than_there_is_keeps_all(model, batch):
    """A sample with few tokens does not end a long evaluation."""
    assert model.prune(**batch, num_keep=17).num_kept.tolist() == [16, 17]
    with model.using(VisPruner(num_keep=100)):
        assert torch.equal(model.generate(**batch, max_new_tokens=3), model.lvlm.generate(**batch, max_new_tokens=3))
    assert torch.equal(model(**batch, num_keep=100).logits, model(**batch, keep_ratio=1.0).logits)


@pytest.mark.parametrize("pad", [-1, 10_000, None])
def test_a_padding_id_that_no_table_has(pad):
    """Nothing attends to padding; some old checkpoints name -1."""
    base = build("llava")
    base.generation_config.pad_token_id, base.generation_config.eos_token_id = pad, None
    own = TPRLForConditionalGeneration.from_base_model(base, latent_dim=8, policy_training={"stage": "lfd"}).eval()
    batch = collate("llava", [sample("llava", 1, 1, text=9), sample("llava", 1, 2)])
    expected = base.generate(**batch, max_new_tokens=4)
    assert torch.equal(own.generate(**batch, keep_ratio=1.0, max_new_tokens=4), expected)
    alone = collate("llava", [sample("llava", 1, 2)])
    pruned = own.generate(**batch, keep_ratio=0.4, max_new_tokens=4)[1]
    single = own.generate(**alone, keep_ratio=0.4, max_new_tokens=4)[0]
    assert torch.equal(pruned[-4:], single[-4:])
    assert own(**batch, keep_ratio=0.4).logits.isfinite().all()


@pytest.mark.parametrize("target_is_pruned", [False, True])
@torch.no_grad()
def test_a_pruned_model_as_a_draft(target_is_pruned):
    base = build("llava")
    settings = {"latent_dim": 8, "policy_training": {"stage": "lfd"}}
    target = TPRLForConditionalGeneration.from_base_model(base, keep_ratio=0.5, **settings).eval()
    draft = TPRLForConditionalGeneration.from_base_model(build("llava", seed=1), keep_ratio=0.3, **settings).eval()
    one = collate("llava", [sample("llava", 1, 1)])
    target = target if target_is_pruned else base
    expected = target.generate(**one, max_new_tokens=8)
    assert torch.equal(target.generate(**one, max_new_tokens=8, assistant_model=draft), expected)
    features = base.model.get_image_features(one["pixel_values"], return_dict=True)
    with pytest.raises(ValueError, match="`mm_encoder_outputs` are not pruned"):
        draft.generate(one["input_ids"], mm_encoder_outputs={"image": features}, num_keep=3)


def test_image_tokens_without_an_image(model, batch):
    with pytest.raises(ValueError, match="48 image tokens, but no image"):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], num_keep=3)


def test_more_and_fewer_images_than_tokens(model, batch):
    for change in (torch.cat([batch["pixel_values"]] * 2), batch["pixel_values"][:1]):
        with pytest.raises(ValueError, match=rf"tokens: 48, features: {len(change) * 16}"):
            model.generate(**{**batch, "pixel_values": change}, num_keep=3)


def test_an_image_without_tokens(model):
    text = collate("llava", [sample("llava", 0, 1)])
    image = collate("llava", [sample("llava", 1, 1)])["pixel_values"]
    with pytest.raises(ValueError, match="tokens: 0, features: 16"):
        model.prune(**text, pixel_values=image, num_keep=3)


@torch.no_grad()
def test_an_image_behind_a_cache_of_forward(model, batch):
    """The base model refuses pixels without tokens there, too; they were left out without a word."""
    cache = model(**batch, num_keep=3, use_cache=True).past_key_values
    for prune in ({}, {"prune": False}):
        with pytest.raises(ValueError, match="New images behind a filled cache are for `generate`"):
            words = torch.full((len(batch["input_ids"]), 1), 7)
            model(input_ids=words, pixel_values=batch["pixel_values"], past_key_values=cache, **prune)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_no_numbers(model, batch, value):
    batch["pixel_values"][1, 0, 3, 3] = value
    with pytest.raises(ValueError, match=f"pixel_values holds {value}"):
        model(**batch, num_keep=3)


@torch.no_grad()
def test_text_without_an_image_works(model):
    batch = collate("llava", [sample("llava", 0, 1), sample("llava", 0, 2, text=9)])
    for settings in ({}, {"keep_ratio": 0.5}, {"num_keep": 3}, {"threshold": 0.5}):
        plan = model.prune(**batch, **settings)
        assert plan.num_visual.tolist() == plan.num_kept.tolist() == [0, 0]
        assert torch.equal(model(**batch, **settings).logits, model.lvlm(**batch).logits)
        expected = model.lvlm.generate(**batch, max_new_tokens=3)
        assert torch.equal(model.generate(**batch, **settings, max_new_tokens=3), expected)


def test_embeddings_in_place_of_ids(model):
    embeddings, ids = torch.randn(1, 5, 32), torch.tensor([[1, 7, 8]])
    words = model.get_input_embeddings()(ids)
    for call, message in (
        (lambda: model.prune(input_ids=None, num_keep=3), "`input_ids` are needed"),
        (lambda: model(inputs_embeds=embeddings, num_keep=3), "of sample 0 has in column 0 an embedding that is not"),
        (lambda: model(inputs_embeds=torch.cat([words, embeddings], 1), num_keep=3), "in column 3 an embedding"),
        (lambda: model(ids, inputs_embeds=words, num_keep=3), "pass one of them"),
        (lambda: model.generate(inputs_embeds=embeddings, num_keep=3), "`generate` needs `input_ids`"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert model(inputs_embeds=embeddings).logits.shape == (1, 5, 99)  # nothing to prune, nothing to refuse


def test_masks_of_another_shape(model, batch):
    with pytest.raises(ValueError, match="two-dimensional"):
        model.prune(**{**batch, "attention_mask": torch.ones(2, 1, 4, 4)}, num_keep=3)


def test_base_models_of_another_kind():
    tiny = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    blip = BlipForConditionalGeneration(BlipConfig(text_config={**tiny, "vocab_size": 99}, vision_config=tiny))
    with pytest.raises(ValueError, match=r"'blip' cannot be pruned: its `forward` .*docs/families.md"):
        TPRLForConditionalGeneration.from_base_model(blip)
    llama = LlamaForCausalLM(LlamaConfig(**tiny, vocab_size=99))
    with pytest.raises(ValueError, match=r"'llama' cannot be pruned.*similar name: llama4.*families.md") as error:
        TPRLForConditionalGeneration.from_base_model(llama)
    assert len(str(error.value)) < 3 * 119


def test_a_refused_model_is_not_warned_about_first(monkeypatch):
    tiny = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    said: list[str] = []
    monkeypatch.setattr(family_adapters.logger, "warning", said.append)
    with pytest.raises(ValueError, match="cannot be pruned"):
        adapter_for(LlamaForCausalLM(LlamaConfig(**tiny, vocab_size=99)))
    assert said == []
    base = build("llava")
    base.config.model_type = "llava_of_tomorrow"
    adapter_for(base)
    assert len(said) == 1 and "untested for models of type 'llava_of_tomorrow'" in said[0]


def test_settings_that_nobody_knows():
    with pytest.raises(ValueError, match=r"'keep_ration'\. Did you mean 'keep_ratio'"):
        TPRLForConditionalGeneration.from_base_model(build("llava"), keep_ration=0.5)
    with pytest.raises(TypeError, match=r"Unknown settings \['colour'\]"):
        TPRLForConditionalGeneration.from_base_model(build("llava"), colour=0.5)
    with pytest.raises(ValueError, match="latent_dim=7 is not a multiple of policy_num_heads=8"):
        TPRLForConditionalGeneration.from_base_model(build("llava"), latent_dim=7)
    with pytest.raises(ValueError, match="from_base_model"):
        TPRLForConditionalGeneration(TPRLConfig())


def test_pruners_without_what_they_need(model, batch):
    with model.using(RandomPruner()), pytest.raises(ValueError, match="No budget"):
        model.prune(**batch)
    with model.using(VisPruner()), pytest.raises(ValueError, match=r"threshold=0.5"):
        model.prune(**batch, threshold=0.5)
    features = model.encode_images(**batch)
    with model.using(VisPruner(num_keep=2)), pytest.raises(ValueError, match="encode_images inside"):
        model.prune(**batch, visual_features=features)


# ---- checkpoints ----


@pytest.fixture
def checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path, save_base_model=False)
    return tmp_path


def test_missing_weights(checkpoint, model):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        TPRLForConditionalGeneration.from_pretrained(checkpoint, base_model=model.lvlm)


def test_missing_config(checkpoint, model):
    (checkpoint / "config.json").unlink()
    with pytest.raises(OSError, match=r"config\.json"):
        TPRLForConditionalGeneration.from_pretrained(checkpoint, base_model=model.lvlm)


@pytest.mark.parametrize("merged", [False, True])
def test_truncated_weights(model, tmp_path, merged):
    model.save_pretrained(tmp_path, save_base_model=merged)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors.*truncated"):
        TPRLForConditionalGeneration.from_pretrained(tmp_path, base_model=None if merged else model.lvlm)


@pytest.mark.parametrize("merged", [False, True])
def test_weights_of_another_shape(model, tmp_path, merged):
    model.save_pretrained(tmp_path, save_base_model=merged)
    state = load_file(tmp_path / "model.safetensors")
    state["policy.query_proj.weight"] = torch.zeros(8, 31)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"policy.query_proj.weight.*\(8, 31\).*\(8, 32\)"):
        TPRLForConditionalGeneration.from_pretrained(tmp_path, base_model=None if merged else model.lvlm)


@pytest.mark.parametrize("merged", [False, True])
def test_missing_and_unknown_weights(model, tmp_path, merged):
    model.save_pretrained(tmp_path, save_base_model=merged)
    state = load_file(tmp_path / "model.safetensors")
    state["policy.surprise"] = state.pop("policy.value_head.bias")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"policy.value_head.bias.*policy.surprise"):
        TPRLForConditionalGeneration.from_pretrained(tmp_path, base_model=None if merged else model.lvlm)


def test_merged_checkpoint_without_its_base(model, tmp_path):
    model.save_pretrained(tmp_path, save_base_model=True)
    state = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if not k.startswith("lvlm.")}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="weights are missing"):
        TPRLForConditionalGeneration.from_pretrained(tmp_path)


def test_a_policy_for_another_width(checkpoint):
    config = TPRLConfig.from_pretrained(checkpoint)
    config.token_dim = 64
    config.save_pretrained(checkpoint)
    with pytest.raises(ValueError, match=r"width 64.*width 32"):
        TPRLForConditionalGeneration.from_pretrained(checkpoint, base_model=build("llava"))


def test_a_policy_without_a_known_base(checkpoint):
    with pytest.raises(ValueError, match="pass base_model="):
        TPRLForConditionalGeneration.from_pretrained(checkpoint)


def test_nothing_half_written_is_left(checkpoint):
    assert not [path for path in checkpoint.iterdir() if path.name.startswith(".")]
    assert {path.suffix for path in checkpoint.iterdir()} <= {".json", ".safetensors"}
