"""The table of docs/families.md: which registered image-text-to-text types are exact, untested, or refused and why.

    python -m tests.families.table            prints the table
    python -m tests.families.table --write    writes docs/families.md

Deviations are the largest absolute differences of float32 logits on tiny random models, on the CPU.
"""

import argparse
import inspect
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests.families.more import BASE_BROKEN, OTHERS
from tests.families.processor_needs import section, wrapped
from tests.families.tiny_models import FAMILIES, Sample, build, collate, entry, sample
from tests.families.videos import VIDEOS
from tests.families.ways_to_generate import CANNOT, WAYS
from tests.reference import delete_by_hand
from tests.stand_ins.flash import BASE_DIFFERS, BASE_FAILS, BEAR_NO_PADDING
from tprl_hf.modeling import TPRLForConditionalGeneration, adapter_for
from tprl_hf.modeling.family_adapters import REFUSED

COLUMNS = {
    "keep_all": "keep-all = base",
    "by_hand": "pruned = deleted by hand",
    "contiguous": "the same, positions renumbered",
    "batch": "batch = singles",
    "loaded": "saved = loaded",
}

# Why a type that takes `mm_encoder_outputs` has no entry.
UNTESTED = {
    "fast_vlm": "its tower needs timm, which is not one of our dependencies",
    "gemma3n": "its tower needs timm, which is not one of our dependencies",
    "inkling_mm_model": "its tower needs scipy, which is not one of our dependencies",
    "perception_lm": "its tower needs timm, which is not one of our dependencies",
    "shieldgemma2": "exact, but transformers cannot load the checkpoint that it saves",
}

# What is not as with images.
OF_VIDEOS = (
    (
        ("molmo2", "nemotron_h_omni"),
        "a call takes images or videos, not both, as nothing tells their tokens apart: both together are refused",
    ),
    (
        ("nemotron_h_omni",),
        "videos are refused where the base model prunes them (`video_pruning_rate` above 0)",
    ),
    (
        ("glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga"),
        "the base model itself fails on images beside videos, which have the same tokens; pruned, also with "
        "keep_ratio=1, they work, as a video lies between its start and its end",
    ),
    (("glm5_next",), "no beams with a video (the base model itself loses its features)"),
    (
        ("kimi_k25", "llava_next_video", "llava_onevision"),
        "pruners cannot read the tower's attention to videos; they are refused",
    ),
    (("ernie4_5_vl_moe",), "pruners see the tokens of a video in their order, without a place"),
)


