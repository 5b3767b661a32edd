"""What the vLLM plug-in works out in plain numbers. No vLLM is needed for that."""

import sys
from types import ModuleType

import pytest
import torch

from tprl_hf import TPRLConfig
from tprl_hf.modeling.budget import Budget
from tprl_hf.modeling.token_layout import Block, TokenLayout
from tprl_hf.modeling.token_pruner import PruningInputs
from tprl_hf.pruners import PRUNERS, DivPrune
from tprl_hf.serving.vllm_plugin import register
from tprl_hf.serving.vllm_plugin.places import embedded_rows, full_prompt, place_columns, read_places
from tprl_hf.serving.vllm_plugin.requests import (
    PRUNERS_HERE,
    counts_of_images,
    question_ids,
    request_budget,
    split_budget,
    towers_by_vllm_names,
)
from tprl_hf.serving.vllm_plugin.rows_cache import RowsCache

SQUARE = [Block(12, 12)]
CROPS = [Block(4, 4), Block(4, 8, row_newline=True)]  # 16 tokens, 32 tokens, 4 separators
CONFIG = TPRLConfig(keep_ratio=1 / 3)


@pytest.mark.parametrize("release", ["0.31.2", "0.34.0", "0.3", "1.32.0"])
def test_another_vllm_is_left_alone_and_told(release, monkeypatch, caplog):
    """It serves other models all the same, so this is no error."""
    other = ModuleType("vllm")  # whose parts would fail to be imported
    other.__version__ = release
    monkeypatch.setitem(sys.modules, "vllm", other)
    register()
    assert f"works inside vLLM 0.32 and 0.33, not {release}, and leaves this one alone." in caplog.text
    assert 'install "vllm==0.33.*"' in caplog.text


@pytest.mark.parametrize(
    ("request_has", "server_has", "wanted"),
    [
        ({}, {}, Budget(keep_ratio=1 / 3)),
        ({}, {"num_keep": 16}, Budget(num_keep=16)),
        ({"keep_ratio": 0.5}, {"num_keep": 16}, Budget(keep_ratio=0.5)),
        ({"prune": False}, {"num_keep": 16}, None),
        ({"prune": True}, {}, Budget(keep_ratio=1 / 3)),
        ({"prune": True}, {"num_keep": 16}, Budget(num_keep=16)),
        ({"prune": True}, {"prune": False}, Budget(keep_ratio=1 / 3)),
    ],
)
def test_the_budget_is_the_requests_else_the_servers_else_the_checkpoints(request_has, server_has, wanted):
    assert request_budget(request_has, server_has, CONFIG) == wanted


def test_a_pruner_with_its_own_budget_goes_before_the_checkpoint():
    pruner = DivPrune(num_keep=5)
    assert request_budget({}, {}, CONFIG, pruner) == Budget(num_keep=5)
    assert request_budget({"num_keep": 7}, {}, CONFIG, pruner) == Budget(num_keep=7)
    assert request_budget({}, {}, CONFIG, DivPrune()) == Budget(keep_ratio=1 / 3)


def test_a_pruner_without_any_budget_is_refused_and_a_policy_without_one_keeps_all():
    with pytest.raises(ValueError, match="No budget"):
        request_budget({}, {}, TPRLConfig(), DivPrune())
    assert request_budget({}, {}, TPRLConfig()) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_keep": 4, "keep_ratio": 0.5}, "Pass only one of"),
        ({"num_keep": 4, "prune": False}, "Pass only one of"),
        ({"threshold": 0.5}, "ask `tprl serve`"),
        ({"num_keep": "4"}, "num_keep must be a whole number"),
        ({"num_keep": True}, "num_keep must be a whole number"),
        ({"prune": "no"}, "prune must be True or False"),
        ({"keep_ratio": 0.0}, r"keep_ratio must be the fraction that is KEPT, in \(0, 1\]"),
    ],
)
@pytest.mark.parametrize("is_server", [False, True])
def test_what_is_refused(given, message, is_server):
    with pytest.raises(ValueError, match=message):
        request_budget(*([{}, given] if is_server else [given, {}]), CONFIG)


def test_a_checkpoint_with_a_threshold_needs_another_budget():
    config = TPRLConfig(threshold=0.6)
    with pytest.raises(ValueError, match=r"threshold=0.6 cannot be used with vLLM"):
        request_budget({}, {}, config)
    assert request_budget({"num_keep": 3}, {}, config) == Budget(num_keep=3)


def test_the_rest_of_the_arguments_stays():
    assert split_budget({"num_keep": 3, "max_pixels": 9, "prune": None}) == ({"num_keep": 3}, {"max_pixels": 9})


