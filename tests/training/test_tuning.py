"""The LLM learns from pruned prompts, with budgets mixed; policy and everything else stay as they are."""

import pytest
import torch

from tests.training.conftest import POLICY
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.cli.main import main
from tprl_hf.evaluation.answers import generate_answers
from tprl_hf.training.tuning import MixedBudgets, as_chats, tune_lvlm
from tprl_hf.training.whole_checkpoints import newest_whole

pytest.importorskip("peft")
trl = pytest.importorskip("trl")


def make(base):
    torch.manual_seed(0)
    return TPRLForConditionalGeneration.from_base_model(
        base, keep_ratio=0.25, policy_training={"stage": "lfd"}, **POLICY
    ).eval()


def config(path, **settings):
    settings = {"max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 2, **settings}
    return trl.SFTConfig(
        str(path), report_to="none", use_cpu=True, bf16=False, max_length=None, disable_tqdm=True, **settings
    )


def test_one_lora_learns_at_all_budgets(base, processor, dataset, tmp_path):
    model = make(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    hook = model.lvlm.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    log = tune_lvlm(model, processor, dataset, config(tmp_path / "run", logging_steps=1), [1, 0.25], {"r": 4})
    hook.remove()
    assert len(set(seen)) > 1 and max(seen) - min(seen) > 10  # 16 tokens an image, and 4
    assert model.config.keep_ratio == 0.25
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0]
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert all(after[name].equal(value) for name, value in before.items())
    trained = [name for name in after if "lora_B" in name]
    assert trained and all("language_model" in name and after[name].abs().max() > 0 for name in trained)

    model.save_pretrained(tmp_path / "tuned")
    again = TPRLForConditionalGeneration.from_pretrained(tmp_path / "tuned").eval()
    samples = [dataset[number] for number in range(4)]
    answers = generate_answers(again, processor, samples, max_new_tokens=4)
    assert answers == generate_answers(model, processor, samples, max_new_tokens=4)
    model.disable_adapters()
    plain = make(base)
    assert generate_answers(model, processor, samples, max_new_tokens=4, prune=False) == generate_answers(
        plain, processor, samples, max_new_tokens=4, prune=False
    )


@pytest.mark.parametrize("step", [4, 6])  # 6 is the last one, in the middle of an epoch
def test_a_run_that_was_cut_off_resumes(step, base, processor, dataset, tmp_path):
    settings = {"save_steps": 2, "save_strategy": "steps", "lr_scheduler_type": "constant", "logging_steps": 1}
    whole = make(base)
    tune_lvlm(whole, processor, dataset, config(tmp_path / "run", **settings), [1, 0.5, 0.25])
    checkpoint, passed_over = newest_whole(tmp_path / "run")
    assert passed_over == [] and checkpoint is not None
    resumed = make(base)
    tune_lvlm(
        resumed, processor, dataset, config(tmp_path / "run", **settings), [1, 0.5, 0.25],
        resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"),
    )  # fmt: skip
    expected, found = whole.state_dict(), resumed.state_dict()
    assert all(found[name].equal(value) for name, value in expected.items())


def test_each_step_draws_its_budget_by_its_number(base):
    model = make(base)
    budgets = MixedBudgets(model, [1, 0.5, 0.25], seed=3)
    drawn = [budgets.ratio_of(step) for step in range(300)]
    assert drawn == [MixedBudgets(model, [1, 0.5, 0.25], seed=3).ratio_of(step) for step in range(300)]
    assert all(70 < drawn.count(ratio) < 130 for ratio in (1, 0.5, 0.25))
    with pytest.raises(ValueError, match=r"keep_ratios\[0\] must be .* in \(0, 1\]; got 2\."):
        MixedBudgets(model, [2])
    model.set_pruner("divprune", keep_ratio=0.5)
    with pytest.raises(ValueError, match="has a budget of its own"):
        MixedBudgets(model, [0.5])


def test_rows_become_messages(dataset):
    rows = as_chats(dataset)
    assert set(rows.column_names) == {"images", "prompt", "completion"} and len(rows) == len(dataset)
    assert rows[0]["completion"] == [{"role": "assistant", "content": dataset[0]["answer"]}]
    assert rows[0]["images"][0].tobytes() == dataset[0]["images"][0].tobytes()


def test_the_stage_tune_of_a_recipe(base, processor, dataset, tmp_path, capsys):
    model = make(base)
    model.save_pretrained(tmp_path / "policy", save_base_model=True)
    processor.save_pretrained(tmp_path / "policy")
    dataset.save_to_disk(tmp_path / "data")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output_dir: {tmp_path}/run\nbase_model: {tmp_path}/policy\ndata: {{train: {{source: {tmp_path}/data}}}}\n"
        "tune: {keep_ratios: [1, 1/4], lora: {r: 2}, max_steps: 2, per_device_train_batch_size: 2}\n"
    )
    assert main(["train", "all", "--config", str(recipe)]) == 0
    again = TPRLForConditionalGeneration.from_pretrained(tmp_path / "run" / "tune")
    assert again.config.includes_adapter and again.config.includes_base_model
    assert again.peft_config["default"].r == 2 and again.config.policy_training == {"stage": "lfd"}
    capsys.readouterr()
    assert main(["train", "all", "--config", str(recipe)]) == 0
    assert "is finished" in capsys.readouterr().out
    for wrong, message in {
        "tune.keep_ratio=1": "tune has no setting 'keep_ratio'; did you mean 'keep_ratios'?",
        "tune.keep_ratios=[2]": "tune.keep_ratios[0] must be the fraction of visual tokens that is KEPT",
        "tune.lora={rank: 3}": "tune.lora has no setting 'rank'",
    }.items():
        assert main(["train", "all", "--config", str(recipe), "--set", wrong, f"output_dir={tmp_path}/other"]) == 2
        assert message in capsys.readouterr().err


