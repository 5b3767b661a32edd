"""Whatever a call or a config is given: the correct result, or one clear exception. See `tests/any_values.py`."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.any_values import (
    ANYTHING,
    ARRAYS,
    NUMBERS,
    OTHERS,
    SCALARS,
    TEXTS,
    WRITABLE,
    all_good,
    assert_good,
    is_count,
    is_flag,
    is_fraction,
    is_number,
    judge,
    or_none,
    scalar,
    several,
    some_of,
)
from tests.families.tiny_models import IMAGE, build, collate, sample
from tprl_hf.modeling import TPRLConfig, TPRLForConditionalGeneration
from tprl_hf.pruners import FeatureNormPruner

# ---- configs ----


def is_list_of_ids(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(is_count(one, 0) for one in value)


def is_name(value: Any) -> bool:
    return type(value) is str and bool(value.strip())


def is_pruner(value: Any) -> bool:
    name = value.get("name") if isinstance(value, dict) else value
    return isinstance(name, str) and bool(name)


FIELDS = {
    "base_model_name_or_path": or_none(is_name),
    "includes_base_model": is_flag,
    "keep_ratio": or_none(is_fraction),
    "num_keep": or_none(is_count),
    "threshold": or_none(is_number),
    "threshold_keep_ratio": or_none(is_fraction),
    "min_keep": lambda value: is_count(value, 0),
    "max_keep": or_none(is_count),
    "position_ids": lambda value: type(value) is str and value in ("original", "contiguous"),
    "query_agnostic": is_flag,
    "pruner": or_none(is_pruner),
    "policy_training": or_none(lambda value: isinstance(value, dict)),
    "special_token_ids": or_none(is_list_of_ids),
    "question_end_ids": or_none(is_list_of_ids),
    "latent_dim": or_none(is_count),
    "policy_dim": is_count,
    "policy_num_heads": is_count,
    "policy_num_layers": lambda value: is_count(value, 0),
    "policy_positions": is_flag,
    "policy_steps": or_none(is_count),
    "policy_budget": is_flag,
    "policy_input_norm": is_flag,
    "policy_similarity": is_flag,
    "num_steps": lambda value: is_count(value, 1, 1000),
}
BUDGETS = ("keep_ratio", "num_keep", "threshold")
# Every other value is of the kind that the field wants.
WANTED: dict[str, Any] = {
    "base_model_name_or_path": st.sampled_from(["somebody/some-llava", None, ""]),
    "keep_ratio": st.floats(0.01, 1),
    "num_keep": st.integers(1, 30),
    "threshold": st.floats(0.01, 30),
    "threshold_keep_ratio": st.floats(0.01, 1),
    "min_keep": st.integers(0, 9),
    "max_keep": st.integers(1, 40),
    "position_ids": st.sampled_from(["original", "contiguous", "Original"]),
    "pruner": st.sampled_from(["uniform", {"name": "uniform"}, {"name": 3}, {"keep_ratio": 0.5}]),
    "policy_training": st.sampled_from([{"stage": "lfd"}, {}, None, "lfd"]),
    "special_token_ids": st.sampled_from([[1, 2], (3,), [-1], [0.5], []]),
    "question_end_ids": st.sampled_from([[1, 2], (3,), [-1], [0.5], []]),
    "latent_dim": st.sampled_from([8, 16, 7, 64]),
    "policy_num_heads": st.sampled_from([1, 2, 4, 3]),
    **dict.fromkeys(("policy_dim", "policy_num_layers", "policy_steps", "num_steps"), st.integers(1, 9)),
    **dict.fromkeys(
        (
            *("includes_base_model", "query_agnostic", "policy_positions", "policy_budget", "policy_input_norm"),
            "policy_similarity",
        ),
        st.booleans(),
    ),
}
FIELD_VALUES: dict[str, Any] = {
    name: st.booleans().flatmap(lambda odd, name=name: ANYTHING if odd else WANTED[name]) for name in FIELDS
}


def goes_together(values: dict[str, Any]) -> bool:
    """Whether fields that are valid alone contradict each other."""
    given = [name for name in BUDGETS if values.get(name) is not None]
    most, least = values.get("max_keep"), values.get("min_keep", 1)
    heads, width = values.get("policy_num_heads", 8), values.get("latent_dim")
    return (
        len(given) < 2
        and (most is None or scalar(most) >= scalar(least))
        and (width is None or scalar(width) % scalar(heads) == 0)
    )


def plain(value: Any) -> Any:
    found = scalar(value)
    if found is not NotImplemented:
        return found
    return [scalar(one) for one in value] if isinstance(value, (list, tuple)) else value


def config_differs(config: TPRLConfig, values: dict[str, Any]) -> str | None:
    again = TPRLConfig.from_dict(json.loads(config.to_json_string()))
    for name, value in values.items():
        expected = {"name": value} if name == "pruner" and isinstance(value, str) else plain(value)
        for found in (getattr(config, name), getattr(again, name)):
            if found != expected:
                return f"{name} became {found!r}"
    return None


@several(450)
@given(values=some_of(FIELD_VALUES, most=3))
def test_a_config(values):
    is_valid = all_good(values, FIELDS) and goes_together(values)
    verdict = judge(lambda: TPRLConfig(**values), values, is_valid, lambda config: config_differs(config, values))
    assert_good(verdict)


@several(150)
@given(values=some_of(FIELD_VALUES, most=2))
def test_a_field_that_is_set_later(values):
    """The next call checks it."""
    model, batch, _, _ = prepared()
    before = {name: getattr(model.config, name) for name in FIELDS}
    # the first two are read when a model is made; another pruner needs a budget, see test_pruner_choice.py
    aside = ("latent_dim", "policy_num_heads", "pruner")
    values = {name: value for name, value in values.items() if name not in aside}
    together = {**before, "latent_dim": None, **values}
    is_valid = all_good(values, FIELDS) and goes_together(together)

    def call():
        for name, value in values.items():
            setattr(model.config, name, value)
        return model.prune(**batch)

    try:
        assert_good(judge(call, values, is_valid))
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)


MISSPELT = st.sampled_from(
    ["keep_ration", "num_keeps", "treshold", "num_step", "policy_head", "prunner", "queryagnostic"]
)


@several(60)
@given(name=MISSPELT, value=NUMBERS)
def test_a_misspelt_field(name, value):
    base = prepared()[0].lvlm
    for call in (TPRLConfig, functools.partial(TPRLForConditionalGeneration.from_base_model, base)):
        verdict = judge(lambda call=call: call(**{name: value}), {name: name}, False)
        assert_good(verdict)


@several(120)
@given(values=some_of(FIELD_VALUES, most=2))
def test_from_base_model(values):
    base = prepared()[0].lvlm
    values = {"latent_dim": 8, "policy_dim": 8, **values}
    small = all(scalar(values.get(name)) is NotImplemented or scalar(values[name]) < 100 for name in values)
    is_valid = all_good(values, FIELDS) and goes_together(values) and small
    if "pruner" in values and values["pruner"] is not None:
        is_valid = is_valid and values["pruner"] in ("uniform", {"name": "uniform"})
    if not small and all_good(values, FIELDS):
        return  # a policy of that size would have to be made

    def differs(model):
        plan = (
            model.prune(**prepared()[1], num_keep=2) if model.config.policy_training or model.config.pruner else None
        )
        return (
            None
            if plan is None or int(plan.num_kept[0]) == 2 or "max_keep" in values or "min_keep" in values
            else "other"
        )

    verdict = judge(lambda: TPRLForConditionalGeneration.from_base_model(base, **values), values, is_valid, differs)
    assert_good(verdict)


@several(40)
@given(value=ANYTHING)
def test_a_base_model_of_any_kind(value):
    verdict = judge(lambda: TPRLForConditionalGeneration.from_base_model(value), {"base_model": value}, False)
    assert_good(verdict, *(["OSError"] if isinstance(value, str) else []))


# ---- checkpoints ----


@functools.cache
def saved() -> Path:
    path = Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    model = TPRLForConditionalGeneration.from_base_model(
        build("llava"), latent_dim=8, policy_dim=8, policy_training={"stage": "lfd"}, keep_ratio=0.5
    )
    model.save_pretrained(path / "policy", save_base_model=False)
    model.save_pretrained(path / "merged", save_base_model=True)
    return path


def damage(state: dict[str, torch.Tensor], name: str, kind: str) -> None:
    value = state[name]
    if kind in ("nan", "inf", "-inf"):
        state[name] = value.clone()
        state[name].view(-1)[-1] = float(kind)
    elif kind == "huge":
        state[name] = value.double()
        state[name].view(-1)[0] = 1e300
    elif kind == "shape":
        state[name] = torch.cat([value, value])
    elif kind == "missing":
        del state[name]
    elif kind == "foreign":
        state[name + "s"] = value.clone()
    elif kind != "nothing":
        state[name] = value.to(getattr(torch, kind))


OF_A_FILE = ("nan", "inf", "-inf", "huge", "shape", "missing", "foreign")
OTHER_TYPES = ("int8", "uint8", "int64", "bool", "complex64")
FINE_TYPES = ("nothing", "float16", "bfloat16", "float64")


@several(80)
@given(
    merged=st.booleans(),
    number=st.integers(0, 10**6),
    kind=st.sampled_from(OF_A_FILE + OTHER_TYPES + FINE_TYPES),
)
def test_weights_of_a_policy(merged, number, kind):
    source = saved() / ("merged" if merged else "policy")
    state = load_file(source / "model.safetensors")
    names = sorted(name for name in state if name.startswith(("policy.", "autoencoder.")))
    name = names[number % len(names)]
    damage(state, name, kind)
    expected = {**load_file(source / "model.safetensors"), **state}

    def differs(model):
        own = model.state_dict()
        same = all(torch.equal(own[one], expected[one].float()) for one in names)
        return None if same else "other weights"

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text((source / "config.json").read_text())
        save_file(state, Path(folder) / "model.safetensors", {"format": "pt"})
        given = {name: {"nan": "nan", "inf": "inf", "-inf": "-inf", "huge": "inf"}.get(kind, kind)}
        if kind in ("shape", "missing", "foreign"):
            given = {name: name}
        base = None if merged else prepared()[0].lvlm
        load = functools.partial(TPRLForConditionalGeneration.from_pretrained, folder, base_model=base)
        assert_good(judge(load, given, kind in FINE_TYPES, differs))


JSON_FIELDS = {
    name: value for name, value in FIELDS.items() if name not in ("latent_dim", "policy_num_heads", "policy_dim")
}
JSON_FIELDS = {
    name: JSON_FIELDS[name] for name in JSON_FIELDS if not name.startswith(("policy_", "base_", "includes", "pruner"))
}


@several(110)
@given(
    values=some_of({name: st.one_of(WRITABLE, WANTED[name]) for name in JSON_FIELDS}, most=2),
    how=st.sampled_from(["file", "call"]),
)
def test_the_config_of_a_checkpoint(values, how):
    values = {"keep_ratio": None, **values}
    is_valid = all_good(values, JSON_FIELDS) and goes_together(values)
    base = prepared()[0].lvlm
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads((saved() / "policy" / "config.json").read_text())
        (Path(folder) / "config.json").write_text(json.dumps({**config, **(values if how == "file" else {})}))
        (Path(folder) / "model.safetensors").write_bytes((saved() / "policy" / "model.safetensors").read_bytes())
        given = values if how == "call" else {}
        load = functools.partial(TPRLForConditionalGeneration.from_pretrained, folder, base_model=base, **given)
        verdict = judge(load, values, is_valid, lambda model: config_differs(model.config, values))
    assert_good(verdict)


@several(40)
@given(value=ANYTHING, name=st.sampled_from(["pretrained_model_name_or_path", "base_model"]))
def test_a_checkpoint_of_any_kind(value, name):
    source = saved() / "policy"
    arguments = {"pretrained_model_name_or_path": source, "base_model": prepared()[0].lvlm, name: value}
    if name == "base_model" and value is None:
        return
    path = arguments.pop("pretrained_model_name_or_path")
    verdict = judge(lambda: TPRLForConditionalGeneration.from_pretrained(path, **arguments), {name: value}, False)
    assert_good(verdict, *(["OSError"] if isinstance(value, str) else []))


# ---- calls ----

ARGUMENTS = {
    "keep_ratio": or_none(is_fraction),
    "num_keep": or_none(is_count),
    "threshold": or_none(is_number),
    "prune": or_none(is_flag),
}
OWN_BUDGET = 5


@functools.cache
def prepared():
    """A model whose pruner can be worked out by hand, a batch, which columns are visual, and each token's norm."""
    torch.manual_seed(0)
    base = build("llava")
    model = TPRLForConditionalGeneration.from_base_model(base, latent_dim=8, policy_dim=8).eval()
    model.set_pruner(FeatureNormPruner(num_keep=OWN_BUDGET))
    batch = collate("llava", [sample("llava", 1, 1, text=6), sample("llava", 2, 2, text=3)])
    with torch.no_grad():
        norms = base.model.get_image_features(batch["pixel_values"], return_dict=True).pooler_output
    norms = torch.cat(list(norms)).float().norm(dim=-1)
    return model, batch, batch["input_ids"] == IMAGE, norms


