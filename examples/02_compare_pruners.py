# %% [markdown]
# # 2. Compare pruners on your picture
# Each published method keeps other tokens. Here each of them keeps a ninth of the same picture. In the shell:
# `tprl compare photo.jpg "is there a red circle ?"`.
# %%
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import tprl_hf
from tprl_hf.data import mosaic_vqa
from tprl_hf.pruners import CDPruner, DivPrune, RandomPruner, ToMePruner, UniformPruner, VisionZip, VisPruner
from tprl_hf.visualization import Panel, draw_figures, figures_by_block, seen_pictures

PICTURE, QUESTION = None, ""  # yours: "photo.jpg", "is there a red circle ?"

# %%
name = tprl_hf.embedded_checkpoint()
model, processor = AutoModelForImageTextToText.from_pretrained(name), AutoProcessor.from_pretrained(name)
if PICTURE is None:
    sample = mosaic_vqa(split="test", seed=7, num_samples=3)[2]
    image, QUESTION = sample["images"][0], sample["prompt"]
else:
    image = Image.open(PICTURE).convert("RGB")
content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
chat = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
inputs = processor.apply_chat_template([{"role": "user", "content": content}], **chat)

# %% [markdown]
# `using` sets a pruner for its block. `RandomPruner` and `UniformPruner` are the baselines. The last pruner is the
# policy that the checkpoint came with; it reads the question, as `CDPruner` does.
# %%
methods = [RandomPruner(seed=0), UniformPruner(), DivPrune(), ToMePruner(), VisionZip(), VisPruner(), CDPruner()]
panels = []
for pruner in [*methods, model.learned_pruner()]:
    with model.using(pruner):
        plan = model.prune(**inputs, keep_ratio=1 / 9)
        sequences = model.generate(**inputs, keep_ratio=1 / 9, max_new_tokens=8, do_sample=False)
    answer = processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    panels.append(Panel(type(pruner).__name__, answer, plan.keep_mask, plan.scores))
    print(f"{type(pruner).__name__:15} {int(plan.num_kept):3} of {int(plan.num_visual)} tokens: {answer}")

# %%
seen = seen_pictures([image], processor, inputs, plan.layout)
figures = [figures_by_block(seen, plan.layout, row, QUESTION)[0] for row in (panels[:4], panels[4:])]
picture = draw_figures(figures)
picture.save("pruners.png")
picture
