"""What a checkpoint that somebody else made cannot do: run code, or have files read that are not its own."""

import json
import pickle
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.families.tiny_models import build
from tprl_hf import TPRLConfig, TPRLForConditionalGeneration
from tprl_hf.cli.main import main
from tprl_hf.loading import load_model
from tprl_hf.model_cards import without_paths
from tprl_hf.model_cards.render import inline_code, plain_text
from tprl_hf.modeling import TPRLProcessor
from tprl_hf.modeling.checkpoint_checks import MOST_POLICIES, refuse_unsafe_name
from tprl_hf.modeling.hub_tprl import BEGIN, END, full_card, is_hub_name, update_card

load = TPRLForConditionalGeneration.from_pretrained
from_base_model = TPRLForConditionalGeneration.from_base_model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base model, its policy and both merged, as directories."""
    folder = tmp_path_factory.mktemp("made")
    build("llava").save_pretrained(folder / "base")
    model = TPRLForConditionalGeneration.from_base_model(
        str(folder / "base"), latent_dim=8, policy_training={"stage": "lfd"}
    )
    model.save_pretrained(folder / "policy")
    model.save_pretrained(folder / "merged", save_base_model=True, max_shard_size="40KB")
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy that a test may damage; `tmp_path / "ran"` is there when its code was run."""
    shutil.copytree(made, tmp_path / "copy")
    change(tmp_path / "copy/policy", base_model_name_or_path=str(tmp_path / "copy/base"))
    return tmp_path / "copy"


def change(directory, name="config.json", **fields):
    path = directory / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


class Pickled:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def put_pickles(directory, marker):
    for path in directory.glob("model*"):
        path.unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Pickled(marker)))


@pytest.mark.parametrize("kind", ["policy", "merged", "base"])
def test_pickles_are_not_read(folder, tmp_path, kind):
    put_pickles(folder / kind, tmp_path / "ran")
    words = r"pytorch_model\.bin\. Only safetensors are read" if kind != "base" else "Only safetensors are read"
    with pytest.raises(OSError, match=words):
        load(folder / ("policy" if kind == "base" else kind))
    if kind == "base":
        with pytest.raises(OSError, match="safetensors"):
            TPRLForConditionalGeneration.from_base_model(str(folder / "base"))
    assert not (tmp_path / "ran").exists()


def test_nobody_can_ask_for_pickles(folder):
    for call in (lambda **k: load(folder / "policy", **k), TPRLForConditionalGeneration.from_base_model):
        with pytest.raises(ValueError, match="use_safetensors=False is refused"):
            call(**({"base_model": str(folder / "base")} | {"use_safetensors": False}))


@pytest.mark.parametrize(
    "name", ["../base/model.safetensors", "/etc/model.safetensors", "a/../../model.safetensors", "C:\\m.safetensors"]
)
def test_weights_elsewhere_are_not_read(folder, name):
    index = json.loads((folder / "merged/model.safetensors.index.json").read_text())
    first = next(iter(index["weight_map"]))
    change(folder / "merged", "model.safetensors.index.json", weight_map={**index["weight_map"], first: name})
    with pytest.raises(ValueError, match="which is not the name of a file beside it"):
        load(folder / "merged")
    (folder / "base/model.safetensors").unlink()
    shutil.copy(folder / "merged/model.safetensors.index.json", folder / "base")
    for call in (lambda: load(folder / "policy"), lambda: from_base_model(folder / "base")):
        with pytest.raises(ValueError, match="which is not the name of a file beside it"):
            call()


@pytest.mark.parametrize("name", ["adapter_model.bin", "../base/model.safetensors"])
def test_a_config_names_no_weights(folder, tmp_path, name):
    """transformers would unpickle the one, and knows of the other in directories only."""
    for kind in ("policy", "merged", "base"):
        (folder / kind / "adapter_model.bin").write_bytes(pickle.dumps(Pickled(tmp_path / "ran")))
    for kind in ("merged", "base"):
        change(folder / kind, transformers_weights=name)
        for call in (
            (lambda: load(folder / "merged"),)
            if kind == "merged"
            else (
                lambda: load(folder / "policy"),
                lambda: from_base_model(folder / "base"),
            )
        ):
            with pytest.raises(ValueError, match=f"names the weights '{re.escape(name)}'"):
                call()
    assert not (tmp_path / "ran").exists()


