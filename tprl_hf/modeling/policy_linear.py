"""The linear layer of policy and autoencoder."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PolicyLinear(nn.Module):
    """
    A linear layer that is not an `nn.Linear`, so that what looks for all linear layers of an LVLM leaves it alone:
    PEFT with `target_modules="all-linear"`, and quantisation. It starts as an `nn.Linear` does.

    Args:
        in_features, out_features (`int`): widths.
        bias (`bool`, defaults to `True`): whether it has one.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(in_features) if in_features > 0 else 0
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
