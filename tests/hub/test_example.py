"""The example that publishes, against the stand-in."""

from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_example_pushes_a_model_that_loads_without_the_package(hub, run, tmp_path):
    code = f"""
import os, runpy, sys
os.chdir({str(tmp_path)!r})
sys.argv = ["06_publish.py", "me/mosaic-tprl"]
runpy.run_path({str(ROOT / "examples" / "06_publish.py")!r}, run_name="__main__")
"""
    assert "Pushed to" in run(code)
    files = hub.files("me/mosaic-tprl")
    assert {"README.md", "config.json", "model.safetensors", "modeling_tprl.py"} <= files.keys()
    assert b"0.1111 of the visual tokens is kept" in files["README.md"]
    load = """
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained("me/mosaic-tprl", trust_remote_code=True)
print(model.config.keep_ratio)
"""
    assert run(load, token=None, installed=False).strip() == str(1 / 9)