def test_shards_are_safetensors(folder):
    index = json.loads((folder / "merged/model.safetensors.index.json").read_text())
    weight_map = dict.fromkeys(index["weight_map"], "pytorch_model.bin")
    change(folder / "merged", "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(ValueError, match=r"names 'pytorch_model\.bin': only safetensors"):
        load(folder / "merged")


@pytest.mark.parametrize("name", [None, 3, "", "..", "a\\b", "/a"])
def test_names_that_are_no_files_beside(name):
    with pytest.raises(ValueError, match="names the file"):
        refuse_unsafe_name(name, "index")


def test_names_of_files_beside():
    for name in ("model.safetensors", "shards/model-1.safetensors", "a..b"):
        refuse_unsafe_name(name, "index")


def other_code(directory, marker, model_type):
    """Names code beside a config that leaves a file behind when it is imported."""
    (directory / "other.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    names = {"AutoConfig": "other.Config", "AutoProcessor": "other.Model"}
    change(directory, model_type=model_type, auto_map={**names, "AutoModelForImageTextToText": "other.Model"})


def test_other_code_is_not_run(folder, tmp_path):
    """Whoever has the package gets its classes, whatever code a checkpoint names."""
    for kind in ("policy", "merged"):
        other_code(folder / kind, tmp_path / "ran", "tprl")
        for trust in ({}, {"trust_remote_code": True}):
            model = AutoModelForImageTextToText.from_pretrained(folder / kind, **trust)
            assert type(model) is TPRLForConditionalGeneration
    # saved again, it names no code
    model.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again/config.json").read_text())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}])
def test_code_of_a_base_model_is_not_run(folder, tmp_path, trust):
    """Nor with trust in the policy: that is no trust in whatever base model its config names."""
    other_code(folder / "base", tmp_path / "ran", "unheard-of")
    with pytest.raises((OSError, ValueError), match=r"unheard-of|trust_remote_code"):
        load(folder / "policy", **trust)
    with pytest.raises((OSError, ValueError), match=r"unheard-of|trust_remote_code|Unrecognized"):
        AutoProcessor.from_pretrained(folder / "policy", **trust)
    with pytest.raises((OSError, ValueError)):
        TPRLProcessor.from_pretrained(folder / "policy", **trust)
    assert not (tmp_path / "ran").exists()


def test_a_base_config_that_transformers_does_not_know(folder):
    for kind in ("policy", "merged"):
        base = json.loads((folder / kind / "config.json").read_text())["base_config"]
        change(folder / kind, base_config={**base, "model_type": "unheard-of", "auto_map": {"AutoConfig": "a.B"}})
        with pytest.raises(ValueError, match="'unheard-of', which transformers does not know"):
            load(folder / kind)


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "kernels-community/flash-attn2:forward"},
        {"_attn_implementation_internal": {"": "sdpa", "text_config": "paged|someone/kernel"}},
        {"experts_implementation": "someone/experts"},
        {"base_config": {"text_config": {"attn_implementation": "someone/kernel"}}},
        {"text_config": {"attn_implementation": {"": "someone/kernel"}}, "vision_config": {}},
    ],
)
def test_a_config_names_no_kernels(folder, fields):
    """A kernel is code of a repository that nobody asked for; transformers would load some of them."""
    for kind, calls in {
        "policy": [
            lambda: load(folder / "policy"),
            lambda: AutoModelForImageTextToText.from_pretrained(folder / "policy"),
        ],
        "merged": [lambda: load(folder / "merged"), lambda: from_base_model(folder / "merged")],
        "base": [lambda: load(folder / "policy"), lambda: from_base_model(folder / "base")],
    }.items():
        before = (folder / kind / "config.json").read_text()
        config = json.loads(before)
        for name, value in fields.items():
            config[name] = {**config.get(name, {}), **value} if isinstance(config.get(name), dict) else value
        if "base_config" in fields:  # the other fields of its parts stay
            config["base_config"] = {**json.loads(before).get("base_config", {}), **fields["base_config"]}
        (folder / kind / "config.json").write_text(json.dumps(config))
        for call in calls:
            with pytest.raises((OSError, ValueError), match=rf"config\.json in .*{kind} asks for the kernel '.*/.*'"):
                call()
        (folder / kind / "config.json").write_text(before)


