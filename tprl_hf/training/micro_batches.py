"""Batches by memory instead of by count: a sample of a high-resolution model has many times the tokens of another."""

from collections.abc import Sequence

# 64 prompts of LLaVA-1.5 at once; 13 of LLaVA-NeXT with its 2,880 visual tokens.
MAX_TOKENS = 40_960
# What a CPU reads at once: 24 instead of 64 prompts of the embedded model take a fifth less time.
MAX_TOKENS_ON_CPU = 2_560


def within_memory(lengths: Sequence[int], max_tokens: int, max_count: int | None = None) -> list[list[int]]:
    """
    Cuts samples, in their order, into parts that fit into memory together.

    Args:
        lengths (`list[int]`): tokens of each sample; all samples of a part are padded to its longest.
        max_tokens (`int`): tokens of a part, padding included. A longer sample is a part by itself.
        max_count (`int`, *optional*): samples of a part.

    Returns:
        `list[list[int]]`: the numbers of the samples of each part.

    Example:

    ```python
    >>> within_memory([10, 10, 30, 10], max_tokens=60)
    [[0, 1], [2, 3]]
    ```
    """
    parts: list[list[int]] = []
    longest = 0
    for number, length in enumerate(lengths):
        longest = max(longest, length)
        is_full = not parts or (len(parts[-1]) + 1) * longest > max_tokens or len(parts[-1]) == max_count
        if is_full:
            parts.append([])
            longest = length
        parts[-1].append(number)
    return parts
