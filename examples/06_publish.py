"""
6. Publish a checkpoint with its card.

    python examples/06_publish.py                    # writes ./published and prints what a push would hold
    python examples/06_publish.py me/mosaic-tprl     # pushes it; needs `hf auth login`
"""

import sys
from pathlib import Path

from huggingface_hub import HfApi
from transformers import AutoModelForImageTextToText, AutoProcessor

import tprl_hf
from tprl_hf.hub.publishing import files_to_publish, publish

# Any model that prunes: here the embedded policy with another default budget.
name = tprl_hf.embedded_checkpoint()
model, processor = AutoModelForImageTextToText.from_pretrained(name), AutoProcessor.from_pretrained(name)
model.config.keep_ratio = 1 / 9

# The base model of this checkpoint is not on the Hub, so its weights are published too. Where it is, leave
# save_base_model out: policy, autoencoder and config are a few MB.
model.save_pretrained("published", save_base_model=True)
processor.save_pretrained("published")

if sys.argv[1:]:
    commit = publish("published", sys.argv[1])  # model, processor, code and card, and nothing else of the folder
    print(f"Pushed to {commit.repo_url}")
else:
    files = files_to_publish("published", "me/mosaic-tprl", HfApi())
    for path, content in sorted(files.items()):
        print(f"{path:40} {len(content) if isinstance(content, bytes) else Path(content).stat().st_size:>10,} bytes")
    print(files["README.md"].decode())
