"""Packed rows: several samples one behind the other in a row, as padding-free training has them.

A base model tells them apart by positions that start again. Pruned, each sample is a row of its own, so that it has
its own question and its own budget, and what comes out goes back to where it was.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .columns import fill_rows
from .outputs_tprl import TPRLOutput


@dataclass
class PackedRows:
    """
    The samples of packed rows.

    Args:
        index (`int64 [S, P]`): place of each sample's columns among the `B * L` of the rows, 0 for padding.
        valid (`bool [S, P]`): False for padding, which comes first.
        shape (`tuple`): B and L.
    """

    index: Tensor
    valid: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, position_ids: Tensor, shape: tuple[int, int]) -> "PackedRows | None":
        """The samples that `position_ids [B, L]` tell apart, by the base model's rule; `None` where a row is one.

        A sample begins wherever a position is not the one before it plus one.
        """
        text = position_ids.cpu().expand(shape)
        begins = torch.ones(shape, dtype=torch.bool, device="cpu")
        begins[:, 1:] = text[:, 1:] != text[:, :-1] + 1
        if not begins[:, 1:].any():
            return None
        sample = begins.flatten().cumsum(0) - 1
        counts = torch.bincount(sample)
        longest = int(counts.max())
        valid = torch.arange(longest, device="cpu") >= longest - counts[:, None]
        return cls(fill_rows(torch.arange(begins.numel(), device="cpu"), valid), valid, shape)

    def unpack(self, values: Tensor, padding: int = 0) -> Tensor:
        """`values [..., B, L]` as samples in rows of their own, `[..., S, P]`."""
        flat = values.flatten(-2)[..., self.index.to(values.device)]
        return flat.masked_fill(~self.valid.to(values.device), padding)

    def pack(self, values: Tensor) -> Tensor:
        """`values [S, P, ...]` back in their rows, `[B, L, ...]`."""
        valid = self.valid.to(values.device)
        places = self.index.to(values.device)[valid]
        packed = values.new_zeros(self.shape[0] * self.shape[1], *values.shape[2:])
        return packed.index_copy(0, places, values[valid]).view(*self.shape, *values.shape[2:])

    def unpack_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """All tensors of the shape `[..., B, L]` unpacked; everything else as it is."""
        return {
            name: self.unpack(value, -100 if name in ("labels", "shift_labels") else 0)
            if torch.is_tensor(value) and value.shape[-2:] == self.shape and name != "pixel_values"
            else value
            for name, value in inputs.items()
        }

    def pack_output(self, output: TPRLOutput, logits_to_keep: int | Tensor) -> TPRLOutput:
        """The output for samples in rows of their own, in the packed rows; of the logits those that are wanted.

        Raises:
            `ValueError`: for attentions, which would be those of one sample each.
        """
        if output.attentions is not None:
            raise ValueError("Packed rows have no attentions: pass the samples in rows of their own.")
        if output.logits is not None:
            logits = self.pack(output.logits)
            if torch.is_tensor(logits_to_keep):
                logits = logits[:, logits_to_keep]
            output.logits = logits[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else logits
        if output.hidden_states is not None:
            output.hidden_states = tuple(self.pack(states) for states in output.hidden_states)
        return output
