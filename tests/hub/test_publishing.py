"""Trained policies and demonstrations on their way out: trainers, `tprl push`, cards, datasets."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import EvalResult, HfApi

from tests.families.tiny_models import build
from tests.families.tiny_processor import make_processor
from tprl_hf import TPRLConfig, TPRLForConditionalGeneration
from tprl_hf.cli.evaluation_notes import OWN_ANSWERS
from tprl_hf.cli.main import main
from tprl_hf.hub.publishing import files_to_publish
from tprl_hf.model_cards import eval_results_yaml, model_index, policy_card
from tprl_hf.modeling.pruner_choice import name_with_settings
from tprl_hf.modeling.saved_files import NAMES, SAVED
from tprl_hf.training.fingerprint import policy_in_checkpoint
from tprl_hf.training.training_record import recorded_stages

MODELING = Path(__file__).parents[2] / "tprl_hf" / "modeling"
CODE = {path.name for path in MODELING.glob("*.py")} - {"__init__.py"}

TRAIN = """
import json
import sys
from pathlib import Path
import torch
from huggingface_hub import HfApi, ModelCard
from tests.families.tiny_processor import make_processor
from tests.families.tiny_models import build
from tests.training.conftest import POLICY, make_dataset
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.pruners import UniformPruner
from tprl_hf.training import AutoencoderConfig, AutoencoderTrainer, LfDConfig, LfDTrainer
from tprl_hf.cli.main import main
from tprl_hf.training import TPRLPPOConfig, TPRLPPOTrainer, generate_demonstrations
from tprl_hf.hub.publishing import has_other_weights, push_demonstrations

folder = Path(sys.argv[1])
processor, dataset = make_processor(), make_dataset()
base = build("llava")
base.generation_config.eos_token_id = 2
base.push_to_hub("me/trained-base")
processor.push_to_hub("me/trained-base")
ModelCard("---\\nlicense: llama2\\n---\\nBase.\\n").push_to_hub("me/trained-base")
model = TPRLForConditionalGeneration.from_base_model("me/trained-base", **POLICY)
common = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "save_strategy": "no"}

trainer = AutoencoderTrainer(
    model,
    AutoencoderConfig(str(folder / "autoencoder"), push_to_hub=True, hub_private_repo=True, **common),
    processing_class=processor, train_dataset=dataset, eval_dataset=dataset,
)
trainer.train()
trainer.evaluate()
trainer.save_model()  # publishes

demonstrations = generate_demonstrations(UniformPruner(), model, processor, dataset, output_dir=str(folder / "shown"))
demonstrated = {"processing_class": processor, "train_dataset": demonstrations}
facts = {"teacher": "<b>uniform</b>", "base_model": "me/trained-base", "licence": "mit"}
push_demonstrations(folder / "shown", "me/shown", **facts)

trainer = LfDTrainer(model, LfDConfig(str(folder / "lfd"), keep_ratio=0.5, **common), **demonstrated)
trainer.train()
trainer.push_to_hub(commit_message="by hand", blocking=False).result()

config = TPRLPPOConfig(str(folder / "ppo"), num_mini_batches=1, num_ppo_epochs=1, num_steps=1, **common)
trainer = TPRLPPOTrainer(model, config, processing_class=processor, train_dataset=dataset)
trainer.train()
trainer.save_model()
(folder / "ppo" / "notes.bin").write_bytes(b"not to be published")

# a path cannot be published: said before anything is trained
model.config.base_model_name_or_path = str(folder)
try:
    LfDTrainer(model, LfDConfig(str(folder / "no"), push_to_hub=True, **common), **demonstrated)
except ValueError as error:
    assert "save_base_model=True" in str(error) and str(folder) in str(error)
else:
    raise AssertionError("a path was taken for a name")

results, bench = str(folder / "results.json"), f"{folder / 'results.json'}=bench/easy:test"
push = ["push", str(folder / "ppo"), "me/by-command"]
assert main([*push, "--results", results, "--benchmark", bench, "--private"]) == 0
# the card is somebody's now, and the checkpoint is pushed again
card = ModelCard.load("me/by-command")
card.text = "\\nMy own words, before.\\n" + card.text + "\\nMy own words, after.\\n"
card.text = card.text.replace("## Limits", "## Overwritten")
card.data.license, card.data.language = "apache-2.0", "en"
card.push_to_hub("me/by-command")
assert main([*push, "--results", results]) == 0
assert main([*push, "--revision", "later", "--message", "again"]) == 0
# the Hub says no: to a card, to a name, to another user's repository
before = HfApi().model_info("me/by-command").sha
for words in (["me/by-command", "--license", "my own"], ["me/a--b"], ["other/name"]):
    assert main([*push[:2], *words]) == 2, words
