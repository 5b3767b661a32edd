"""docs/reproduction.md: its numbers are those of the files that it names, and its tables are all there."""

import json
import re
from pathlib import Path
from statistics import fmean

from tprl_hf.cli.measured_runs import MeasuredRuns, unpacked
from tprl_hf.cli.paper_tables import read_table, runs_of, table_names
from tprl_hf.loading import load_model
from tprl_hf.training.fingerprint import fingerprint_of_lvlm

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
GRPO = (ROOT / "docs" / "trainers" / "grpo.md").read_text(encoding="utf-8")
PAPER = ROOT / "docs" / "results" / "paper"
SHIPPED, FORMER = (
    json.loads((ROOT / "docs" / "results" / "mosaic_llava" / f"{name}.json").read_text(encoding="utf-8"))
    for name in ("policy", "counterfactual")
)


def test_what_is_kept_is_of_the_lvlm_that_is_shipped():
    """Else a table made in parts would compare policies of two LVLMs."""
    shipped = fingerprint_of_lvlm(load_model(None, "cpu", dtype="float32")[0])
    for path in (PAPER / "measured").iterdir():
        assert json.loads(path.read_text(encoding="utf-8"))["lvlm"] == shipped, path.name


def test_no_two_runs_went_the_same_way():
    """Settings that change nothing make a comparison void: MAPO once was leave-one-out, bit for bit."""
    ways = {}
    for path in sorted((PAPER / "measured").iterdir()):
        curve = json.loads(path.read_text(encoding="utf-8")).get("curve", [])
        later = [{name: entry[name] for name in entry if name != "llm_passes"} for entry in curve[1:]]
        if later:
            assert ways.setdefault(json.dumps(later), path.name) == path.name


def lost(way: str, budget: str, with_interval: bool = False, of: dict = FORMER) -> str:
    """Points that a variant loses, as the page writes them."""
    row = next(row for row in of["rows"] if (row["way"], row["budget"]) == (way, budget))
    value, low, high = (-100 * row["difference"][end] for end in ("value", "high", "low"))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]" if with_interval else f"{value:.2f}"


def test_the_numbers_are_those_of_the_results():
    assert f"points at 1/3, of {100 * SHIPPED['unpruned']['value']:.2f} % unpruned." in PAGE
    assert f"LLM frozen, three seeds, {SHIPPED['num_samples']:,} test questions" in PAGE
    assert f"shipped policy loses {lost('grpo', '1/3', True, SHIPPED)} points" in PAGE
    assert f"recipe loses {lost('paper', '1/3', True)} points, VisPruner {lost('vispruner', '1/3', True)}." in PAGE
    lfd, after = ([lost(way, budget, of=SHIPPED) for budget in ("1/9", "1/18")] for way in ("lfd", "grpo"))
    assert "At 1/9 and 1/18 LfD loses {} and {} points, after GRPO {} and {};".format(*lfd, *after) in PAGE
    lfd, after = ([lost(way, budget) for budget in ("1/9", "1/18")] for way in ("lfd", "ppo"))
    assert "demonstrations {} and {}, after counterfactual credit {} and {};".format(*lfd, *after) in PAGE
    assert f"At 1/18 counterfactual credit from scratch loses {lost('scratch', '1/18')} points, one seed." in PAGE


