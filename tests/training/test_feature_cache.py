"""Features are computed once: in memory or on disk, by several processes, after a kill; and nothing else changes."""

import threading

import pytest
import torch
from PIL import Image

from tests.families.tiny_models import build, collate, sample
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.modeling.visual_features import VisualFeatures
from tprl_hf.training.answer_batches import SampleEncoder, undecoded
from tprl_hf.training.feature_cache import FeatureCache, cache_of, join_features
from tprl_hf.training.stored_features import from_file, num_bytes, to_bytes
from tprl_hf.training.unpruned_answers import UnprunedAnswers

from .test_trainers import stage, weights_of


def rows_of(dataset):
    return [dataset[i] for i in range(len(dataset))]


def tensors_of(features: VisualFeatures) -> dict[str, torch.Tensor]:
    found = {f"geometry.{name}": value for name, value in features.geometry.items()}
    for name, one in features.modalities.items():
        found |= {f"{name}.rows": one.rows, f"{name}.counts": one.counts}
        found |= {f"{name}.{layer}": rows for layer, rows in enumerate(one.deepstack)}
    return found


def assert_same(first: VisualFeatures, second: VisualFeatures) -> None:
    one, other = tensors_of(first), tensors_of(second)
    assert one.keys() == other.keys() and all(value.equal(other[name]) for name, value in one.items())
    for name, modality in first.modalities.items():
        again = second.modalities[name]
        for field in ("blocks", "container", "output_class", "extra"):
            assert getattr(modality, field) == getattr(again, field), field


@pytest.mark.parametrize("directory", [False, True])
def test_a_cache_smaller_than_the_data_hits_as_often_as_it_is_large(
    directory, make_model, processor, dataset, tmp_path
):
    """A cache that replaces what was used longest ago would never hit."""
    encoder = SampleEncoder(make_model(), processor)
    features = encoder.encode(dataset[0]).features
    size = len(to_bytes(features)) if directory else num_bytes(features)
    cache = FeatureCache(5 * size, tmp_path / "all" / "model" if directory else None)
    for epoch in range(4):
        for image in torch.randperm(20, generator=torch.Generator().manual_seed(epoch)).tolist():
            if cache.get(f"{image:02}") is None:
                cache.add(f"{image:02}", features)
    assert cache.hits == 3 * 5 and cache.used_bytes <= cache.max_bytes
    if directory:  # another process counts what is there
        assert FeatureCache(5 * size, tmp_path / "all" / "other").used_bytes == cache.used_bytes


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "llava_next"])
def test_what_is_read_from_disk_is_what_was_written(family, tmp_path):
    model = TPRLForConditionalGeneration.from_base_model(build(family))
    features = model.encode_images(**collate(family, [sample(family, 1, 1)]))
    path = tmp_path / "one.safetensors"
    path.write_bytes(to_bytes(features))
    assert_same(from_file(path), features)


def test_a_file_that_is_not_whole_is_written_again(make_model, processor, dataset, tmp_path):
    model = make_model()
    plain = SampleEncoder(model, processor).encode(dataset[0]).features
    first = cache_of(model, processor, 100, str(tmp_path), None)
    SampleEncoder(model, processor, first).encode(dataset[0])
    (path,) = tmp_path.glob("*/*/*.safetensors")
    (path.parent / f".{path.name}.1.2").write_bytes(b"of a run that was killed")
    path.write_bytes(path.read_bytes()[:-100])
    second = cache_of(model, processor, 100, str(tmp_path), None)
    assert_same(SampleEncoder(model, processor, second).encode(dataset[0]).features, plain)
    third = cache_of(model, processor, 100, str(tmp_path), None)
    assert_same(SampleEncoder(model, processor, third).encode(dataset[0]).features, plain)
    assert (second.misses, third.hits, third.misses) == (1, 1, 0)


def test_another_model_has_another_folder(make_model, processor, dataset, tmp_path):
    model = make_model()
    cache = cache_of(model, processor, 100, str(tmp_path), None)
    for other in (
        cache_of(model, processor, 100, str(tmp_path), "float16"),
        cache_of(make_model().to(torch.bfloat16), processor, 100, str(tmp_path), None),
    ):
        assert other.directory != cache.directory
    assert cache_of(make_model(), processor, 100, str(tmp_path), None).directory == cache.directory
    other = make_model()
    other.lvlm.config.vision_feature_layer = -1 - (other.lvlm.config.vision_feature_layer == -1)
    assert cache_of(other, processor, 100, str(tmp_path), None).directory != cache.directory
    # a name that is used twice does not mix up pictures
    rows = rows_of(dataset)
    encoder = SampleEncoder(model, processor, cache)
    one, other = encoder.encode(rows[0]), encoder.encode({**rows[2], "image_id": rows[0]["image_id"]})
    assert not one.features.modalities["image"].rows.equal(other.features.modalities["image"].rows)