assert HfApi().model_info("me/by-command").sha == before

# weights that are somebody's stay, and a LoRA that this checkpoint has not goes
api = HfApi()
assert main([*push[:2], "me/with-others"]) == 0
assert main([*push[:2], "me/with-others", "--benchmark", bench]) == 0
assert ".eval_results/bench-easy-test.yaml" in api.list_repo_files("me/with-others")
for name in ("onnx/model.safetensors", "adapter/adapter_model.safetensors", "model-00001-of-00002.safetensors"):
    api.upload_file(path_or_fileobj=b"theirs", path_in_repo=name, repo_id="me/with-others")
assert main([*push[:2], "me/with-others"]) == 0
weights = {name for name in api.list_repo_files("me/with-others") if name.endswith(".safetensors")}
assert weights == {"onnx/model.safetensors", "model.safetensors"}, weights
# results that are not passed again are still those of these weights, and not those of others
assert ".eval_results/bench-easy-test.yaml" in api.list_repo_files("me/with-others")
assert main(["push", str(folder / "lfd"), "me/with-others", "--base-model", "me/trained-base"]) == 0
assert ".eval_results/bench-easy-test.yaml" not in api.list_repo_files("me/with-others")
# a LoRA's config is not a file of weights
for name, is_other in (("lfd", False), ("ppo", True)):
    files = {"model.safetensors": folder / name / "model.safetensors", "adapter/adapter_config.json": b"{}"}
    assert has_other_weights(api, "me/with-others", files, None) == is_other

# the Hub says no to a card of demonstrations: before anything is made
try:
    push_demonstrations(folder / "shown", "me/refused", **{**facts, "licence": "my own"})
except ValueError as error:
    assert "license" in str(error)
else:
    raise AssertionError("a card was taken")
assert not api.repo_exists("me/refused", repo_type="dataset")
"""


def estimate(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "count": 8}


def row(pruner, budget, kept, value):
    return {
        **{"pruner": pruner, "budget": budget, "mean_kept": kept, "min_kept": kept, "max_kept": kept},
        **{"mean_visual": 16.0, "accuracy": estimate(value), "difference": estimate(value - 0.5), "by_type": {}},
    }


RESULTS = {
    "command": "tprl evaluate /data/runs/ppo --data easy-vqa",
    "device": "cpu, float32, 1 threads",
    "versions": {"torch": "2.13.0"},
    "data": "easy|<script>alert(1)</script>\nlicense: mit",
    **{"split": "test", "seed": 7, "num_samples": 8, "score": "exact", "weights": "0123456789abcdef"},
    "questions": "fedcba9876543210",
    "rows": [row("none", "1", 16.0, 0.5), row("random", "1/2", 8.0, 0.25), row("learned", "1/2", 8.0, 0.4375)],
}


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "results.json").write_text(json.dumps(RESULTS))
    out = run(TRAIN, folder)
    print(out)
    return folder


PROCESSOR = {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
CHECKPOINT = {"README.md", "config.json", "generation_config.json", "model.safetensors"}


def test_what_trainers_and_the_command_push(hub, folder):
    """Weights, config, processor, code and card: no pickle, no state of training, nothing that lay there by chance."""
    for name in ("autoencoder", "lfd", "by-command"):
        extra = {".eval_results/bench-easy-test.yaml"} if name == "by-command" else set()
        assert set(hub.files(f"me/{name}")) == CODE | PROCESSOR | CHECKPOINT | extra
    assert hub.repo("me/autoencoder").private and hub.repo("me/by-command").private
    assert hub.repo("me/lfd").messages[1:] == ["by hand"]
    assert hub.repo("me/by-command").messages[-1] == "again"
    later = hub.files("me/by-command", revision="later")["README.md"].decode()
    assert "model-index" not in later and "My own words, before." in later  # a new branch begins with the main card
    assert str(folder) not in "".join(map(str, hub.files("me/by-command").values()))


def test_a_card_that_is_there_is_brought_up_to_date(hub, folder):
    card = hub.files("me/by-command")["README.md"].decode()
    header, before, ours, after = re.fullmatch(
        r"---\n(.*?)\n---\n(.*)<!-- tprl_hf.*?-->\n(.*)<!-- /tprl_hf -->(.*)", card, re.S
    ).groups()
    assert before.strip() == "My own words, before." and after.strip() == "My own words, after."
    assert "## Limits" in ours and "## Overwritten" not in ours
    metadata = yaml.safe_load(header)
    assert metadata["license"] == "apache-2.0" and metadata["language"] == "en"  # the user's
    assert metadata["base_model"] == "me/trained-base" and metadata["base_model_relation"] == "adapter"
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "image-text-to-text"


def test_results_on_the_card(hub, folder):
    """What `tprl evaluate` wrote, in the table, the model index and the leaderboard's file, and escaped."""
    files = hub.files("me/by-command")
    card = files["README.md"].decode()
    assert "| learned (this policy) | 1/2 | 8.0 of 16.0 | 43.8 [33.8, 53.8] | -6.2 [-16.2, +3.8] |" in card
    assert "| random | 1/2 | 8.0 of 16.0 | 25.0 [15.0, 35.0] |" in card and "| none | 1 |" in card
    assert "`tprl evaluate ppo --data easy-vqa`" in card  # the command, without the machine's directories
    metadata, text = yaml.safe_load(card.split("---\n")[1]), card.split("---\n", 2)[2]
    assert metadata["model-index"][0]["results"][0]["metrics"][1]["value"] == 0.4375
    assert metadata["license"] != "mit" and "<script>" not in text
    assert "easy&#124;&lt;script&gt;alert(1)&lt;/script&gt; license: mit, split test" in text
    (entry,) = yaml.safe_load(files[".eval_results/bench-easy-test.yaml"])
    assert entry == {
        "dataset": {"id": "bench/easy", "task_id": "test"},
        "value": 43.75,
        "notes": "1/2 of the visual tokens kept; 8 questions",
    }


