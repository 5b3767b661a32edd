"""The example of docs/training.md that tunes the LVLM runs from top to bottom, on the embedded model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import tprl_hf

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
