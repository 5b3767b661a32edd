"""The same seed gives the same result: the rows of the table in docs/reliability.md that no other test holds."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import set_seed

import tprl_hf
from tests.families.tiny_models import build, collate, sample
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.data import mosaic_vqa
from tprl_hf.data.digest import data_digest
from tprl_hf.evaluation.answers import chat_inputs
from tprl_hf.loading import load_model
from tprl_hf.pruners import RandomPruner
from tprl_hf.training import GradientTeacher, generate_demonstrations

from .test_trainers import stage, weights_of

TRAINED = {"max_steps": 4, "save_strategy": "no", "logging_steps": 1, "seed": 3}


@contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def losses_of(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_a_random_stream_that_others_used_changes_nothing(make_model, processor, dataset, tmp_path):
    """Nor do processes that load the data: bit for bit."""
    for name in ("autoencoder", "lfd", "ppo", "counterfactual"):
        found = []
        for seed, workers in ((0, 0), (1, 2)):
            trainer = stage(
                name, make_model, processor, dataset, str(tmp_path), **TRAINED, dataloader_num_workers=workers
            )
            set_seed(seed)
            trainer.train()
            found.append((weights_of(trainer.tprl_model), losses_of(trainer)))
        (first, losses), (second, again) = found
        assert losses == again and all(value.equal(second[key]) for key, value in first.items()), name
        other = stage(name, make_model, processor, dataset, str(tmp_path), **{**TRAINED, "seed": 4})
        other.train()
        assert losses_of(other) != losses, name


def test_the_number_of_threads_changes_training_by_rounding(make_model, processor, dataset, tmp_path):
    for name in ("autoencoder", "lfd"):
        found = []
        for number in (1, 2):
            with threads(number):
                trainer = stage(name, make_model, processor, dataset, str(tmp_path), **TRAINED)
                trainer.train()
            found.append(losses_of(trainer))
        assert found[1] == pytest.approx(found[0], rel=1e-4), name


def test_the_number_of_threads_changes_no_keep_mask_and_no_answer():
    """On the embedded model, in float32."""
    model, processor = load_model()
    samples = mosaic_vqa("test", seed=5, num_samples=12)
    inputs = chat_inputs(processor, samples, model.device)
    for ratio in (1 / 3, 1 / 9):
        plans, answers = [], []
        for number in (1, 2):
            with threads(number):
                plans.append(model.prune(**inputs, keep_ratio=ratio))
                answers.append(model.generate(**inputs, keep_ratio=ratio, max_new_tokens=4, do_sample=False))
        assert torch.equal(plans[0].keep_mask, plans[1].keep_mask) and torch.equal(answers[0], answers[1])
        torch.testing.assert_close(plans[0].scores, plans[1].scores, atol=1e-5, rtol=0)


def test_the_batch_size_changes_no_demonstration(make_model, processor, dataset):
    model = make_model()
    for teacher in (GradientTeacher(), RandomPruner(seed=3)):
        found = [generate_demonstrations(teacher, model, processor, dataset, batch_size=n) for n in (1, 3, 8)]
        assert found[0]["keep_masks"][:] == found[1]["keep_masks"][:] == found[2]["keep_masks"][:]


def test_another_process_draws_the_same():
    """Random pruner, and the samples of Mosaic-VQA: no result depends on how this interpreter hashes."""
    code = "from tests.training.test_same_results import drawn; print(drawn())"
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(tprl_hf.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == drawn(), done.stderr


def drawn() -> str:
    torch.manual_seed(0)
    model = TPRLForConditionalGeneration.from_base_model(build("llava"), pruner=RandomPruner(seed=4), keep_ratio=0.5)
    plan = model.prune(**collate("llava", [sample("llava", 1, 1), sample("llava", 2, 2)]))
    return f"{plan.keep_mask.tolist()} {data_digest(mosaic_vqa('test', 3, 12))}"


def test_sampling_is_reproducible_for_the_same_batch():
    """Over other batches it is not promised: torch draws for all rows at once."""
    torch.manual_seed(0)
    model = TPRLForConditionalGeneration.from_base_model(build("llava"), keep_ratio=0.5).eval()
    inputs = collate("llava", [sample("llava", 1, 1), sample("llava", 1, 2)])
    found = []
    for seed in (5, 5, 6):
        set_seed(seed)
        found.append(model.generate(**inputs, do_sample=True, max_new_tokens=8))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