def test_what_the_cards_say_runs_as_it_is(hub, run, folder):
    """In a process without the package; the dataset's card, too."""
    pages = [hub.files("me/by-command")["README.md"], hub.files("me/shown", "datasets")["README.md"]]
    blocks = [block for page in pages for block in re.findall(r"^```python\n(.*?)^```", page.decode(), re.M | re.S)]
    assert len(blocks) == 2
    printed = run("\n".join(blocks), installed=False)
    assert "8 of 16 visual tokens kept" in printed and "[12, 8]" in printed


def test_the_card_of_demonstrations(hub, folder):
    card = hub.files("me/shown", "datasets")["README.md"].decode()
    assert "| rows | 8 |" in card and "| left after each step, 8 rows | 75.0 %, 50.0 % |" in card
    assert "&lt;b&gt;uniform&lt;/b&gt;" in card and "<b>" not in card
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["license"] == "mit" and metadata["dataset_info"]["splits"][0]["num_examples"] == 8


def test_stages_of_a_recipe_are_on_the_card(tmp_path):
    for stage, seconds in (("autoencoder", 60.0), ("demonstrations", 120.0), ("lfd", 180.0), ("ppo", 240.0)):
        (tmp_path / stage).mkdir()
        settings = {stage: {"learning_rate": 1e-3}, "data": {"train": {"source": "/data/secret/train.jsonl"}}}
        (tmp_path / stage / "settings.json").write_text(json.dumps(settings))
        done = {"stage": stage, "seconds": seconds, "metrics": {"accuracy@0.333": 81.5}, "log_history": []}
        (tmp_path / stage / "training.json").write_text(json.dumps(done))
    assert [stage["stage"] for stage in recorded_stages(tmp_path / "lfd")] == ["autoencoder", "demonstrations", "lfd"]
    assert recorded_stages(tmp_path) == []
    config = {"includes_base_model": True, "keep_ratio": 1 / 3}
    card = policy_card("me/name", config, stages=recorded_stages(tmp_path / "ppo"))
    assert '- **ppo** (4 minutes): `learning_rate=0.001, data={"source": "train.jsonl"}`' in card
    assert card.count("minutes") == 4 and "secret" not in card and "accuracy@0.333=81.5" in card


