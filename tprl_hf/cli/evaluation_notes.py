"""The lines below the tables of `tprl evaluate`: what each column and each row is."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tprl_hf.evaluation.tables import Row

# Rows that are no pruners: they change the picture before the tower sees it.
RESIZE, ENLARGED = "resize", "enlarged"
# The picture that `resize+NAME` prunes from has this fraction of the visual tokens.
HALF_SIZE = 1 / 2
OWN_ANSWERS = "the unpruned model's own answers are the references"  # model_cards recognises these words
# Behind the names of rows whose scores were trained with boxes.
MARK = "*"


def notes_of(rows: Sequence["Row"], described: dict[str, Any]) -> list[str]:
    """The lines below every table."""
    more = []
    if any(len(row.by_pruner_seed) > 1 for row in rows):
        first = described["seed"][0] if isinstance(described["seed"], list) else described["seed"]
        last = first + described["random_seeds"] - 1
        more.append(
            f"random: mean over its seeds {first} to {last}; sd, pruner seeds: standard deviation of the accuracy "
            "over them, in percentage points."
        )
    if isinstance(described["seed"], list):
        more.append("sd, data seeds: the same over the seeds of the data, each with as many questions.")
    if any(row.counted for row in rows):
        more.append(
            "tower M, pruner M, prefill M: 10^6 operations (twice the multiply-accumulates of matrix products, "
            "counted by torch on one question) of vision tower and projector, of choosing the tokens, and of the LLM "
            "up to its first new token."
        )
    if any(row.milliseconds for row in rows):
        more.append(
            f"ms: from pixels to the first new token (tower, pruner, LLM) of one question, median and middle half of "
            f"{described['time_rounds']} rounds in turns; processor time on a CPU. The picture was read before."
        )
    if any(row.pruner.startswith(RESIZE) for row in rows):
        more.append(
            "resize: the picture is shrunk until the processor makes the wanted number of tokens of it, or the "
            "nearest that is possible; resize+NAME: NAME prunes from a picture of half the tokens. A model that was "
            "trained on one size of picture is worse at others: that is not the fault of the lost detail alone."
        )
    if any(row.pruner == ENLARGED for row in rows):
        more.append("enlarged: the picture is shrunk and enlarged again, and no token is lost: what detail is left.")
    if any(row.group_a for row in rows):
        more.append(
            "group A: accuracy on the questions that are correct at full size and wrong under resize at the same "
            "budget; in parentheses how many. By this choice unpruned has 100 there and resize 0."
        )
    if any(row.confidence for row in rows):
        more.append(
            "ECE (10 bins of equal width), Brier: of the probability of the answer against its score. entropy: of the "
            "first token, in nats, mean over correct and wrong answers. false yes: share of existence questions with "
            "the answer no that were answered yes; in parentheses how many."
        )
    if any(row.pruner.endswith(MARK) for row in rows):
        more.append(
            "*: reads attention that was trained with boxes of the objects while this model was made. Such a row has "
            "an unfair advantage here; do not compare it with other rows."
        )
    versions = ", ".join(f"{name} {version}" for name, version in described["versions"].items())
    asked = f"{described['num_samples']} questions of {described['data']}"
    asked += f", split {described['split']}" if described["split"] else ""
    return [
        f"{asked}, {seeds_of(described)}. "
        f"Accuracy: {described['score']}; in brackets 95 % bootstrap intervals over images (2000 resamples).",
        "vs. unpruned (pp): mean of the paired differences to the unpruned model on the same questions, in percentage "
        "points.",
        *more,
        f"Device: {described['device']}; {versions}; weights {described['weights']}.",
        f"Command: {described['command']}",
    ]


def seeds_of(described: Mapping[str, Any]) -> str:
    """The seed of the questions, or the seeds."""
    several = isinstance(described["seed"], list)
    return f"seeds {', '.join(map(str, described['seed']))}" if several else f"seed {described['seed']}"