def weights_of(path):
    """Policy and LoRA of a checkpoint, by name."""
    state = TPRLForConditionalGeneration.from_pretrained(path).state_dict()
    return ({name: value for name, value in state.items() if part in name} for part in ("policy.", ".lora_"))


def differ(one, other):
    assert one.keys() == other.keys()
    return any(not value.equal(other[name]) for name, value in one.items())


def test_policy_and_llm_are_trained_in_turns(base, processor, dataset, tmp_path, capsys):
    model = make(base)
    model.save_pretrained(tmp_path / "policy", save_base_model=True)
    processor.save_pretrained(tmp_path / "policy")
    dataset.save_to_disk(tmp_path / "data")
    short = "max_steps: 3, per_device_train_batch_size: 2, learning_rate: 1e-2"
    recipes = {
        "tune": f"tune: {{keep_ratios: [1, 1/4], {short}}}",
        "ppo": f"ppo: {{num_mini_batches: 1, num_ppo_epochs: 3, score: logprob, save_base_model: true, {short}}}",
    }

    def run(stage, start, output, *overrides):
        recipe = tmp_path / f"{stage}.yaml"
        data = f"data: {{train: {{source: {tmp_path}/data}}}}"
        recipe.write_text(f"output_dir: {tmp_path}/{output}\nstart_from: {start}\n{data}\n{recipes[stage]}\n")
        code = main(["train", "all", "--config", str(recipe), "--set", "dtype=float32", *overrides])
        return code, tmp_path / output / stage

    _, tuned = run("tune", tmp_path / "policy", "first")
    _, learned = run("ppo", tuned, "second")
    _, again = run("tune", learned, "third")
    (policy, lora), (learned_policy, frozen_lora), (kept_policy, more_lora) = map(weights_of, (tuned, learned, again))
    assert lora and not differ(lora, frozen_lora) and differ(lora, more_lora)
    assert differ(policy, learned_policy) and not differ(learned_policy, kept_policy)
    assert all(value.abs().max() > 0 for name, value in lora.items() if "lora_B" in name)  # it was tuned before

    capsys.readouterr()
    for overrides, message in {
        ("policy={latent_dim: 8}",): "policy.latent_dim is 8, but",
        (f"base_model={base}",): "has both start_from and base_model",
    }.items():
        assert run("ppo", tuned, "other", *overrides)[0] == 2
        assert message in capsys.readouterr().err
    assert run("tune", tuned, "other", "tune.lora={r: 2}")[0] == 2
    assert "The model has a LoRA already" in capsys.readouterr().err