@pytest.mark.parametrize("directory", [None, "features"])
def test_features_go_by_the_picture_and_not_by_its_label(directory, make_model, processor, dataset, tmp_path):
    """Two files, or training and validation, may both count their pictures from 0."""
    model, passes = make_model(), []
    cache = cache_of(model, processor, 100, directory and str(tmp_path / directory), None)
    encoder, alone = SampleEncoder(model, processor, cache), SampleEncoder(model, processor, 0)
    encode_images = encoder.encode_images
    encoder.encode_images = lambda inputs: passes.append(1) or encode_images(inputs)
    rows = rows_of(undecoded(dataset))
    for number, row in enumerate(rows):  # questions 0 and 1 are about one picture, 2 and 3 about another
        for image_id in ("0", f"{number}", None):
            labelled = {**row, "image_id": image_id}
            assert_same(encoder.encode(labelled).features, alone.encode(row).features)
    assert len(passes) == 4
    # decoded pictures that differ in nothing but their palettes
    painted = []
    for color in ([255, 0, 0], [0, 0, 255]):
        image = Image.new("P", (24, 24))
        image.putpalette(color)
        painted.append({**rows[0], "images": [image]})
    one, other = (encoder.encode(row).features.modalities["image"].rows for row in painted)
    assert not one.equal(other)
    assert len({UnprunedAnswers(model, processor).key(row) for row in painted}) == 2


@pytest.mark.parametrize("name", ["autoencoder", "ppo"])
def test_training_with_a_cache_on_disk_is_training_without_one_bit_for_bit(
    name, make_model, processor, dataset, tmp_path, monkeypatch
):
    passes = []
    encode_images = SampleEncoder.encode_images
    monkeypatch.setattr(
        SampleEncoder, "encode_images", lambda self, inputs: passes.append(1) or encode_images(self, inputs)
    )
    found = []
    cached = {"feature_cache_dir": str(tmp_path / "features")}
    for settings in ({"feature_cache_mb": 0, "prefetch_threads": 0}, {"prefetch_threads": 2}, cached, cached):
        passes.clear()
        trainer = stage(
            name, make_model, processor, dataset, str(tmp_path / "run"), max_steps=6, logging_steps=1, save_steps=6,
            **settings,
        )  # fmt: skip
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        found.append((weights_of(trainer.tprl_model), losses, len(passes)))
    (weights, losses, without), *others, (_, _, last) = found
    for other, same, _ in [*others, found[-1]]:
        assert same == losses and all(value.equal(other[key]) for key, value in weights.items())
    assert without > 4 and found[2][2] == 4 and last == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_rounds_once_whether_it_hits_or_not(dtype, make_model, processor, dataset, tmp_path):
    model = make_model()
    exact = SampleEncoder(model, processor).encode(dataset[0]).features.modalities["image"].rows
    found = []
    for _ in range(2):
        cache = cache_of(model, processor, 100, str(tmp_path), dtype)
        found.append(SampleEncoder(model, processor, cache).encode(dataset[0]).features.modalities["image"].rows)
    assert found[0].equal(found[1]) and found[0].dtype == torch.float32
    error = ((found[0] - exact).abs() / exact.abs().clamp(min=1e-3)).max()
    assert 0 < error <= {"float16": 2**-10, "bfloat16": 2**-8}[dtype]


def test_float16_refuses_what_it_cannot_hold(make_model, processor, dataset, tmp_path):
    features = SampleEncoder(make_model(), processor).encode(dataset[0]).features
    features.modalities["image"].rows[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"do not fit into torch\.float16: set feature_cache_dtype to bfloat16"):
        FeatureCache(1, tmp_path / "a" / "b", torch.float16).rounded(features)


def test_images_are_encoded_together_as_one_by_one(make_model, processor, dataset):
    rows = rows_of(dataset)
    rows[5] = {**rows[5], "images": [*rows[0]["images"], *rows[6]["images"]], "image_id": None}
    rows[6] = {**rows[6], "images": [], "image_id": None}
    model = make_model()
    single, several = SampleEncoder(model, processor), SampleEncoder(model, processor, encode_batch_size=3)
    for one, other in zip(single.encode_rows(rows), several.encode_rows(rows), strict=True):
        for name in ("prompt_ids", "answer_ids", "query_mask"):
            assert getattr(one, name).equal(getattr(other, name)), name
        found = join_features([one.features]), join_features([other.features])
        assert found[0].modalities.keys() == found[1].modalities.keys()
        for name, modality in found[0].modalities.items():
            torch.testing.assert_close(found[1].modalities[name].rows, modality.rows, atol=1e-5, rtol=1e-5)


def test_images_are_processed_while_the_llm_works(make_model, processor, dataset, monkeypatch):
    rows = rows_of(dataset)
    plain = SampleEncoder(make_model(), processor)(rows).inputs.tokens
    encoder = SampleEncoder(make_model(), processor, prefetch_threads=2)
    threads = []
    process = encoder.process_together

    def noted(processor, rows):
        threads.append(threading.current_thread().name)
        return process(processor, rows)

    monkeypatch.setattr(encoder.ahead, "process", noted)
    encoder.prefetch(rows)
    assert encoder(rows).inputs.tokens.equal(plain)
    assert threads and all(name.startswith("process-images") for name in threads)
    threads.clear()
    assert encoder(rows).inputs.tokens.equal(plain) and threads == []
    encoder.prefetch([{**rows[0], "images": [{"bytes": b"no picture", "path": None}], "image_id": "bad"}])
    with pytest.raises(ValueError, match="bad"):
        encoder([{**rows[0], "images": [{"bytes": b"no picture", "path": None}], "image_id": "bad"}])
