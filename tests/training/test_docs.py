"""The example of docs/training.md that tunes the LVLM runs from top to bottom, on the embedded model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import tprl_hf
from tprl_hf.data import mosaic_vqa

ROOT = Path(__file__).parents[2]
SECTION = r"## Tune the LVLM itself\n.*?^```python\n(.*?)^```"


def test_the_example_of_tuning_runs(tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    code = re.search(SECTION, (ROOT / "docs" / "training.md").read_text(), re.M | re.S).group(1)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"'loss': '([\d.]+)'", done.stdout)]
    assert all(loss > 0 for loss in losses)
    before = load_file(Path(tprl_hf.embedded_checkpoint()) / "model.safetensors")
    after = load_file(tmp_path / "runs/sft/merged/model.safetensors")
    changed = [name for name in after if "q_proj" in name and "language_model" in name]
    assert changed and len(after) >= len(before)
    assert not set(load_file(tmp_path / "runs/sft/adapter/adapter_model.safetensors")) & set(after)


def test_the_example_without_labels_runs(tmp_path):
    page = (ROOT / "docs" / "training.md").read_text()
    code = re.search(r"## Without labels\n.*?^```python\n(.*?)^```", page, re.M | re.S).group(1)
    code = code.replace("max_steps=500", "max_steps=2, per_device_train_batch_size=2")
    code = code.replace("llava-hf/llava-1.5-7b-hf", str(tprl_hf.embedded_checkpoint()))
    (tmp_path / "pictures").mkdir()
    for number, image in enumerate(mosaic_vqa("train", num_samples=60)["images"][::6]):
        image[0].save(tmp_path / "pictures" / f"{number}.png")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "eval_agreement" in done.stdout and (tmp_path / "c" / "model.safetensors").exists()
    answered = [path.read_text().splitlines()[1:] for path in (tmp_path / "answers").glob("*.jsonl")]
    assert sum(map(len, answered)) == 10
