"""Two processes with gloo: they end with the same weights, and resume; and all of a recipe under `torchrun`."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_from_disk
from safetensors.torch import load_file
from transformers import AutoProcessor

from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.training import GradientTeacher, LfDConfig, LfDTrainer, generate_demonstrations

SCRIPT = """
import json
import os
import sys
from pathlib import Path
import torch
from datasets import load_from_disk
from transformers import AutoProcessor
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.training import GradientTeacher, LfDConfig, LfDTrainer, TPRLGRPOConfig, TPRLGRPOTrainer
from tprl_hf.training import TPRLPPOConfig, TPRLPPOTrainer, generate_demonstrations

stage, base, data, output_dir, resume = sys.argv[1:]
torch.manual_seed(1)
model = TPRLForConditionalGeneration.from_base_model(base, latent_dim=16, policy_num_heads=4, policy_dim=16)
processor, dataset = AutoProcessor.from_pretrained(base), load_from_disk(data)
common = {
    "use_cpu": True, "disable_tqdm": True, "max_steps": 4, "save_steps": 3, "per_device_train_batch_size": 2,
    "learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1,
    "feature_cache_dir": f"{output_dir}/features",
}
if stage == "lfd":
    calls = []

    class Counted(GradientTeacher):
        def score(self, *arguments):
            calls.append(1)
            return super().score(*arguments)

    demonstrations = generate_demonstrations(
        Counted(), model, processor, dataset, output_dir=f"{output_dir}/shown", batch_size=1
    )
    Path(output_dir, f"calls-{os.environ['RANK']}-{resume}").write_text(str(len(calls)))
    trainer = LfDTrainer(
        model, LfDConfig(output_dir, **common), processing_class=processor, train_dataset=demonstrations,
        eval_dataset=dataset,
    )  # fmt: skip
elif stage == "probes":
    config = TPRLGRPOConfig(
        output_dir, num_generations=4, num_probes=2, num_iterations=1, min_spread=0.05, score="logprob",
        score_every_step=False, min_logprob=-100.0, num_steps=1, lambda_disc=1.0, rollout_keep_ratios=[0.5],
        draw="sets", num_mini_batches=2, micro_batch_size=1, **common,
    )  # fmt: skip
    trainer = TPRLGRPOTrainer(
        model, config, processing_class=processor, train_dataset=dataset, eval_dataset=dataset
    )
else:
    settings = {"num_generations": 2, "num_ppo_epochs": 1, "num_mini_batches": 2, "micro_batch_size": 1}
    if stage == "unlabelled":
        settings.update(score="agreement", min_logprob=-100.0, max_answer_length=4)
    config = TPRLPPOConfig(output_dir, **settings, **common)
    trainer = TPRLPPOTrainer(
        model, config, processing_class=processor, train_dataset=dataset, eval_dataset=dataset
    )
trainer.train(resume_from_checkpoint=resume == "True")
rank = trainer.args.process_index
assert trainer.args.world_size == 2
torch.save({n: p.data for n, p in trainer.model.named_parameters()}, f"{output_dir}/rank-{rank}-{resume}.pt")
if rank == 0:
    (Path(output_dir) / "log.json").write_text(json.dumps(trainer.state.log_history))
for count in (3, 1):  # the processes have different numbers of rows, and one has none
    trainer.evaluate(dataset.select(range(count)))
