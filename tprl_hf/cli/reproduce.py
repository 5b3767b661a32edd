"""Tables and figures of the TPRL paper on the embedded model: trains what is missing, measures, and writes JSON,
Markdown and plots. What is finished is not done again; an interrupted run resumes."""

import argparse
import contextlib
import io
import json
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tprl_hf.missing_packages import require
from tprl_hf.whole_files import write

from .measured_runs import TRAINED, MeasuredRuns, machine, training_of
from .paper_tables import Run, Table, minutes_left, of_the_paper, read_table, runs_of, settings_of_all, table_names
from .processes import say

if TYPE_CHECKING:
    from .stop_signals import StopSignals

NAME = "reproduce"
HELP = "run the tables and figures of the TPRL paper on the embedded model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "tables", nargs="+", metavar="TABLE", help=f"{', '.join(table_names())}; all of the paper, or beyond it: more"
    )
    parser.add_argument("--runs-dir", default="runs/paper", metavar="DIR", help="for training (default: %(default)s)")
    parser.add_argument(
        "--output-dir", default="docs/results/paper", metavar="DIR", help="for the results (default: %(default)s)"
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="the recipes' own length (default: a short version that two cores can train)",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what is missing and how long it takes, and end")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="SECTION.SETTING=VALUE",
        help="settings that replace those of all runs, as of tprl train; name another --output-dir with it",
    )


def run(arguments: argparse.Namespace) -> int:
    groups = {"all": [name for name in table_names() if of_the_paper(name)]}
    groups["more"] = [name for name in table_names() if name not in groups["all"]]
    names = list(dict.fromkeys(name for word in arguments.tables for name in groups.get(word, [word])))
    tables = [read_table(name) for name in names]
    folder = Path(arguments.runs_dir)
    runs = {table.name: runs_of(table, folder, arguments.full, arguments.set) for table in tables}
    results = Path(arguments.output_dir)
    missing = {table.name: MeasuredRuns(table, results).missing(runs[table.name]) for table in tables}
    for table in tables:
        if table.trajectories is not None:  # it needs the policy itself, to draw what it keeps
            missing[table.name] = runs[table.name]
        say(f"{table.name}: {table.title}. {state(runs[table.name], missing[table.name])}")
    everything = [one for several in missing.values() for one in several]
    say(f"Training that is missing takes about {minutes_left(everything, folder):.0f} minutes on two free cores.")
    if arguments.dry_run:
        return 0
    require("easy_vqa", "matplotlib", "peft", "trl")

    from .stop_signals import Stopped, StopSignals

    try:
        with StopSignals() as signals:
            for table in tables:
                settings = settings_of_all(table, arguments.full)
                command = command_of(table, arguments)
                reproduce(table, runs[table.name], results, signals, command, settings)
    except Stopped as stopped:
        saved = stopped.saved or "no new checkpoint was saved"
        reason = signal.Signals(stopped.signum).name
        print(f"tprl reproduce: stopped by {reason}; {saved}. The same command resumes.", file=sys.stderr)
        return 128 + stopped.signum
    return 0


def state(runs: Sequence[Run], missing: Sequence[Run]) -> str:
    """How much of a table is there already."""
    if not runs:
        return "Nothing to train"
    directories = {path: (path / "training.json").exists() for one in missing for path in one.directories.values()}
    measured = "" if len(missing) == len(runs) else f"{len(runs) - len(missing)} of {len(runs)} runs are measured. "
    if not missing:
        return measured.rstrip()
    return f"{measured}{sum(directories.values())} of {len(directories)} stages are trained"


def command_of(table: Table, arguments: argparse.Namespace) -> str:
    """The command that makes one table again."""
    words = ["tprl", "reproduce", table.name, *(["--full"] if arguments.full else [])]
    return shlex.join([*words, *(["--set", *arguments.set] if arguments.set else [])])