def test_time_and_operations_on_the_card():
    times = {"prefill pruned": {"median": 12.3456, "low": 12.0, "high": 13.0}}
    latency = {"num_keep": 5, "num_visual": 16, "pruner": "learned", "batch": 1, "new_tokens": 4, "device": "cpu"}
    latency |= {"rounds": 7, "milliseconds": times, "command": "tprl benchmark"}
    rows = [{"num_kept": 16, "conventions": {"paper": 2e9}}, {"num_kept": 5, "conventions": {"paper": 1.25e9}}]
    flops = {"num_visual": 16, "text_tokens": 133, "new_tokens": 1, "rows": rows, "command": "tprl flops"}
    config = {"includes_base_model": True, "num_keep": 5}
    card = policy_card("me/name", config, latency=latency, flops=flops)
    assert "| prefill pruned | 12.35 [12, 13] |" in card
    assert "| visual tokens kept | `paper` |\n|---|---|\n| 16 | 2 |\n| 5 | 1.25 |\n" in card


def test_benchmarks_on_the_card():
    entry = EvalResult(
        task_type="image-text-to-text",
        **{
            "dataset_type": "lmms-lab/POPE",
            "dataset_name": "pope|x",
            "metric_type": "accuracy",
            "metric_value": 0.8437,
        },
        metric_args={"model_args": "keep_ratio=0.33", "num_questions": 100},
    )
    card = policy_card("me/name", {"includes_base_model": True}, benchmark_results=[entry])
    assert '| pope&#124;x | accuracy | 0.8437 | `model_args="keep_ratio=0.33", num_questions=100` |' in card
    (found,) = model_index("me/name", [RESULTS], [entry])
    assert len(found["results"]) == 2 and found["results"][0]["dataset"]["type"] == "lmms-lab/POPE"


def test_a_checkpoint_with_a_pruner_says_so():
    """No policy was trained: nothing is said of one, and the results are the pruner's."""
    config = {"includes_base_model": True, "pruner": {"name": "fastv", "layer": 3, "keep_ratio": 0.25}}
    results = {**RESULTS, "rows": [*RESULTS["rows"], row("fastv:layer=3", "1/4", 4.0, 0.375)]}
    own = name_with_settings(config["pruner"])
    card = policy_card("me/name", config, [results], own=own)
    assert "with a pruner that prunes" in card and "`fastv:layer=3` of `tprl_hf`, which needs no training" in card
    assert "| fastv:layer=3 (this pruner) |" in card and "a fraction of 0.25 of the visual tokens is kept" in card
    assert not re.search("TPRL\\]|Shape of the policy|## Training|## Citation|this policy|keep_ratio=1 / 3", card)
    (index,) = model_index("me/name", [results], own=own)
    names = [metric["name"] for metric in index["results"][0]["metrics"]]
    assert names == ["Accuracy (unpruned)", "Accuracy (visual tokens kept: 1/4)"]
    assert yaml.safe_load(eval_results_yaml(results, "me/data", "test", own))[0]["value"] == 37.5
    with pytest.raises(ValueError, match=r"no row `fastv:layer=3`: run tprl evaluate with --pruners fastv:layer=3"):
        eval_results_yaml(RESULTS, "me/data", "test", own)


def test_agreement_is_not_published_as_accuracy():
    """Of data without answers: the unpruned model agrees with itself."""
    score = f"exact match of the reference answer; the data have none, so {OWN_ANSWERS}"
    results = {**RESULTS, "score": score, "split": None}
    (found,) = model_index("me/name", [results])[0]["results"]
    (metric,) = found["metrics"]
    assert (metric["type"], metric["name"]) == ("agreement", "Agreement with unpruned (visual tokens kept: 1/2)")
    assert "split" not in found["dataset"] and len(model_index("me/name", [RESULTS])[0]["results"][0]["metrics"]) == 2
    with pytest.raises(ValueError, match=r"without reference answers.*Leave out --benchmark"):
        eval_results_yaml(results, "me/data", "test")


def test_results_without_baselines_are_refused():
    rows = [one for one in RESULTS["rows"] if one["pruner"] != "random"]
    with pytest.raises(ValueError, match=r"none and random.*\['learned', 'none'\]"):
        policy_card("me/name", {"includes_base_model": True}, [{**RESULTS, "rows": rows}])
    with pytest.raises(ValueError, match="device, versions"):
        policy_card("me/name", {"includes_base_model": True}, [{"command": "", "rows": rows}])


