# %% [markdown]
# # 1. Generate
# A model that prunes is loaded and asked as any model of transformers. `generate` takes one more argument: how many of
# the visual tokens the LLM reads.
# %%
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import tprl_hf
from tprl_hf.data import mosaic_vqa
from tprl_hf.visualization import Panel, draw_figures, figures_by_block, seen_pictures

name = tprl_hf.embedded_checkpoint()  # or a TPRL checkpoint of yours: a directory or a name on the Hub
model, processor = AutoModelForImageTextToText.from_pretrained(name), AutoProcessor.from_pretrained(name)

# %% [markdown]
# A test image with its question. For your own: `image = PIL.Image.open("photo.jpg").convert("RGB")`.
# %%
sample = mosaic_vqa(split="test", seed=7, num_samples=3)[2]
image, question = sample["images"][0], sample["prompt"]
content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
chat = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
inputs = processor.apply_chat_template([{"role": "user", "content": content}], **chat)
print(question, "Reference:", sample["answer"])

# %% [markdown]
# Three budgets. `prune=False` is the base model, as it is. `model.prune` says which tokens stay, without running the
# LLM.
# %%
panels = []
for budget in ({"prune": False}, {"keep_ratio": 1 / 3}, {"keep_ratio": 1 / 9}):
    sequences = model.generate(**inputs, **budget, max_new_tokens=8, do_sample=False)
    answer = processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    plan = model.prune(**inputs, **budget)
    kept = f"{int(plan.num_kept)} of {int(plan.num_visual)} tokens"
    print(f"{kept}: {answer}")
    panels.append(Panel(kept, answer, plan.keep_mask, plan.scores))

# %% [markdown]
# What the vision tower sees, and in it the patches whose tokens the LLM reads; the others are hatched.
# %%
seen = seen_pictures([image], processor, inputs, plan.layout)
picture = draw_figures(figures_by_block(seen, plan.layout, panels, question))
picture.save("kept_tokens.png")
picture

# %% [markdown]
# `forward` prunes too. Its logits come back in the columns of `input_ids`.
# %%
with torch.no_grad():
    output = model(**inputs, keep_ratio=1 / 9)
assert output.logits.shape[:2] == inputs["input_ids"].shape
