"""What a prompt costs with all and with part of its visual tokens, counted from the model's shape by every published
convention."""

import argparse
import json
from pathlib import Path
from typing import Any

from .arguments import OldSpelling, add_model_argument, keep_ratio, positive_int

NAME = "flops"
HELP = "count operations and KV cache of a model, unpruned and pruned"
DEFAULT_MODEL = "llava-1.5-7b"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(
        parser,
        "a preset (see --list), or a model as a directory or a name on the Hub, of which only the config is read "
        f"(default: {DEFAULT_MODEL})",
        DEFAULT_MODEL,
    )
    parser.add_argument("--list", action="store_true", help="list the presets")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--keep-ratios",
        type=fractions,
        default=[1 / 3, 1 / 9],
        metavar="FRACTION,...",
        help="fractions of visual tokens to keep (default: 1/3,1/9)",
    )
    budget.add_argument("--num-keep", type=numbers, metavar="K,...", help="numbers of visual tokens to keep")
    budget.add_argument("--keep", action=OldSpelling, new="--keep-ratios or --num-keep", dest="budgets", type=budgets)
    parser.add_argument(
        "--text-tokens",
        type=positive_int,
        default=133,
        metavar="L",
        help="tokens of the prompt besides the visual ones (default: 133, as in the TPRL paper's Table 4)",
    )
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=1, metavar="N", help="tokens of the answer (default: 1)"
    )
    parser.add_argument(
        "--new-tokens", action=OldSpelling, new="--max-new-tokens", dest="max_new_tokens", type=positive_int
    )
    parser.add_argument(
        "--tiles", type=positive_int, metavar="N", help="tiles of the image (default: the preset's, or 1)"
    )
    parser.add_argument(
        "--image-size",
        type=positive_int,
        default=672,
        metavar="PIXELS",
        help="side of the image, for towers that take any size (default: 672)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def fractions(text: str) -> list[float]:
    """Fractions with commas between them."""
    return [keep_ratio(part.strip()) for part in text.split(",")]


def numbers(text: str) -> list[int]:
    """Numbers of tokens with commas between them."""
    return [positive_int(part.strip()) for part in text.split(",")]


def budgets(text: str) -> list[int | float]:
    """What --keep takes: whole numbers above 1 are tokens, everything else a fraction."""
    parts = [part.strip() for part in text.split(",")]
    return [int(part) if part.isdigit() and int(part) > 1 else keep_ratio(part) for part in parts]


def budgets_of(arguments: argparse.Namespace) -> list[int | float]:
    """Numbers and fractions of visual tokens to keep."""
    return getattr(arguments, "budgets", None) or arguments.num_keep or arguments.keep_ratios


def run(arguments: argparse.Namespace) -> int:
    from tprl_hf.evaluation.presets import PRESETS

    from .tables import format_table

    if arguments.list:
        print(format_table([["preset", "about"], *([name, preset.about] for name, preset in PRESETS.items())]))
        return 0
    found = count(arguments)
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    print(format_table(measured_table(found)))
    print(format_table(convention_table(found)))
    print("\n".join(notes(found)))
    return 0


def count(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything the tables show, as plain values; operations in units of one."""
    from dataclasses import asdict

    from tprl_hf.evaluation.flops import cost_of, flops_by_convention, shape_of
    from tprl_hf.evaluation.presets import PRESETS, preset_shape
    from tprl_hf.loading import config_of

    if arguments.model in PRESETS:
        shape = preset_shape(arguments.model, arguments.tiles, arguments.image_size)
    else:
        try:
            config = config_of(arguments.model)
        except OSError as error:
            if Path(arguments.model).is_dir():
                raise
            raise OSError(
                f"{arguments.model!r} is not a preset ({', '.join(PRESETS)}), and no model could be read: {error}"
            ) from error
        shape = shape_of(config, arguments.tiles or 1, arguments.image_size)
    total = shape.num_visual
    kept = [keep if isinstance(keep, int) else max(1, round(keep * total)) for keep in budgets_of(arguments)]
    for keep in kept:
        if keep > total:
            raise ValueError(
                f"Cannot keep {keep} of {total} visual tokens of {arguments.model}: pass --num-keep of at most that."
            )
    rows = []
    for num_kept in dict.fromkeys([total, *kept]):
        cost = cost_of(shape, num_kept, arguments.text_tokens, arguments.max_new_tokens)
        conventions = flops_by_convention(shape, num_kept, arguments.text_tokens, arguments.max_new_tokens)
        rows.append({"num_kept": num_kept, **asdict(cost), "conventions": conventions})
    command = (
        f"tprl flops {arguments.model} --num-keep {','.join(map(str, kept))} --text-tokens {arguments.text_tokens}"
    )
    command += f" --max-new-tokens {arguments.max_new_tokens} --image-size {arguments.image_size}"
    command += f" --tiles {arguments.tiles}" if arguments.tiles else ""
    return {
        "model": arguments.model,
        "command": command,
        "num_visual": total,
        "text_tokens": arguments.text_tokens,
        "new_tokens": arguments.max_new_tokens,
        "rows": rows,
    }


def measured_table(found: dict[str, Any]) -> list[list[str]]:
    """Header and rows of the parts of the "measured" convention, in 10^9 operations."""
    header = "kept,vision G,pruner G,prefill G,decode G,total G,less,KV MB,visual KV MB,early layers G,less with them"
    table = [header.split(",")]
    base = None
    for row in found["rows"]:
        parts = [row[name] for name in ("vision", "pruner", "prefill", "decode")]
        base = base or sum(parts)
        table.append(
            [
                f"{row['num_kept']} of {found['num_visual']}",
                *(f"{part / 1e9:.4g}" for part in [*parts, sum(parts)]),
                less(sum(parts), base),
                *(f"{row[name] / 1e6:.4g}" for name in ("kv_bytes", "visual_kv_bytes")),
                f"{row['early_layers'] / 1e9:.4g}",
                less(sum(parts) - row["pruner"] + row["early_layers"], base),
            ]
        )
    return table


def convention_table(found: dict[str, Any]) -> list[list[str]]:
    """Header and rows of the total by each convention, in 10^12."""
    names = list(found["rows"][0]["conventions"])
    table = [["kept", *(part for name in names for part in (f"{name} T", "less"))]]
    first = found["rows"][0]["conventions"]
    for row in found["rows"]:
        cells = [f"{row['num_kept']} of {found['num_visual']}"]
        for name in names:
            cells += [f"{row['conventions'][name] / 1e12:.4g}", less(row["conventions"][name], first[name])]
        table.append(cells)
    return table


def less(value: float, base: float) -> str:
    """
    Example:

    ```python
    >>> less(50, 100), less(100, 100)
    ('-50.0 %', '-')
    ```
    """
    return "-" if value == base else f"{100 * (value / base - 1):+.1f} %"


def notes(found: dict[str, Any]) -> list[str]:
    """The lines below the tables."""
    return [
        f"{found['model']}: {found['num_visual']} visual and {found['text_tokens']} other tokens, "
        f"{found['new_tokens']} new; computed from the config, nothing was run.",
        "First table: floating point operations (twice the multiply-accumulates), the whole tower, the TPRL policy "
        "with its encoder, the LLM with one row of logits; KV cache after the prompt, two bytes a value.",
        "early layers: what FastV or SparseVLM costs in the pruner's place, the LLM on all tokens until the attention "
        "of its layer 2; less with them: the total then.",
        "Second table: paper = 2 P (N + L) with P parameters of the LLM; visual-macs = multiply-accumulates 4nd^2 + "
        "2n^2d + 3ndm a layer, visual tokens alone; two-matrix-macs = the same with 2ndm, all tokens; measured = the "
        "total of the first table.",
        f"Command: {found['command']}",
    ]
