"""Push in one process, load in others that know nothing but names: through huggingface_hub's real client."""

import json
import sys
from pathlib import Path

import pytest

MODELING = Path(__file__).parents[2] / "tprl_hf" / "modeling"
CODE = {path.name for path in MODELING.glob("*.py")} - {"__init__.py"}

PUSH = """
import sys
import torch
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from tests.families.tiny_processor import make_processor
from tests.families.tiny_models import build
from tprl_hf import TPRLForConditionalGeneration

expected = sys.argv[1]
base = build("llava")
base.push_to_hub("me/base", private=True)
processor = make_processor()
processor.push_to_hub("me/base")
ModelCard("---\\nlicense: llama2\\n---\\nA base model.\\n").push_to_hub("me/base")

torch.manual_seed(1)
settings = {"latent_dim": 8, "keep_ratio": 0.4, "policy_training": {"stage": "lfd"}}
model = TPRLForConditionalGeneration.from_base_model("me/base", **settings).eval()
assert model.config.base_model_revision == HfApi().model_info("me/base").sha
bare = model.push_to_hub("me/llava-tprl", private=True).oid  # without a processor
processor.push_to_hub("me/llava-tprl")
first = HfApi().model_info("me/llava-tprl").sha
model.push_to_hub("me/merged", save_base_model=True, max_shard_size="40KB")
processor.push_to_hub("me/merged")

image = Image.new("RGB", (30, 24), "red")
image.save(f"{expected}.png")
content = [{"type": "image", "image": image}, {"type": "text", "text": "word5 word9"}]
chat = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
inputs = dict(processor.apply_chat_template([{"role": "user", "content": content}], **chat))
tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
made = {"inputs": inputs, "logits": model(**inputs).logits, "tokens": tokens, "first": first, "bare": bare}
torch.save(made, expected)

# another policy later on, beside the earlier one
model.config.keep_ratio = 0.9
model.push_to_hub("me/llava-tprl", revision="more")
# the base model goes on, and the policy stays with the commit it was trained with
with torch.no_grad():
    for weight in base.parameters():
        weight.mul_(2)
base.push_to_hub("me/base")
assert HfApi().model_info("me/base").sha != model.config.base_model_revision
"""

# What every fresh process has loaded must do.
CHECK = """
import sys
import torch

folder = sys.argv[1]
expected = torch.load(f"{folder}/expected")
inputs, first, bare = expected["inputs"], expected["first"], expected["bare"]
KINDS = {"do_sample": False, "max_new_tokens": 4}


def check(model):
    assert type(model).__name__ == "TPRLForConditionalGeneration"
    assert int(model.prune(**inputs).num_kept[0]) == 6  # of 16: pruned by default
    assert torch.equal(model(**inputs).logits, expected["logits"])
    assert torch.equal(model.generate(**inputs, **KINDS), expected["tokens"])


def refused(call, *words):
    try:
        call()
    except (OSError, ValueError) as error:
        assert all(word in str(error) for word in words), error
        return
    raise AssertionError("not refused")
"""


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory) -> Path:
    """Where the results of the pushed model lie."""
    folder = tmp_path_factory.mktemp("pushed")
    run(PUSH, folder / "expected")
    return folder


