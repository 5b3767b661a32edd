"""Stage 1: small codes of visual tokens, for the policy to look at (eq. 1 of the TPRL paper)."""

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration

from .answer_batches import AnswerBatch
from .autoencoder_config import AutoencoderConfig
from .pruner_trainer import PrunerTrainer, TrainedNetworks


class AutoencoderNetworks(TrainedNetworks):
    """The autoencoder's loss of each sample."""

    def forward(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """Mean squared error of each sample, float32 `[B]`, over tokens `[B, N, D]` where `valid [B, N]` is True."""
        error = self.autoencoder.decode(self.autoencoder.encode(tokens)) - tokens.float()
        error = error.square().mean(-1).masked_fill(~valid, 0.0)  # (B, N)
        return error.sum(1) / valid.sum(1).clamp(min=1)


class AutoencoderTrainer(PrunerTrainer):
    """
    Trains the token autoencoder of a model on the visual tokens that its LLM would see.

    Args: see [`PrunerTrainer`]; `args` is an [`AutoencoderConfig`]. Only `images` and `prompt` of the datasets matter.

    Example:

    ```python
    >>> config = AutoencoderConfig("autoencoder")
    >>> trainer = AutoencoderTrainer(model, config, train_dataset=train, eval_dataset=validation)
    >>> trainer.train()
    >>> trainer.save_model()
    ```
    """

    _name = "TPRL autoencoder"
    _stage = "autoencoder"
    args: AutoencoderConfig

    def networks(self, model: TPRLForConditionalGeneration, args: Any) -> TrainedNetworks:
        model.autoencoder.requires_grad_(True)
        model.policy.requires_grad_(False)
        return AutoencoderNetworks(model)

    def loss(self, networks: nn.Module, batch: AnswerBatch) -> Tensor:
        return networks(batch.inputs.tokens, batch.inputs.valid).mean()

    def measure(self, dataset: Dataset) -> dict[str, float]:
        r"""
        Returns:
            `dict`: `mse` per element, and `explained_variance`: 1 minus the squared error over the variance of the
            dataset's tokens around their mean.
        """
        dim = self.tprl_model.config.token_dim
        # on the CPU, since not every accelerator has float64
        count, total, squares, errors = (torch.zeros(n, dtype=torch.float64) for n in (1, dim, dim, dim))
        mine = range(self.args.process_index, len(dataset), self.args.world_size)
        batch_size = self.args.per_device_eval_batch_size
        for start in range(0, len(mine), batch_size):
            inputs = self.encoder([dataset[i] for i in mine[start : start + batch_size]]).inputs
            tokens = inputs.tokens[inputs.valid].float()  # (V, D)
            decoded = self.model.autoencoder.decode(self.model.autoencoder.encode(tokens))
            tokens, missed = tokens.cpu().double(), (decoded - tokens).cpu().double()
            count += len(tokens)
            total += tokens.sum(0)
            squares += tokens.square().sum(0)
            errors += missed.square().sum(0)
        if self.args.world_size > 1:  # where processes meet
            sums = (count, total, squares, errors)
            count, total, squares, errors = (self.accelerator.reduce(x.to(self.args.device), "sum") for x in sums)
        if not count:
            raise ValueError("No row of eval_dataset has a picture, so that there are no visual tokens to code.")
        variance = (squares - total.square() / count).sum()
        return {
            "mse": (errors.sum() / (count * dim)).item(),
            "explained_variance": (1 - errors.sum() / variance).item(),
        }