trainer.save_model()
"""


@pytest.mark.parametrize("stage", ["lfd", "ppo", "unlabelled", "probes"])
def test_two_processes(stage, base, dataset, tmp_path):
    if stage == "unlabelled":
        dataset = dataset.remove_columns("answer")
    dataset.save_to_disk(str(tmp_path / "data"))
    (tmp_path / "script.py").write_text(SCRIPT)
    out = tmp_path / "out"

    def run(resume: bool):
        words = [stage, base, str(tmp_path / "data"), str(out), str(resume)]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        done = subprocess.run([*launcher, str(tmp_path / "script.py"), *words], capture_output=True, text=True)
        errors = [line for line in done.stderr.splitlines() if "Error" in line]
        assert done.returncode == 0, errors
        ranks = [torch.load(out / f"rank-{rank}-{resume}.pt") for rank in (0, 1)]
        assert all(value.equal(ranks[1][name]) for name, value in ranks[0].items())
        return ranks[0]

    whole = run(resume=False)
    assert load_file(out / "model.safetensors").keys() >= {"policy.policy_head.bias"}
    for path in out.glob("checkpoint-4"):  # go on from the one before the end
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    resumed = run(resume=True)
    assert all(value.equal(whole[name]) for name, value in resumed.items())
    assert len(list(out.glob("features/*/*/*.safetensors"))) == len(set(dataset["image_id"]))  # of both, each once
    if stage == "probes":  # some questions of each buffer, not all, have all their rollouts scored
        log = json.loads((out / "log.json").read_text())
        passes = sorted({row["llm_passes"] for row in log if "llm_passes" in row})
        scored = [after - before for before, after in pairwise(passes)]
        assert len(scored) == 2 and all(2 * 4 < number < 4 * 4 for number in scored), scored
    if stage == "unlabelled":  # one process finds what the other one has answered
        lines = [line for path in out.glob("unpruned_answers/*.jsonl") for line in path.read_text().splitlines()[1:]]
        assert len(lines) == len({line[:64] for line in lines}) == len(dataset)
    if stage == "lfd":  # a demonstration may be made twice where one process has no other work left
        calls = [int((out / f"calls-{rank}-False").read_text()) for rank in (0, 1)]
        assert len(dataset) <= sum(calls) <= len(dataset) + 1, calls
        assert not list(out.glob("shown.*"))
        shown = load_from_disk(str(out / "shown"))["keep_masks"][:]
        assert_as_one_process(json.loads((out / "log.json").read_text()), shown, base, dataset, tmp_path)


def assert_as_one_process(log, masks, base, dataset, tmp_path):
    """The same demonstrations; and two processes with batches of 2 are as one with batches of 4, up to rounding."""
    torch.manual_seed(1)
    settings = {"latent_dim": 16, "policy_num_heads": 4, "policy_dim": 16}
    model = TPRLForConditionalGeneration.from_base_model(base, **settings)
    processor = AutoProcessor.from_pretrained(base)
    shown = generate_demonstrations(GradientTeacher(), model, processor, dataset, batch_size=1)
    assert shown["keep_masks"][:] == masks
    common = {"use_cpu": True, "disable_tqdm": True, "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1}
    common |= {"per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
    trainer = LfDTrainer(
        model,
        LfDConfig(str(tmp_path / "one"), **common),
        processing_class=processor,
        train_dataset=shown,
        eval_dataset=dataset,
    )
    trainer.train()
    for name in ("loss", "eval_logprob"):
        found, alone = ([row[name] for row in rows if name in row] for rows in (log, trainer.state.log_history))
        assert found == pytest.approx(alone, rel=1e-4) and len(set(alone)) > 1, name


def test_a_whole_recipe_under_torchrun(base, dataset, tmp_path):
    dataset.save_to_disk(str(tmp_path / "data"))
    data = {"source": str(tmp_path / "data")}
    stage = {"max_steps": 2, "disable_tqdm": True, "use_cpu": True, "per_device_train_batch_size": 2}
    policy_stage = {**stage, "eval_strategy": "steps", "eval_steps": 1}
    recipe = {
        "base_model": base,
        "output_dir": str(tmp_path / "run"),
        "policy": {"latent_dim": 16, "policy_num_heads": 4, "policy_dim": 16},
        "data": {"train": data, "validation": data},
        "autoencoder": stage,
        "demonstrations": {"teacher": "uniform", "keep_ratios": ["1/2"]},
        "lfd": {**policy_stage, "keep_ratio": "1/2"},
        "ppo": {**policy_stage, "num_mini_batches": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    torchrun = str(Path(sys.executable).with_name("torchrun"))
    command = [torchrun, "--standalone", "--nproc_per_node", "2", "-m", "tprl_hf.cli.main", "train", "all"]
    command += ["--config", str(tmp_path / "recipe.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    stages = ["autoencoder", "demonstrations", "lfd", "ppo"]
    assert [line.split(":")[0] for line in done.stdout.splitlines() if line.count(" in ")] == stages  # each said once
    reports = [json.loads((tmp_path / "run" / name / "training.json").read_text()) for name in stages]
    assert [report["stage"] for report in reports] == stages
    assert len(load_from_disk(str(tmp_path / "run" / "demonstrations" / "dataset"))) == len(dataset)