def test_what_is_no_kernel_is_taken(folder):
    change(folder / "policy", attn_implementation="eager")
    assert load(folder / "policy").lvlm.config.text_config._attn_implementation == "eager"
    asked = load(folder / "policy", attn_implementation="sdpa")
    assert asked.lvlm.config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", ["os", "float33", "int8", "", 3, ["float16"], {"": "nn"}])
@pytest.mark.parametrize("place", ["dtype", "torch_dtype", "part"])
def test_a_config_names_a_dtype_of_weights(folder, dtype, place):
    """`"os"` is an attribute of torch as `"float16"` is."""
    for kind in ("policy", "merged", "base"):
        before = (folder / kind / "config.json").read_text()
        fields = {"dtype": None, place: dtype}
        if place == "part":
            part = "text_config" if kind == "base" else "base_config"
            fields = {part: {**json.loads(before)[part], "dtype": dtype}}
        change(folder / kind, **fields)
        calls = [lambda: load(folder / "policy")] if kind == "base" else [lambda kind=kind: load(folder / kind)]
        for call in (*calls, lambda kind=kind: from_base_model(folder / kind)):
            with pytest.raises(ValueError, match=r"dtype of .* must be a dtype of weights, such as 'bfloat16'; got "):
                call()
        (folder / kind / "config.json").write_text(before)


# ---- which base model ----


def policies_on_one_another(folder, number, last):
    """Copies of the policy, each with the next one as its base model, and `last` as that of the last one."""
    places = [folder / f"policy{i}" for i in range(number)]
    for place, base in zip(places, [*places[1:], last or places[0]], strict=True):
        shutil.copytree(folder / "policy", place)
        change(place, base_model_name_or_path=str(base), base_model_relative_path=None)
    return places[0]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_policies_that_name_each_other(folder, capsys, number):
    first = policies_on_one_another(folder, number, last=None)
    Image.new("RGB", (24, 24)).save(folder / "a.png")
    for call in (
        lambda: load(first),
        lambda: AutoModelForImageTextToText.from_pretrained(first),
        lambda: from_base_model(first),
        lambda: AutoProcessor.from_pretrained(first),
        lambda: TPRLProcessor.from_pretrained(first),
        lambda: load_model(str(first)),
        lambda: load(folder / "policy", base_model=first),
    ):
        with pytest.raises(OSError, match="is a policy, its base model is a policy again, and so on without an end"):
            call()
    assert main(["generate", str(first), "--image", str(folder / "a.png"), "--question", "What is this?"]) == 2
    assert "so on without an end" in capsys.readouterr().err
    # a live model that names them is saved with all its weights, as one whose base model is not on this machine
    model = from_base_model(build("llava"), base_model_name_or_path=str(first), latent_dim=8)
    model.save_pretrained(folder / "saved")
    assert load(folder / "saved").config.includes_base_model


def test_a_policy_of_a_policy(folder):
    """The LVLM at the end of a row of policies, which is not longer than anybody needs."""
    first = policies_on_one_another(folder, 3, last=folder / "base")
    expected = load(folder / "policy").lvlm.state_dict()
    assert all(map(torch.equal, load(first).lvlm.state_dict().values(), expected.values()))
    shutil.rmtree(folder / "policy1")
    with pytest.raises(OSError, match=r"The base model of .*policy0 is not in .*policy1"):
        load(first)
    for place in (folder / "policy0", folder / "policy2"):
        shutil.rmtree(place)
    with pytest.raises(OSError, match="without an end"):
        load(policies_on_one_another(folder, MOST_POLICIES + 2, last=folder / "base"))


def test_a_base_of_another_shape(folder):
    config = json.loads((folder / "policy/config.json").read_text())
    config["base_config"]["vision_config"]["image_size"] = 30
    config["base_config"]["text_config"]["num_hidden_layers"] = 3
    change(folder / "policy", base_config=config["base_config"], base_model_revision="a" * 40)
    words = r"text_config\.num_hidden_layers 3 instead of 2, vision_config\.image_size 30 instead of 24"
    with pytest.raises(ValueError, match=f"{words}.*at revision {'a' * 40}"):
        load(folder / "policy", base_model=build("llava"))
    with pytest.raises(ValueError, match=r"model_type llava instead of .*qwen2_5_vl"):
        load(folder / "policy", base_model=build("qwen2_5_vl"))