def budget_of(values: dict[str, Any]) -> dict[str, Any]:
    return {name: scalar(values[name]) for name in BUDGETS if values.get(name) is not None}


def kept_by_hand(values: dict[str, Any], mask: torch.Tensor) -> torch.Tensor:
    """Which visual tokens stay, `bool [V]`, by the norms; with Python's own sorting."""
    _, _, visual, norms = prepared()
    shown = mask.bool()[visual]
    if values.get("keep_mask") is not None:
        return values["keep_mask"] & shown
    if values.get("prune") is not None and not scalar(values["prune"]):
        return shown
    budget, kept, start = budget_of(values) or {"num_keep": OWN_BUDGET}, torch.zeros(len(norms), dtype=torch.bool), 0
    for count in visual.sum(1).tolist():
        own = [index for index in range(start, start + count) if shown[index]]
        start += count
        if "threshold" in budget:
            most = sum(float(norms[index]) > budget["threshold"] for index in own)
        else:
            most = budget.get("num_keep", round(budget.get("keep_ratio", 0) * len(own)))
        best = sorted(own, key=lambda index: -float(norms[index]))[: max(int(min(most, len(own))), 1)]
        kept[best] = True
    return kept


def hidden_by_hand(inputs: dict[str, Any], kept: torch.Tensor) -> torch.Tensor:
    """The mask under which the base model itself sees what stays: with its own positions, hiding is as removing."""
    mask = inputs["attention_mask"].bool().clone()
    mask[prepared()[2]] &= kept
    return mask.long()


