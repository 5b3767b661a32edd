"""The example of docs/training.md that trains without labels runs from top to bottom, on the embedded model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import tprl_hf
from tprl_hf.data import mosaic_vqa

ROOT = Path(__file__).parents[2]


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
