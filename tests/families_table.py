"""The table of docs/families.md: which registered image-text-to-text types are exact, untested, or refused and why.

    python -m tests.families_table            prints the table
    python -m tests.families_table --write    writes docs/families.md

Deviations are the largest absolute differences of float32 logits on tiny random models, on the CPU.
"""

import argparse
import inspect
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from tests.reference import delete_by_hand
from tests.tiny_models import FAMILIES, MODEL_TYPES, build, collate, entry, sample
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tprl_hf.modeling import TPRLForConditionalGeneration, adapter_for

COLUMNS = {
    "keep_all": "keep-all = base",
    "by_hand": "pruned = deleted by hand",
    "contiguous": "the same, positions renumbered",
    "batch": "batch = singles",
    "loaded": "saved = loaded",
}


def deviation(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


@torch.no_grad()
def measure(family: str) -> dict[str, float]:
    """Largest deviation of each invariant; infinity where greedy tokens differ."""
    base = build(family)
    numbering = "contiguous" if entry(family).numbered_anew else "original"
    model = TPRLForConditionalGeneration.from_base_model(base, latent_dim=8, position_ids=numbering).eval()
    samples = [sample(family, 1, 1, text=3), sample(family, 2, 2), sample(family, 0, 3, text=9)]
    batch = collate(family, samples)
    found = {}

    attended = batch["attention_mask"].bool()
    found["keep_all"] = deviation(model(**batch, keep_ratio=1.0).logits[attended], base(**batch).logits[attended])
    made = model.generate(**batch, keep_ratio=1.0, max_new_tokens=4)
    if not torch.equal(made, base.generate(**batch, max_new_tokens=4)):
        found["keep_all"] = float("inf")

    one = collate(family, samples[1:2])
    keep_mask = model.prune(**one, keep_ratio=0.4).keep_mask
    for name, position_ids in (("by_hand", "original"), ("contiguous", "contiguous")):
        if name == "by_hand" and entry(family).numbered_anew:
            continue
        model.config.position_ids = position_ids
        expected, tokens = delete_by_hand(base, one, keep_mask, position_ids, 4)
        found[name] = deviation(model(**one, keep_mask=keep_mask).logits, expected)
        if model.generate(**one, keep_mask=keep_mask, max_new_tokens=4)[0, -4:].tolist() != tokens:
            found[name] = float("inf")
    model.config.position_ids = numbering

    together = [model(**collate(family, samples, side), keep_ratio=0.4).logits for side in ("left", "right")]
    found["batch"] = 0.0
    for row, alone in enumerate(samples):
        logits = model(**collate(family, [alone]), keep_ratio=0.4).logits[0]
        for padded in together:
            found["batch"] = max(found["batch"], deviation(padded[row, -len(logits) :], logits))

    expected = model(**batch, keep_ratio=0.4).logits
    with tempfile.TemporaryDirectory() as directory:
        base.save_pretrained(f"{directory}/base")
        model.config.base_model_name_or_path = f"{directory}/base"
        for name, merged in (("policy", False), ("merged", True)):
            model.save_pretrained(f"{directory}/{name}", save_base_model=merged)
            loaded = TPRLForConditionalGeneration.from_pretrained(f"{directory}/{name}")
            found["loaded"] = max(found.get("loaded", 0.0), deviation(loaded(**batch, keep_ratio=0.4).logits, expected))
    return found


def registered() -> dict[str, str]:
    """All registered image-text-to-text types with the name of their model class."""
    return dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


if __name__ == "__main__":
    import sys
    from tests.more_families import OTHERS
    for family in [*FAMILIES, *OTHERS]:
        found = measure(family)
        print(f"{family:24}", {k: f"{v:.1e}" for k, v in found.items()}, flush=True)