def test_a_base_of_another_revision(folder):
    """A directory of the Hub's cache says which commit it holds."""
    snapshots = folder / "models--me--base/snapshots"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(folder / "base", snapshots / commit)
    change(folder / "policy", base_model_name_or_path="me/base", base_model_revision="a" * 40)
    assert load(folder / "policy", base_model=snapshots / ("a" * 40)).config.token_dim == 32
    for base in (snapshots / ("b" * 40), AutoModelForImageTextToText.from_pretrained(snapshots / ("b" * 40))):
        with pytest.raises(ValueError, match=f"me/base at revision {'a' * 40}, but .* is revision {'b' * 40}"):
            load(folder / "policy", base_model=base)
    config = TPRLConfig.from_pretrained(folder / "policy")
    config.base_model_revision = None  # as the message says
    assert load(folder / "policy", config=config, base_model=snapshots / ("b" * 40)) is not None


def test_saving_leaves_no_weights_of_another_kind(made, tmp_path):
    """Sharded, whole and policy-only checkpoints over one another: the last one counts."""
    model = load(made / "merged")
    for settings in ({"max_shard_size": "40KB"}, {}, {"max_shard_size": "40KB"}):
        model.save_pretrained(tmp_path, save_base_model=True, **settings)
        assert (tmp_path / "model.safetensors").exists() == (not settings)
        loaded = load(tmp_path)
        assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]


# ---- cards ----

HOSTILE = "<img src=x onerror=alert(1)> [a](http://b) | *c* `d`\n# title\n---\nlicense: mit"


def test_text_on_cards_is_escaped():
    text = plain_text(HOSTILE)
    assert "\n" not in text and "<" not in text and "|" not in text and "\\[a\\](" in text and "\\`d\\`" in text
    code = inline_code(f"{HOSTILE} {END}")
    assert code.count("`") == 2 and "\n" not in code and END not in code and "\\|" in code


def test_paths_are_shortened():
    assert without_paths({"a": ["/data/runs/x y", "~/runs/x", "../x/y.json", "--model=/a/b"]}) == {
        "a": ["x y", "x", "y.json", "--model=b"]
    }
    for text in ("1/3", "me/name", "https://host/a/b", "a and/or b", "3 / 4"):
        assert without_paths(text) == text


def test_metadata_is_quoted():
    card = ModelCard(full_card({"license": "mit\nbase_model: other/model", "tags": ["a: b", "c\n- d"]}, "text"))
    assert card.data.license == "mit\nbase_model: other/model" and card.data.base_model is None
    assert card.data.tags == ["a: b", "c\n- d"]


def test_names_on_the_hub():
    for name in ("me/name", "gpt2", "a-b/c.d_e"):
        assert is_hub_name(name)
    for name in (None, "", "/a/b", "a/b/c", "../a", "a b", "a/b\nc", "me/name\n", ".", ".."):
        assert not is_hub_name(name)


def test_a_card_without_our_text_keeps_its_own():
    new = full_card({"tags": ["tprl"], "license": "mit", "library_name": "transformers"}, "ours")
    card = update_card("---\ntags:\n- mine\nlicense: other\nmodel-index: []\n---\n# Mine\n", new)
    assert card.endswith(f"# Mine\n\n{BEGIN}\nours\n{END}\n")
    data = ModelCard(card).data
    assert (data.tags, data.license, data.library_name) == (["mine", "tprl"], "other", "transformers")
    again = update_card(card, full_card({"tags": ["tprl"]}, "newer"))
    assert "newer" in again and "ours" not in again and "# Mine" in again
    assert update_card(again, new, replace=False).count("newer") == 1
    assert "ours" not in update_card("# Mine\n", new, replace=False)
    assert update_card(None, new) == update_card("\n", new) == new
    assert "# No header" in update_card("# No header\n", new)
    named = card.replace("license: other", "license: other\nlicense_name: llama3\nlicense_link: LICENSE")
    told = ModelCard(update_card(named, new, explicit=("license",))).data.to_dict()
    assert told["license"] == "mit" and not {"license_name", "license_link"} & told.keys()
    assert ModelCard(update_card(named, new)).data.license_name == "llama3"
