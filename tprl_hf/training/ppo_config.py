"""Configuration of PPO."""

from dataclasses import dataclass, field

from .policy_config import PolicyTrainingConfig


@dataclass
class TPRLPPOConfig(PolicyTrainingConfig):
    r"""
    Configuration of [`TPRLPPOTrainer`]. The defaults are the paper's; what the paper leaves open is as in its authors'
    repository.

    Args:
        > Rollouts

        per_device_train_batch_size (`int`, defaults to 64):
            Questions in a buffer, on each device.
        num_rollouts (`int`, defaults to 1):
            Trajectories of each question.
        num_steps (`int`, defaults to 3):
            Steps T of a trajectory at most.
        lambda_disc (`float`, defaults to 0.5):
            Step t draws from `lambda_disc ** t * p` (eq. 14), t counted from 0.
        rollout_keep_ratios (`list[float]`, *optional*):
            Draw at budgets instead, one of these for each question: a shift of all logits, part of the state and not
            of the policy, brings the expected number of kept tokens to `keep_ratio ** ((t + 1) / T)`. So the policy is
            trained on the sets that a budget at inference asks for. Not in the paper. Wants `lambda_disc=1`.
        shared_budget (`float`, defaults to 0):
            Share of the buffers that meet one of `rollout_keep_ratios` on average only, so that questions compete for
            tokens: for policies that are used with a threshold. With counterfactual advantages those that need none
            give way, also where nothing was flipped.

        > Reward

        score (`"correct"` or `"logprob"`, defaults to `"correct"`):
            Score(H) of eq. 5: 1 for a right answer, else 0; or the mean log-probability of the reference answer.
            `reward_funcs` of the trainer replace it.
        min_logprob (`float`, defaults to -4.0):
            The score "logprob" is clipped there, so that one hopeless answer does not outweigh all others.
        score_every_step (`bool`, defaults to `True`):
            Score after each step (eq. 4). Else only after the last one, which costs a third of the time; the scores of
            the steps between cancel anyway, but for `gamma`.
        alpha (`float`, defaults to 1.0), beta (`float`, defaults to 0.1):
            Weights of score and efficiency.
        efficiency_while_right (`bool`, defaults to `False`):
            Pay for pruned tokens only while the answer is right.
        target_keep_ratio (`float`, *optional*):
            Charge kept tokens at a price that rises while more than this fraction is kept, and falls while less is.
        price_step (`float`, defaults to 0.02), max_price (`float`, defaults to 2.0):
            How far the price moves with the relative error of each buffer, and its bound.
        max_new_tokens (`int`, defaults to 16):
            Longest answer that is generated for `reward_funcs`.

        > Advantages

        advantages (`"gae"`, `"leave_one_out"`, `"group"` or `"counterfactual"`, defaults to `"gae"`):
            By the value head; or against the other rollouts of the question, by their mean, or mean and deviation; or
            a bit for itself: what keeping it earns more than pruning it while all other bits stay as they were drawn,
            which is the derivative of the expected reward by the bit's probability. For this masks are scored in
            which one bit is flipped (as Foerster et al. 2018 and Titsias and Lazaro-Gredilla 2015 do); the ratio
            that is clipped is then that of the probability's change. Wants `ratio="token"` and `num_steps=1`.
        num_flips (`int`, defaults to 16):
            Bits of each trajectory that are flipped for counterfactual advantages, drawn by their variance
            `p * (1 - p)`; the others' advantages are 0. Trajectories whose score cannot rise by `min_spread` are not
            flipped.
        gamma (`float`, defaults to 0.99), lam (`float`, defaults to 0.95):
            Discount and trace decay.
        whiten_advantages (`bool`, defaults to `True`):
            Standardise them over the buffer.
        weight_by_budget (`bool`, defaults to `False`):
            Multiply advantages by the budget that a mask was drawn at. A token matters the more the fewer there are:
            without this, small budgets decide almost alone what is learned. Wants `rollout_keep_ratios`.
        min_spread (`float`, defaults to 0):
            Leave a question out of the updates when the returns of its rollouts have a smaller standard deviation, or
            no flip changes them by as much: what is right, or wrong, whatever is pruned teaches nothing, and its
            updates cost time.

        > Updates

        num_ppo_epochs (`int`, defaults to 4), num_mini_batches (`int`, defaults to 4):
            Passes over a buffer, and optimizer steps in each pass.
        micro_batch_size (`int`, *optional*):
            Trajectories that run through the policy at once; gradients do not depend on it.
        ratio (`"joint"` or `"token"`, defaults to `"joint"`):
            The clipped ratio is that of all bits of a step, or that of each bit.
        cliprange (`float`, defaults to 0.2), cliprange_value (`float`, defaults to 0.2):
            Of the ratio and of the value.
        vf_coef (`float`, defaults to 0.5), entropy_coef (`float`, defaults to 0.01):
            Weights of value loss and entropy. Entropy is the mean over bits, so that it does not grow with the image.
        kl_coef (`float`, defaults to 0.0):
            Weight of the mean Kullback-Leibler divergence per bit from the policy that training started with, at
            the same budget. An image has hundreds of bits: weights above 1 are usual.
        learning_rate (`float`, defaults to 1e-5), critic_learning_rate (`float`, defaults to 3e-5):
            Of the policy with the shared attention, and of the value head.
        num_train_epochs (`float`, defaults to 200):
            Passes over the questions.
    """

    num_rollouts: int = field(default=1, metadata={"help": "Trajectories of each question."})
    num_steps: int = field(default=3, metadata={"help": "Steps of a trajectory at most."})
    lambda_disc: float = field(default=0.5, metadata={"help": "Discount of the keep probability per step."})
    rollout_keep_ratios: list[float] | None = field(default=None, metadata={"help": "Draw at these budgets."})
    shared_budget: float = field(default=0.0, metadata={"help": "Share of buffers that meet it on average."})

    score: str = field(default="correct", metadata={"help": "correct or logprob"})
    min_logprob: float = -4.0
    score_every_step: bool = True
    alpha: float = 1.0
    beta: float = 0.1
    efficiency_while_right: bool = False
    target_keep_ratio: float | None = None
    price_step: float = 0.02
    max_price: float = 2.0
    max_new_tokens: int = 16

    advantages: str = field(default="gae", metadata={"help": "gae, leave_one_out, group, counterfactual"})
    num_flips: int = 16
    gamma: float = 0.99
    lam: float = 0.95
    whiten_advantages: bool = True
    weight_by_budget: bool = False
    min_spread: float = 0.0

    num_ppo_epochs: int = 4
    num_mini_batches: int = 4
    micro_batch_size: int | None = None
    ratio: str = field(default="joint", metadata={"help": "joint or token"})
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.5
    entropy_coef: float = 0.01
    kl_coef: float = 0.0
    critic_learning_rate: float = 3e-5

    per_device_train_batch_size: int = 64
    learning_rate: float = 1e-5
    num_train_epochs: float = 200

    def __post_init__(self):
        super().__post_init__()
        choices = {
            "score": ("correct", "logprob"),
            "advantages": ("gae", "leave_one_out", "group", "counterfactual"),
            "ratio": ("joint", "token"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {', '.join(allowed)}; got {getattr(self, name)!r}.")
        if self.advantages in ("leave_one_out", "group") and self.num_rollouts < 2:
            raise ValueError(f"advantages={self.advantages!r} compare rollouts: num_rollouts={self.num_rollouts} < 2.")
        if self.advantages == "gae" and self.min_spread > 0:
            raise ValueError(f"min_spread={self.min_spread} compares rollouts or flips: advantages='gae' has none.")
        if self.num_flips < 1:
            raise ValueError(f"num_flips is at least 1: without a flip nothing is learned; got {self.num_flips}.")
        if self.advantages == "counterfactual" and (self.ratio, self.num_steps) != ("token", 1):
            raise ValueError(
                "advantages='counterfactual' are of single bits of one step: set ratio='token' and num_steps=1; got "
                f"{self.ratio!r} and {self.num_steps}."
            )
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} has no meaning here: set "
                "num_mini_batches for the size of an update and micro_batch_size for memory."
            )
        if not 0 <= self.shared_budget <= 1 or (self.shared_budget and not self.rollout_keep_ratios):
            raise ValueError(
                f"shared_budget is the share of buffers, in [0, 1], that meet rollout_keep_ratios on average; got "
                f"{self.shared_budget} and {self.rollout_keep_ratios}."
            )
        if self.weight_by_budget and not self.rollout_keep_ratios:
            raise ValueError("weight_by_budget=True multiplies by the budgets of rollout_keep_ratios: set these too.")
        trajectories = self.per_device_train_batch_size * self.num_rollouts
        if trajectories % self.num_mini_batches != 0:
            raise ValueError(
                f"per_device_train_batch_size * num_rollouts = {trajectories} trajectories cannot be cut into "
                f"num_mini_batches={self.num_mini_batches} equal parts."
            )
