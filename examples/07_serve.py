"""
7. Serve a model over HTTP, by the OpenAI protocol, with a budget for each request.

    python examples/07_serve.py                       # the embedded model
    python examples/07_serve.py runs/own_data/grpo     # a checkpoint of yours, or a name on the Hub
"""

import base64
import io
import re
import subprocess
import sys

from openai import OpenAI

from tprl_hf.data import mosaic_vqa

# In the shell: tprl serve MODEL --port 8000. Port 0 takes a free one, which the first line names.
words = [sys.executable, "-m", "tprl_hf.cli.main", "serve", *sys.argv[1:2], "--port", "0"]
server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
try:
    line = server.stdout.readline()
    print(line.strip())
    client = OpenAI(base_url=re.search(r"http://\S+:\d+", line)[0] + "/v1", api_key="none")
    model = client.models.list().data[0].id

    sample = mosaic_vqa(split="test", seed=7, num_samples=3)[2]
    png = io.BytesIO()
    sample["images"][0].save(png, "PNG")
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": sample["prompt"]}]
    messages = [{"role": "user", "content": content}]

    for budget in ({"prune": False}, {"keep_ratio": 1 / 3}, {"keep_ratio": 1 / 9}):
        answer = client.chat.completions.create(model=model, messages=messages, max_tokens=8, extra_body=budget)
        tokens = answer.usage.prompt_tokens_details
        print(f"{tokens.image_tokens_kept} of {tokens.image_tokens} tokens: {answer.choices[0].message.content}")

    stream = client.chat.completions.create(model=model, messages=messages, max_tokens=8, stream=True)
    print("".join(event.choices[0].delta.content or "" for event in stream if event.choices))
finally:
    server.terminate()
    server.wait()
