"""Options that several commands share, and the checks argparse makes of them. Imports no torch."""

import argparse
import difflib
import os
import sys
from pathlib import Path
from typing import Any

from tprl_hf.loading import check_model_name
from tprl_hf.pruners import DEFAULT_PRUNER, PRUNERS
from tprl_hf.pruners.by_name import split_settings

DEFAULT_KEEP_RATIO = 1 / 3
A_MODEL = "a TPRL checkpoint or any LVLM, as a directory or a name on the Hub (default: the embedded one)"
MAX_SEED, MAX_PORT = 2**32 - 1, 2**16 - 1
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def keep_ratio(text: str) -> float:
    """A fraction in (0, 1]; "1/3" is one too."""
    numerator, slash, denominator = text.partition("/")
    try:
        value = float(numerator) / float(denominator if slash else 1)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction; write it as 0.333 or 1/3") from None
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]: it is the fraction of visual tokens that is KEPT")
    return value


def keep_ratios(text: str) -> list[tuple[str, float]]:
    """Each fraction as the user wrote it, and its value."""
    return [(part.strip(), keep_ratio(part.strip())) for part in text.split(",")]


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def seed(text: str) -> int:
    """A whole number that every random stream can begin with."""
    if not text.isascii() or not text.isdigit() or int(text) > MAX_SEED:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {MAX_SEED}, such as 7")
    return int(text)


def port(text: str) -> int:
    """A port, or 0 for a free one."""
    if not text.isascii() or not text.isdigit() or int(text) > MAX_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: give a whole number from 0 to {MAX_PORT}")
    return int(text)


def check_arguments(arguments: argparse.Namespace) -> None:
    """
    Looks at what a command reads and writes, and at options that exclude each other, before it loads anything.

    Raises:
        `OSError`, `ValueError`: If the model's directory is not there or not a model's, the output's cannot be
            written, a text is empty, or there is a budget for the pruner that keeps everything.
    """
    given = vars(arguments)
    for name, value in given.items():
        texts = value if isinstance(value, list) else [value]
        # an empty one, as of a variable of the shell that is not set, would count as none
        if any(isinstance(one, str) and not one.strip() for one in texts) and name != "question":
            raise ValueError(f"{name.replace('_', '-')} is empty (got {value!r}): give a text, or leave it out.")
    if given.get("pruner") == "none" and "no_prune" in given:
        refuse_budget_of_none(budget_of(arguments))
    if given.get("model") is not None:
        check_model_name(given["model"])
    if given.get("output_dir") is not None:
        check_writable(given["output_dir"])


def refuse_budget_of_none(budget: dict[str, float]) -> None:
    """Raises `ValueError` for a budget of the pruner that keeps everything."""
    for option in budget:
        raise ValueError(f"--pruner none keeps all tokens: leave out --{option.replace('_', '-')}.")


def check_writable(directory: str | Path) -> None:
    """Raises `OSError` for a directory that is not one, or in which this user cannot write; it need not exist."""
    place = Path(directory).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise OSError(f"{directory} cannot be written: {place} is not a directory. Pass another one.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise OSError(f"{directory} cannot be written: this user may not write in {place}. Pass another one.")


def rounds(text: str) -> int:
    """A whole number of at least 2: a single round has no spread."""
    number = positive_int(text)
    if number < 2:
        raise argparse.ArgumentTypeError("at least 2 rounds are needed, for a spread")
    return number


def keep_probability(text: str) -> float:
    """A number between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not between 0 and 1: it is the keep probability above which a token stays, such as 0.5"
        )
    return value


def question(text: str) -> str:
    """A text with words."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the question is empty; write it in quotes")
    return text