def deviation(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


@torch.no_grad()
def measure(family: str) -> dict[str, float]:
    """Largest deviation of each invariant; infinity where greedy tokens differ."""
    base = build(family)
    numbering = "contiguous" if entry(family).own_positions else "original"
    model = TPRLForConditionalGeneration.from_base_model(
        base, latent_dim=8, policy_training={"stage": "lfd"}, position_ids=numbering
    ).eval()
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
        if name == "by_hand" and entry(family).own_positions:
            continue
        model.config.position_ids = position_ids
        expected, tokens = delete_by_hand(base, one, keep_mask, position_ids, 4)
        found[name] = deviation(model(**one, keep_mask=keep_mask, compact=True).logits, expected)
        if model.generate(**one, keep_mask=keep_mask, max_new_tokens=4)[0, -4:].tolist() != tokens:
            found[name] = float("inf")
    model.config.position_ids = numbering

    if not entry(family).batch_differs:
        found["batch"] = batch_deviation(family, model, samples)

    expected = model(**batch, keep_ratio=0.4).logits
    with tempfile.TemporaryDirectory() as directory:
        base.save_pretrained(f"{directory}/base")
        model.config.base_model_name_or_path = f"{directory}/base"
        for name, merged in (("policy", False), ("merged", True)):
            model.save_pretrained(f"{directory}/{name}", save_base_model=merged)
            loaded = TPRLForConditionalGeneration.from_pretrained(f"{directory}/{name}")
            found["loaded"] = max(
                found.get("loaded", 0.0), deviation(loaded(**batch, keep_ratio=0.4).logits, expected)
            )
    return found


def batch_deviation(family: str, model: TPRLForConditionalGeneration, samples: list[Sample]) -> float:
    """Largest deviation of samples in a batch, padded on either side, from the same samples alone."""
    together = [
        model(**collate(family, samples, side), keep_ratio=0.4, compact=True).logits for side in ("left", "right")
    ]
    found = 0.0
    for row, alone in enumerate(samples):
        logits = model(**collate(family, [alone]), keep_ratio=0.4, compact=True).logits[0]
        for padded in together:
            found = max(found, deviation(padded[row, -len(logits) :], logits))
    return found


@torch.no_grad()
def attention_of_tower(family: str) -> str:
    """Whether the attention of the vision tower can be laid over the tokens."""
    batch = collate(family, [sample(family, 1, 1)])
    try:
        adapter_for(build(family)).encode(batch["input_ids"], batch, with_attention=True)
    except ValueError:
        return "no"
    return "yes"


def exceptions() -> dict[tuple[str, tuple[str, ...]], list[str]]:
    """Families by what their base models cannot, and why."""
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for family, ways in CANNOT.items():
        for reason in dict.fromkeys(ways.values()):
            key = (reason, tuple(way for way, why in ways.items() if why == reason))
            found.setdefault(key, []).append(family)
    return found


def registered() -> dict[str, str]:
    """All registered image-text-to-text types with the name of their model class."""
    return dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def why_not(model_type: str) -> tuple[str, str]:
    """Status and reason of a type without an entry."""
    forward = getattr(transformers, registered()[model_type]).forward
    if BASE_BROKEN.get(model_type) == transformers.__version__:
        return "broken", f"exact with transformers 5.23; in {transformers.__version__} the base model itself fails"
    if model_type in REFUSED:
        return "refused", REFUSED[model_type]
    if "mm_encoder_outputs" in inspect.signature(forward).parameters:
        return "untested", UNTESTED.get(model_type, "takes `mm_encoder_outputs`; nobody tried it yet")
    return "refused", "its `forward` does not take `mm_encoder_outputs`"


def table() -> str:
    """The page as Markdown."""
    rows, exact, largest = [], set(), 0.0
    for family in [*FAMILIES, *OTHERS]:
        base = build(family)
        found = measure(family)
        largest = max(largest, *found.values())
        exact.add(base.config.model_type)
        numbers = " | ".join(f"{found[name]:.1e}" if name in found else "–" for name in COLUMNS)
        rows.append(f"| {family} | {type(adapter_for(base)).__name__} | {numbers} | {attention_of_tower(family)} |")
    rest = {name: why_not(name) for name in sorted(set(registered()) - exact)}
    others = [f"| {name} | {status} | {reason} |" for name, (status, reason) in rest.items()]
    counts = Counter(status for status, _ in rest.values())
    return "\n".join(
        [
            "# Families",
            "",
            "Written by `python -m tests.families.table --write`.",
            "",
            wrapped(
                f"Of the {len(registered())} image-text-to-text types that transformers {transformers.__version__} "
                f"registers, **{len(exact)} are exact** on tiny random models, {counts['untested']} are untested, "
                f"{counts['refused']} are refused and {counts['broken']} "
                f"{'is' if counts['broken'] == 1 else 'are'} broken in this release, pruned or not. An untested type "
                "gets the default adapter and a warning. "
                f"The largest deviation of all is **{largest:.1e}**."
            ),
            "",
            "## Exact",
            "",
            wrapped(
                "The numbers are largest absolute differences of float32 logits on the CPU (hidden 32, two layers). "
                "Keep-all and deletion by hand also compare greedy tokens. The batch has one sample with one image, "
                "one with two images and one without an image, padded on either side. A dash under deletion: the base "
                "model does not respect gaps in positions, so only renumbered positions are possible. A dash under "
                "batch: the base model's own batch differs from its samples one by one. The last column says whether "
                "pruners can read the attention of the vision tower."
            ),
            "",
            "| family | adapter | " + " | ".join(COLUMNS.values()) + " | attention of the tower |",
            "|---|---|" + "---|" * len(COLUMNS) + "---|",
            *rows,
            "",
            "## Ways to generate",
            "",
            wrapped(
                f"Tests run these ways: {', '.join(WAYS)}. For each way they check that the answer is that of plain "
                "greedy decoding, that a batch answers as its samples do, and that keeping all tokens gives the base "
                "model's answer (`tests/families/ways_to_generate.py`). Some base models cannot do some of these, "
                "also without pruning:"
            ),
            "",
            *(
                wrapped(f"- {', '.join(families)}: {', '.join(ways)} ({reason})")
                for (reason, ways), families in exceptions().items()
            ),
            "",
            "## Flash Attention",
            "",
            wrapped(
                'With `attn_implementation="flash_attention_2"` logits and answers equal those of sdpa, for single '
                "samples, in batches, and with a new image in a second turn. These tests ran without a GPU. They run "
                "transformers' own code around the kernels; the kernels themselves are written in plain torch "
                "(`tests/stand_ins/flash.py`). Three things do not work:"
            ),
            "",
            wrapped(f"- {', '.join(BASE_FAILS)}: the base model itself fails with Flash Attention"),
            wrapped(f"- {', '.join(BASE_DIFFERS)}: the base model itself answers differently than with sdpa"),
            wrapped(f"- {', '.join(BEAR_NO_PADDING)}: a new image behind a cache is refused, as layers carry a state"),
            "",
            "## Videos and audio",
            "",
            wrapped(
                f"Tests pass a video to {len(VIDEOS)} families, all whose base models take videos, after an image "
                "where a call takes both. Keeping all tokens gives the base model's logits, and pruning is deletion "
                "by hand (`tests/modeling/test_videos_of_families.py`). In the thinkers of Qwen-Omni audio stands "
                "beside them. Exceptions:"
            ),
            "",
            *(wrapped(f"- {', '.join(families)}: {what}") for families, what in OF_VIDEOS),
            "",
            *section(),
            "## Others",
            "",
            "| type | status | why |",
            "|---|---|---|",
            *others,
            "",
            "## Adding one",
            "",
            wrapped(
                "A family that the default adapter fits needs one entry with a tiny config in "
                "`tests/families/more.py` and its name in `SUPPORTED` of `tprl_hf/modeling/family_adapters.py`. Then "
                "run the command above. Where a number is not small, the family needs an adapter in the same file; "
                "the adapter says only what differs."
            ),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/families.md")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    page = table()
    if arguments.write:
        (Path(__file__).parents[2] / "docs" / "families.md").write_text(page)
    else:
        print(page)


if __name__ == "__main__":
    main()
