"""Two tokens, a bright one and a dark one, in random order: whoever keeps just the bright one wins."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from tests.families.tiny_models import build, tower
from tests.families.tiny_processor import make_processor
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.training import (
    CounterfactualConfig,
    CounterfactualTrainer,
    TPRLGRPOConfig,
    TPRLGRPOTrainer,
    TPRLMAPOConfig,
    TPRLMAPOTrainer,
    TPRLPPOConfig,
    TPRLPPOTrainer,
)
from tprl_hf.training.rewards import MaskScores


class BrightToken:
    """Scores +1 for the bright token and -1 for the dark one."""

    def score_masks(self, batch, keep_masks, sample_index):
        bright_first = torch.tensor([row["answer"] == "word10" for row in batch.rows])[sample_index]
        worth = torch.where(bright_first[:, None], torch.tensor([1.0, -1.0]), torch.tensor([-1.0, 1.0]))
        scores = (keep_masks * worth).sum(-1)
        return MaskScores(scores, scores > 0)


class BrightPPO(BrightToken, TPRLPPOTrainer):
    pass


class BrightGRPO(BrightToken, TPRLGRPOTrainer):
    pass


class BrightMAPO(BrightToken, TPRLMAPOTrainer):
    pass


class BrightCounterfactual(BrightToken, CounterfactualTrainer):
    pass


TWO_PASSES = {"num_iterations": 2, "efficiency_coef": 0.0, "beta": 0.0}
NO_BUDGET = {"rollout_keep_ratios": None, "shared_budget": 0.0, "weight_by_budget": False, "min_spread": 0.0}
PPO = {"num_steps": 1, "num_ppo_epochs": 2, "beta": 0.0, "critic_learning_rate": 1e-2}
GRPO = {"num_steps": 1, **TWO_PASSES, "num_generations": 4, "per_device_train_batch_size": 4}


@pytest.mark.parametrize(
    ("trainer_class", "config_class", "settings"),
    [
        (BrightPPO, TPRLPPOConfig, PPO),
        (BrightPPO, TPRLPPOConfig, {**PPO, "ratio": "token"}),
        (BrightGRPO, TPRLGRPOConfig, {**GRPO, "scale_rewards": "none"}),
        (BrightGRPO, TPRLGRPOConfig, GRPO),
        (BrightMAPO, TPRLMAPOConfig, GRPO),
        (BrightCounterfactual, CounterfactualConfig, {**TWO_PASSES, **NO_BUDGET, "score": "correct"}),
    ],
    ids=["gae-joint", "gae-token", "leave-one-out", "group", "mapo", "counterfactual"],
)
def test_the_known_optimum_is_found(trainer_class, config_class, settings, tmp_path):
    base = build("llava", vision_config=tower("clip_vision_model", patch_size=24))  # one token an image
    processor = make_processor()
    processor.patch_size = 24
    bright, dark = (Image.fromarray(np.full((24, 24, 3), value, np.uint8)) for value in (250, 5))
    rows = [
        {"images": [bright, dark], "prompt": "word20", "answer": "word10", "image_id": "bright first"},
        {"images": [dark, bright], "prompt": "word20", "answer": "word11", "image_id": "dark first"},
    ]
    torch.manual_seed(0)
    model = TPRLForConditionalGeneration.from_base_model(
        base, latent_dim=16, policy_training={"stage": "lfd"}, policy_num_heads=2, policy_dim=16
    )
    settings = {"per_device_train_batch_size": 16, **settings}
    config = config_class(
        str(tmp_path), max_steps=80, num_mini_batches=2, learning_rate=1e-2, disable_tqdm=True, use_cpu=True,
        save_strategy="no", **settings,
    )  # fmt: skip
    trainer = trainer_class(model, config, processing_class=processor, train_dataset=Dataset.from_list(rows))
    trainer.train()
    inputs = trainer.encoder(rows).inputs
    with torch.no_grad():
        probs = model.pruner.score(inputs).sigmoid()
    assert probs[0, 0] > 0.9 and probs[1, 1] > 0.9
    assert probs[0, 1] < 0.1 and probs[1, 0] < 0.1
