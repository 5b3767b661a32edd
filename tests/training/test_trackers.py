"""What arrives in the trackers that are installed: scalars, and tables whose rows have the kept tokens as pictures."""

import json
import os
import sqlite3
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = 2
RUN = f"""
import sys
from tests.training.conftest import POLICY, make_dataset
from tests.families.tiny_processor import make_processor
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.training import TPRLPPOConfig, TPRLPPOTrainer

base, output_dir, tracker = sys.argv[1:]
config = TPRLPPOConfig(
    output_dir=output_dir, max_steps={STEPS}, per_device_train_batch_size=2, num_mini_batches=1, num_ppo_epochs=1,
    logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True, log_completions=True,
    num_completions_to_print=2, report_to=tracker, run_name="seen", project="looks",
)
model = TPRLForConditionalGeneration.from_base_model(base, **POLICY)
TPRLPPOTrainer(model, config, train_dataset=make_dataset(), processing_class=make_processor()).train()
"""


def train(base: str, folder: Path, tracker: str, **environment: str) -> None:
    """In a process of its own: trackers keep their run until it ends."""
    if find_spec(tracker) is None:
        pytest.skip(f"pip install {tracker}")
    command = [sys.executable, "-c", RUN, base, str(folder / "out"), tracker]
    settings = {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_trackio(base, tmp_path):
    train(base, tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    with sqlite3.connect(tmp_path / "trackio" / "looks.db") as database:
        rows = [json.loads(text) for (text,) in database.execute("SELECT metrics FROM metrics ORDER BY step")]
    tables = [row for row in rows if "completions" in row]
    assert [row["train/global_step"] for row in tables] == list(range(1, STEPS + 1))
    for number, row in enumerate(tables, start=1):
        for line in row["completions"]["_value"]:
            assert line["step"] == number and line["visual_tokens"] == 16
            assert (tmp_path / "trackio" / "media" / line["picture"]["file_path"]).is_file()
    assert any("train/objective/reward" in row for row in rows)


def test_wandb(base, tmp_path):
    places = {f"WANDB_{name}_DIR": str(tmp_path / name) for name in ("DATA", "CACHE", "CONFIG")}
    train(base, tmp_path, "wandb", WANDB_MODE="offline", WANDB_DIR=str(tmp_path), **places)
    tables = [json.loads(path.read_text()) for path in tmp_path.glob("wandb/offline-run-*/files/media/table/*.json")]
    assert sorted(table["data"][0][table["columns"].index("step")] for table in tables) == list(range(1, STEPS + 1))
    # what is to be sent with the tables
    staged = [path.read_bytes() for path in (tmp_path / "DATA").rglob("tmp*") if path.is_file()]
    assert sum(content.startswith(b"\x89PNG") for content in staged) == 2 * STEPS
