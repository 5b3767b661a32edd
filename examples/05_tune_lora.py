"""
5. Tune the LLM with LoRA on pruned prompts: TRL's SFTTrainer, PEFT, and one LoRA for several budgets.

    python examples/05_tune_lora.py              # four steps of the embedded model
    python examples/05_tune_lora.py 750          # so many steps
"""

import sys

import torch
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

import tprl_hf
from tprl_hf.data import mosaic_vqa
from tprl_hf.training import MixedBudgets

steps = int(sys.argv[1]) if sys.argv[1:] else 4
name = tprl_hf.embedded_checkpoint()  # or TPRLForConditionalGeneration.from_base_model(NAME, pruner="divprune", ...)
model, processor = AutoModelForImageTextToText.from_pretrained(name), AutoProcessor.from_pretrained(name)
model.read_chat_template(processor)  # tells the question from the answer


def to_chat(row):
    user, assistant = [{"role": "user", "content": row["prompt"]}], [{"role": "assistant", "content": row["answer"]}]
    return {"images": row["images"], "prompt": user, "completion": assistant}


rows = mosaic_vqa("train", num_samples=16 * steps)
rows = rows.map(to_chat, remove_columns=[column for column in rows.column_names if column not in ("images", "prompt")])
layers = r"lvlm\..*language_model.*\.(q|k|v|o)_proj"  # or "all-linear", which takes the vision tower too
trainer = SFTTrainer(
    model,
    SFTConfig(
        "tuned",
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=2e-4,
        logging_steps=1,
        max_length=None,  # a prompt that is cut off loses its image
        bf16=torch.cuda.is_available(),
        report_to="none",
    ),
    train_dataset=rows,
    processing_class=processor,
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=layers, task_type="CAUSAL_LM"),
    callbacks=[MixedBudgets(model, [1, 1 / 3, 1 / 9])],  # each step prunes to one of these
)
trainer.train()
trainer.save_model("tuned/adapter")

# Policy and LoRA in one checkpoint: `from_pretrained` loads both.
model = AutoModelForImageTextToText.from_pretrained(name)
model.load_adapter("tuned/adapter")
model.save_pretrained("tuned/both")

# Or one model without an adapter. The base model's weights are saved too, because they were changed.
merged = trainer.model.merge_and_unload()
merged.save_pretrained("tuned/merged")
processor.save_pretrained("tuned/merged")
print("Saved: tuned/adapter, tuned/both, tuned/merged")
