"""The timings under docs/results/benchmark: what the targets ask of them, and that the page says the same."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tprl_hf.cli.main import make_parser

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = {path.stem: json.loads(path.read_text()) for path in sorted((DOCS / "results" / "benchmark").glob("*.json"))}


@pytest.mark.parametrize("name", RESULTS)
def test_each_names_its_command_device_and_versions(name):
    found = RESULTS[name]
    make_parser().parse_args(shlex.split(found["command"])[1:])
    assert found["device"] and {"torch", "transformers"} <= found["versions"].keys() and found["rounds"] >= 5


def test_the_targets_are_met_on_a_model_of_half_a_billion_on_a_cpu():
    found = RESULTS["llava-0.5b-cpu"]
    assert (found["num_visual"], found["num_keep"], found["batch"]) == (576, 192, 1) and "1 threads" in found["device"]
    ratios = {name: spread["median"] for name, spread in found["cpu_ratios"].items()}
    assert ratios["prefill pruned / floor"] <= 1.03
    assert ratios["pruner / prefill unpruned"] <= 0.02
    assert ratios["prefill speed-up"] >= 0.9 * ratios["prefill speed-up of the floor"]


@pytest.mark.parametrize("name", RESULTS)
def test_whole_answers_are_never_slower_than_unpruned(name):
    found = RESULTS[name]
    speed_ups = [found[clock]["answer speed-up"]["median"] for clock in ("ratios", "cpu_ratios")]
    speed_ups += [one[clock]["median"] for one in found.get("load", ()) for clock in ("speed_up", "cpu_speed_up")]
    assert min(speed_ups) >= 1


def as_written(spread) -> str:
    return f"{spread['median']:.3f} ({spread['low']:.3f} to {spread['high']:.3f})"


def test_the_page_says_what_was_measured():
    page = " ".join((DOCS / "evaluation.md").read_text().split())
    assert {f"results/benchmark/{name}.json" for name in RESULTS} == set(
        re.findall(r"results/benchmark/[\w.-]+", page)
    )
    told = ["prefill pruned / floor", "pruner / prefill unpruned", "prefill speed-up", "answer speed-up"]
    for name, clocks in {"llava-0.5b-cpu": ("ratios", "cpu_ratios"), "mosaic-llava-cpu": ("cpu_ratios",)}.items():
        for spread in [RESULTS[name][clock][ratio] for clock in clocks for ratio in told]:
            assert as_written(spread) in page
    for found in RESULTS.values():
        for part in ("prefill", "answer"):
            peaks = [found["peak_bytes"][f"{part} {name}"] / 1e6 for name in ("unpruned", "pruned")]
            assert f"{peaks[0]:.1f} to {peaks[1]:.1f}" in page and peaks[1] < peaks[0]
        kv = [found[f"kv_bytes_{name}"] / 1e6 for name in ("unpruned", "pruned")]
        assert f"{kv[0]:.2f} to {kv[1]:.2f}" in page
    for one in [one for found in RESULTS.values() for one in found["load"]]:
        speed_ups = f"{one['speed_up']['median']:.3f} | {one['cpu_speed_up']['median']:.3f} |"
        assert f"| {one['batch']} | {as_written(one['unpruned'])} | {as_written(one['pruned'])} | {speed_ups}" in page


def test_the_page_says_what_a_gpu_gave():
    page = " ".join((DOCS / "evaluation.md").read_text().split())
    files = [DOCS / "results" / "gpu" / f"llava-1.5-7b_{share}.json" for share in ("third", "ninth")]
    found = [json.loads(path.read_text()) for path in files]
    assert all(f"(results/gpu/{path.name})" in page for path in files)
    assert [one["num_keep"] for one in found] == [192, 64] and all(one["num_visual"] == 576 for one in found)

    def row(title: str, cells: list[str]) -> None:
        assert f"| {title} | {' | '.join(cells)} |" in page

    for title, part in {
        "prefill unpruned, ms": "prefill unpruned",
        "prefill pruned, ms": "prefill pruned",
        "floor, ms": "prefill floor",
        "pruner, ms": "pruner",
    }.items():
        spreads = [one["milliseconds"][part] for one in found]
        row(title, [f"{of['median']:.1f} ({of['low']:.1f} to {of['high']:.1f})" for of in spreads])
    for place, words in enumerate(("one at a time", "batches of 16")):
        row(f"speed-up of whole answers, {words}", [as_written(one["load"][place]["speed_up"]) for one in found])
    peaks = [[one["peak_bytes"][f"answer {name}"] / 1e6 for name in ("unpruned", "pruned")] for one in found]
    row("peak of a whole answer without weights, MB", [f"{before:.1f} to {after:.1f}" for before, after in peaks])
    caches = [[one[f"kv_bytes_{name}"] / 1e6 for name in ("unpruned", "pruned")] for one in found]
    row("KV cache of a prompt, MB", [f"{before:.1f} to {after:.1f}" for before, after in caches])


def test_readme_says_what_was_measured():
    ratios = {name: spread["median"] for name, spread in RESULTS["llava-0.5b-cpu"]["ratios"].items()}
    readme = " ".join((DOCS.parent / "README.md").read_text().split())
    assert f"reads a prompt {ratios['prefill speed-up']:.1f} times as fast" in readme
    assert f"choosing the tokens takes {100 * ratios['pruner / prefill unpruned']:.1f} % of the time" in readme
    assert f"comes {ratios['answer speed-up']:.1f} times as fast" in readme