@torch.no_grad()
def result_differs(method: str, result: Any, inputs: dict[str, Any], values: dict[str, Any]) -> str | None:
    model = prepared()[0]
    kept = kept_by_hand(values, inputs["attention_mask"])
    if method == "prune":
        return None if torch.equal(result.keep_mask, kept) else f"kept {result.keep_mask}, not {kept}"
    mask = hidden_by_hand(inputs, kept)
    shown = {"input_ids": inputs["input_ids"], "pixel_values": inputs["pixel_values"], "attention_mask": mask}
    if method == "forward":
        if scalar(values.get("compact", False)):
            return None if result.logits.shape[1] == int(mask.sum(1).max()) else "another width"
        expected = model.lvlm(**shown).logits
        worst = (result.logits - expected)[mask.bool()].abs().max()
        return None if worst < 1e-4 else f"logits differ by {worst}"
    tokens = result[:, inputs["input_ids"].shape[1] :]
    ids, positions = inputs["input_ids"], (inputs["attention_mask"].long().cumsum(1) - 1).clamp(min=0)
    for step in range(tokens.shape[1]):
        grown = {**shown, "input_ids": ids, "attention_mask": mask, "position_ids": positions}
        best = model.lvlm(**grown).logits[:, -1].topk(2)
        clear = best.values[:, 0] - best.values[:, 1] > 1e-4
        if not (best.indices[:, 0] == tokens[:, step])[clear].all():
            return f"token {step} differs"
        ids, mask = torch.cat([ids, tokens[:, step : step + 1]], 1), torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = torch.cat([positions, positions[:, -1:] + 1], 1)
    return None


