"""Stage 3: the policy learns to keep what a teacher kept (eq. 8 of the TPRL paper)."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn

from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
from tprl_hf.modeling.token_pruner import PruningInputs

from .answer_batches import AnswerBatch
from .lfd_config import LfDConfig
from .policy_trainer import PolicyTrainer
from .pruner_trainer import TrainedNetworks


def demonstrated_steps(keep_masks: list[list[list[bool]]], inputs: PruningInputs) -> tuple[Tensor, Tensor, Tensor]:
    """
    Demonstrations of several lengths, with several numbers of tokens, as tensors.

    Args:
        keep_masks: for each sample, for each of its steps, one bit for each of its visual tokens.
        inputs: of the B samples.

    Returns:
        Tokens kept `before` each step, tokens `kept` by it, and `label_mask`, the bits that the teacher
        decided: all `bool [T, B, N]`. Not among these are tokens already gone, separators, padding, and the steps that
        a sample does not have.

    Raises:
        `ValueError`: when a demonstration has another number of tokens than the sample, brings back tokens that were
            gone, keeps none, or has anything but bits.
    """
    if not all(isinstance(masks, (list, tuple)) and masks for masks in keep_masks):
        raise ValueError("keep_masks must hold a step at least for each sample. Generate the demonstrations again.")
    num_steps = max(len(masks) for masks in keep_masks)
    kept = torch.zeros((num_steps, *inputs.valid.shape), dtype=torch.bool, device=inputs.valid.device)
    step_mask = torch.zeros_like(kept)
    for sample, masks in enumerate(keep_masks):
        num_visual = int(inputs.valid[sample].sum())
        for step, mask in enumerate(masks):
            if len(mask) != num_visual:
                raise ValueError(
                    f"A demonstration has {len(mask)} tokens, but its sample has {num_visual} visual tokens: it was "
                    "made with another model or processor. Generate the demonstrations again."
                )
            before = torch.tensor(masks[step - 1]) if step else torch.ones(num_visual, dtype=torch.bool)
            if not set(mask) <= {True, False} or not any(mask) or bool((torch.tensor(mask) > before).any()):
                raise ValueError(
                    f"keep_masks of sample {sample} must be bits, of which step {step} keeps some and brings none "
                    "back that were gone. Generate the demonstrations again."
                )
            kept[step, sample, :num_visual] = torch.tensor(mask, device=kept.device)
            step_mask[step, sample] = True
    before = torch.cat([inputs.valid[None], kept[:-1]])
    return before, kept, before & step_mask & ~inputs.layout.protected


def imitation_loss(logits: Tensor, kept: Tensor, label_mask: Tensor) -> Tensor:
    """
    Binary cross-entropy of eq. 8: the mean over the bits of each step, over the steps of each sample, over samples.

    Args:
        logits (`[T, B, N]`): log-odds of keeping.
        kept (`bool [T, B, N]`): what the teacher kept.
        label_mask (`bool [T, B, N]`): bits that the teacher decided.

    Returns:
        float32 `[B]`, the loss of each sample.
    """
    loss = F.binary_cross_entropy_with_logits(logits, kept.to(logits.dtype), reduction="none")
    of_steps = loss.masked_fill(~label_mask, 0.0).sum(-1) / label_mask.sum(-1).clamp(min=1)  # (T, B)
    return of_steps.sum(0) / label_mask.any(-1).sum(0).clamp(min=1)


class LfDTrainer(PolicyTrainer):
    """
    Trains the policy on demonstrations.

    Args: see [`PrunerTrainer`]; `args` is an [`LfDConfig`], `train_dataset` comes from [`generate_demonstrations`].
    `eval_dataset` needs no demonstrations.

    Example:

    ```python
    >>> trainer = LfDTrainer(model, LfDConfig("lfd"), train_dataset=demonstrations, eval_dataset=eval_dataset)
    >>> trainer.train()
    >>> trainer.save_model()
    ```
    """

    _name = "TPRL learning from demonstrations"
    _stage = "lfd"
    args: LfDConfig

    def accepted(self, dataset: Dataset | None) -> Dataset | None:
        dataset = super().accepted(dataset)
        if dataset is not None and "keep_masks" not in dataset.column_names:
            raise ValueError(
                "train_dataset has no column `keep_masks`: make demonstrations of it with generate_demonstrations."
            )
        return dataset

    def networks(self, model: TPRLForConditionalGeneration, args: LfDConfig) -> TrainedNetworks:
        networks = super().networks(model, args)
        model.autoencoder.encoder.requires_grad_(args.train_encoder)
        return networks

    def loss(self, networks: nn.Module, batch: AnswerBatch) -> Tensor:
        rows, inputs = batch.rows, batch.inputs
        before, kept, label_mask = demonstrated_steps([row["keep_masks"] for row in rows], inputs)
        left = torch.tensor([sum(row["keep_masks"][-1]) for row in rows], device=kept.device)
        inputs = replace(inputs, keep_ratio=left.clamp(min=1) / inputs.valid.sum(1).clamp(min=1))
        logits = networks(inputs, torch.arange(len(rows), device=kept.device), before).logits
        agrees = ((logits > 0) == kept)[label_mask]
        keep_prob = logits.sigmoid()[label_mask]
        self.note({"policy/agreement": agrees.float().mean(), "policy/keep_prob": keep_prob.mean()})
        return imitation_loss(logits, kept, label_mask).mean()
