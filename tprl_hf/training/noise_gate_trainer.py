"""Noise gates: the policy learns by gradients through the frozen LLM, without reinforcement learning."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
from tprl_hf.modeling.visual_features import VisualFeatures

from .answer_batches import AnswerBatch
from .answer_scores import answer_logits, answered_prompts, score_logits
from .noise_gate_config import NoiseGateConfig
from .rollout_trainer import RolloutTrainer
from .rollouts import Budgets, collect_rollouts, draw_budgets, logits_at_budget, mean_entropy
from .unpruned_answers import OWN_ANSWER_SCORES

# Of the LLM, for each prompt: a forward pass, and a backward pass that counts as two.
PASSES = 3
ALWAYS_KEPT = 40.0  # log-odds of tokens that no policy decides about


def logits_of_rows(
    model: TPRLForConditionalGeneration, batch: AnswerBatch, sample_index: Sequence[int], logits: Tensor
) -> dict[str, Tensor]:
    """
    Logits of tokens, in the order in which features lie.

    Args:
        sample_index: of S samples; logits (`[S, N]`): of their visual tokens. Gradients pass.

    Returns:
        By modality `[V]`, of the rows of `batch.features.take(sample_index)`.
    """
    features = batch.features.take(list(sample_index))
    counts = {name: len(one.rows) for name, one in features.modalities.items()}
    numbers = torch.arange(sum(counts.values()), dtype=torch.float32, device=logits.device)[:, None]
    by_modality = zip(features.modalities.items(), numbers.split(list(counts.values())), strict=True)
    numbered = {name: replace(one, rows=rows) for (name, one), rows in by_modality}
    # in the place of the tokens, so that they come in the order and padding of the tokens
    prompts = {**batch.prompts(sample_index), "visual_features": replace(features, modalities=numbered)}
    inputs = model.pruning_inputs(**prompts, with_attention=False)
    places, of_tokens = inputs.tokens.squeeze(-1).long()[inputs.valid], logits[:, : inputs.valid.shape[1]]
    of_rows = logits.new_zeros(len(numbers)).index_put((places,), of_tokens[inputs.valid])
    return dict(zip(counts, of_rows.split(list(counts.values())), strict=True))


def gate(rows: Tensor, typical: Tensor, logits: Tensor, noise: Tensor) -> Tensor:
    """
    Tokens of which a part is replaced by noise: `m + sqrt(g) (v - m) + sqrt(1 - g) s e`, with `g = sigmoid(logit)`.

    Args:
        rows (`[V, D]`): the tokens; typical (`[M, D]`): tokens whose mean m and standard deviation s the noise has, so
            that a token keeps the moments of tokens whatever its gate.
        logits (float32 `[V]`): the gates. noise (float32 `[V, D]`): with mean 0 and variance 1.
    """
    mean, deviation = typical.float().mean(0), typical.float().std(0, correction=0)
    # sqrt(sigmoid(x)), with a gradient also where it is nearly 0
    signal, rest = (0.5 * F.logsigmoid(logits)).exp()[:, None], (0.5 * F.logsigmoid(-logits)).exp()[:, None]
    return (mean + signal * (rows.float() - mean) + rest * deviation * noise).to(rows.dtype)


class NoiseGateTrainer(RolloutTrainer):
    """
    Trains a policy that prunes in one step, by a differentiable relaxation: the rival of reinforcement learning.

    No token is removed while it trains. A token with the keep probability g passes through a *gate*, which lets a part
    g of its variance through and replaces the rest by noise of the same variance. The gates of a question sum to its
    budget, by the shift of logits at which rollouts are drawn elsewhere. The gradient of the answer's score goes back
    through the frozen LLM and the gates into the policy, and each token gets its own. At inference the largest gates
    are kept and all other tokens are removed.

    Variance-preserving noise is that of AutoSelect (arXiv 2603.07135) and DiffPrune (2605.28051), which report 4 to 9
    points more than by straight-through Gumbel gates. What differs here: the policy reads the question; it starts from
    demonstrations; there is no denoiser between gates and LLM; `score="kl"` compares with the unpruned model.

    `llm_passes` counts three for each prompt, because its backward pass counts as two. These prompts have all their
    visual tokens: a pass takes longer than one of a pruned prompt.

    Args: see [`RolloutTrainer`]; `args` is a [`NoiseGateConfig`].

    Raises:
        `ValueError`: for reward functions, which have no gradient.

    Example:

    ```python
    >>> trainer = NoiseGateTrainer(model, NoiseGateConfig("run"), train_dataset=train, eval_dataset=validation)
    >>> trainer.train()
    ```
    """

    _name = "TPRL noise gates"
    _stage = "noise_gate"
    args: NoiseGateConfig

    def __init__(self, model: TPRLForConditionalGeneration | str | os.PathLike, args: Any = None, **arguments: Any):
        super().__init__(model, args, **arguments)
        if self.reward_funcs:
            raise ValueError(
                "NoiseGateTrainer learns by gradients, and a reward function has none: set score in its config, or "
                "use another trainer."
            )
        if self.tprl_model.lvlm.dtype == torch.float16:
            raise ValueError(
                "NoiseGateTrainer sends gradients through the LVLM, and those of sure answers are too small for "
                "float16: load the model with dtype='bfloat16' or 'float32'."
            )

    def budgets(self, buffer: int) -> Budgets:
        args, generator = self.args, self.generator(3, buffer, self.args.process_index)
        return draw_budgets(args.rollout_keep_ratios, 0.0, args.per_device_train_batch_size, generator)

    @torch.no_grad()
    def collect(self, buffer: int) -> None:
        args, model = self.args, self.tprl_model
        self.batch, budgets = self.encode_questions(buffer)
        generator = self.generator(2, buffer, args.process_index, device=args.device)
        # for their budgets; the bits that are drawn are not used
        self.rollouts = collect_rollouts(
            model.policy, model.autoencoder, self.batch.inputs, args.num_generations, 1, 1.0, generator, budgets
        )
        self.num_scored += PASSES * len(self.rollouts.sample_index)

    def trajectory_losses(self, networks: nn.Module, index: Tensor) -> Tensor:
        assert self.rollouts is not None
        rollouts, model, batch = self.rollouts.take(index), self.tprl_model, self.batch
        samples = rollouts.sample_index.tolist()
        output = networks(batch.inputs, rollouts.sample_index, rollouts.keep_masks[:-1])
        logits = logits_at_budget(rollouts, output.logits, lambda_disc=1.0)  # (1, S, N)

        inputs, labels = answered_prompts(model, batch, samples)
        gates = logits[0].masked_fill(~rollouts.action_mask[0], ALWAYS_KEPT)
        inputs["visual_features"] = self.gated_features(gates, samples, index.tolist())
        keep_all = batch.inputs.valid[samples]
        answers, labels = answer_logits(model, inputs, labels, keep_all[keep_all])
        scores = score_logits(answers, labels, [batch.samples[sample] for sample in samples])
        score = scores.by_name(self.args.score)
        same = "objective/agreement" if self.args.score in OWN_ANSWER_SCORES else "objective/accuracy"
        kept = (logits[0].sigmoid() * rollouts.action_mask[0]).sum(1) / rollouts.num_kept[0].clamp(min=1)
        self.note(
            {
                "objective/score": score.mean(),
                same: scores.correct.float().mean(),
                "objective/keep_ratio": kept.mean(),
                "policy/entropy_avg": mean_entropy(rollouts, logits.detach(), lambda_disc=1.0).mean(),
            }
        )
        return -score

    def gated_features(self, gates: Tensor, samples: list[int], trajectories: list[int]) -> VisualFeatures:
        """Features of S samples behind gates of log-odds `gates [S, N]`; each trajectory has noise of its own."""
        features = self.batch.features.take(samples)
        logits = logits_of_rows(self.tprl_model, self.batch, samples, gates)
        step, process = self.state.global_step, self.args.process_index
        generators = [self.generator(4, step, process, number, device=self.args.device) for number in trajectories]
        gated = {}
        for name, one in features.modalities.items():
            whole, counts = self.batch.features.modalities[name], one.counts.tolist()

            def behind_gates(rows: Tensor, typical: Tensor, counts: list[int] = counts, name: str = name) -> Tensor:
                noise = [
                    torch.randn(count, rows.shape[1], generator=generator, device=rows.device)
                    for count, generator in zip(counts, generators, strict=True)
                ]
                return gate(rows, typical, logits[name], torch.cat(noise))

            gated[name] = replace(
                one,
                rows=behind_gates(one.rows, whole.rows),
                # what goes into deeper layers of the LLM tells of the token too
                deepstack=[behind_gates(*pair) for pair in zip(one.deepstack, whole.deepstack, strict=True)],
            )
        return replace(features, modalities=gated)
