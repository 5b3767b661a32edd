"""
Requests per second and time to the first token of a server that runs: `tprl serve` or `vllm serve`, asked alike.

    python -m tests.serving.vllm.requests_per_second URL --budgets '{"prune": false}' '{"keep_ratio": 0.333}'

Each request, in every repetition, has an image of its own, so that no cache helps. Compare figures of one machine that
does nothing else. `compare_servers.py` starts both servers and asks them in one run.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import openai

from tests.serving.test_serve import data_url
from tprl_hf.data import mosaic_vqa

NEW_TOKENS = 8
QUESTIONS_PER_IMAGE = 6
HEADER = "| budget | clients | requests/s (median, least to most) | first token, ms (median) |\n|---|---|---|---|"


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


def measured(
    url: str, budgets: list[dict], clients: list[int], requests: int, repetitions: int, seed: int
) -> Iterator[dict[str, Any]]:
    """
    Rows of figures: one for each budget and number of clients that ask at once.

    Args:
        url (`str`): Of the server, without /v1.
        budgets (`list[dict]`): Of the requests; an empty one leaves the server's own.
        clients (`list[int]`): That ask at once.
        requests (`int`): In a repetition.
        repetitions (`int`): That count; one more comes before them.
        seed (`int`): Of the questions.
    """
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        served = client.models.list().data[0]
        to_vllm = served.owned_by == "vllm"
        new = requests * (repetitions + 1) * len(budgets) * len(clients)
        questions = mosaic_vqa(split="test", seed=seed, num_samples=QUESTIONS_PER_IMAGE * new)
        rows = iter(questions.select(range(0, QUESTIONS_PER_IMAGE * new, QUESTIONS_PER_IMAGE)))
        for budget in budgets:
            for number in clients:
                rates, waits = [], []
                for repetition in range(repetitions + 1):
                    asked = [(data_url(row["images"][0]), row["prompt"]) for row in islice(rows, requests)]
                    begin = time.perf_counter()
                    with ThreadPoolExecutor(number) as pool:
                        times = list(pool.map(lambda one, b=budget: ask(client, served.id, *one, b, to_vllm), asked))
                    if repetition:  # the first warms up
                        rates.append(requests / (time.perf_counter() - begin))
                        waits += times
                yield {
                    "server": served.owned_by,
                    "budget": budget,
                    "clients": number,
                    "requests_per_second": {
                        "median": statistics.median(rates),
                        "least": min(rates),
                        "most": max(rates),
                    },
                    "first_token_ms": {
                        "median": 1000 * statistics.median(waits),
                        "p90": 1000 * statistics.quantiles(waits, n=10)[-1],
                    },
                }


def line(row: dict[str, Any]) -> str:
    rate = row["requests_per_second"]
    spread = f"{rate['median']:.2f} ({rate['least']:.2f} to {rate['most']:.2f})"
    return f"| {json.dumps(row['budget'])} | {row['clients']} | {spread} | {row['first_token_ms']['median']:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the server, without /v1")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 12], help="that ask at once (1 and 12)")
    parser.add_argument("--budgets", type=json.loads, nargs="+", default=[{}], help="JSON (the server's own)")
    parser.add_argument("--requests", type=int, default=60, help="in a repetition (60)")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seed", type=int, default=7, help="of the questions (7)")
    print(HEADER)
    for row in measured(**vars(parser.parse_args())):
        print(line(row), flush=True)


if __name__ == "__main__":
    main()