@pytest.fixture(scope="module")
def policies(tmp_path_factory) -> Path:
    """Two policies of one base model, without its weights and with them, and results of the first one."""
    folder = tmp_path_factory.mktemp("policies")
    build("llava").save_pretrained(folder / "base")
    make_processor().save_pretrained(folder / "base")
    for name in ("mine", "other"):
        model = TPRLForConditionalGeneration.from_base_model(
            str(folder / "base"), latent_dim=8, policy_num_heads=2, keep_ratio=0.5, policy_training={"stage": "lfd"}
        )
        model.save_pretrained(folder / name)
        make_processor().save_pretrained(folder / name)
        model.save_pretrained(folder / f"{name}-merged", save_base_model=True, max_shard_size="40KB")
    words = ["--num-samples", "2", "--keep-ratios", "1/2", "--max-new-tokens", "1", "--pruners", "learned"]
    words += ["--dtype", "bfloat16", "--output-dir", str(folder / "results")]
    assert main(["evaluate", str(folder / "mine"), *words]) == 0
    return folder


def test_results_of_another_policy_are_refused(policies, capsys):
    """Told from the weights of policy and autoencoder, in whatever dtype the base model computed."""
    results = policies / "results/results.json"
    for name in ("mine-merged", "other-merged"):
        for words in (["--results", str(results)], ["--benchmark", f"{results}=me/data:test"]):
            code = main(["push", str(policies / name), "me/name", "--dry-run", *words])
            said = capsys.readouterr().err
            assert code == (0 if name == "mine-merged" else 2) and "names no policy" not in said, said
            assert (f"{results} was measured with another policy" in said) == (code == 2)
    # one without its base model's weights; another policy's is refused before anything else
    mine, other = (policy_in_checkpoint(policies / name) for name in ("mine", "other"))
    assert mine == policy_in_checkpoint(policies / "mine-merged") != other
    assert json.loads(results.read_text())["policy_weights"] == mine
    assert main(["push", str(policies / "other"), "me/name", "--dry-run", "--results", str(results)]) == 2
    assert f"(policy_weights {mine}) than that of {policies}/other ({other})" in capsys.readouterr().err


def test_results_of_older_versions_are_taken_with_a_line(policies, tmp_path, capsys):
    (tmp_path / "old.json").write_text(json.dumps(RESULTS))
    words = ["me/name", "--dry-run", "--results", str(tmp_path / "old.json")]
    assert main(["push", str(policies / "mine-merged"), *words]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "names no policy" in line]
    assert str(tmp_path / "old.json") in line and "is not known" in line
    # none was trained: there is nothing to compare
    model = TPRLForConditionalGeneration.from_base_model(build("llava"), latent_dim=8, pruner="uniform")
    model.save_pretrained(tmp_path / "uniform", save_base_model=True)
    rows = [*RESULTS["rows"][:2], row("uniform", "1/2", 8.0, 0.25)]
    (tmp_path / "old.json").write_text(json.dumps({**RESULTS, "rows": rows, "policy_weights": None}))
    assert main(["push", str(tmp_path / "uniform"), *words]) == 0
    assert "names no policy" not in capsys.readouterr().err
    (tmp_path / "old.json").write_text(json.dumps({**RESULTS, "rows": rows, "policy_weights": "0"}))
    assert main(["push", str(tmp_path / "uniform"), *words]) == 2
    assert "(none that is trained)" in capsys.readouterr().err


def test_a_save_that_was_cut_off_is_finished_before_it_is_pushed(policies, tmp_path):
    """Not the config of one save with the weights of another."""
    other, cut = policies / "other-merged", tmp_path / "cut"
    shutil.copytree(policies / "mine-merged", cut)
    shutil.copytree(other, cut / SAVED)
    (cut / SAVED / NAMES).write_text(json.dumps(sorted(path.name for path in other.glob("*"))))
    shutil.copyfile(other / "config.json", cut / "config.json")  # took its place before the process ended
    assert policy_in_checkpoint(other) != policy_in_checkpoint(policies / "mine-merged")
    files = files_to_publish(cut, "me/name", HfApi(), licence="mit")
    assert not (cut / SAVED).exists() and policy_in_checkpoint(cut) == policy_in_checkpoint(other)
    for path in other.glob("*.safetensors"):
        assert files[path.name].read_bytes() == path.read_bytes()