def test_what_is_pushed(hub, folder):
    policy, merged = hub.files("me/llava-tprl"), hub.files("me/merged")
    assert {name for name in policy if name.endswith(".py")} == CODE
    for name in CODE:
        assert policy[name] == (MODELING / name).read_bytes()
    others = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    others |= {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert set(policy) - CODE == others
    assert set(merged) - CODE - others == {name for name in merged if "-of-" in name or name.endswith(".index.json")}
    config = json.loads(policy["config.json"])
    assert config["base_model_name_or_path"] == "me/base" and len(config["base_model_revision"]) == 40
    assert hub.repo("me/llava-tprl").private and not hub.repo("me/merged").private
    card = policy["README.md"].decode()
    for line in ("license: llama2", "base_model: me/base", "base_model_relation: adapter", "- tprl"):
        assert f"\n{line}\n" in card
    assert "base_model_relation: finetune" in merged["README.md"].decode()


def test_names_are_enough(hub, run, folder, tmp_path):
    """With the package imported; then the same from the cache, without a network."""
    code = """
import tprl_hf
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

name = "me/llava-tprl"
assert type(AutoConfig.from_pretrained(name)) is tprl_hf.TPRLConfig
check(AutoModelForImageTextToText.from_pretrained(name))
check(AutoModel.from_pretrained("me/merged"))
check(AutoModel.from_pretrained(name, revision=first))
more = AutoModelForImageTextToText.from_pretrained(name, revision="more")
assert int(more.prune(**inputs).num_kept[0]) == 14
processor = AutoProcessor.from_pretrained(name)
assert type(processor).__name__ == "LlavaProcessor"
# a policy without a processor of its own takes that of its base model
assert type(AutoProcessor.from_pretrained(name, revision=bare)).__name__ == "LlavaProcessor"
pipe = pipeline("image-text-to-text", model=name)
content = [{"type": "image", "path": f"{folder}/expected.png"}, {"type": "text", "text": "word5 word9"}]
made = pipe([{"role": "user", "content": content}], max_new_tokens=4, return_full_text=False)
new = expected["tokens"][0, inputs["input_ids"].shape[1] :]
assert made[0]["generated_text"].strip() == processor.decode(new, skip_special_tokens=True), made
"""
    home = tmp_path / "home"
    run(CHECK + code, folder, home=home)
    requests = len(hub.requests)
    run(CHECK + code, folder, home=home, token=None, HF_HUB_OFFLINE="1")
    assert len(hub.requests) == requests


def test_without_the_package(hub, run, folder, tmp_path):
    """Code that lies beside the weights loads, prunes, generates and saves; it is not run unasked."""
    code = """
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

name, trust = "me/llava-tprl", {"trust_remote_code": True}
for kind in (AutoConfig, AutoModelForImageTextToText):
    refused(lambda: kind.from_pretrained(name), "trust_remote_code=True")
model = AutoModelForImageTextToText.from_pretrained(name, **trust)
check(model)
check(AutoModel.from_pretrained("me/merged", **trust))
assert AutoProcessor.from_pretrained(name, revision=bare, **trust).tokenizer is not None
pipe = pipeline("image-text-to-text", model=name, **trust)
check(pipe.model)
model.save_pretrained(f"{folder}/again")
model.save_pretrained(f"{folder}/again-merged", save_base_model=True)
for again in ("again", "again-merged"):
    check(AutoModelForImageTextToText.from_pretrained(f"{folder}/{again}", **trust))
assert "tprl_hf" not in sys.modules
"""
    run(CHECK + code, folder, installed=False)
    for again in ("again", "again-merged"):
        assert {path.name for path in (folder / again).glob("*.py")} == CODE
        config = json.loads((folder / again / "config.json").read_text())
        assert set(config["auto_map"].values()) <= {
            f"{name[:-3]}.{c}"
            for name in CODE
            for c in ("TPRLConfig", "TPRLForConditionalGeneration", "TPRLProcessor")
        }


def test_tokens_and_other_bases(run, folder, tmp_path):
    """Installed but not imported; nobody is logged in, and the base model may come from elsewhere."""
    for name in ("llava-tprl", "base"):
        run([str(Path(sys.executable).parent / "hf"), "download", f"me/{name}", "--local-dir", str(tmp_path / name)])
    code = """
import json
from transformers import AutoModelForImageTextToText, AutoProcessor

got, base = sys.argv[2:]
name, options = "me/llava-tprl", {"trust_remote_code": True}
load = AutoModelForImageTextToText.from_pretrained
refused(lambda: load(name, **options), name)
refused(lambda: load(name, token="hf_others", **options), name)
revision = json.load(open(f"{got}/config.json"))["base_model_revision"]
refused(lambda: load(got, **options), "me/base", revision)  # its base model is private, too
check(load(name, token="hf_mine", **options))
assert AutoProcessor.from_pretrained(name, revision=bare, token="hf_mine", **options).tokenizer is not None
assert "tprl_hf" not in sys.modules

model = load(got, base_model=base, **options)  # the later base model, from a directory
assert not torch.equal(model(**inputs).logits, expected["logits"])
"""
    run(CHECK + code, folder, tmp_path / "llava-tprl", tmp_path / "base", token=None)


@pytest.mark.parametrize("name", ["vispruner", "fastv"])
def test_a_pruner_that_was_set_travels_with_its_code(run, tmp_path, name):
    """One that reads the tower's attention, and one whose code imports a sibling."""
    make = f"""
import sys, torch
from tests.families.tiny_models import build, collate, sample
from tprl_hf import TPRLForConditionalGeneration
build("llava").save_pretrained(sys.argv[1] + "/base")
model = TPRLForConditionalGeneration.from_base_model(sys.argv[1] + "/base", latent_dim=8, pruner="{name}", num_keep=5)
inputs = collate("llava", [sample("llava", 1, 1)])
model.eval().save_pretrained(sys.argv[1] + "/model", include_code=True)
torch.save((inputs, model.prune(**inputs).keep_mask), sys.argv[1] + "/expected")
"""
    load = f"""
import sys, torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1] + "/model", trust_remote_code=True).eval()
inputs, expected = torch.load(sys.argv[1] + "/expected")
assert model.config.pruner["name"] == "{name}" and "tprl_hf" not in sys.modules
assert torch.equal(model.prune(**inputs).keep_mask, expected)
model.save_pretrained(sys.argv[1] + "/again")  # takes its code along
"""
    run(make, tmp_path)
    run(load, tmp_path, installed=False)
    again = {path.name: path.read_text() for path in (tmp_path / "again").glob("*.py")}
    assert again == {path.name: path.read_text() for path in (tmp_path / "model").glob("*.py")}
