"""What of lmms-eval's results reaches a model card; no lmms-eval is needed for that."""

import json
import re
import subprocess
import sys

import pytest
from huggingface_hub import ModelCardData

from tprl_hf.evaluation.lmms_eval.results import lmms_eval_results

RESULTS = {
    "results": {
        "gqa": {"alias": "gqa", "exact_match,none": 0.6, "exact_match_stderr,none": 0.01, "submission,none": None},
        "mmbench_en": {"alias": "mmbench_en", " ": " "},
        "local": {"alias": "local", "pope_f1_score,flexible": 0.5, "pope_f1_score_stderr,flexible": "N/A"},
    },
    "configs": {
        "gqa": {
            "dataset_path": "lmms-lab/GQA",
            "dataset_name": "testdev_balanced_instructions",
            "test_split": "testdev",
        },
        "local": {"dataset_path": "parquet", "validation_split": "val"},
    },
    "config": {"model": "tprl", "model_args": "pretrained=/data/me/model,keep_ratio=1/3"},
    "n-samples": {"gqa": {"original": 12578, "effective": 100}, "local": {"original": 7, "effective": 7}},
    "throughput": {"avg_visual_tokens_kept": 192.0, "avg_visual_tokens": 576.0, "avg_speed": 60.0},
}


def test_each_task_and_metric_has_an_entry(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(RESULTS))
    gqa, local = lmms_eval_results(path)
    assert (gqa.dataset_type, gqa.dataset_config, gqa.dataset_split) == (
        "lmms-lab/GQA",
        "testdev_balanced_instructions",
        "testdev",
    )
    assert (gqa.metric_type, gqa.metric_value) == ("exact_match", 0.6)
    assert gqa.metric_args == {
        "model_args": "pretrained=model,keep_ratio=1/3",
        "avg_visual_tokens_kept": 192.0,
        "avg_visual_tokens": 576.0,
        "num_questions": 100,
    }
    assert (local.dataset_type, local.dataset_split, local.metric_type) == ("local", "val", "pope_f1_score")
    text = ModelCardData(model_name="some model", eval_results=[gqa, local]).to_yaml()
    assert text.count("avg_visual_tokens_kept: 192") == 2 and "verifyToken" not in text


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match=re.escape("it lacks results, configs, config, n-samples")):
        lmms_eval_results(path)


def test_the_entry_point_is_light_to_import():
    code = "import sys, tprl_hf.evaluation.lmms_eval.plugin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