def run(method: str, inputs: dict[str, Any], values: dict[str, Any]):
    model = prepared()[0]
    if method == "generate":
        return model.generate(**inputs, **values, max_new_tokens=2, do_sample=False)
    with torch.no_grad():
        return (model if method == "forward" else model.prune)(**inputs, **values)


METHODS = st.sampled_from(["prune", "forward", "generate"])
CALL_VALUES = {**{name: FIELD_VALUES[name] for name in BUDGETS}, "prune": FIELD_VALUES["query_agnostic"]}


@several(300)
@given(method=METHODS, values=some_of(CALL_VALUES, most=2))
def test_the_budget_of_a_call(method, values):
    said = [name for name, value in values.items() if value is not None]
    is_valid = all_good(values, ARGUMENTS) and len(said) < 2
    batch = prepared()[1]
    verdict = judge(
        lambda: run(method, batch, values), values, is_valid, lambda out: result_differs(method, out, batch, values)
    )
    assert_good(verdict)


@functools.cache
def learned():
    """A model whose policy chooses; some of its tokens are kept with more than a half, some with less."""
    torch.manual_seed(3)
    settings = {"latent_dim": 8, "policy_dim": 8, "policy_training": {"stage": "lfd"}}
    model = TPRLForConditionalGeneration.from_base_model(prepared()[0].lvlm, **settings).eval()
    for parameter in model.policy.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(20.0)
    return model


