"""
3. Wrap Qwen2.5-VL. A model without a policy prunes with a published method; nothing is trained.

    python examples/03_wrap_qwen_vl.py                                    # a tiny random model, without a network
    python examples/03_wrap_qwen_vl.py Qwen/Qwen2.5-VL-7B-Instruct photo.jpg "what colour is the cat ?"
"""

import sys

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLConfig

from tprl_hf import TPRLForConditionalGeneration


def on_the_hub(name, picture, question):
    """The base model, and its inputs as its own processor makes them (which needs torchvision)."""
    base = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")
    content = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": question}]
    chat = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = AutoProcessor.from_pretrained(name).apply_chat_template([{"role": "user", "content": content}], **chat)
    return base, inputs.to(base.device)


def tiny_and_random():
    """The same architecture with two layers, and a picture of 16 × 16 patches of noise."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = Qwen2_5_VLConfig(
        text_config={**small, "num_key_value_heads": 2, "vocab_size": 100, "rope_parameters": rope},
        vision_config={**small, "depth": 2, "num_heads": 4, "out_hidden_size": 32, "fullatt_block_indexes": [1]},
        **{"vision_start_token_id": 92, "vision_end_token_id": 93, "image_token_id": 94, "video_token_id": 95},
    )
    ids = torch.tensor([[1, 92, *[94] * 64, 93, 5, 6, 7]])  # each visual token stands for 2 × 2 patches
    pixels = {"pixel_values": torch.randn(256, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 16, 16]])}
    types = {"attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == 94).long()}
    return AutoModelForImageTextToText.from_config(config).eval(), {"input_ids": ids, **types, **pixels}


base, inputs = on_the_hub(*sys.argv[1:4]) if sys.argv[1:] else tiny_and_random()
settings = {"max_new_tokens": 16, "do_sample": False}
unwrapped = base.generate(**inputs, **settings)

model = TPRLForConditionalGeneration.from_base_model(base, pruner="divprune", keep_ratio=1 / 3)
plan = model.prune(**inputs)
output = model.generate(**inputs, **settings, return_dict_in_generate=True)
print(f"{type(base).__name__}: {int(plan.num_kept)} of {int(plan.num_visual)} visual tokens are kept")
print(f"The prompt has {inputs['input_ids'].shape[1]} tokens; the cache of prompt and answer has "
      f"{output.past_key_values.get_seq_length()}")  # fmt: skip

# With all tokens it is the base model.
assert torch.equal(model.generate(**inputs, **settings, prune=False), unwrapped)
print("Unpruned it answers as the base model does")
