"""One page of a training run, or of two over each other."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tprl_hf.style import PALETTE, html_page

from .charts import CHART_CSS, DASHES, Series, box_chart, cell, line_chart, table
from .runs import StageRun, TrainingRun, distinct_names, duration, flattened
from .shown import HATCH_SVG, SHOWN_CSS, ShownPictures

# Title, unit, and which metrics: names, or beginnings of names before "*". What none of these takes has a chart of its
# own, so that metrics of other algorithms are there too.
CHARTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Accuracy on validation", "% of answers", ("eval_accuracy*",)),
    ("Log-probability of the reference answer, on validation", "nats a token", ("eval_logprob*",)),
    ("Agreement with the unpruned model, on validation", "% of answers", ("eval_agreement", "eval_agreement@*")),
    ("Log-probability of the unpruned answer, on validation", "nats a token", ("eval_agreement_logprob*",)),
    ("Divergence from the unpruned model, on validation", "nats a token", ("eval_kl*",)),
    ("Reward on validation", "reward", ("eval_reward*",)),
    ("Reward and its parts", "reward", ("objective/reward*", "objective/score*", "rewards/*")),
    ("Accuracy of rollouts", "share of answers", ("objective/accuracy",)),
    ("Agreement of rollouts with the unpruned model", "share of answers", ("objective/agreement",)),
    ("Keep ratio", "share of visual tokens kept", ("objective/keep_ratio", "policy/keep_prob")),
    ("Entropy", "nats a bit", ("policy/entropy*",)),
    ("Approximate KL divergence", "nats", ("policy/approxkl*", "objective/kl")),
    ("Clip fraction", "share of ratios", ("policy/clipfrac*", "val/clipfrac*")),
    ("Explained variance", "share of variance", ("val/explained_variance", "eval_explained_variance")),
    ("Mean squared error on validation", "squared units of tokens", ("eval_mse",)),
    ("Loss", "loss", ("loss", "loss/*")),
    ("Probability ratio", "ratio; 1 right after a rollout", ("val/ratio*",)),
    ("Agreement with the teacher", "share of bits", ("policy/agreement",)),
    ("Share that updates use", "share of rollouts", ("objective/is_trained_on", "objective/is_scored")),
    ("Gradient norm", "norm", ("grad_norm",)),
    ("Learning rate", "rate", ("learning_rate",)),
)
NOT_CURVES = {"step", "epoch", "time", "total_flos", "train_loss", "llm_passes"}
ENDS = ("_runtime", "_per_second")
MOST_MOMENTS = 6  # at which the masks of a picture are shown


def training_page(runs: Sequence[TrainingRun], command: str, refresh: int | None = None) -> str:
    """
    The page.

    Args:
        runs (`Sequence[TrainingRun]`): One, or two, whose stages of one name are drawn over each other.
        command (`str`): That which makes the page.
        refresh (`int`, *optional*): The browser loads it again after so many seconds.
    """
    names = distinct_names([run.folder for run in runs])
    pictures = ShownPictures()
    title = f"Training run{'s' * (len(runs) > 1)} {' and '.join(names)}"
    notes = [f"Command: {command}"]
    if len(runs) > 1:
        notes.insert(0, f"Whole lines are {names[0]}, dashed ones {names[1]}.")
    if refresh:
        notes.insert(0, f"Written again, and loaded again, every {refresh} seconds.")
    body = [HATCH_SVG, f"<section><h2>Stages</h2>{overview(runs, names)}</section>"]
    for name in dict.fromkeys(stage.name for run in runs for stage in run.stages):
        stages = {own: stage for run, own in zip(runs, names, strict=True) if (stage := run.stage(name)) is not None}
        body.append(f"<section><h2>{html.escape(name)}</h2>{stage_html(stages, names, pictures)}</section>")
    return html_page(title, notes, "\n".join(body), CHART_CSS + SHOWN_CSS + pictures.css, refresh)


def overview(runs: Sequence[TrainingRun], names: Sequence[str]) -> str:
    """What state each stage is in, what came out, what it took."""
    several = len(runs) > 1
    header = [*(["run"] if several else []), "stage", "state", "result", "time", "disk", "of it checkpoints"]
    rows = []
    for run, name in zip(runs, names, strict=True):
        for stage in run.stages:
            took = "-" if stage.seconds is None else duration(stage.seconds)
            restarts = f", {len(stage.starts)} starts" if len(stage.starts) > 1 else ""
            cells = [stage.name, stage.state(), result_of(stage), took + restarts, size(sum(stage.num_bytes.values()))]
            rows.append(
                [*([cell(name)] if several else []), *map(cell, cells), cell(size(stage.num_bytes["checkpoints"]))]
            )
        total = sum(stage.seconds or 0 for stage in run.stages)
        room = sum(sum(stage.num_bytes.values()) for stage in run.stages)
        if len(run.stages) > 1:
            rows.append(
                [*([cell(name)] if several else []), *map(cell, ["all", "", "", duration(total), size(room), ""])]
            )
    return table(header, rows)


def result_of(stage: StageRun) -> str:
    """What was measured last, in a few words."""
    found = dict(stage.metrics)
    for row in stage.history:
        found |= {name.removeprefix("eval_"): value for name, value in row.items() if name.startswith("eval_")}
    words = {
        "accuracy": "accuracy {:.1f} %",
        "logprob": "log-probability {:.3f} nats",
        "agreement": "agreement {:.1f} %",
        "kl": "divergence {:.4f} nats",
        "reward": "reward {:.3f}",
        "explained_variance": "explained variance {:.3f}",
    }
    said = [text.format(found[name]) for name, text in words.items() if name in found]
    said += [f"{name.replace('_', ' ')} {value}" for name, value in stage.facts.items()]
    return ", ".join(said) or "-"


def size(num_bytes: float) -> str:
    """
    Example:

    ```python
    >>> size(512), size(2_500_000)
    ('512 B', '2.5 MB')
    ```
    """
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= least:
            return f"{num_bytes / least:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def stage_html(stages: Mapping[str, StageRun], names: Sequence[str], pictures: ShownPictures) -> str:
    """Charts, masks and settings of one stage, of each run that has it."""
    charts = "".join(charts_of(stages, names))
    parts = [f'<div class="charts">{charts}</div>' if charts else ""]
    for name, stage in stages.items():
        title = f" of {name}" if len(names) > 1 else ""
        if stage.samples and stage.masks:
            parts.append(masks_html(stage, pictures, title))
    parts.append(settings_html(stages, len(names) > 1))
    return "\n".join(part for part in parts if part)


def charts_of(stages: Mapping[str, StageRun], names: Sequence[str]) -> list[str]:
    """All charts of a stage, known metrics first."""
    metrics = dict.fromkeys(
        name
        for stage in stages.values()
        for row in stage.history
        for name, value in row.items()
        if isinstance(value, int | float) and name not in NOT_CURVES and not name.endswith(ENDS)
    )
    drawn, taken = [], set()
    for title, unit, patterns in CHARTS:
        own = [name for name in metrics if any(fits(name, pattern) for pattern in patterns)]
        taken.update(own)
        drawn.append(chart_of(title, unit, own, stages, names))
        if title == "Keep ratio":
            drawn += kept_by_type(stages, names)
    drawn += [chart_of(name, "as logged", [name], stages, names) for name in metrics if name not in taken]
    return [chart for chart in drawn if chart]


def fits(name: str, pattern: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def chart_of(
    title: str, unit: str, metrics: Sequence[str], stages: Mapping[str, StageRun], names: Sequence[str]
) -> str:
    """The metrics of one chart; those of validation against passes of the LLM where all runs count them."""
    validates = bool(metrics) and all(metric.startswith("eval_") for metric in metrics)
    logged = [stage.history for stage in stages.values() if stage.history]
    are_counted = all(any(row.get("llm_passes") for row in rows) for rows in logged)
    x_name = "llm_passes" if validates and are_counted else "step"
    series = []
    for number, metric in enumerate(metrics):
        for run, stage in stages.items():
            points: dict[float, float] = {}
            for row in stage.history:
                if x_name in row and isinstance(
                    row.get(metric), int | float
                ):  # measured again at the end, it is of the weights that were best
                    points.setdefault(row[x_name], row[metric])
            label, dash = readable(metric, metrics), DASHES[names.index(run)]
            name = f"{label}, {run}" if len(names) > 1 else label
            series.append(Series(name, sorted(points.items()), number % len(PALETTE), number, dash, label=label))
    x_label = {"step": "optimizer step", "llm_passes": "keep masks that the LLM has scored"}[x_name]
    return line_chart(title, series, x_label, unit)


def readable(metric: str, others: Sequence[str]) -> str:
    """
    A metric's name in the legend of a chart of it and `others`.

    Example:

    ```python
    >>> both = ["eval_accuracy", "eval_accuracy@0.333"]
    >>> [readable(name, both) for name in both], readable("policy/entropy_avg", [])
    (['accuracy, mean of budgets', 'accuracy, 0.333 kept'], 'policy/entropy_avg')
    ```
    """
    if not metric.startswith("eval_"):
        return metric
    name, _, ratio = metric.removeprefix("eval_").partition("@")
    if ratio:
        return f"{name}, {ratio} kept"
    return f"{name}, mean of budgets" if any(other.startswith(f"{metric}@") for other in others) else name


def kept_by_type(stages: Mapping[str, StageRun], names: Sequence[str]) -> list[str]:
    """How a shared budget is divided among the question types, when it was measured last."""
    drawn = []
    for run, stage in stages.items():
        if not stage.masks or not stage.masks[-1].get("kept_by_type"):
            continue
        last = stage.masks[-1]
        for ratio, by_type in zip(last["keep_ratios"], last["kept_by_type"], strict=True):
            if not by_type:  # nothing was kept
                continue
            title = f"Tokens kept by question type, {ratio:.3g} on average"
            title += f", {run}" if len(names) > 1 else ""
            high = max(box[-1] for box in by_type.values())
            label = f"visual tokens kept at step {last['step']}, if all questions share the budget"
            drawn.append(box_chart(title, by_type, label, max(high, 1)))
    return drawn


def masks_html(stage: StageRun, pictures: ShownPictures, title: str) -> str:
    """The watched pictures over time, a block for each budget; the smallest, which says most, is open."""
    moments = spread_out(stage.masks, MOST_MOMENTS)
    ratios = stage.masks[-1]["keep_ratios"]
    parts = [f"<h3>The same pictures over time{html.escape(title)}</h3>"]
    for place, ratio in enumerate(ratios):
        blocks = []
        for number, sample in enumerate(stage.samples):
            panels = []
            for moment in moments:
                bits = moment["masks"][number][place]
                panels.append(pictures.panel(sample, bits, f"step {moment['step']}", f"{bits.count('1')} kept"))
            reference = f"<span>({html.escape(sample.reference or '-')})</span>"
            asked = f'<p class="question">{html.escape(sample.question)} {reference}</p>'
            blocks.append(f'{asked}<div class="shown">{"".join(panels)}</div>')
        is_open = " open" if ratio == min(ratios) else ""
        parts.append(f"<details{is_open}><summary>{ratio:.3g} of the tokens kept</summary>{''.join(blocks)}</details>")
    return "\n".join(parts)


def spread_out(items: Sequence[Any], most: int) -> list[Any]:
    """
    The first, the last, and some between them.

    Example:

    ```python
    >>> spread_out(range(11), 3), spread_out("ab", 3)
    ([0, 5, 10], ['a', 'b'])
    ```
    """
    if len(items) <= most:
        return list(items)
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]


def settings_html(stages: Mapping[str, StageRun], several: bool) -> str:
    """What each run was told, and with what it ran; of two runs, first what differs."""
    flat = {name: flattened(without_places(stage.settings)) for name, stage in stages.items()}
    keys = sorted({key for settings in flat.values() for key in settings})
    parts = []
    if len(stages) > 1:
        other = [key for key in keys if len({settings.get(key) for settings in flat.values()}) > 1]
        rows = [[cell(key), *(cell(settings.get(key, "-"), "words") for settings in flat.values())] for key in other]
        parts.append("<h3>Settings that differ</h3>" + (table(["setting", *flat], rows) if rows else "<p>None.</p>"))
    if keys:
        rows = [[cell(key), *(cell(settings.get(key, "-"), "words") for settings in flat.values())] for key in keys]
        header = ["setting", *(flat if several else ["value"])]
        parts.append(f"<details><summary>All settings</summary>{table(header, rows)}</details>")
    starts = [[cell(name)] * several + start_cells(start) for name, stage in stages.items() for start in stage.starts]
    if starts:
        header = [*(["run"] if several else []), "started", "at step", "on", "versions"]
        parts.append(f"<details><summary>Starts, machine and versions</summary>{table(header, starts)}</details>")
    return "".join(parts)


def start_cells(start: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in start.get("versions", {}).items())
    return [cell(str(start.get(name, "-")), "words") for name in ("when", "step", "device")] + [
        cell(versions, "words")
    ]


def without_places(value: Any) -> Any:
    """Settings without paths of this machine: of a path the last part."""
    if isinstance(value, str):
        return Path(value).name if Path(value).is_absolute() else value
    if isinstance(value, Mapping):
        return {name: without_places(one) for name, one in value.items()}
    return [without_places(one) for one in value] if isinstance(value, list) else value
