"""Original positions of kept tokens: what travels with their rows, and the positions of the full prompt.

vLLM knows the positions of a prompt before its images are encoded, so it cannot know which tokens are kept. It is told
the position of each image's first token for all its tokens. The rest, a token's *place* in its image, travels in
columns behind the token's row, and is added just before the LLM.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Behind rows that were encoded and pruned elsewhere: a token's place, and how many tokens its image had.
EMBEDDED_COLUMNS = 4
# Two digits to this base are exact in any floating-point type, also in bfloat16.
BASE = 128


def place_columns(places: Tensor, dtype: torch.dtype) -> Tensor:
    """`places [A, K]`, below 16384, on A axes, as columns `[K, 2 A]`."""
    return torch.cat([places // BASE, places % BASE]).T.to(dtype)


def read_places(columns: Tensor) -> Tensor:
    """The places `int64 [A, K]` in `columns [K, 2 A]`."""
    high, low = columns.T.round().long().chunk(2)
    return high * BASE + low


def embedded_rows(rows: Tensor, keep_mask: Tensor, position_ids: str = "original") -> Tensor:
    """
    An image that was encoded and pruned outside the engine, as the engine takes it. Each may have its own number of
    tokens, so that adaptive budgets are possible.

    Args:
        rows (`[N, D]`): all tokens of the image.
        keep_mask (`bool [N]`): which are kept.
        position_ids (`str`): as the checkpoint's config says.

    Returns:
        `[K, D + 4]`, or `[K, D]` with contiguous positions. Pass it as `multi_modal_data={"image": [rows]}` to an
        engine with `enable_mm_embeds`.
    """
    kept = rows[keep_mask]
    if position_ids == "contiguous":
        return kept
    places = keep_mask.nonzero().T
    total = torch.full_like(places, len(rows))
    return torch.cat([kept, place_columns(places, kept.dtype), place_columns(total, kept.dtype)], dim=1)


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