@several(60)
@given(threshold=st.one_of(ANYTHING, st.floats(0, 1), st.sampled_from([0, 1, 0.0, 1.0])))
def test_a_threshold_of_the_policy_is_a_probability(threshold):
    model, batch = learned(), prepared()[1]
    if threshold is None:
        return

    def differs(plan):
        expected = plan.scores > scalar(threshold)
        for rows in torch.arange(48).split(plan.num_visual.tolist()):
            if not expected[rows].any():
                expected[rows[plan.scores[rows].argmax()]] = True
        sure = (plan.scores - scalar(threshold)).abs() > 1e-6
        return None if torch.equal(plan.keep_mask[sure], expected[sure]) else f"{plan.keep_mask}"

    is_valid = is_number(threshold, least=0, most=1)
    assert_good(judge(lambda: model.prune(**batch, threshold=threshold), {"threshold": threshold}, is_valid, differs))


KEEP_MASKS = st.one_of(
    st.lists(st.booleans(), min_size=48, max_size=48).map(torch.tensor),
    st.sampled_from(
        [
            torch.ones(48),
            torch.ones(48, dtype=torch.long),
            torch.ones(47, dtype=torch.bool),
            torch.ones(2, 24, dtype=torch.bool),
            np.ones(48, dtype=bool),
            [True] * 48,
            torch.zeros(48, dtype=torch.bool),
        ]
    ),
    ARRAYS,
    TEXTS,
    OTHERS,
)


@several(80)
@given(method=METHODS, keep_mask=KEEP_MASKS)
def test_the_keep_mask_of_a_call(method, keep_mask):
    batch, values = prepared()[1], {"keep_mask": keep_mask}
    is_mask = isinstance(keep_mask, torch.Tensor) and keep_mask.dtype == torch.bool and keep_mask.shape == (48,)
    is_valid = keep_mask is None or is_mask
    verdict = judge(
        lambda: run(method, batch, values), values, is_valid, lambda out: result_differs(method, out, batch, values)
    )
    assert_good(verdict)