def pruner_names(text: str, others: tuple[str, ...] = ()) -> list[str]:
    """Pruners with commas between them, each with or without settings (`fastv:layer=3`), or one of `others`."""
    names, known = [name.strip() for name in text.split(",") if name.strip()], (*method_names(), *others)
    for name in names:
        if name.partition(":")[0] not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
            raise argparse.ArgumentTypeError(f"there is no pruner {name!r}; {hint}")
        try:
            split_settings(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    if not names:
        raise argparse.ArgumentTypeError(f"no pruner is named in {text!r}; choose from {', '.join(known)}")
    return names


class OldSpelling(argparse.Action):
    """A hidden option that sets what `new` sets, and says so on stderr. It goes with the next version."""

    def __init__(self, option_strings, dest, new: str, type=None, default=None):
        super().__init__(option_strings, dest, type=type, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self.new = new

    def __call__(self, parser, namespace, values, option_string=None):
        print(f"{parser.prog}: {option_string} is deprecated: write {self.new}", file=sys.stderr)
        setattr(namespace, self.dest, values)


def add_model_argument(
    parser: argparse.ArgumentParser,
    description: str = A_MODEL,
    default: str | None = None,
) -> None:
    parser.set_defaults(model=default)
    # without a default of its own, which would replace what --model has set
    parser.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help=description)
    parser.add_argument("--model", action=OldSpelling, new="MODEL without --model")


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """How a model is loaded; [`loading_options`] reads them."""
    group = parser.add_argument_group("how the model is loaded (docs/your_model.md)")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="auto is the checkpoint's own (default: half precision where it is faster and the LLM is wide)",
    )
    place = group.add_mutually_exclusive_group()
    place.add_argument("--device", metavar="DEVICE", help="such as cuda:1 or cpu (default: the accelerator, or cpu)")
    place.add_argument(
        "--device-map",
        choices=DEVICE_MAPS,
        help="spread the model over all cards, and over the CPU where it is larger",
    )
    group.add_argument(
        "--attn-implementation", metavar="NAME", help="sdpa, eager, flash_attention_2, ... (default: transformers')"
    )
    group.add_argument("--load-in-4bit", action="store_true", help="4 bits a weight of the base model (bitsandbytes)")


def loading_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of [`add_loading_arguments`] as keyword arguments of [`~tprl_hf.loading.load_model`]."""
    names = ("device", "dtype", "device_map", "attn_implementation", "load_in_4bit")
    return {name: getattr(arguments, name) for name in names}


def loading_words(arguments: argparse.Namespace) -> str:
    """The options of [`add_loading_arguments`] that were given, as they are written in a command."""
    words = ""
    for name, value in loading_options(arguments).items():
        if value:
            words += f" --{name.replace('_', '-')}{'' if value is True else f' {value}'}"
    return words


def add_budget_arguments(parser: argparse.ArgumentParser) -> None:
    """At most one of the budgets of `generate`."""
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--keep-ratio",
        type=keep_ratio,
        metavar="FRACTION",
        help="fraction of visual tokens to keep, in (0, 1] (default: the checkpoint's own budget, else 1/3)",
    )
    budget.add_argument("--num-keep", type=positive_int, metavar="K", help="number of visual tokens to keep")
    budget.add_argument(
        "--threshold",
        type=keep_probability,
        metavar="P",
        help="keep the tokens whose score is larger; of the policy that is the keep probability",
    )
    budget.add_argument("--no-prune", action="store_true", help="keep all visual tokens")


def add_pruner_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pruner",
        choices=method_names(),
        help=f"default: the checkpoint's own: learned if its policy is trained; without one, {DEFAULT_PRUNER}",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the random pruner (default: 0)")


def method_names() -> tuple[str, ...]:
    """What `--pruner` takes."""
    return (*PRUNERS, "learned")


def budget_of(arguments: argparse.Namespace) -> dict[str, float]:
    """The budget the user named, as keyword arguments of a pruner or of `generate`; empty if none was."""
    named = {name: getattr(arguments, name) for name in ("keep_ratio", "num_keep", "threshold")}
    return {name: value for name, value in named.items() if value is not None}
