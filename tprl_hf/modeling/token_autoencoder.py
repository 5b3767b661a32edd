"""Token-wise autoencoder that gives the policy small codes of the visual tokens (eq. 1 of the TPRL paper)."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .policy_linear import PolicyLinear


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Inside it, a `torch.autocast` that a caller opened does not make numbers coarser."""
    kind = device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_on else nullcontext()


def in_own_precision(function: Callable) -> Callable:
    """A function, or method, of tensors that computes as outside of any `torch.autocast`."""

    @functools.wraps(function)
    def computed(*args: Any, **kwargs: Any) -> Any:
        tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with without_autocast(tensor.device):
            return function(*args, **kwargs)

    return computed


class Float32Module(nn.Module):
    """A module that stays in float32 when the model around it is cast.

    A policy in bfloat16 changes which tokens are the top ones, so `model.to(torch.bfloat16)` and `model.half()` move
    its device and leave its precision. For the same reason `torch.autocast` does not reach its methods.
    """

    def _apply(self, fn, recurse=True):
        def keep_precision(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if tensor.is_floating_point() and applied.dtype != tensor.dtype:
                return tensor.to(device=applied.device)
            return applied

        return super()._apply(keep_precision, recurse)


class TokenAutoencoder(Float32Module):
    """Two-layer MLP encoder and its mirrored decoder, with LayerNorm and GELU between the layers.

    The paper gives 1024 -> 256 -> 64 (section 4.1) and 4096 -> 256 (section 4.3): both compress 16 times, and the
    first also tells the middle width, a quarter. The codes feed only the policy; the LLM never sees them.

    Args:
        token_dim (`int`): width D of the visual tokens, as the LLM would see them.
        hidden_dim (`int`): width between the two layers.
        latent_dim (`int`): width Z of the codes.
    """

    def __init__(self, token_dim: int, hidden_dim: int, latent_dim: int):
        super().__init__()
        self.encoder = nn.Sequential(
            PolicyLinear(token_dim, hidden_dim),
            nn.LayerNorm(hidden_dim),
            nn.GELU(),
            PolicyLinear(hidden_dim, latent_dim),
        )
        self.decoder = nn.Sequential(
            PolicyLinear(latent_dim, hidden_dim),
            nn.LayerNorm(hidden_dim),
            nn.GELU(),
            PolicyLinear(hidden_dim, token_dim),
        )

    @in_own_precision
    def encode(self, tokens: Tensor) -> Tensor:
        """Tokens `[B, N, D]` of any float dtype to codes, float32 `[B, N, Z]`."""
        return self.encoder(tokens.float())

    @in_own_precision
    def decode(self, codes: Tensor) -> Tensor:
        """Codes `[B, N, Z]` to tokens, float32 `[B, N, D]`."""
        return self.decoder(codes)

    @in_own_precision
    def forward(self, tokens: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Codes `[B, N, Z]` and the reconstruction loss of eq. 1: the mean over tokens of the squared error.

        Args:
            tokens (`[B, N, D]`): visual tokens.
            valid (`bool [B, N]`, *optional*): False for padding, which the loss leaves out.
        """
        tokens = tokens.float()
        codes = self.encode(tokens)
        error = F.mse_loss(self.decode(codes), tokens, reduction="none").mean(-1)  # (B, N)
        loss = error.mean() if valid is None else error[valid].mean()
        return codes, loss