def test_results_of_another_lora_are_refused(policies, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = TPRLForConditionalGeneration.from_pretrained(policies / "mine")
        peft.get_peft_model(model, config).save_pretrained(tmp_path / f"lora-{seed}")
        model = TPRLForConditionalGeneration.from_pretrained(policies / "mine")
        model.load_adapter(str(tmp_path / f"lora-{seed}"))
        model.save_pretrained(tmp_path / f"{seed}", save_base_model=True)
        make_processor().save_pretrained(tmp_path / f"{seed}")
    words = ["--num-samples", "2", "--keep-ratios", "1/2", "--max-new-tokens", "1", "--pruners", "learned"]
    assert main(["evaluate", str(tmp_path / "0"), *words, "--output-dir", str(tmp_path / "results")]) == 0
    of_lora, without = tmp_path / "results/results.json", policies / "results/results.json"
    assert json.loads(of_lora.read_text())["lora"] and json.loads(without.read_text())["lora"] is None
    capsys.readouterr()
    for directory, results, code in [
        (tmp_path / "0", of_lora, 0),
        (tmp_path / "1", of_lora, 2),
        (policies / "mine-merged", of_lora, 2),
        (tmp_path / "0", without, 2),
        (policies / "mine-merged", without, 0),
    ]:
        assert main(["push", str(directory), "me/name", "--dry-run", "--results", str(results)]) == code
        assert ("was measured with another LoRA" in capsys.readouterr().err) == (code == 2)


def test_a_damaged_checkpoint_is_said_before_its_results_are_compared(policies, tmp_path, capsys):
    shutil.copytree(policies / "mine", tmp_path / "mine")
    path = tmp_path / "mine/model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    words = ["--dry-run", "--results", str(policies / "results/results.json")]
    assert main(["push", str(tmp_path / "mine"), "me/name", *words]) == 2
    assert f"The weights in {tmp_path}/mine are damaged" in capsys.readouterr().err


def test_a_merged_checkpoint_takes_no_path_along(tmp_path, capsys):
    """Sharded, made from a directory of this machine."""
    model = TPRLForConditionalGeneration.from_base_model(
        build("llava"), latent_dim=8, policy_training={"stage": "lfd"}
    )
    model.config.base_model_name_or_path = str(tmp_path)
    model.lvlm.config._name_or_path = str(tmp_path)
    model.save_pretrained(tmp_path / "merged", save_base_model=True, max_shard_size="40KB")
    (tmp_path / "merged" / "credentials.json").write_text("{}")
    (tmp_path / "README.md").write_text("---\nlicense: llama2\n---\n")  # the base model's
    files = files_to_publish(tmp_path / "merged", "me/merged", HfApi())
    shards = {name for name in files if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)}
    assert len(shards) > 2
    others = {"README.md", "config.json", "generation_config.json", "model.safetensors.index.json"}
    assert set(files) == CODE | shards | others
    texts = {name: content for name, content in files.items() if isinstance(content, bytes) and name not in CODE}
    assert {"README.md", "config.json"} <= set(texts)
    written = b"".join(texts.values())
    assert str(tmp_path).encode() not in written and b"base_model_relation" not in written
    assert b"license: llama2" in files["README.md"]
    assert main(["push", str(tmp_path / "merged"), "me/merged", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name}\n" in printed for name in files) and "# merged" in printed


def test_what_cannot_be_pushed(tmp_path, capsys):
    model = TPRLForConditionalGeneration.from_base_model(
        build("llava"), latent_dim=8, policy_training={"stage": "lfd"}
    )
    model.config.base_model_name_or_path = "some/where"
    model.save_pretrained(tmp_path / "policy", save_base_model=False)
    config = TPRLConfig.from_pretrained(tmp_path / "policy")
    config.base_model_name_or_path = str(tmp_path)
    config.save_pretrained(tmp_path / "policy")
    (tmp_path / "empty").mkdir()
    build("llava").save_pretrained(tmp_path / "base")
    for folder, words in (
        ("missing", "no directory"),
        ("empty", "no config.json"),
        ("base", "'llava', no TPRL checkpoint"),
        ("policy", "others cannot load"),
    ):
        assert main(["push", str(tmp_path / folder), "me/name", "--dry-run"]) == 2
        assert words in capsys.readouterr().err
