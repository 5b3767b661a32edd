"""`vllm serve` as its users have it: a process of its own, a policy whose base model lies elsewhere, many clients."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import openai
import pytest

from tests.serving.test_serve import data_url
from tests.serving.vllm.engine import ENVIRONMENT, NEW_TOKENS, RUNNER, Request, generated
from tprl_hf.data import mosaic_vqa
from tprl_hf.loading import load_model

BUDGETS = [{"num_keep": 16}, {"num_keep": 48}, {"keep_ratio": 1 / 18}, {"keep_ratio": 2 / 9}, {"prune": False}]
SERVER_DEFAULT = {"num_keep": 16}
START_SECONDS = 900
VLLM = Path(sys.executable).with_name("vllm")


@contextlib.contextmanager
def serving(checkpoint: Path, *words: str):
    """`vllm serve` on a free port; gives its address."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    settings = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "16"]
    place = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "mosaic"]
    command = [VLLM, "serve", checkpoint, *settings, *place, *words]
    log = checkpoint.parent / "vllm.log"
    with log.open("w") as output:
        apart = {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", RUNNER: "0"}
        environment = {**os.environ, **ENVIRONMENT, **apart}
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
            with contextlib.suppress(OSError), urlopen(f"{url}/health", timeout=5) as answer:
                if answer.status == 200:
                    break
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The embedded model as a policy alone, without a tokenizer, beside its base model."""
    folder = tmp_path_factory.mktemp("models")
    model, processor = load_model()
    model.lvlm.generation_config = model.generation_config
    model.lvlm.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    model.config.base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "policy")
    assert not model.from_pretrained(folder / "policy").config.includes_base_model
    return folder / "policy"


@pytest.fixture(scope="module")
def client(checkpoint):
    words = ["--limit-mm-per-prompt", '{"image": 1}', "--mm-processor-kwargs", json.dumps(SERVER_DEFAULT)]
    with (
        serving(checkpoint, *words, "--trust-request-mm-kwargs") as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def requests():
    rows = mosaic_vqa(split="test", seed=3, num_samples=60)
    return [Request(row["prompt"], row["images"], BUDGETS[index % len(BUDGETS)]) for index, row in enumerate(rows)]


def ask(client, request: Request, **settings):
    content = [
        {"type": "image_url", "image_url": {"url": data_url(request.images[0])}},
        {"type": "text", "text": request.question},
    ]
    body = {"mm_processor_kwargs": request.budget} if request.budget else {}
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(
        model="mosaic", messages=messages, max_tokens=NEW_TOKENS, temperature=0, extra_body=body, **settings
    )


def test_twelve_clients_at_once_with_budgets_of_their_own(client, requests):
    model, processor = load_model()
    wanted = [processor.decode(ids, skip_special_tokens=True).strip() for ids in generated(model, processor, requests)]
    with ThreadPoolExecutor(12) as clients:
        found = list(clients.map(lambda request: ask(client, request), requests))
    assert [one.choices[0].message.content.strip() for one in found] == wanted
    by_budget = {str(request.budget): one.usage.prompt_tokens for request, one in zip(requests, found, strict=True)}
    assert len(set(by_budget.values())) == len(BUDGETS)  # what the LLM reads is counted, not the full prompt


def test_the_servers_budget_is_for_requests_without_one_and_streams_are_the_same(client, requests):
    model, processor = load_model()
    bare = replace(requests[1], budget={})
    (ids,) = generated(model, processor, [replace(bare, budget=SERVER_DEFAULT)])
    wanted = processor.decode(ids, skip_special_tokens=True).strip()
    assert ask(client, bare).choices[0].message.content.strip() == wanted
    parts = [chunk.choices[0].delta.content or "" for chunk in ask(client, bare, stream=True)]
    assert "".join(parts).strip() == wanted
    asked = replace(bare, budget=SERVER_DEFAULT)
    assert ask(client, bare).usage.prompt_tokens == ask(client, asked).usage.prompt_tokens


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"num_keep": 8, "keep_ratio": 0.5}, "Pass only one of"),
        ({"threshold": 0.4}, "cannot be used with vLLM"),
        ({"keep_ratio": 2.0}, "the fraction that is KEPT, in (0, 1]; got 2.0"),
        ({"num_keep": "many"}, "num_keep must be a whole number of at least 1; got 'many'"),
    ],
    ids=str,
)
def test_a_bad_budget_is_a_400_with_our_text(client, requests, budget, message):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, replace(requests[0], budget=budget))
    assert caught.value.status_code == 400 and message in str(caught.value)
    assert ask(client, requests[0]).choices[0].message.content


def test_without_the_flag_a_requests_budget_is_refused_by_vllm():
    """Held by a look at vLLM, since a second server would take a minute."""
    from vllm.entrypoints.generate.base.protocol import validate_request_mm_kwargs
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="--trust-request-mm-kwargs"):
        validate_request_mm_kwargs(
            mm_processor_kwargs={"num_keep": 8}, media_io_kwargs=None, trust_request_mm_kwargs=False
        )
