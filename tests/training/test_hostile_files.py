"""What others may put into a run's directory or a recipe, and what it cannot do: run code."""

import pickle

import pytest
import torch

from tprl_hf.cli.recipe_file import read_recipe
from tprl_hf.training.whole_checkpoints import mark_whole

from .test_trainers import stage


class Pickled:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def as_torch(what, path):
    torch.save(what, path)


def as_pickle(what, path):
    path.write_bytes(pickle.dumps(what))


@pytest.mark.parametrize("write", [as_torch, as_pickle])
def test_no_file_of_a_checkpoint_runs_code_when_a_run_resumes(make_model, processor, dataset, tmp_path, write):
    """Whoever writes them can write the list of whole files too."""
    settings = {"max_steps": 3, "save_steps": 2, "logging_steps": 1}
    stage("autoencoder", make_model, processor, dataset, str(tmp_path), **settings).train()
    folder, ran = tmp_path / "checkpoint-2", tmp_path / "ran"
    pickles = [path for path in folder.iterdir() if path.suffix in (".pt", ".pth", ".bin")]
    assert {path.name for path in pickles} == {"optimizer.pt", "scheduler.pt", "rng_state.pth", "pruner_trainer_0.pt"}
    for path in [*pickles, folder / "training_args.bin"]:  # we do not write the last one
        content = path.read_bytes() if path.exists() else b""
        write(Pickled(ran), path)
        mark_whole(folder)
        trainer = stage("autoencoder", make_model, processor, dataset, str(tmp_path), **settings)
        if not content:  # nor does anybody read it
            trainer.train(resume_from_checkpoint=str(folder))
        else:
            with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights"):
                trainer.train(resume_from_checkpoint=str(folder))
        assert not ran.exists(), path.name
        path.write_bytes(content)


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system ['touch ran']", "!!python/name:os.system", "!!python/module:os"]
)
def test_a_recipe_cannot_make_objects(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(f"output_dir: run\npolicy: {text}\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        read_recipe("recipe.yaml")
    (tmp_path / "recipe.yaml").write_text("output_dir: run\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        read_recipe("recipe.yaml", [f"policy.x={text}"])
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
