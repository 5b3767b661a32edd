"""The pictures of README and docs, from the shipped checkpoint and the numbers in docs/results:
`python docs/make_pictures.py`."""

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

DOCS = Path(__file__).parent
BUDGETS = (1.0, 2 / 3, 1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 9, 1 / 12, 1 / 18)
SCALE = 1.4
MILLISECONDS, LAST = 900, 2500  # of a frame, and of the last one
PLOTS = ("mosaic", "baselines", "prune_or_shrink")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=DOCS, metavar="DIR", help="default: docs")
    folder = parser.parse_args().output_dir
    folder.mkdir(parents=True, exist_ok=True)
    write_kept_tokens(folder / "kept_tokens.png")
    write_animation(budget_frames(), folder / "falling_budget.gif")
    for name in PLOTS:
        path = folder / "results" / "mosaic_llava" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_plot(DOCS / "results" / "mosaic_llava" / f"{name}.json", path)


def write_kept_tokens(path: Path) -> None:
    """Two questions with all, a third and a ninth of the visual tokens, as `tprl demo` draws them."""
    from tprl_hf.cli.main import main as tprl

    with tempfile.TemporaryDirectory() as scratch:
        # the two that are shown are among the first questions, however many are answered
        if tprl(["demo", "--num-samples", "12", "--num-shown", "2", "--output-dir", scratch]):
            raise SystemExit(1)
        shutil.copy(Path(scratch) / "kept_tokens.png", path)


def pair_of_questions(samples: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The first two questions about one picture that ask about different things of it, each about one."""
    for number, one in enumerate(samples):
        for other in samples[number + 1 :]:
            different = one["boxes"] != other["boxes"] and one["question_type"] != other["question_type"]
            if one["image_id"] == other["image_id"] and len(one["boxes"]) == len(other["boxes"]) == 1 and different:
                return one, other
    raise ValueError("No two questions ask about different things of one picture.")


def budget_frames(budgets: Sequence[float] = BUDGETS) -> list[Image.Image]:
    """One picture under two questions, while the budget falls; the checkpoint's own policy chooses."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import tprl_hf
    from tprl_hf.answer_rules import is_correct
    from tprl_hf.data import mosaic_vqa
    from tprl_hf.evaluation.answers import chat_inputs
    from tprl_hf.visualization import Panel, draw_figures, figures_by_block, seen_pictures

    path = tprl_hf.embedded_checkpoint()
    model, processor = AutoModelForImageTextToText.from_pretrained(path), AutoProcessor.from_pretrained(path)
    pair = pair_of_questions(list(mosaic_vqa("test", seed=7, num_samples=120)))
    frames = []
    for budget in budgets:
        pages = []
        for sample in pair:
            inputs = chat_inputs(processor, [sample])
            pruned: dict[str, Any] = {"prune": False} if budget == 1 else {"keep_ratio": budget}
            plan = model.prune(**inputs, **pruned)
            sequence = model.generate(**inputs, **pruned, do_sample=False, max_new_tokens=8)[0]
            answer = processor.decode(sequence[inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
            panel = Panel("answer", answer, plan.keep_mask, is_correct=is_correct(answer, sample["answer"]))
            seen = seen_pictures(sample["images"], processor, inputs, plan.layout)
            pages.append(draw_figures(figures_by_block(seen, plan.layout, [panel], sample["prompt"]), SCALE))
        frames.append(with_bar(pages, int(plan.num_kept), int(plan.num_visual)))
    return frames


def with_bar(pages: Sequence[Image.Image], kept: int, total: int) -> Image.Image:
    """Pages beside each other with a bar above them: the tokens that the LLM reads, of all."""
    from tprl_hf.style import BLUE, INK, PAPER, RIM

    margin, high = round(18 * SCALE), round(44 * SCALE)
    width, height = sum(page.width for page in pages), max(page.height for page in pages) + high
    frame = Image.new("RGB", (width, height), PAPER)
    for number, page in enumerate(pages):  # a question of two lines makes its page higher
        frame.paste(page, (sum(one.width for one in pages[:number]), height - page.height))
    pen = ImageDraw.Draw(frame)
    font = ImageFont.load_default(15 * SCALE)
    pen.text((margin, round(10 * SCALE)), f"The LLM reads {kept} of {total} visual tokens", font=font, fill=INK)
    left, right, top, bottom = margin, width - margin, high - round(8 * SCALE), high + round(4 * SCALE)
    pen.rectangle([left, top, right, bottom], outline=RIM)
    pen.rectangle([left, top, left + round((right - left) * kept / total), bottom], fill=BLUE)
    return frame


def write_animation(frames: Sequence[Image.Image], path: Path) -> None:
    """The frames as a GIF that begins anew; all have one palette."""
    together = Image.new("RGB", (frames[0].width, sum(frame.height for frame in frames)))
    for number, frame in enumerate(frames):
        together.paste(frame, (0, number * frame.height))
    palette = together.quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    reduced = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [MILLISECONDS] * (len(frames) - 1) + [LAST]
    reduced[0].save(path, save_all=True, append_images=reduced[1:], duration=durations, loop=0, optimize=True)


def write_plot(results: Path, path: Path) -> None:
    """Accuracy against tokens of an evaluation's results.json, as `tprl evaluate` draws it."""
    from tprl_hf.evaluation.tables import plot_accuracy

    found = json.loads(results.read_text(encoding="utf-8"))
    seeds = found["seed"] if isinstance(found["seed"], int) else ", ".join(map(str, found["seed"]))
    title = f"{found['data']} {found['split']}, {found['num_samples']} questions, seed {seeds}"
    plot_accuracy([row_of(row) for row in found["rows"]], path, title)


def row_of(found: Mapping[str, Any]) -> Any:
    """A row of results.json as the plot takes it."""
    from tprl_hf.evaluation.benchmark import Spread
    from tprl_hf.evaluation.tables import Row
    from tprl_hf.intervals import Estimate

    times = found.get("milliseconds")
    return Row(
        **{name: found[name] for name in ("pruner", "budget", "mean_kept", "min_kept", "max_kept", "mean_visual")},
        accuracy=Estimate(**found["accuracy"]),
        difference=Estimate(**found["difference"]),
        by_type={},
        milliseconds=Spread(**times) if times else None,
    )


if __name__ == "__main__":
    main()
