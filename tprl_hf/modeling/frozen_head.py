"""The base model's head where its weights are frozen: torch would copy them once for each prompt of a batch."""

from typing import Any

from torch import Tensor, nn


def contiguous_input(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Before the head: its input in one piece.

    `hidden_states[:, -n:]` is a slice. Where no gradient is wanted, `torch.matmul` expands a frozen weight to one
    matrix for each row of a batch before it multiplies such a slice, and on a CPU writes it out.
    """
    if args and isinstance(args[0], Tensor) and not args[0].is_contiguous():
        return (args[0].contiguous(), *args[1:])
    return None


def watch_head(lvlm: nn.Module) -> None:
    """Has the head of `lvlm` called with [`contiguous_input`], once however often it is wrapped."""
    head = lvlm.get_output_embeddings()  # type: ignore[operator]
    if head is None and hasattr(lvlm, "language_model"):  # Nemotron's LLM has it
        head = lvlm.language_model.get_output_embeddings()  # type: ignore[operator, union-attr]
    if head is not None and contiguous_input not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(contiguous_input)
