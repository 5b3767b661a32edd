"""What the commands print: aligned tables, and the device below timings. Imports no torch."""

from collections.abc import Sequence


def describe_device(model) -> str:
    """Device, dtype and threads, for a line below timings."""
    import torch

    dtype = str(model.dtype).removeprefix("torch.")
    if model.device.type == "cuda":
        return f"{torch.cuda.get_device_name(model.device)}, {dtype}"
    return f"{model.device.type}, {dtype}, {torch.get_num_threads()} threads"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of texts as aligned columns under a ruled header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:], ""])