def test_each_table_has_its_row():
    rows = re.findall(r"^\| (`\w+`.*?) \|", PAGE.split("| table |")[1].split("## Claims")[0], re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == sorted(table_names())


def test_each_table_that_was_run_is_linked_and_the_others_say_so():
    table = PAGE.split("| table |")[1].split("## Claims")[0]
    for name in table_names():
        (row,) = re.findall(rf"^\| .*`{name}`.*$", table, re.MULTILINE)
        state = f"(results/paper/{name}.md)" if (PAPER / f"{name}.md").exists() else "not run yet"
        assert state in row, name


def points(name: str, label: str, budget: str, other: str | None = None) -> str:
    """Points of a row compared with unpruned, or with another row of its table, as the page writes them."""
    result = json.loads((PAPER / f"{name}.json").read_text(encoding="utf-8"))
    slugs = {label: slug for slug, label in result["labels"].items()}
    way = slugs.get(label, label)  # a rule has its own name
    (row,) = (row for row in result["measured"]["rows"] if (row["way"], row["budget"]) == (way, budget))
    found = row["difference"] if other is None else row[f"less {slugs[other]}"]
    value, low, high = (100 * found[end] for end in ("value", "low", "high"))
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def test_the_numbers_of_the_papers_tables_are_those_of_the_runs():
    gains = [points("table6", "LfD and PPO", budget, "LfD only") for budget in ("1/9", "1/18")]
    assert "recipe and PPO the gains are {} and {} ([table 6]".format(*gains) in PAGE
    assert f"RL from scratch differs from LfD by {points('table6', 'RL from scratch', '1/3', 'LfD only')}" in PAGE
    tuned, control, frozen = "tuned on pruned prompts", "control: tuned unpruned", "frozen, the shipped checkpoint"
    gains = [points("table5", tuned, budget, frozen) for budget in ("1", "1/3", "1/9", "1/18")]
    assert f"LLM by {gains[0]} points unpruned, and {gains[1]}, {gains[2]} and {gains[3]} at 1/3, 1/9 and 1/18" in PAGE
    assert f"the control, change nothing: {points('table5', control, '1/18', frozen)} at 1/18" in PAGE
    for budget, least, most in (("1/9", 0.45, 0.55), ("1/18", 0.30, 0.37)):  # "half" and "a third"
        lost = -float(points("table5", frozen, budget).split()[0])
        assert least < float(points("table5", tuned, budget, frozen).split()[0]) / lost < most


def test_the_number_of_steps():
    one, five = (points("table7", f"T = {number}", "1/3", "T = 3") for number in (1, 5))
    assert f"At 1/3 one step differs from three by {one} points, five by {five} ([table 7]" in PAGE


def test_the_algorithms_at_equal_passes():
    for label, text in (
        ("GRPO", "GRPO differs from PPO by {} points at 1/3 and {} at 1/9;"),
        ("MAPO, the same 256 questions", "MAPO on 256 questions by {} and {} ([figure 3]"),
    ):
        assert text.format(*(points("fig3", label, at, "PPO") for at in ("1/3", "1/9"))) in PAGE, label
    result = json.loads((PAPER / "fig3.json").read_text(encoding="utf-8"))
    for budget in ("2/9", "1/9"):
        found = {r["way"]: r["difference"]["value"] for r in result["measured"]["rows"] if r["budget"] == budget}
        assert all(found[slug] < found["vispruner"] - 0.05 for slug in result["labels"]), budget
    table = read_table("fig3")
    measured, runs = MeasuredRuns(table, PAPER), runs_of(table, Path("runs"), full=False)
    for budget in ("1/9",):
        kept = {(one.label, one.seed): json.loads(measured.path_of(one).read_text(encoding="utf-8")) for one in runs}
        correct = {
            key: fmean(unpacked(one["answers"][budget], 4200)["correct"])
            for key, one in kept.items()
            if key[0] in ("GRPO", "PPO")
        }
        assert sum(correct["GRPO", seed] > correct["PPO", seed] for seed in (0, 1, 2)) == 2, budget
    assert "two of its three seeds are better than PPO's and one is worse" in PAGE


def test_the_policy_without_attention():
    differences = [points("table8", "MLP only", at, "attention and MLP") for at in ("1/3", "2/9")]
    assert "differs from one with attention by {} points at 1/3 and {} at 2/9".format(*differences) in PAGE


def test_the_numbers_of_the_runs_without_labels():
    budgets = ("1/3", "1/9", "1/18")

    def lost_by(label: str) -> list[str]:
        """Points that a row loses, by budget."""
        found = [float(points("unlabelled", label, budget).split()[0]) for budget in budgets]
        return [f"{-one:.2f}" for one in found]

    without_labels, with_labels = lost_by("without labels"), [lost("ppo", budget) for budget in budgets]
    for one, other in zip(without_labels, with_labels, strict=True):
        assert abs(float(one) - float(other)) < 0.3  # "as good"
    differences = [points("unlabelled", "without labels", budget, "with labels") for budget in budgets]
    assert "without labels differ from one with labels by {}, {} and {} points".format(*differences) in PAGE
    blind, rule = lost_by("without labels and question"), [lost("divprune", budget) for budget in budgets]
    assert "neither labels nor question loses {}, {} and {} points".format(*blind) in PAGE
    assert "a rule that does not read it, loses {}, {} and {} ([unlabelled]".format(*rule) in PAGE
    assert all(float(one) >= float(other) for one, other in zip(blind, rule, strict=True))


def test_the_ways_to_give_credit():
    shipped = "counterfactual (ours)"
    rows = {
        "GRPO, bits": "at 1/9, GRPO with one reward differs from counterfactual credit by {} points;",
        "GRPO, sets": "with sets, which keep exactly the budget, {};",
        "GRPO, sets, annealed, probes": "which spend passes where rollouts differ, {}.",
        "noise gates, KL": "Noise gates with the KL target, the rival without RL, {} ([credit]",
    }
    for label, text in rows.items():
        assert text.format(points("credit", label, "1/9", shipped)) in PAGE


def test_the_width_of_the_codes():
    rows = ["192 (as wide as the token)", "48 (a 4th)", "24 (an 8th)", "6 (a 32nd)", "3 (a 64th)"]
    none, narrow = (points("fig2", row, "1/3", "12 (a 16th, the paper's)") for row in (rows[0], rows[3]))
    assert f"12 numbers, a 16th, none is {none} points better at 1/3 and 6 numbers {narrow} ([figure 2]" in PAGE
    for row in rows[:3]:  # "about five points"
        assert 4.5 < float(points("fig2", row, "2/9", "12 (a 16th, the paper's)").split()[0]) < 5.5


def test_grpo_at_length():
    label, former = "GRPO, 16 questions a step", "counterfactual credit"
    differences = [points("rival", label, at, former) for at in ("1/3", "1/9", "1/18")]
    assert "passes GRPO differs from it by {}, {} and {} points at 1/3, 1/9 and 1/18".format(*differences) in PAGE
    for pair in differences:
        low, high = pair.split("[")[1].rstrip("]").split(", ")
        assert float(low) < 0 < float(high)  # "as good as"
    better = "GRPO, 64 questions a step, reads similarity (shipped)"
    differences = [points("rival", better, at, former) for at in ("1/3", "1/9", "1/18")]
    losses = [points("rival", better, at).split()[0][1:] for at in ("1/3", "1/9", "1/18")]
    assert "passes {}, {} and {}; it loses {}, {} and {} ([rival]".format(*differences, *losses) in PAGE
    assert " {}, {} and {} points".format(*losses) in GRPO
    table = read_table("rival")
    measured, runs = MeasuredRuns(table, PAPER), runs_of(table, Path("runs"), full=False)
    for row, page in ((label, PAGE), (better, PAGE), (better, GRPO)):
        files = [measured.path_of(one) for one in runs if one.label == row]
        passes = [json.loads(path.read_text(encoding="utf-8"))["curve"][-1]["llm_passes"] for path in files]
        assert f"about {round(fmean(passes), -3):,.0f} passes" in page


def test_whose_masks_are_imitated():
    result = json.loads((PAPER / "teachers.json").read_text(encoding="utf-8"))
    rows = result["measured"]["rows"]
    found = {row["way"]: -100 * row["difference"]["value"] for row in rows if row["budget"] == "1/9"}
    slugs = {label: slug for slug, label in result["labels"].items()}
    (claim,) = (line for line in PAGE.splitlines() if line.startswith("| Whose masks should be imitated?"))
    for label, text in (
        ("VisPruner at 75 and 50 %, the paper's", "as in the paper, lose {} points;"),
        ("VisPruner", "its masks at all budgets {},"),
        ("DivPrune", "DivPrune's {},"),
        ("gradient", "which knows the answer, {}."),
    ):
        assert text.format(f"{found[slugs[label]]:.2f}") in claim
        assert found[slugs[label]] > found["vispruner"]
    assert f"VisPruner itself loses {found['vispruner']:.2f} " in claim


def test_one_policy_for_all_budgets():
    own = [points("budgets", f"only {budget}", budget, "all budgets") for budget in ("1/3", "1/9", "1/18")]
    assert "differs from one that was trained at four by {}, {} and {} points. The one of 1/9".format(*own) in PAGE
    others = [points("budgets", "only 1/9", budget, "all budgets") for budget in ("1/3", "1/18")]
    assert "of 1/9 differs by {} at 1/3 and {} at 1/18 ([budgets]".format(*others) in PAGE


def test_the_recipe_for_own_data():
    def both(label: str) -> str:
        return " and ".join(points("own_data", label, budget).split()[0][1:] for budget in ("1/3", "1/9"))

    (claim,) = (line for line in PAGE.splitlines() if line.startswith("| A policy can be trained on a few"))
    assert f"loses {both('the recipe')} points at 1/3 and 1/9, DivPrune {both('divprune')}. " in claim
    assert f"changes imitation by {points('own_data', 'the recipe', '1/9', 'imitation alone')} at 1/9. " in claim
    assert f"the recipe loses {both('the recipe, codes of 16').split()[-1]} ([own_data]" in claim
    your_model = " ".join((ROOT / "docs" / "your_model.md").read_text(encoding="utf-8").split())
    losses = [points("own_data", way, "1/9").split()[0][1:] for way in ("the recipe", "divprune")]
    assert "it loses {} points at 1/9 there, DivPrune {}".format(*losses) in your_model


def test_positions_counted_anew():
    differences = [points("positions", "counted anew", at, "original positions") for at in ("1/3", "1/18")]
    assert "differs from original positions by {} points at 1/3 and {} at 1/18".format(*differences) in PAGE


def test_the_discount_of_a_step():
    losses = [points("lambda_disc", label, "1/3").split()[0][1:] for label in ("0.25", "0.5", "0.75", "1")]
    assert "the recipe loses {}, {}, {} and {} points at 1/3 ([lambda_disc]".format(*losses) in PAGE


def test_the_parts_of_the_reward():
    for label, text in (
        ("log-probability instead of correctness", "differs from the paper's reward by {} points,"),
        ("no bonus for removed tokens", "no bonus for removed tokens {},"),
        ("scores of the last masks only", "no scores of the masks between {} ([rewards]"),
    ):
        assert text.format(points("rewards", label, "1/3", "the paper's")) in PAGE


def test_the_timings_are_those_of_the_gpu():
    timed = json.loads((ROOT / "docs" / "results" / "gpu" / "llava-1.5-7b_third.json").read_text(encoding="utf-8"))
    before, after = (timed["milliseconds"][f"prefill {way}"]["median"] for way in ("unpruned", "pruned"))
    assert f"a prefill from {before:.1f} to {after:.1f} ms" in PAGE
    (batches,) = (one for one in timed["load"] if one["batch"] == 16)
    assert f"in batches of 16: {batches['speed_up']['median']:.3f} times" in PAGE


BUDGETS = ("1/3", "1/4", "2/9", "1/9")  # of tables 1 and 2


def test_the_shipped_policy_among_all_rules():
    """Without the oracle, which is told where to look, and rows with the star of unfair ones."""
    rows = json.loads((PAPER / "table1" / "results.json").read_text(encoding="utf-8"))["rows"]

    def losses(pruner: str) -> str:
        found = {row["budget"]: -100 * row["difference"]["value"] for row in rows if row["pruner"] == pruner}
        return "{:.1f} and {:.1f}".format(*(abs(found[budget]) for budget in ("1/3", "1/9")))

    (claim,) = (line for line in PAGE.splitlines() if line.startswith("| TPRL is better than every rule"))
    assert f"At 1/3 and 1/9 the shipped policy loses {losses('learned')} points, DivPrune" in claim
    assert f"{losses('divprune')}, VisPruner {losses('vispruner')} ([table 1]" in claim
    for budget in BUDGETS:
        accuracy = {row["pruner"]: row["accuracy"]["value"] for row in rows if row["budget"] == budget}
        order = sorted(accuracy.keys() - {"oracle"}, key=lambda name: -accuracy[name])
        assert order[:2] == ["learned", "divprune"], budget
        assert len(order) == 13  # the best of twelve others


def test_the_policy_of_another_model_among_all_rules():
    rows = json.loads((PAPER / "table3" / "results.json").read_text(encoding="utf-8"))["rows"]

    def points_of(pruner: str) -> str:
        found = {row["budget"]: 100 * row["difference"]["value"] for row in rows if row["pruner"] == pruner}
        return "{:+.1f} and {:+.1f}".format(*(found[budget] for budget in ("1/3", "1/9")))

    told = "differs from unpruned by {} points, VisionZip by {}, DivPrune by {}, VisPruner by {} ([table 3]"
    assert told.format(*map(points_of, ("learned", "visionzip", "divprune", "vispruner"))) in PAGE
    for budget in BUDGETS:
        accuracy = {row["pruner"]: row["accuracy"]["value"] for row in rows if row["budget"] == budget}
        assert max(accuracy.keys() - {"oracle"}, key=lambda name: accuracy[name]) == "learned", budget


def test_the_shipped_policy_on_a_second_source():
    rows = json.loads((PAPER / "table2" / "results.json").read_text(encoding="utf-8"))["rows"]
    by_place = {(row["pruner"], row["budget"]): row["difference"] for row in rows}

    def losses(pruner: str) -> str:
        ends = ("value", "high", "low")
        found = [[0.0 - 100 * by_place[pruner, budget][end] for end in ends] for budget in ("1/3", "1/9")]
        return "{} and {}".format(*(f"{value:.2f} [{low:.2f}, {high:.2f}]" for value, low, high in found))

    (claim,) = (line for line in PAGE.splitlines() if line.startswith("| The same on a second source"))
    assert f"loses {losses('learned')} points, DivPrune {losses('divprune')} ([table 2]" in claim
    assert by_place["learned", "1/9"]["value"] < by_place["divprune", "1/9"]["value"]
