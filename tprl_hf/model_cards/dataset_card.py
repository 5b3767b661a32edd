"""The card of a dataset of demonstrations; its numbers are counted from the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from .render import render_card


def dataset_card(
    repo_id: str,
    keep_masks: Iterable[Sequence[Sequence[bool]]],
    columns: Sequence[str],
    teacher: str = "not recorded",
    base_model: str | None = None,
    source: str | None = None,
) -> str:
    """
    The text of a card, without header.

    Args:
        repo_id (`str`): Where the dataset is published.
        keep_masks (`Iterable`): The column of that name.
        columns (`Sequence[str]`): Names of all columns.
        teacher, base_model, source (`str`, *optional*): Who demonstrated, for which model, on what.

    Returns:
        `str`: Markdown. All that comes from outside is escaped.
    """
    num_visual: list[int] = []
    counts: Counter[tuple[float, ...]] = Counter()
    for steps in keep_masks:
        tokens = len(steps[0])
        num_visual.append(tokens)
        if tokens:  # to half percents, so that rounding to whole tokens makes no schedules of its own
            counts[tuple(round(200 * sum(step) / tokens) / 200 for step in steps)] += 1
    common = counts.most_common(8)
    return render_card(
        "demonstrations",
        repo_id=repo_id,
        title=repo_id.split("/")[-1],
        num_rows=len(num_visual),
        mean_visual=sum(num_visual) / max(len(num_visual), 1),
        schedules=[{"keep_ratios": ratios, "count": count} for ratios, count in common],
        columns=list(columns),
        teacher=teacher,
        base_model=base_model,
        source=source,
    )
