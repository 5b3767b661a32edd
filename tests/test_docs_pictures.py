"""README's pictures come from one command, and are the same each time."""

import importlib.util
import re
from pathlib import Path

import pytest
from PIL import Image, ImageSequence

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def command():
    """docs/make_pictures.py as a module."""
    spec = importlib.util.spec_from_file_location("make_pictures", ROOT / "docs" / "make_pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_animation_is_the_same_each_time_and_its_bar_is_the_budget(command, tmp_path):
    budgets = (1.0, 1 / 3, 1 / 18)
    for name in ("one.gif", "other.gif"):
        command.write_animation(command.budget_frames(budgets), tmp_path / name)
    assert (tmp_path / "one.gif").read_bytes() == (tmp_path / "other.gif").read_bytes()
    with Image.open(tmp_path / "one.gif") as animation:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(animation)]
        assert animation.info["loop"] == 0
    lengths = []
    for frame in frames:
        row = [frame.getpixel((x, round(44 * command.SCALE))) for x in range(frame.width)]
        lengths.append(sum(blue > 120 > red for red, _, blue in row))
    assert [round(length / lengths[0], 2) for length in lengths] == pytest.approx([1, 48 / 144, 8 / 144], abs=0.02)


def test_the_committed_animation_is_small_and_shows_every_budget(command):
    path = ROOT / "docs" / "falling_budget.gif"
    assert path.stat().st_size < 400_000
    with Image.open(path) as animation:
        assert animation.n_frames == len(command.BUDGETS)
    linked = re.findall(r"!\[[^]]+\]\((docs/[\w./]+)\)", (ROOT / "README.md").read_text())
    assert {"docs/kept_tokens.png", "docs/falling_budget.gif"} <= set(linked)
    assert all((ROOT / name).is_file() for name in linked)


def test_plots_are_drawn_from_the_committed_numbers(command, tmp_path):
    for name in command.PLOTS:
        command.write_plot(ROOT / "docs" / "results" / "mosaic_llava" / f"{name}.json", tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as plot:
            assert plot.width > 1000
