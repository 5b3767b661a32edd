"""What the configs of all algorithms have in common that learn from rollouts."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from tprl_hf.modeling.values import (
    COUNT,
    KEPT_FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    UNIT,
    Check,
    list_of,
    number,
    optional,
)

from .policy_config import PolicyTrainingConfig

Score = Literal["correct", "logprob", "agreement", "kl"]


@dataclass
class RolloutConfig(PolicyTrainingConfig):
    r"""
    Base of the configs of [`RolloutTrainer`]s.

    Args:
        per_device_train_batch_size (`int`, defaults to 64):
            Questions in a buffer, on each device.
        num_generations (`int`, defaults to 1):
            Trajectories of each question.
        score (`"correct"`, `"logprob"`, `"agreement"` or `"kl"`, defaults to `"correct"`):
            Score(H) of eq. 5: 1 for a correct answer, else 0; or the mean log-probability of the reference answer. Two
            scores read no label, and take what the LVLM itself answers unpruned for the reference: "agreement" is the
            mean log-probability of that answer, "kl" minus the divergence from the unpruned next-token distributions
            along it. `reward_funcs` of the trainer replace the score.
        min_logprob (`float`, defaults to -4.0):
            Scores in nats are clipped there, so that one hopeless answer does not outweigh all others.
        reward_weights (`list[float]`, *optional*):
            The weight of each of `reward_funcs` in their sum; 1 without it.
        max_completion_length (`int`, defaults to 16):
            Tokens of the longest answer that is generated for `reward_funcs`.
        max_llm_passes (`int`, *optional*):
            Stop after the buffer with which so many keep masks have been scored, by all processes. Scoring is nearly
            all of the cost, so that algorithms compare at equal `llm_passes`, not at equal steps.
        log_completions (`bool`, defaults to `False`):
            At each log show some rollouts: question, kept tokens, answer and score as a table in the terminal, in
            `output_dir/completions` and in W&B and Trackio; pictures of the kept tokens in these and in TensorBoard.
        num_completions_to_print (`int`, *optional*, defaults to 8):
            So many of them; `None` for all of a buffer.
        num_mini_batches (`int`, defaults to 4):
            Optimizer steps in each pass over a buffer.
        micro_batch_size (`int`, *optional*):
            Trajectories that run through the policy at once, for memory; gradients do not depend on it.
        learning_rate (`float`, defaults to 1e-5):
            That of the authors' repository; the paper does not say it.
        num_train_epochs (`float`, defaults to 200):
            The paper's. An epoch is a pass over the questions.
        logging_steps (`float`, *optional*):
            By default, `None`, a log for each buffer; in a run of more than 2,000 buffers one for several, so that the
            log, which each checkpoint holds, stays below about 1.5 MB.

    Raises:
        `ValueError`: for settings that exclude each other.
    """

    checks: ClassVar[dict[str, Check]] = {
        "num_generations": COUNT,
        "min_logprob": number(most=0, what="a number of at most 0, as logarithms of probabilities are"),
        "reward_weights": optional(list_of(number())),
        "max_completion_length": COUNT,
        "max_llm_passes": optional(COUNT),
        "num_completions_to_print": optional(COUNT),
        "num_mini_batches": COUNT,
        "micro_batch_size": optional(COUNT),
    }

    per_device_train_batch_size: int = 64
    num_generations: int = 1
    score: Score = "correct"
    min_logprob: float = -4.0
    reward_weights: list[float] | None = None
    max_completion_length: int = 16
    max_llm_passes: int | None = None
    log_completions: bool = False
    num_completions_to_print: int | None = 8
    num_mini_batches: int = 4
    micro_batch_size: int | None = None
    learning_rate: float = 1e-5
    num_train_epochs: float = 200
    logging_steps: float | None = None  # type: ignore[assignment]

    @property
    def updates_per_buffer(self) -> int:
        """Optimizer steps that are made of the rollouts of a buffer."""
        return self.passes_per_buffer * self.num_mini_batches

    @property
    def passes_per_buffer(self) -> int:
        """How often updates go through a buffer. Algorithms have their own names for it."""
        raise NotImplementedError

    def __post_init__(self):
        logging_steps = self.logging_steps
        if logging_steps is None:  # for transformers, which falls back to it for `eval_steps`
            self.logging_steps = PolicyTrainingConfig.logging_steps
        super().__post_init__()
        if logging_steps is None:  # again, so that a copy of the config logs buffers too
            self.logging_steps = None
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} has no meaning here: set "
                "num_mini_batches for the size of an update and micro_batch_size for memory."
            )
        order = getattr(self, "train_sampling_strategy", "random"), self.data_seed
        if order[0] != "random" or order[1] not in (None, self.seed):
            raise ValueError(
                f"train_sampling_strategy={order[0]!r} and data_seed={order[1]} have no effect here: each epoch has a "
                "random order that follows from seed. Leave them out."
            )
        trajectories = self.per_device_train_batch_size * self.num_generations
        if trajectories % self.num_mini_batches != 0:
            raise ValueError(
                f"per_device_train_batch_size * num_generations = {trajectories} trajectories cannot be cut into "
                f"num_mini_batches={self.num_mini_batches} equal parts: change one of the three."
            )


@dataclass
class BudgetedRolloutConfig(RolloutConfig):
    r"""
    Base of the configs of algorithms that may draw rollouts at budgets and are held near their start.

    Args:
        rollout_keep_ratios (`list[float]`, *optional*):
            Draw at budgets, one of these for each question: a shift of all logits, part of the state and not of the
            policy, brings the expected number of kept tokens to `keep_ratio ** ((t + 1) / T)`. So the policy is
            trained on the sets that a budget at inference asks for. Set `lambda_disc=1` with it.
        shared_budget (`float`, defaults to 0):
            Fraction of buffers whose budget holds for the whole batch instead of for each question. Questions then
            compete for tokens, as they do under a threshold at inference.
        anneal_budgets (`bool`, defaults to `False`):
            Draw from fewer and fewer of the budgets, the smallest ones; at the end of training from one alone.
            The largest of n leaves after 1/n of `max_steps`.
        efficiency_coef (`float`, defaults to 0.1):
            Weight of the fraction of tokens that a step removes, in the reward: TPRL's beta. Of no use at budgets.
        min_spread (`float`, defaults to 0):
            Skip questions whose score changes by less from mask to mask: they carry no gradient signal, and their
            updates cost time.
        num_iterations (`int`, defaults to 4):
            Passes over a buffer.
        epsilon (`float`, defaults to 0.2):
            The probability ratio is clipped to `1 - epsilon` and `1 + epsilon`.
        beta (`float`, defaults to 0.04):
            Weight of the mean Kullback-Leibler divergence per bit from the policy that training started with, at the
            same budget. An image has hundreds of bits: weights above 1 are usual.
    """

    checks: ClassVar[dict[str, Check]] = {
        "rollout_keep_ratios": optional(list_of(KEPT_FRACTION, least=1)),
        "shared_budget": UNIT,
        "efficiency_coef": NOT_NEGATIVE,
        "min_spread": NOT_NEGATIVE,
        "num_iterations": COUNT,
        "epsilon": POSITIVE,
        "beta": NOT_NEGATIVE,
    }

    rollout_keep_ratios: list[float] | None = None
    shared_budget: float = 0.0
    anneal_budgets: bool = False
    efficiency_coef: float = 0.1
    min_spread: float = 0.0
    num_iterations: int = 4
    epsilon: float = 0.2
    beta: float = 0.04

    @property
    def passes_per_buffer(self) -> int:
        return self.num_iterations

    def __post_init__(self):
        super().__post_init__()
        if self.shared_budget and not self.rollout_keep_ratios:
            raise ValueError(
                f"shared_budget={self.shared_budget} is the share of buffers that share one of rollout_keep_ratios: "
                "set these too, or shared_budget=0."
            )
        if self.anneal_budgets and len(self.rollout_keep_ratios or []) < 2:
            raise ValueError(
                f"anneal_budgets=True draws from fewer and fewer of rollout_keep_ratios={self.rollout_keep_ratios}: "
                "set at least two."
            )
