"""Original positions of kept tokens: what travels with their rows, and the positions of the full prompt.

vLLM knows the positions of a prompt before its images are encoded, so it cannot know which tokens are kept. It is told
the position of each image's first token for all its tokens. The rest, a token's *place* in its image, travels in
columns behind the token's row, and is added just before the LLM.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Two digits to this base are exact in any floating-point type, also in bfloat16.
BASE = 128


def place_columns(places: Tensor, dtype: torch.dtype) -> Tensor:
    """`places [A, K]`, below 16384, on A axes, as columns `[K, 2 A]`."""
    return torch.cat([places // BASE, places % BASE]).T.to(dtype)


def read_places(columns: Tensor) -> Tensor:
    """The places `int64 [A, K]` in `columns [K, 2 A]`."""
    high, low = columns.T.round().long().chunk(2)
    return high * BASE + low


def full_prompt(
    pruned: Sequence[int], images: Sequence[tuple[int, int, int]], image_token_id: int
) -> tuple[list[int], list[int], Tensor]:
    """
    The prompt as it was before pruning.

    Args:
        pruned: token ids.
        images: (first column, tokens kept, tokens in all) of each image, in the order of the prompt.

    Returns:
        The ids of the full prompt, the first column of each image in it, and the column `int64 [L]` in it of each
        token of `pruned`: for all tokens of an image, that of its first.
    """
    full: list[int] = []
    starts: list[int] = []
    columns: list[int] = []
    done = 0
    for offset, kept, total in images:
        columns += range(len(full), len(full) + offset - done)
        full += pruned[done:offset]
        starts.append(len(full))
        columns += [len(full)] * kept
        full += [image_token_id] * total
        done = offset + kept
    columns += range(len(full), len(full) + len(pruned) - done)
    full += pruned[done:]
    return full, starts, torch.tensor(columns)
