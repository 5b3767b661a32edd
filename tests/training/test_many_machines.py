"""The recipes of accelerate: its own loader reads them, and what can be run on a CPU of what they set up runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser

from tprl_hf.training import TPRLPPOConfig

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "accelerate").glob("*.yaml"))
SHARDED = """
import json
import os
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.families.tiny_models import build, collate, sample
from tprl_hf import TPRLForConditionalGeneration

dist.init_process_group("gloo")
torch.manual_seed(0)
settings = {"policy_num_heads": 2, "policy_dim": 16, "policy_training": {"stage": "lfd"}}
model = TPRLForConditionalGeneration.from_base_model(build("llava"), **settings)
model.policy.requires_grad_(False)
model.autoencoder.requires_grad_(False)
batch = collate("llava", [sample("llava", seed=seed) for seed in (1, 2)])
labels = batch["input_ids"].clone()


def step():
    output = model(**batch, labels=labels, keep_ratio=0.5)
    output.loss.backward()
    return [output.loss.item(), *output.num_kept.tolist()]


whole = step()
gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
model.zero_grad()
# what `accelerator.prepare` calls on a GPU; an Accelerator itself offers FSDP nowhere else
plugin = FullyShardedDataParallelPlugin(**json.loads(sys.argv[1]))
state = SimpleNamespace(fsdp_plugin=plugin)
rest = {"mixed_precision": "no", "device": torch.device("cpu"), "is_main_process": dist.get_rank() == 0}
fsdp2_prepare_model(SimpleNamespace(state=state, **rest), model)
sharded = step()
trained = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
found = {
    "whole": whole,
    "sharded": sharded,
    "same_names": trained.keys() == gradients.keys(),
    "worst": max((trained[name] - gradient).abs().max().item() for name, gradient in gradients.items()),
    "units": sorted({type(module).__name__ for module in model.modules() if isinstance(module, FSDPModule)}),
    "left_whole": sorted({n.split(".")[0] for n, p in model.named_parameters() if not isinstance(p, DTensor)}),
}
if dist.get_rank() == 0:
    print(json.dumps(found), flush=True)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # gloo's threads sometimes abort a process that Python takes down
"""


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_accelerates_own_loader_reads_it(path):
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    options = set(vars(launch_command_parser().parse_args(["script.py"])))  # the loader lets unknown ones pass
    options |= {"fsdp_ignored_modules"}  # read from a file, though it is no option
    assert {*config.fsdp_config, *config.deepspeed_config} <= options
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED"}
    assert str(config.distributed_type).split(".")[-1] == kinds[path.stem]


def test_a_pruned_step_of_weights_that_are_shared_out_equals_that_of_whole_ones(tmp_path):
    recipe = load_config_from_file(str(next(path for path in RECIPES if path.stem == "fsdp2")))
    settings = {name.removeprefix("fsdp_"): value for name, value in recipe.fsdp_config.items()}
    settings["transformer_cls_names_to_wrap"] = settings.pop("transformer_layer_cls_to_wrap").split(",")
    settings["fsdp_version"] = settings.pop("version")
    settings["cpu_offload"] = settings.pop("offload_params")
    (tmp_path / "script.py").write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "script.py"), json.dumps(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["sharded"] == pytest.approx(found["whole"], abs=1e-5)
    assert found["same_names"] and found["worst"] < 1e-5
    assert {f"FSDP{name}" for name in settings["transformer_cls_names_to_wrap"]} <= set(found["units"])
    assert found["left_whole"] == ["autoencoder", "policy"]


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_our_trainers_refuse_to_share_out_weights(kind, tmp_path, monkeypatch):
    message = f"need the networks whole in each process, and {kind}"
    with pytest.raises(ValueError, match=message):
        TPRLPPOConfig(str(tmp_path), use_cpu=True, **{kind.lower(): "full_shard" if kind == "FSDP" else "zero.json"})
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(ValueError, match=message):
        TPRLPPOConfig(str(tmp_path), use_cpu=True)