def reproduce(
    table: Table,
    runs: Sequence[Run],
    folder: Path,
    signals: "StopSignals",
    command: str,
    settings: Mapping[str, Any],
) -> None:
    """Trains, measures and writes one table; `settings` are those in which all rows differ from the recipe."""
    measured = MeasuredRuns(table, folder)
    draws = table.trajectories is not None
    for number, one in enumerate(runs if draws else measured.missing(runs), start=1):
        if one.missing():
            say(f"{table.name}: run {number} of {len(runs)}, {one.label}, seed {one.seed}")
            train(one, signals)
        one.link()
        if not draws:
            measured.keep(one)
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"title": table.title, "about": " ".join(table.about.split()), "command": command}
    result |= machine()
    parts = []
    if runs:
        result["recipe"], result["settings"] = table.recipe, dict(settings)
        result["labels"] = slugs(table)
    if runs and draws:
        result["training"] = [{"row": one.label, "seed": one.seed, **training_of(one)} for one in runs]
    elif runs:
        kept = [(one, measured.of(one)) for one in runs]
        shown = (*TRAINED, "versions", "machine")
        result["training"] = [
            {"row": one.label, "seed": one.seed, **{name: found[name] for name in shown}} for one, found in kept
        ]
        result["measured"] = compare(table, kept, measured)
        parts.append(as_table(table, result))
        plot(table, result, folder / f"{table.name}.png")
        parts.append(f"![{table.title}]({table.name}.png)\n")
    if draws:
        parts.append(draw_trajectories(table, runs[0], folder))
    for text in table.commands:
        parts.append(run_command(text.format(out=folder / table.name), folder / table.name))
        if (folder / table.name / "results.png").exists():
            parts.append(f"![{table.title}]({table.name}/results.png)\n")
    write(folder / f"{table.name}.json", json.dumps(result, indent=2) + "\n")
    head = f"# {table.title}\n\n{' '.join(table.about.split())}\n\n```bash\n{command}\n```\n\n"
    write(folder / f"{table.name}.md", head + "\n".join(parts))
    say(f"{table.name}: {folder / table.name}.md")


# ---- training and measuring ----


def train(one: Run, signals: "StopSignals") -> None:
    """The stages of a run that are not finished."""
    from .train import run_stages

    one.link()
    run_stages(one.stages, one.recipe, one.recipe_name, signals, loading={})


def slugs(table: Table) -> dict[str, str]:
    """Labels by names without blanks and signs."""
    return {f"row{number}": label for number, label in enumerate([*table.checkpoints, *table.rows])}


def compare(table: Table, kept: Sequence[tuple[Run, Mapping[str, Any]]], measured: MeasuredRuns) -> dict[str, Any]:
    """The rows of a table, with intervals; on the test questions."""
    import tprl_hf
    from tprl_hf.evaluation.policy_runs import Answers, compared

    from .train import starting_model

    names = {label: slug for slug, label in slugs(table).items()}
    found: Answers = {}
    for label, name in table.checkpoints.items():
        path = str(tprl_hf.embedded_checkpoint()) if name == "embedded" else name
        answered = measured.of_checkpoint(path)["answers"]
        found |= {(names[label], 0, budget): answers for budget, answers in answered.items()}
    for number, (one, of_it) in enumerate(kept):
        found |= {(names[one.label], number, budget): answers for budget, answers in of_it["answers"].items()}
    recipe = kept[0][0].recipe
    rules = measured.of_rules(recipe, lambda: starting_model(kept[0][0].stages[0], recipe, {"dtype": "float32"}))
    result = compared(names.values(), found, rules["answers"], table.keep_ratios, measured.questions)
    return {"seeds": table.test["seeds"], **result}