@pytest.mark.parametrize(
    ("budget", "images", "counts"),
    [
        (None, [SQUARE, CROPS], [144, 52]),
        (Budget(num_keep=16), [SQUARE], [16]),
        (Budget(num_keep=16), [SQUARE, SQUARE], [8, 8]),
        (Budget(num_keep=500), [SQUARE, SQUARE], [144, 144]),
        (Budget(keep_ratio=1 / 3), [SQUARE, CROPS], [48, 17]),
        (Budget(num_keep=1), [SQUARE] * 3, [1, 1, 1]),  # none is lost
        (Budget(num_keep=1), [CROPS], [5]),  # the separators, and one token
        (Budget(keep_ratio=0.5, max_keep=10), [SQUARE], [10]),
        (Budget(num_keep=2, min_keep=6), [SQUARE], [6]),
        (Budget(num_keep=1), [[Block(1, 1, separator=True)]], [1]),
    ],
)
def test_how_many_tokens_of_each_image_are_kept(budget, images, counts):
    assert counts_of_images(budget, images) == counts


def test_the_question_is_that_of_generate():
    ids = [1, 90, 92, 7, 8, 9, 93, 5, 6]
    assert question_ids(ids, 90, [1, 92, 93]) == [7, 8, 9, 5, 6]
    assert question_ids(ids, 90, [1], [92], [93]) == [7, 8, 9]


@pytest.mark.parametrize(("name", "reads"), PRUNERS_HERE.items())
def test_which_pruners_read_the_question(name, reads):
    """Where one reads it and the table says no, cached tokens would be those of another question."""
    torch.manual_seed(0)
    layout = TokenLayout.from_stacked(TokenLayout.from_blocks([SQUARE]).stacked()[:, None])
    inputs = PruningInputs(
        tokens=torch.randn(1, 144, 16),
        valid=torch.ones(1, 144, dtype=torch.bool),
        num_visual=torch.tensor([144]),
        layout=layout,
        protected=None,
        query=torch.empty(1, 3, 16),
        query_valid=torch.ones(1, 3, dtype=torch.bool),
        sample_keys=[0],
    )
    masks = []
    for _ in range(4):
        inputs.query = torch.randn(1, 3, 16)
        masks.append(PRUNERS[name]().choose(inputs, Budget(num_keep=20))[0])
        assert int(masks[-1].sum()) == 20
    assert any(not torch.equal(mask, masks[0]) for mask in masks) == reads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_places_survive_any_dtype(dtype):
    places = torch.stack([torch.arange(16384), torch.arange(16384).flip(0)])
    assert torch.equal(read_places(place_columns(places, dtype)), places)


def test_rows_that_were_pruned_elsewhere_say_where_they_lay():
    rows = torch.randn(300, 8)
    mask = torch.zeros(300, dtype=torch.bool)
    mask[[0, 7, 299]] = True
    embedded = embedded_rows(rows, mask)
    assert torch.equal(embedded[:, :8], rows[mask])
    assert read_places(embedded[:, 8:10]).tolist() == [[0, 7, 299]]
    assert read_places(embedded[:, 10:]).tolist() == [[300] * 3]
    assert torch.equal(embedded_rows(rows, mask, "contiguous"), rows[mask])


def test_the_full_prompt_has_every_token_where_it_was():
    pruned = [1, 90, 90, 5, 6, 90, 7]  # images of 4 and 3 tokens, of which 2 and 1 are kept
    full, starts, columns = full_prompt(pruned, [(1, 2, 4), (5, 1, 3)], 90)
    assert full == [1, 90, 90, 90, 90, 5, 6, 90, 90, 90, 7] and starts == [1, 7]
    assert columns.tolist() == [0, 1, 1, 5, 6, 7, 10]
    assert full_prompt([3, 4], [], 90)[0] == [3, 4]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("vision_tower.embeddings.weight", "vision_tower.vision_model.embeddings.weight"),
        ("model.vision_tower.encoder.a", "model.vision_tower.vision_model.encoder.a"),
        ("vision_tower.vision_model.encoder.a", "vision_tower.vision_model.encoder.a"),
        ("model.language_model.layers.0.a", "model.language_model.layers.0.a"),
    ],
)
def test_names_of_towers(ours, theirs):
    assert towers_by_vllm_names(ours) == theirs


def test_the_cache_of_rows_keeps_what_was_used_last_within_its_size():
    rows = [torch.full((4, 8), float(i)) for i in range(4)]  # 128 bytes each
    cache, device = RowsCache(max_bytes=256), torch.device("cpu")
    cache.put("a", rows[0])
    cache.put("b", rows[1])
    assert torch.equal(cache.get("a", device), rows[0])
    cache.put("c", rows[2])
    assert cache.get("b", device) is None and cache.num_bytes == 256
    assert torch.equal(cache.get("a", device), rows[0]) and torch.equal(cache.get("c", device), rows[2])
    cache.put("large", torch.zeros(100, 8))
    assert cache.get("large", device) is None and cache.num_bytes == 256
    nothing = RowsCache(max_bytes=0)
    nothing.put("a", rows[0])
    assert nothing.get("a", device) is None
