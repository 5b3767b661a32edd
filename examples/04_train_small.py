# %% [markdown]
# # 4. Train a policy, small
# The stages of `tprl train`, each in seconds: the autoencoder, demonstrations, learning from them, and reinforcement
# learning. The recipe `mosaic_llava_policy` is the long version.
# %%
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import tprl_hf
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.data import mosaic_vqa
from tprl_hf.training import (
    AutoencoderConfig,
    AutoencoderTrainer,
    CounterfactualConfig,
    CounterfactualTrainer,
    GradientTeacher,
    LfDConfig,
    LfDTrainer,
    generate_demonstrations,
)
from tprl_hf.visualization import Panel, draw_figures, figures_by_block, seen_pictures

# %% [markdown]
# The embedded LVLM with a new policy. For your own model: its name instead of `lvlm`.
# %%
name = tprl_hf.embedded_checkpoint()
processor = AutoProcessor.from_pretrained(name)
lvlm = AutoModelForImageTextToText.from_pretrained(name).lvlm
torch.manual_seed(0)
policy = {"latent_dim": 96, "autoencoder_dim": 96, "policy_dim": 96, "policy_num_heads": 4, "policy_positions": True}
model = TPRLForConditionalGeneration.from_base_model(lvlm, policy_budget=True, num_steps=1, **policy)
train, validation = mosaic_vqa("train", num_samples=240), mosaic_vqa("validation", num_samples=60)
data = {"processing_class": processor, "train_dataset": train, "eval_dataset": validation}
quiet = {"logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True, "per_device_eval_batch_size": 60}

# %% [markdown]
# One validation picture, to see what the policy keeps of it after each stage.
# %%
image, question = validation[0]["images"][0], validation[0]["prompt"]
content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
chat = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
inputs = processor.apply_chat_template([{"role": "user", "content": content}], **chat)
plans = {}


def look(title):
    with model.using(model.learned_pruner()):
        plans[title] = model.prune(**inputs, keep_ratio=1 / 9)


# %% [markdown]
# ## The autoencoder
# It gives each visual token a short code, which is all that the policy reads of it.
# %%
config = AutoencoderConfig("autoencoder", max_steps=60, learning_rate=1e-2, per_device_train_batch_size=8, **quiet)
trainer = AutoencoderTrainer(model, config, **data)
trainer.train()
metrics = trainer.evaluate()
look("not trained yet")

# %% [markdown]
# ## Demonstrations, and learning from them
# The teacher knows the reference answer. It shows which tokens it would keep.
# %%
shown = generate_demonstrations(GradientTeacher(), model, processor, train, [1 / 9], batch_size=60)
policy_at = {"keep_ratio": 1 / 9, "eval_keep_ratios": [1 / 9], **quiet}
config = LfDConfig("lfd", max_steps=50, learning_rate=2e-3, per_device_train_batch_size=24, **policy_at)
trainer = LfDTrainer(model, config, **{**data, "train_dataset": shown})
trainer.train()
look("after demonstrations")

# %% [markdown]
# ## Reinforcement learning
# From here the answers teach: each bit of a keep mask earns what flipping it costs.
# %%
config = CounterfactualConfig(
    "counterfactual",
    max_steps=4,
    per_device_train_batch_size=24,
    rollout_keep_ratios=[1 / 9],
    learning_rate=5e-4,
    **policy_at,
)
trainer = CounterfactualTrainer(model, config, **data)
trainer.train()
trainer.save_model()  # `from_pretrained("counterfactual")` loads it

# %%
look("and after reinforcement")
panels = [Panel(title, "", plan.keep_mask, plan.scores) for title, plan in plans.items()]
layout = plans["not trained yet"].layout
seen = seen_pictures([image], processor, inputs, layout)
picture = draw_figures(figures_by_block(seen, layout, panels, question))
picture.save("stages.png")
picture