def draw_trajectories(table: Table, one: Run, folder: Path) -> str:
    """Pictures of test questions, each after every step of the policy, and the Markdown that shows them."""
    import torch
    from transformers import AutoProcessor

    from tprl_hf import TPRLForConditionalGeneration
    from tprl_hf.data import mosaic_vqa
    from tprl_hf.evaluation.answers import chat_inputs
    from tprl_hf.evaluation.trajectory import trajectory_of
    from tprl_hf.modeling.budget import Budget
    from tprl_hf.visualization import draw_figures

    from .demo import pick_shown
    from .recipe_file import as_number
    from .trajectory import figures_of

    settings = as_number(table.trajectories)
    model = TPRLForConditionalGeneration.from_pretrained(one.model, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(one.model)
    samples = list(mosaic_vqa("test", seed=table.test["seeds"][0], num_samples=120))
    figures = []
    for number in pick_shown(samples, int(settings["num_samples"])):
        sample = samples[number]
        budget = Budget(keep_ratio=settings["keep_ratio"])
        steps = trajectory_of(model, processor, sample, budget, int(settings["num_steps"]), max_new_tokens=8)
        plan = model.prune(**chat_inputs(processor, [sample]), keep_mask=steps[-1].keep_mask)
        figures += figures_of(steps, plan, processor, sample)
    draw_figures(figures, scale=1.5).save(folder / f"{table.name}.png")
    return f"![{table.title}]({table.name}.png)\n"


def run_command(text: str, folder: Path) -> str:
    """Runs a `tprl` command; what it printed, as Markdown."""
    from .main import main

    words = shlex.split(text)
    if "--output-dir" in words and (folder / "results.md").exists() and (folder / "results.json").exists():
        return (folder / "results.md").read_text(encoding="utf-8")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main(words)
    if code != 0:
        raise ValueError(f"`tprl {text}` ended with {code}.")
    if (folder / "results.md").exists():
        return (folder / "results.md").read_text(encoding="utf-8")
    return f"`tprl {text}`\n\n```\n{printed.getvalue().rstrip()}\n```\n"


# ---- writing ----


def as_table(table: Table, result: dict[str, Any]) -> str:
    """Points compared with unpruned, by row and budget, with intervals and the spread over seeds; then the rows
    compared with the one that the table is `against`, and how they were trained."""
    from tprl_hf.evaluation.tables import as_markdown

    measured, labels = result["measured"], result["labels"]
    head = ["", *(f"at {ratio}" for ratio in table.keep_ratios)]
    by_place = {(row["way"], row["budget"]): row for row in measured["rows"]}

    def points(of: Mapping[str, float]) -> str:
        value, low, high = (100 * of[end] for end in ("value", "low", "high"))
        return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"

    rows = [head]
    for way in [*labels, *dict.fromkeys(row["way"] for row in measured["rows"] if row["way"] not in labels)]:
        found = [by_place[way, ratio] for ratio in table.keep_ratios]
        spreads = ["" if row["spread"] is None else f", sd {100 * row['spread']:.2f}" for row in found]
        cells = [points(row["difference"]) + spread for row, spread in zip(found, spreads, strict=True)]
        rows.append([labels.get(way, f"rule: {way}"), *cells])
    unpruned, seeds = measured["unpruned"], len(table.seeds)
    text = (
        f"Accuracy in points compared with unpruned ({100 * unpruned['value']:.2f} %), paired 95 % intervals over "
        f"the images of {measured['num_samples']} test questions (seeds {listed(measured['seeds'])})"
    )
    text += (
        f", mean of {seeds} training seeds; sd: standard deviation over them." if seeds > 1 else ", one training seed."
    )
    for label, settings in table.rows.items():
        if "seeds" in settings:
            text += f" *{label}*: of training seed{'s' * (len(settings['seeds']) > 1)} {listed(settings['seeds'])}."
    parts = [as_markdown(rows).rstrip(), text]
    if table.against is not None:
        other = next(slug for slug, label in labels.items() if label == table.against)
        compared = {
            label: [points(by_place[slug, ratio][f"less {other}"]) for ratio in table.keep_ratios]
            for slug, label in labels.items()
            if slug != other
        }
        parts += [as_markdown([head, *([label, *cells] for label, cells in compared.items())]).rstrip()]
        parts += [f"The same in points compared with the row *{table.against}*."]
    changed = ", ".join(f"{name} {json.dumps(value)}" for name, value in result["settings"].items())
    trained = f"Trained by recipes/{result['recipe']}.yaml" + (f", with {changed} in all rows." if changed else ".")
    for label, settings in table.rows.items():
        if "recipe" in settings:
            trained += f" *{label}*: by recipes/{settings['recipe']}.yaml as it is."
    return "\n\n".join([*parts, trained]) + "\n"


def listed(seeds: Sequence[int]) -> str:
    """Seeds as a text."""
    return ", ".join(map(str, seeds))


def curve_of(entries: Sequence[Mapping[str, Any]], count: str) -> list[tuple[float, float]]:
    """Accuracy on validation by `count`. At the last one a run measures its best step again, which is not a point."""
    points: dict[float, float] = {}
    for entry in entries:
        points.setdefault(entry.get(count, 0), entry["eval_accuracy"])
    return list(points.items())


def plot(table: Table, result: dict[str, Any], path: Path) -> None:
    """Curves of training where the table has some, else accuracy by budget."""
    from fractions import Fraction

    from matplotlib.figure import Figure

    from tprl_hf.style import PALETTE

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    labels = result["labels"]
    for number, (slug, label) in enumerate(labels.items()):
        colour = PALETTE[number % len(PALETTE)]
        dash = "-" if number < len(PALETTE) else "--"  # tells apart what shares a colour
        if table.curve:
            for place, one in enumerate(one for one in result["training"] if one["row"] == label):
                points = curve_of(one["curve"], table.curve)
                shown = label if place == 0 else None
                axes.plot(*zip(*points, strict=True), dash, color=colour, label=shown, linewidth=1.3)
        else:
            rows = {row["budget"]: row for row in result["measured"]["rows"] if row["way"] == slug}
            xs = [100 * float(Fraction(ratio)) for ratio in table.keep_ratios]
            ys = [100 * rows[ratio]["accuracy"]["value"] for ratio in table.keep_ratios]
            axes.plot(xs, ys, dash, color=colour, marker="osD^vPX*"[number % 8], label=label)
    if table.curve:
        axes.set_xlabel({"step": "optimizer steps", "llm_passes": "keep masks scored by the LLM"}[table.curve])
        axes.set_ylabel("accuracy on validation, %, mean of the budgets of training")
    else:
        axes.axhline(100 * result["measured"]["unpruned"]["value"], color="0.4", linestyle="--", label="unpruned")
        axes.set_xlabel("visual tokens kept, %")
        axes.set_ylabel("accuracy on test, %")
    axes.set_title(table.title, fontsize=10)
    axes.grid(color="0.92")
    axes.legend(frameon=False)
    figure.savefig(path)
