"""`tprl serve` as its users have it: a process of its own, and the `openai` client."""

import base64
import contextlib
import io
import json
import re
import shlex
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import openai
import pytest
from transformers.cli.serving.chat_completion import TransformersCompletionCreateParamsStreaming

from tests.serving.raw_requests import data_url as data_url_of
from tests.serving.raw_requests import served
from tprl_hf.cli.main import main, make_parser
from tprl_hf.data import mosaic_vqa
from tprl_hf.evaluation.answers import generate_answers
from tprl_hf.loading import load_model
from tprl_hf.serving.chat_requests import COUNTS, NUMBERS, UNSERVED

pytestmark = pytest.mark.short

MAX_TOKENS = 4
BUDGETS = [{}, {"keep_ratio": 1 / 9}, {"num_keep": 1}, {"threshold": 0.5}, {"prune": False}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The embedded model with a policy and a budget, all in one place."""
    path = tmp_path_factory.mktemp("models") / "mosaic-tprl"
    model, processor = load_model()
    model.config.keep_ratio, model.config.num_keep, model.config.threshold = 1 / 3, None, None
    model.save_pretrained(path, save_base_model=True)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def samples():
    return list(mosaic_vqa(split="test", seed=3, num_samples=6))


@contextlib.contextmanager
def serving(*words: str, stderr=None):
    """Runs `tprl serve` on a free port; gives its first line and a client."""
    with served(*words, stderr=stderr) as (_, line, (host, port)):
        url = f"http://{host}:{port}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            yield line, client


@pytest.fixture(scope="module")
def client(checkpoint):
    with serving(str(checkpoint), "--max-request-mb", "1") as (line, client):
        assert line.startswith("Serving mosaic-tprl at http://127.0.0.1:") and "as the checkpoint says" in line
        yield client


def data_url(image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return data_url_of(file.getvalue())


def ask(client, question: str, url: str | None, model="mosaic-tprl", **settings):
    content = [{"type": "text", "text": question}]
    if url is not None:
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    messages = [{"role": "user", "content": content}]
    settings = {"max_tokens": MAX_TOKENS, **settings}
    return client.chat.completions.create(model=model, messages=messages, **settings)


def text_of(stream) -> tuple[str, str]:
    """The text of all chunks, and the reason why it ended."""
    chunks = [chunk.choices[0] for chunk in stream]
    return "".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason


def body_of(samples, **fields) -> dict:
    """A request's body with the first sample's picture and question."""
    image = {"type": "image_url", "image_url": {"url": data_url(samples[0]["images"][0])}}
    content = [image, {"type": "text", "text": samples[0]["prompt"]}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": MAX_TOKENS, **fields}


def post(client, body) -> str:
    return client.post("/chat/completions", body=body, cast_to=str)


def test_answers_are_those_of_generate_at_every_budget_at_once_and_streamed(client, checkpoint, samples):
    model, processor = load_model(str(checkpoint))
    wanted, asked = [], []
    for budget in BUDGETS:
        wanted += generate_answers(model, processor, samples, 1, max_new_tokens=MAX_TOKENS, **budget)
        asked += [(sample["prompt"], data_url(sample["images"][0]), budget) for sample in samples]
    assert len({tuple(wanted[i :: len(samples)]) for i in range(len(samples))}) > 1  # not one answer to everything
    per_budget = [wanted[i : i + len(samples)] for i in range(0, len(wanted), len(samples))]
    assert len({tuple(answers) for answers in per_budget}) > 1  # the budget matters

    def answer(question):
        prompt, url, budget = question
        whole = ask(client, prompt, url, extra_body=budget)
        streamed, reason = text_of(ask(client, prompt, url, extra_body=budget, stream=True))
        assert reason == whole.choices[0].finish_reason
        return whole.choices[0].message.content.strip(), streamed.strip(), whole.usage.prompt_tokens

    with ThreadPoolExecutor(6) as clients:  # several at once, with budgets of their own
        answers = list(clients.map(answer, asked))
    assert [whole for whole, _, _ in answers] == wanted
    assert [streamed for _, streamed, _ in answers] == wanted
    assert min(tokens for _, _, tokens in answers) > 144  # usage counts the prompt as the client would


def test_a_question_without_an_image_and_a_conversation(client):
    assert ask(client, "is there a red circle ?", None).choices[0].message.content is not None
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "b"},
    ]
    done = client.chat.completions.create(model="mosaic-tprl", messages=messages, max_tokens=2)
    assert done.usage.completion_tokens <= 2 and done.id.startswith("chatcmpl-")


def test_the_page_runs_as_it_stands(client, samples, tmp_path, monkeypatch, capsys):
    samples[0]["images"][0].save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    code = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)[0]  # the others are for vLLM
    exec(compile(code.replace("http://127.0.0.1:8000/v1", str(client.base_url)), "serving.md", "exec"), {})
    assert {word.strip(".") for word in capsys.readouterr().out.lower().split()} <= {"yes", "no"}
    for line in re.findall(r"^tprl (serve.*?)(?:  +#.*)?$", page, re.M):
        make_parser().parse_args(shlex.split(line))


def test_health_and_models(client):
    (model,) = client.models.list().data
    assert model.id == "mosaic-tprl" == client.models.retrieve("mosaic-tprl").id
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")
    assert client.get("/../health", cast_to=object) == {"status": "ok", "model": "mosaic-tprl"}
    for path in ("/load_model", "/reset", "/v1/responses"):  # what transformers' own server has besides
        with pytest.raises(openai.NotFoundError):
            client.post(f"/..{path}", body={}, cast_to=object)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"extra_body": {"keep_ratio": 2}}, r"in \(0, 1\]; got 2"),
        ({"extra_body": {"keep_ratio": "1/3"}}, "keep_ratio must be float or int; got '1/3'"),
        ({"extra_body": {"num_keep": True}}, "num_keep must be int; got True"),
        ({"extra_body": {"num_keep": 5, "threshold": 0.5}}, "Pass only one of"),
        ({"extra_body": {"keep": 5}}, "Unexpected fields in the request: {'keep'}"),
        ({"extra_body": {"generation_config": {}}}, "must be a text that holds a JSON object"),
        ({"extra_body": {"chat_template_kwargs": {"chat_template": "x"}}}, "chat_template_kwargs=.* is not served"),
        ({"n": 2}, "n=2 is not served: leave it out"),
        ({"logprobs": True}, "logprobs=true is not served"),
        ({"presence_penalty": 0.5}, "presence_penalty=0.5 is not served"),
        ({"frequency_penalty": 0.5}, "frequency_penalty=0.5 is not served"),
        ({"response_format": {"type": "json_object"}}, "response_format=.* is not served"),
        ({"extra_body": {"temperature": "warm"}}, 'temperature must be a number; got "warm"'),
        ({"extra_body": {"seed": 0.5}}, "seed is a whole number of 64 bits; got 0.5"),
        ({"extra_body": {"stop": 3}}, "stop is a text, or a list of texts, none of them empty; got 3"),
        ({"stop": ["a", ""]}, "none of them empty"),
        ({"model": "other"}, "This server has the model 'mosaic-tprl'; got .other"),
        ({"url": "file:///etc/hostname"}, "No files are read"),
        ({"url": "/etc/hostname"}, "No files are read"),
        ({"url": "http://127.0.0.1:1/image.png"}, "This server fetches no images"),
        ({"url": "data:image/png;base64,!"}, "not base64"),
        (
            {"url": "data:image/png,iVBORw0KGgo="},
            "sent as data:image/png;base64,...; got 'data:image/png,iVBORw0KGgo='",
        ),
        ({"extra_body": {"verbosity": "low"}}, "verbosity=.* is not served"),
        ({"extra_body": {"moderation": {"model": "omni"}}}, "moderation=.* is not served"),
        ({"url": "data:image/svg+xml;base64,PHN2Zy8+"}, "none of PNG, JPEG"),
    ],
)
def test_what_is_refused(client, samples, settings, message):
    settings = dict(settings)
    url = settings.pop("url", data_url(samples[0]["images"][0]))
    with pytest.raises((openai.BadRequestError, openai.UnprocessableEntityError), match=message):
        ask(client, "is there a red circle ?", url, **settings)


def test_what_asks_for_nothing_is_taken(client, samples):
    for fields in ({"presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": {}}, {"verbosity": "medium"}):
        assert ask(client, samples[0]["prompt"], None, **fields).choices[0].finish_reason == "stop"


def test_each_field_of_the_protocol_is_served_refused_or_changes_no_answer():
    served = {*NUMBERS, *COUNTS, "generation_config", "logit_bias", "messages", "model", "seed", "stop", "stream"}
    changes_none = {"prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "user"}
    fields = TransformersCompletionCreateParamsStreaming.__mutable_keys__
    assert fields - UNSERVED.keys() - served <= changes_none | {"stream_options"}


def test_a_stream_has_the_form_of_the_protocol_to_its_end(checkpoint, samples):
    """The last event is a word; a refusal in place of it is the object that other refusals are."""
    with serving(str(checkpoint), "--pruner", "divprune") as (_, client):
        *_, usage, last = post(client, body_of(samples, stream=True)).split("\n\n")[:-1]
        assert last == "data: [DONE]" and '"usage"' in usage
        *_, last = post(client, body_of(samples, stream=True, threshold=0.5)).split("\n\n")[:-1]
        found = json.loads(last.removeprefix("data: "))
        assert found["error"]["type"] == "invalid_request_error" and "threshold" in found["error"]["message"]
        with pytest.raises(openai.APIError, match="threshold"):
            list(ask(client, "is", data_url(samples[0]["images"][0]), stream=True, extra_body={"threshold": 0.5}))


def test_an_answer_that_ends_with_its_last_token_is_whole(client, samples):
    url = data_url(samples[0]["images"][0])
    whole = ask(client, samples[0]["prompt"], url)
    length = whole.usage.completion_tokens
    assert whole.choices[0].finish_reason == "stop" and 1 < length < MAX_TOKENS
    for number, reason in ((length, "stop"), (length - 1, "length")):
        told = {"max_tokens": number, "extra_body": {"keep_ratio": 1 / 3}}
        assert ask(client, samples[0]["prompt"], url, **told).choices[0].finish_reason == reason
        assert text_of(ask(client, samples[0]["prompt"], url, stream=True, **told))[1] == reason


def test_a_checkpoint_with_generation_settings_of_its_own(checkpoint, samples, tmp_path):
    """They count beside those of a request; its texts end the answer, and it may search with beams."""
    shutil.copytree(checkpoint, tmp_path / "own")
    path = tmp_path / "own" / "generation_config.json"
    own = {"num_beams": 2, "stop_strings": ["o"], "sequence_bias": [[[5, 6], -1.0]]}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    sample = next(one for one in samples if one["answer"] == "no")
    url, greedy = data_url(sample["images"][0]), {"generation_config": '{"num_beams": 1, "stop_strings": ["x"]}'}
    with serving(str(tmp_path / "own")) as (_, client):
        for settings in ({}, {"extra_body": {"generation_config": '{"top_k": 5}'}}, {"extra_body": greedy}):
            choice = ask(client, sample["prompt"], url, model="own", **settings).choices[0]
            assert (choice.message.content, choice.finish_reason) == ("n", "stop")
        assert text_of(ask(client, sample["prompt"], url, model="own", stream=True, extra_body=greedy))[0] == "n"


def parts_of(samples, *details):
    """A question about the first image, which comes once for each detail."""
    url = data_url(samples[0]["images"][0])
    parts = [{"type": "image_url", "image_url": {"url": url} | ({"detail": one} if one else {})} for one in details]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": samples[0]["prompt"]}]}]


@pytest.mark.parametrize(
    ("detail", "budget", "kept"), [("low", 1 / 9, 16), ("high", None, 144), ("auto", 1 / 3, 48), (None, 1 / 3, 48)]
)
@pytest.mark.parametrize("streamed", [False, True])
def test_detail_is_a_budget_and_usage_says_what_was_kept(client, checkpoint, samples, detail, budget, kept, streamed):
    model, processor = load_model(str(checkpoint))
    wanted = {"prune": False} if budget is None else {"keep_ratio": budget}
    (expected,) = generate_answers(model, processor, samples[:1], max_new_tokens=MAX_TOKENS, **wanted)
    asked = {"model": "mosaic-tprl", "messages": parts_of(samples, detail), "max_tokens": MAX_TOKENS}
    timed = {"extra_body": {"timings": True}}
    if streamed:
        chunks = list(client.chat.completions.create(**asked, **timed, stream=True))
        text, last = "".join(chunk.choices[0].delta.content or "" for chunk in chunks), chunks[-1]
    else:
        last = client.chat.completions.create(**asked, **timed)
        text = last.choices[0].message.content
    assert text.strip() == expected
    assert last.usage.prompt_tokens_details.image_tokens == 144
    assert last.usage.prompt_tokens_details.image_tokens_kept == kept
    assert set(last.timings) == {"read_ms", "waited_ms", "prepared_ms", "generated_ms"}
    assert all(one >= 0 for one in last.timings.values()) and last.timings["generated_ms"] > 0
    assert not hasattr(client.chat.completions.create(**asked), "timings")


def test_what_detail_cannot_say_is_refused(client, samples):
    for details, extra, message in [
        (("low", "high"), {}, "have one detail; got high, low"),
        (("low",), {"keep_ratio": 0.5}, "a detail other than auto, or keep_ratio, not both"),
        (("medium",), {}, 'detail is one of auto, high, low; got "medium"'),
    ]:
        with pytest.raises(openai.BadRequestError, match=message):
            client.chat.completions.create(model="mosaic-tprl", messages=parts_of(samples, *details), extra_body=extra)


def count(client, messages, **fields):
    body = {"messages": messages, **fields}
    return client.post("/chat/completions/count", body=body, cast_to=object)


def test_a_prompt_is_counted_before_it_is_asked(client, samples, capsys, tmp_path, checkpoint):
    for details, fields in [
        ((None,), {}),
        (("low", "low"), {}),
        (("high",), {}),
        ((None,), {"num_keep": 7}),
        ((), {}),
    ]:
        told = count(client, parts_of(samples, *details), **fields)
        usage = client.chat.completions.create(
            model="mosaic-tprl", messages=parts_of(samples, *details), max_tokens=1, extra_body=fields
        ).usage
        assert told["prompt_tokens"] == usage.prompt_tokens and told["images"] == len(details)
        found = usage.prompt_tokens_details
        assert told["prompt_tokens_details"] == {
            "image_tokens": found.image_tokens, "image_tokens_kept": found.image_tokens_kept
        }  # fmt: skip
    assert count(client, parts_of(samples, None), threshold=0.5)["prompt_tokens_details"]["image_tokens_kept"] is None
    with pytest.raises(openai.BadRequestError, match="the model 1,024 positions"):
        count(client, parts_of(samples, *[None] * 9))


def test_metrics_and_the_log_say_what_became_of_each_request(checkpoint, samples, tmp_path):
    with (
        open(tmp_path / "errors", "w") as errors,
        serving(str(checkpoint), "--max-image-tokens", "20", stderr=errors) as (_, client),
    ):
        url = data_url(samples[0]["images"][0])
        for fields in ({}, {"prune": False}, {"num_keep": 5}, {"threshold": 0.01}):
            usage = ask(client, samples[0]["prompt"], url, extra_body=fields, max_tokens=2).usage
            assert usage.prompt_tokens_details.image_tokens_kept == fields.get("num_keep", 20)
        assert count(client, parts_of(samples, "high"))["prompt_tokens_details"]["image_tokens_kept"] == 20
        with pytest.raises(openai.BadRequestError):
            ask(client, "red\nred", url, n=2)
        told = client.get("/../metrics", cast_to=str)
    assert 'tprl_requests_total{status="200"} 5.0' in told and 'tprl_requests_total{status="400"} 1.0' in told
    assert 'tprl_tokens_total{kind="visual"} 720.0' in told and 'tprl_tokens_total{kind="kept"} 85.0' in told
    assert 'tprl_request_seconds_count{stage="generated"} 4.0' in told and "process_resident_memory_bytes" in told
    lines = [line for line in (tmp_path / "errors").read_text().splitlines() if line.startswith("chatcmpl-")]
    assert len(lines) == 6
    assert re.fullmatch(
        r"chatcmpl-[-0-9a-f]+ 200 [\d.]+ s \(read [\d.]+, waited [\d.]+, prepared [\d.]+, generated [\d.]+\) "
        r"1 images, \d+ prompt tokens, 20 of 144 visual tokens kept, [12] new tokens",
        lines[0],
    )
    assert re.fullmatch(r'chatcmpl-[-0-9a-f]+ 400 [\d.]+ s "n=2 is not served: leave it out."', lines[-1])


def test_requests_that_wait_share_a_call_and_each_ends_by_itself(client, checkpoint, samples):
    def asked_alone():
        told = client.get("/../metrics", cast_to=str)
        counts = re.findall(r'^tprl_batch_requests_(?:bucket\{le="1.0"\}|count) (.*)$', told, re.M)
        return [float(count) for count in counts]

    def made(words):
        number, length = words
        fields = {"generation_config": f'{{"min_new_tokens": 4, "max_new_tokens": {length}}}', "timings": True}
        answer = ask(client, samples[number]["prompt"], urls[number], max_tokens=None, extra_body=fields)
        return answer.choices[0].message.content.strip(), answer.usage.completion_tokens, answer.timings

    long = '{"min_new_tokens": 200, "max_new_tokens": 200}'
    a_while = {"max_tokens": None, "extra_body": {"generation_config": long}}
    urls = [data_url(sample["images"][0]) for sample in samples]
    lengths = [4, 5, 6, 7, 8, 9]
    model, processor = load_model(str(checkpoint))
    expected = [
        generate_answers(model, processor, [sample], min_new_tokens=4, max_new_tokens=length)[0]
        for sample, length in zip(samples, lengths, strict=True)
    ]
    before = asked_alone()
    with ThreadPoolExecutor(7) as clients:
        first = clients.submit(ask, client, "is", urls[0], **a_while)  # the others come meanwhile
        time.sleep(0.5)
        answers = list(clients.map(made, enumerate(lengths)))
        first.result()
    assert [text for text, _, _ in answers] == expected
    assert all(tokens <= length for (_, tokens, _), length in zip(answers, lengths, strict=True))
    alone, count = (now - then for now, then in zip(asked_alone(), before, strict=True))
    assert count == 7 and alone < 4  # the long one, and at most the first of the others


def test_beams_are_served_but_not_streamed(client, checkpoint, samples):
    beams = {"generation_config": '{"num_beams": 3, "max_new_tokens": 3}'}
    url = data_url(samples[0]["images"][0])
    asked = {"max_tokens": None, "extra_body": beams}
    model, processor = load_model(str(checkpoint))
    (expected,) = generate_answers(model, processor, samples[:1], num_beams=3, max_new_tokens=3)
    assert ask(client, samples[0]["prompt"], url, **asked).choices[0].message.content.strip() == expected
    with pytest.raises(openai.BadRequestError, match="A stream has one beam; got num_beams=3"):
        ask(client, samples[0]["prompt"], url, stream=True, **asked)


def test_more_tokens_than_there_are_keeps_all(client, samples):
    url = data_url(samples[0]["images"][0])
    answers = [ask(client, samples[0]["prompt"], url, extra_body=one) for one in ({"num_keep": 500}, {"prune": False})]
    assert answers[0].choices[0].message == answers[1].choices[0].message


LONG = {"extra_body": {"generation_config": '{"min_new_tokens": 800, "max_new_tokens": 800}'}, "max_tokens": None}


@pytest.mark.parametrize("stop", ["e", ["e"], ["zzz", "es"], "yes", "no such text", ["s", "ye"], None])
def test_an_answer_ends_before_what_the_client_names(client, samples, stop):
    sample = next(one for one in samples if one["answer"] in ("yes", "no"))
    url = data_url(sample["images"][0])
    whole = ask(client, sample["prompt"], url).choices[0].message.content
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    expected = whole[: min((whole.index(one) for one in stops if one in whole), default=len(whole))]
    answer = ask(client, sample["prompt"], url, stop=stop).choices[0]
    assert (answer.message.content, answer.finish_reason) == (expected, "stop")
    assert text_of(ask(client, sample["prompt"], url, stop=stop, stream=True)) == (expected, "stop")


def test_a_stop_frees_the_model(client, samples):
    """Generation ends there; the answer is not only cut. A text may lie across tokens."""
    url = data_url(samples[0]["images"][0])
    many = {"generation_config": '{"min_new_tokens": 40, "max_new_tokens": 40}'}
    whole = ask(client, samples[0]["prompt"], url, max_tokens=None, extra_body=many)
    text = whole.choices[0].message.content
    words = text.split()
    assert whole.usage.completion_tokens == 40 and len(words) > 8
    stop = text[text.index(words[3]) : text.index(words[3]) + len(words[3]) + 2]
    for where in ({"stop": [stop]}, {"stop_strings": stop}):
        body = dict(many)
        if "stop" in where:
            body |= where
        else:
            body = {"generation_config": many["generation_config"][:-1] + ', "stop_strings": "' + stop + '"}'}
        cut = ask(client, samples[0]["prompt"], url, max_tokens=None, extra_body=body)
        assert cut.choices[0].message.content == text[: text.index(stop)]
        assert cut.usage.completion_tokens < 12
        streamed, reason = text_of(
            ask(client, samples[0]["prompt"], url, max_tokens=None, extra_body=body, stream=True)
        )
        assert (streamed, reason) == (text[: text.index(stop)], "stop")


def test_a_seed_gives_the_same_answer_again(client, samples):
    url = data_url(samples[0]["images"][0])

    def draw(seed):
        return ask(client, "is", url, max_tokens=24, temperature=2.0, seed=seed).choices[0].message.content

    with ThreadPoolExecutor(4) as clients:  # whoever else draws in between
        answers = list(clients.map(draw, [1, 2, 3, 4, 5, 6] * 2))
    assert answers[:6] == answers[6:] and len({*answers}) > 1
    assert draw(1) == answers[0]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_leaves_frees_the_model(client, samples, streamed):
    url = data_url(samples[0]["images"][0])
    start = time.monotonic()
    ask(client, samples[0]["prompt"], url)
    alone = time.monotonic() - start
    hasty, before = client.with_options(timeout=0.5), left(client)
    for _ in range(3):  # clients that try again by themselves
        if streamed:
            with ask(client, samples[0]["prompt"], url, stream=True, **LONG) as stream:
                next(iter(stream))
        else:
            with pytest.raises(openai.APITimeoutError):
                ask(hasty, samples[0]["prompt"], url, **LONG)
    start = time.monotonic()
    ask(client, samples[0]["prompt"], url)
    assert time.monotonic() - start < 10 * alone + 3
    assert left(client) >= before + 3


def left(client) -> float:
    """How many clients did not wait for their answer, as the metrics have it."""
    text = client.get("/../metrics", cast_to=str)
    found = re.search(r'^tprl_requests_total{status="499"} (\S+)$', text, re.MULTILINE)
    return float(found.group(1)) if found else 0.0


def test_an_image_in_base64_may_have_lines(client, samples):
    header, data = data_url(samples[0]["images"][0]).split(",")
    url = f"{header},{base64.encodebytes(base64.b64decode(data)).decode()}"
    whole = ask(client, samples[0]["prompt"], f"{header},{data}").choices[0].message.content
    assert "\n" in url and ask(client, samples[0]["prompt"], url).choices[0].message.content == whole


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"{", 400, "not JSON"),
        (b"[]", 400, "must be a JSON object; got list"),
        (b'{"messages": []}', 400, "at least one message"),
        (b'{"messages": ["hi"]}', 400, "an object with a `role`"),
        (b'{"messages": [{"role": "user", "content": 3}]}', 400, "a text or a list of parts; got int"),
        (b'{"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}', 400, "one of type 'video_url'"),
        (b" " * 1_000_001, 413, "larger than 1 MB"),
        (b" " * 50_000_000, 413, "larger than 1 MB"),
    ],
)
def test_requests_of_another_form(client, content, status, message):
    with pytest.raises(openai.APIStatusError, match=message) as error:
        client.post("/chat/completions", content=content, cast_to=object)
    assert error.value.status_code == status


def test_a_second_server_with_remote_images_and_another_pruner(client, checkpoint, samples, tmp_path):
    samples[0]["images"][0].save(tmp_path / "image.png")
    (tmp_path / "large.png").write_bytes(bytes(1_000_001))
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        Thread(target=web.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{web.server_port}"
        words = ["--allow-remote-images", "--max-request-mb", "1", "--pruner", "uniform", "--num-keep", "6"]
        with serving(str(checkpoint), *words, "--name", "me/mosaic") as (line, second):
            assert "Serving me/mosaic at" in line and "(uniform, num_keep=6)" in line
            found = ask(second, samples[0]["prompt"], f"{url}/image.png", model="me/mosaic")
            asked = ask(
                second, samples[0]["prompt"], f"{url}/image.png", model="me/mosaic", extra_body={"prune": True}
            )
            assert asked.usage.prompt_tokens_details.image_tokens_kept == 6  # which names no budget
            for name, why in (("none.png", "404"), ("large.png", "larger than 1 MB")):
                with pytest.raises(openai.BadRequestError, match=why):
                    ask(second, "q", f"{url}/{name}", model="me/mosaic")
            question, image = samples[1]["prompt"], data_url(samples[1]["images"][0])
            unpruned = {"extra_body": {"prune": False}}
            first = ask(client, question, image, **unpruned).choices[0].message
            assert first == ask(second, question, image, model="me/mosaic", **unpruned).choices[0].message
        web.shutdown()
    from tprl_hf.pruners import UniformPruner

    model, processor = load_model(str(checkpoint))
    with model.using(UniformPruner(num_keep=6)):
        (wanted,) = generate_answers(model, processor, samples[:1], max_new_tokens=MAX_TOKENS)
    assert found.choices[0].message.content.strip() == wanted


def test_budgets_of_a_model_without_a_policy_that_prunes_nothing_by_itself(checkpoint, samples, tmp_path):
    """And what `--quiet` leaves of the log."""
    model, processor = load_model(str(checkpoint))
    model.lvlm.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    words = [str(tmp_path / "base"), "--name", "mosaic-tprl", "--no-prune", "--quiet", "--max-image-tokens", "100"]
    url = data_url(samples[0]["images"][0])
    with open(tmp_path / "errors", "w") as errors, serving(*words, stderr=errors) as (line, client):
        assert "(none, prune=False)" in line
        for fields, kept in (({}, 100), ({"keep_ratio": 1 / 9}, 16), ({"num_keep": 5}, 5)):
            usage = ask(client, samples[0]["prompt"], url, extra_body=fields, max_tokens=1).usage
            assert usage.prompt_tokens_details.image_tokens_kept == kept
        with pytest.raises(openai.BadRequestError):
            ask(client, "red", url, n=2)
    (line,) = [one for one in (tmp_path / "errors").read_text().splitlines() if one.startswith("chatcmpl-")]
    assert " 400 " in line


def test_without_the_extra_it_says_which_one(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "tprl_hf.serving.connections", raising=False)  # other tests import it
    assert main(["serve"]) == 2
    assert "pip install 'tprl_hf[serve]'" in capsys.readouterr().err


def test_a_port_that_is_taken_is_one_line(client, capsys):
    port = client.base_url.port
    assert main(["serve", "--port", str(port)]) == 2
    err = capsys.readouterr().err
    assert f"Cannot listen at 127.0.0.1, port {port}" in err and err.count("\n") == 1


def test_a_set_pruner_is_served_and_unknown_words_are_told(checkpoint, samples, tmp_path):
    """A checkpoint with a pruner that needs no training, and a question outside of its small vocabulary."""
    model, processor = load_model(str(checkpoint))
    model.set_pruner("divprune", num_keep=5)
    model.save_pretrained(tmp_path / "mosaic-tprl", save_base_model=True)
    processor.save_pretrained(tmp_path / "mosaic-tprl")
    (expected,) = generate_answers(model, processor, samples[:1], max_new_tokens=MAX_TOKENS)
    with (
        open(tmp_path / "errors", "w") as errors,
        serving(str(tmp_path / "mosaic-tprl"), stderr=errors) as (line, one),
    ):
        assert "(divprune, as the checkpoint says)" in line
        url = data_url(samples[0]["images"][0])
        answer = ask(one, samples[0]["prompt"], url, max_tokens=MAX_TOKENS, temperature=0)
        assert answer.choices[0].message.content.strip() == expected
        ask(one, "is there a red elephant ?", url, max_tokens=1)
        threshold = {"extra_body": {"threshold": 0.5}}  # DivPrune has no scores: an error of generate
        with pytest.raises(openai.BadRequestError, match="pass keep_ratio or num_keep"):
            ask(one, "is", url, **threshold)
        with pytest.raises(openai.APIError) as error:
            text_of(ask(one, "is", url, stream=True, **threshold))
        assert "pass keep_ratio or num_keep" in error.value.body["message"]
    (note,) = [line for line in (tmp_path / "errors").read_text().splitlines() if "does not know" in line]
    assert "'elephant'" in note and "red" not in note
