"""
Requests per second and time to the first token of a server that runs: `tprl serve` or `vllm serve`, asked alike.

    python -m tests.serving.vllm.requests_per_second URL --budgets '{"prune": false}' '{"keep_ratio": 0.333}'

Each request has an image of its own, so that no cache helps. Compare figures of one machine that does nothing else.
"""

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import openai

from tests.serving.test_serve import data_url
from tprl_hf.data import mosaic_vqa

NEW_TOKENS = 8


def ask(client: openai.OpenAI, model: str, url: str, question: str, budget: dict, to_vllm: bool) -> float:
    """Seconds to the first token of a streamed answer."""
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    body = {"mm_processor_kwargs": budget} if to_vllm else budget
    begin, first = time.perf_counter(), None
    messages = [{"role": "user", "content": content}]
    stream = client.chat.completions.create(
        model=model, messages=messages, max_tokens=NEW_TOKENS, stream=True, extra_body=body
    )
    for chunk in stream:
        if first is None and chunk.choices and chunk.choices[0].delta.content:
            first = time.perf_counter() - begin
    return time.perf_counter() - begin if first is None else first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the server, without /v1")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 12], help="that ask at once (1 and 12)")
    parser.add_argument("--budgets", type=json.loads, nargs="+", default=[{}], help="JSON (the server's own)")
    parser.add_argument("--requests", type=int, default=60, help="in a repetition (60)")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seed", type=int, default=7, help="of the questions (7)")
    arguments = parser.parse_args()
    with openai.OpenAI(base_url=f"{arguments.url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        served = client.models.list().data[0]
        to_vllm = served.owned_by == "vllm"
        rows = mosaic_vqa(split="test", seed=arguments.seed, num_samples=6 * arguments.requests)
        asked = [(data_url(row["images"][0]), row["prompt"]) for row in list(rows)[::6]]  # six questions an image
        print(f"{served.id} of {served.owned_by}, {arguments.requests} requests of {NEW_TOKENS} new tokens or fewer")
        print(
            "| budget | clients | requests/s (median, least to most) | first token, ms (median) |\n|---|---|---|---|"
        )
        for budget in arguments.budgets:
            for clients in arguments.clients:
                rates, waits = [], []
                for repetition in range(arguments.repetitions + 1):
                    begin = time.perf_counter()
                    with ThreadPoolExecutor(clients) as pool:
                        times = list(pool.map(lambda one, b=budget: ask(client, served.id, *one, b, to_vllm), asked))
                    if repetition:  # the first warms up
                        rates.append(len(asked) / (time.perf_counter() - begin))
                        waits += times
                rate = f"{statistics.median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f})"
                print(
                    f"| {json.dumps(budget)} | {clients} | {rate} | {1000 * statistics.median(waits):.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