@several(90)
@given(
    method=METHODS,
    hidden=st.lists(st.integers(0, 10**6), max_size=30),
    dtype=st.sampled_from([torch.long, torch.int32, torch.bool, torch.float32]),
    budget=some_of(
        {"keep_ratio": st.floats(0.01, 1), "num_keep": st.integers(1, 40), "prune": st.just(False)}, most=1
    ),
    whole_image=st.booleans(),
)
def test_what_attention_mask_hides_stays_hidden(method, hidden, dtype, budget, whole_image):
    """Holes anywhere but in the last column, which predicts, and in that before the first visual token."""
    _, batch, visual, _ = prepared()
    mask = batch["attention_mask"].clone()
    columns = mask.shape[1] - 1
    for number in hidden:
        mask[number % 2, (number // 2) % columns] = 0
    if whole_image:
        mask[0, visual[0]] = 0
    inputs = {**batch, "attention_mask": mask.to(dtype)}
    verdict = judge(
        lambda: run(method, inputs, budget), budget, True, lambda out: result_differs(method, out, inputs, budget)
    )
    assert_good(verdict)


def changed(tensor: torch.Tensor, place: int, value: Any) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[place] = value
    return tensor


@functools.cache
def odd_inputs() -> dict[str, list[Any]]:
    """Values of other inputs that cannot be right, whatever the budget."""
    _, batch, _, _ = prepared()
    ids, mask, pixels = (batch[name] for name in ("input_ids", "attention_mask", "pixel_values"))
    shape = tuple(ids.shape)
    return {
        "input_ids": [ids.tolist(), ids.numpy(), ids[0], ids.float(), ids[None], ids[:, :0], changed(ids, 3, 10**6)],
        "attention_mask": [mask.tolist(), mask.numpy(), mask[:, 1:], mask[0], mask * 2, mask - 1, mask[:, None, None]],
        "query_mask": [mask.tolist(), mask[:, 1:], mask[0], "question"],
        "position_ids": ["x", ids.tolist(), 0, ids.float(), torch.zeros(2, 3, dtype=torch.long), ids[0]],
        "labels": [ids.tolist(), ids[0], ids[:, 1:], ids.float(), changed(ids, -1, 10**6), changed(ids, -1, -1), "x"],
        "pixel_values": [
            pixels.tolist(),
            pixels.numpy(),
            pixels.long(),
            (pixels * 0).to(torch.uint8),
            changed(pixels, 0, float("nan")),
            changed(pixels, 0, float("inf")),
            "a.png",
            0,
        ],
        "visual_features": [pixels, {"image": pixels}, "x", 0],
        "past_key_values": ["x", 0, ((pixels, pixels),), {}],
        "compact": ["yes", 1, 0, [], torch.ones(2)],
        "shape": [shape],
    }


ODD = [(name, index) for name in odd_inputs() for index in range(len(odd_inputs()[name])) if name != "shape"]
IN_PLACE = {"pixel_values": "pixel_values", "past_key_values": "past_key_values"}


@several(160)
@given(
    method=METHODS,
    odd=st.sampled_from(ODD),
    budget=some_of({"keep_ratio": st.floats(0.01, 1), "num_keep": st.integers(1, 40)}, most=1, least=0),
)
def test_other_inputs_of_a_call(method, odd, budget):
    name, index = odd
    value = odd_inputs()[name][index]
    if (name == "labels" and method != "forward") or (name == "compact" and method != "forward"):
        method = "forward"
    if name in ("past_key_values", "position_ids") and method == "prune":
        method = "generate"  # what `prune` has no use for is not looked at
    inputs = {**prepared()[1], name: value}
    given = {name: value}
    if (name, index) in (("input_ids", 6), ("labels", 4)):
        given = {name: 10**6}
    if name in ("attention_mask",) and index in (4, 5):
        given = {name: {4: 2, 5: -1}[index]}
    if name == "pixel_values" and index in (4, 5):
        given = {name: {4: float("nan"), 5: float("inf")}[index]}
    if name == "labels" and index == 5:
        given = {name: -1}
    assert_good(judge(lambda: run(method, inputs, budget), given, False))


@several(60)
@given(
    method=METHODS,
    name=st.sampled_from(
        ["keep_ration", "keepratio", "num_keeps", "numkeep", "tresholds", "prunes", "keep_masks", "querymask"]
    ),
    value=st.one_of(NUMBERS, SCALARS),
)
def test_a_misspelt_argument_of_a_call(method, name, value):
    assert_good(judge(lambda: run(method, prepared()[1], {name: value}), {name: name}, False))


@pytest.mark.parametrize("score", [float("inf"), -float("inf"), float("nan")])
def test_scores_that_are_not_finite(score):
    """Infinite scores are the highest and the lowest there are; NaN is refused."""
    model, batch, visual, norms = prepared()

    class Scored(FeatureNormPruner):
        def score(self, inputs):
            scores = super().score(inputs)
            scores[:, ::3] = score
            return scores

    with model.using(Scored(num_keep=7)):
        if score != score:
            with pytest.raises(ValueError, match="Scored gave scores that are NaN: look for broken weights"):
                model.prune(**batch)
            return
        plan = model.prune(**batch)
    assert plan.num_kept.tolist() == [7, 7]
    changed = norms.clone()
    start = 0
    for count in visual.sum(1).tolist():
        changed[start : start + count : 3] = score
        own = changed[start : start + count].tolist()
        best = sorted(range(count), key=lambda index: -own[index])[:7]
        assert plan.keep_mask[start : start + count].nonzero()[:, 0].tolist() == sorted(best)
        start += count
