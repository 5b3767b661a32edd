"""
Requests per second of `tprl serve` against `--max-batch`.

    python -m tests.serving.requests_per_second

The embedded model answers in one thread; all answers of a row have the same length. Counted is the processor time of
the server (HTTP and image processing included), because the clock on the wall also counts what else the machine does.
"""

import argparse
import io
import json
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import product
from pathlib import Path

from tprl_hf.data import mosaic_vqa

from .raw_requests import Address, question, send, served

QUESTIONS_PER_IMAGE = 6


def processor_seconds(pid: int) -> float:
    """What a process has used so far, its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bodies(number: int, new_tokens: int, seed: int) -> list[dict]:
    """Requests, each with an image of its own, whose answers have `new_tokens` tokens."""
    length = json.dumps({"min_new_tokens": new_tokens, "max_new_tokens": new_tokens})
    rows = mosaic_vqa(split="test", seed=seed, num_samples=QUESTIONS_PER_IMAGE * number)
    asked = []
    for row in list(rows)[::QUESTIONS_PER_IMAGE]:
        file = io.BytesIO()
        row["images"][0].save(file, "PNG")
        asked.append(question(row["prompt"], (file.getvalue(),), max_tokens=None, generation_config=length))
    return asked


def rate(pid: int, address: Address, asked: list[dict], clients: int) -> float:
    """Requests per second of the server's processor time."""
    before = processor_seconds(pid)
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda body: send(address, body), asked))
    refused = [message for answer in answers if (message := answer.refusal()) is not None]
    if refused:
        raise RuntimeError(f"{len(refused)} of {len(asked)} requests were refused: {refused[0]}")
    return len(asked) / (processor_seconds(pid) - before)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-batch", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 12], help="that ask at once (1 and 12)")
    parser.add_argument("--requests", type=int, default=48, help="in a repetition (48)")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seed", type=int, default=7, help="of the questions (7)")
    arguments = parser.parse_args(words)
    asked = {length: bodies(arguments.requests, length, arguments.seed) for length in arguments.new_tokens}
    rows = list(product(arguments.new_tokens, arguments.clients))
    rates: dict[tuple[int, int, int], list[float]] = {}
    for most in arguments.max_batch:
        with served("--max-batch", str(most)) as (process, _, address):
            rate(process.pid, address, asked[arguments.new_tokens[0]][:2], 1)  # warms up
            for _ in range(arguments.repetitions):
                for length, clients in rows:
                    found = rate(process.pid, address, asked[length], clients)
                    rates.setdefault((length, clients, most), []).append(found)
    print("| new tokens | clients | " + " | ".join(f"`--max-batch {most}`" for most in arguments.max_batch) + " |")
    print("|---|---|" + "---|" * len(arguments.max_batch))
    for length, clients in rows:
        cells = []
        for most in arguments.max_batch:
            of_cell = rates[length, clients, most]
            cells.append(f"{statistics.median(of_cell):.1f} ({min(of_cell):.1f} to {max(of_cell):.1f})")
        print(f"| {length} | {clients} | " + " | ".join(cells) + " |")
    print(
        "\nRequests per second of the server's processor time, median (least to most) of "
        f"{arguments.repetitions} times {arguments.requests} requests; seed {arguments.seed}; torch "
        f"{version('torch')}, transformers {version('transformers')}."
    )


if __name__ == "__main__":
    main()
