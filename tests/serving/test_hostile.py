"""What a server has to bear: requests of any form and size, slow and leaving clients, pages of other servers."""

import contextlib
import io
import json
import os
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.serving.raw_requests import (
    JSON,
    data_url,
    header_of,
    memory_mb,
    picture,
    pulse_of,
    question,
    send,
    served,
)
from tprl_hf.data import mosaic_vqa
from tprl_hf.evaluation.answers import generate_answers
from tprl_hf.loading import load_model
from tprl_hf.serving.chat_requests import GENERATION_COUNTS, GENERATION_NUMBERS, NUMBERS, UNSERVED

NUM_REQUESTS = int(os.environ.get("TPRL_TEST_REQUESTS", 160))
CLIENTS = 16
HEALTH_SECONDS = 1  # without the time in which other processes had all cores


@pytest.fixture(scope="module")
def server():
    """The embedded model in a process of its own, and where it listens."""
    with served() as (process, _, address):
        assert send(address, question(images=(picture(),))).status == 200
        yield process, address


WRONG = ["", "x", "\ud800", 0, -1, 1.5, 10**30, 1e308, True, [], {}, [None], {"a": {"b": []}}, [1, "a"], "[]"]
SETTINGS = [*GENERATION_NUMBERS, *GENERATION_COUNTS, "do_sample", "stop_strings", "max_time", "assistant_model"]
PARTS = [
    *WRONG,
    {"type": "text"},
    {"type": "image"},
    {"type": "image_url"},
    {"type": "image_url", "image_url": {"url": ""}},
    {"type": "input_audio"},
]
URLS = [
    *("data:", "data:,", "data:image/png;base64", "data:image/png;base64,\u00e9", "data:image/png;base64,===="),
    *("file:///etc/hostname", "ftp://127.0.0.1/y", "//x", "http://[::1", "https://\ud800", "javascript:1"),
]


def hostile_requests():
    """Each field with values of any type, messages of any form, bodies that are not what they should be."""
    fields = {*NUMBERS, *UNSERVED, "model", "messages", "max_tokens", "logit_bias", "stop", "seed", "stream"}
    fields |= {"stream_options", "user", "generation_config", "keep_ratio", "num_keep", "threshold", "prune", "other"}
    found = [question(**{field: value}) for field in sorted(fields) for value in WRONG]
    for name in SETTINGS:
        found += [question(generation_config=json.dumps({name: value})) for value in (-1, 10**30, "x", [], True)]
    for part in PARTS:
        user = {"role": "user", "content": "a"}
        messages = [part, {"role": "user", "content": part}, {"role": "user", "content": [part]}]
        messages += [{**user, "role": part}, {**user, "name": part}, {**user, "tool_calls": part}]
        found += [{"messages": [message]} for message in messages]
    for url in URLS:
        found.append({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]})
    for text in ("<image>", "<image>" * 50, "\0", "\ud83d", "{% for x in range(10**9) %}"):
        found += [question(text), question(text, (picture(),))]
    whole = json.dumps(question()).encode()
    found += [b"", b"{", b"null", b'"a"', whole[:-1], whole + b"x", b"\xff\xfe\xff", b'{"temperature": 1e999}']
    return [*found, b'{"messages": NaN}', b"{" * 1000, b'{"a":' * 20_000]


def test_the_pulse_sees_a_server_that_is_busy_itself():
    """Where its loop works for a second, /health counts a second, whatever other processes do."""

    class Busy(BaseHTTPRequestHandler):
        def do_GET(self):
            until = time.thread_time() + HEALTH_SECONDS
            while time.thread_time() < until:
                pass
            self.send_response(200)
            self.end_headers()

        def log_message(self, *words):
            pass

    with HTTPServer(("127.0.0.1", 0), Busy) as web:
        Thread(target=web.serve_forever, daemon=True).start()
        with pulse_of(web.server_address, os.getpid()) as pulse:
            time.sleep(0.1)
        web.shutdown()
    assert 0.95 * HEALTH_SECONDS < min(pulse.seconds) <= max(pulse.by_the_clock)


def test_every_refusal_is_json_with_a_message(server):
    process, address = server
    requests = hostile_requests()
    assert len(requests) >= 600
    before = send(address, question(images=(picture(),))).json()["choices"]
    with pulse_of(address, process.pid) as pulse, ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(lambda request: send(address, request), requests))
    for request, answer in zip(requests, answers, strict=True):
        assert answer.status in (200, 400, 422), (request, answer)
        assert answer.status == 200 or len(answer.refusal()) < 1200, (request, answer)
    assert 400 <= sum(answer.status != 200 for answer in answers)
    assert max(pulse.seconds) < HEALTH_SECONDS
    assert send(address, question(images=(picture(),))).json()["choices"] == before


BUDGETS = [{}, {"keep_ratio": 1 / 9}, {"num_keep": 2}, {"threshold": 0.5}, {"prune": False}]
LONG = {"max_tokens": None, "generation_config": json.dumps({"min_new_tokens": 300, "max_new_tokens": 300})}


def leave_soon(address, request, seconds):
    """Asks, waits for a while, and is gone."""
    content = json.dumps(request).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address[0]}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(address, 60) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        time.sleep(seconds)


def text_of(answer) -> str:
    if not answer.content.startswith(b"data: "):
        return answer.json()["choices"][0]["message"]["content"].strip()
    *events, last = [event[6:] for event in answer.content.decode().split("\n\n") if event]
    assert last == "[DONE]"
    chunks = map(json.loads, events)
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks).strip()


def test_many_clients_of_whom_some_leave_and_some_send_nonsense(server, capsys):
    """Each answer is that of the direct call, none is lost, and memory does not grow."""
    process, address = server
    rows = list(mosaic_vqa("test", seed=11, num_samples=8))
    images = [content_of(row["images"][0]) for row in rows]
    model, processor = load_model()
    expected = [generate_answers(model, processor, rows, 1, max_new_tokens=3, **budget) for budget in BUDGETS]
    nonsense = hostile_requests()[::7]
    memory, latest = [], []

    def ask(number):
        draw = random.Random(number)
        kind = draw.choices(["whole", "streamed", "nonsense", "leaves"], [55, 20, 12, 13])[0]
        row, budget = draw.randrange(len(rows)), draw.randrange(len(BUDGETS))
        request = question(rows[row]["prompt"], (images[row],), **BUDGETS[budget]) | {"max_tokens": 3}
        if number % 20 == 0:
            memory.append(memory_mb(process.pid))
        if kind == "leaves":
            leave_soon(address, {**request, **LONG, "stream": draw.random() < 0.5}, draw.uniform(0, 0.5))
        elif kind == "nonsense":
            answer = send(address, draw.choice(nonsense))
            assert answer.status in (200, 400, 422) and (answer.status == 200 or answer.refusal()), answer
        else:
            answer = send(address, {**request, "stream": kind == "streamed"})
            assert answer.status == 200 and answer.refusal() is None, answer
            latest.append(answer.seconds)
            return kind, text_of(answer) == expected[budget][row]
        return kind, True

    start = time.monotonic()
    with pulse_of(address, process.pid) as pulse, ThreadPoolExecutor(CLIENTS) as clients:
        done = list(clients.map(ask, range(NUM_REQUESTS)))
    seconds = time.monotonic() - start
    assert len(done) == NUM_REQUESTS and {kind for kind, _ in done} == {"whole", "streamed", "nonsense", "leaves"}
    wrong = [kind for kind, correct in done if not correct]
    warm = memory[len(memory) // 4]
    with capsys.disabled():
        print(
            f"\n{NUM_REQUESTS} requests, {CLIENTS} clients: {len(latest)} answers, {len(wrong)} wrong, "
            f"{seconds:.0f} s, latency median {sorted(latest)[len(latest) // 2]:.2f} max {max(latest):.2f} s; "
            f"memory {warm:.0f} MB after a quarter, {memory[-1]:.0f} MB at the end; "
            f"/health {len(pulse.seconds)} times, max {max(pulse.seconds):.2f} s, "
            f"{max(pulse.by_the_clock):.2f} s by the clock"
        )
    assert not wrong
    assert memory[-1] - warm < 30
    assert max(pulse.seconds) < HEALTH_SECONDS


def content_of(image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def of_messages(content: bytes) -> bytes:
    return b'{"messages": [' + content + b"]}"


AMPLIFIERS = {
    "a thread of 1 x 4,000": (lambda: question(images=(header_of(1, 4000),)), "at most 100 times the other"),
    "a thread of 49 million": (lambda: question(images=(header_of(1, 49_000_000),)), "at most 100 times the other"),
    "more pixels than Pillow reads": (lambda: question(images=(header_of(30_000, 30_000),)), "at most 50,000,000"),
    "three large ones": (lambda: question(images=(header_of(7000, 7000),) * 3), "147,000,000 pixels together"),
    "more images": (lambda: question(images=(picture(),) * 17), "17 images; at most 16"),
    "2,000 images": (lambda: question(images=(picture(),) * 2000), "2,001 parts; at most 1,000"),
    "a prompt beyond the positions": (
        lambda: question(images=(picture(),) * 16),
        "and the model 1,024 positions",
    ),
    "a long text": (lambda: question("red " * 24_000), "24,003 tokens, and the model 1,024 positions"),
    "a longer text": (lambda: question("red " * 30_000), "120,000 characters; at most 100,000"),
    "a word of 10 MB": (lambda: question("a" * 10_000_000), "10,000,000 characters"),
    "100,000 messages": (lambda: {"messages": [{"role": "user", "content": "a"}] * 100_000}, "50,000 commas"),
    "1,001 messages": (lambda: {"messages": [{"role": "user", "content": "a"}] * 1001}, "1,001 messages; at most"),
    "empty lists": (lambda: of_messages(b"[]," * 6_000_000 + b"1"), "50,000 commas and brackets"),
    "depth": (lambda: of_messages(b"[" * 40_000), "not JSON"),
    "digits": (lambda: of_messages(b"1" * 19_000_000), "not JSON"),
    "escapes": (
        lambda: of_messages(b'{"role": "user", "content": "' + b"\\n" * 9_000_000 + b'"}'),
        "9,000,000 characters",
    ),
    "a long model's name": (lambda: question(model="m" * 10_000_000), "This server has the model"),
    "a long field's name": (lambda: question(**{"k" * 10_000_000: 1}), "Unexpected fields"),
    "a long answer": (lambda: question(max_tokens=5000), "from 1 to 4096; got 5000"),
    "an answer past the positions": (lambda: question(max_tokens=1020), "so an answer has at most 1,015 tokens"),
    "biases": (lambda: question(logit_bias={str(token): 1 for token in range(301)}), "at most 300 token ids"),
    "a token that is not there": (lambda: question(logit_bias={"99999": 1}), "the model has 85"),
}


@pytest.mark.parametrize("name", AMPLIFIERS)
def test_a_small_request_takes_little(server, name):
    process, address = server
    make, message = AMPLIFIERS[name]
    request = make()
    content = request if isinstance(request, bytes) else json.dumps(request).encode()
    before = memory_mb(process.pid)
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak is that from here on
    with pulse_of(address, process.pid, 0.05) as pulse:
        answer = send(address, content)
    assert answer.status in (400, 422) and message in answer.refusal()
    assert memory_mb(process.pid, "VmHWM") - before < 150
    assert max(pulse.seconds) < HEALTH_SECONDS


def test_the_largest_picture_is_bounded_too(server):
    """49 million pixels with transparency, the most that a request may cost; answered, while /health is."""
    process, address = server
    before = memory_mb(process.pid)
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    with pulse_of(address, process.pid, 0.05) as pulse:
        assert send(address, question(images=(picture(7000, 7000, "RGBA"),))).status == 200
    assert memory_mb(process.pid, "VmHWM") - before < 1500
    assert max(pulse.seconds) < HEALTH_SECONDS


def test_a_page_of_another_server_may_not_ask(server):
    _, address = server
    host = f"{address[0]}:{address[1]}"
    good = [{}, {"Host": f"localhost:{address[1]}"}, {"Host": "[::1]:80"}, {"Origin": f"http://{host}"}]
    for headers in good:
        assert send(address, question(), {**JSON, "Host": host, **headers}).status == 200
    bad = [
        ({"Host": "evil.example"}, 403, "does not know itself as"),
        ({"Host": "127.0.0.1.evil.example:80"}, 403, "does not know itself as"),
        ({"Host": "[::1"}, 403, "does not know itself as"),
        ({"Origin": "http://evil.example"}, 403, "may not ask"),
        ({"Origin": "null"}, 403, "may not ask"),
        ({"Origin": "http://localhost:3000"}, 403, "may not ask"),
        ({"Content-Type": "text/plain"}, 415, "must be application/json"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415, "must be application/json"),
    ]
    for headers, status, message in bad:
        answer = send(address, question(), {**JSON, "Host": host, **headers})
        assert answer.status == status and message in answer.refusal()
    for path in ("/health", "/v1/models"):
        assert send(address, None, {"Host": "evil.example"}, path=path, method="GET").status == 403
    answer = send(address, None, {}, path="/nothing", method="GET")
    assert answer.status == 404 and answer.refusal()


def test_what_is_not_http_is_refused_in_json(server):
    _, address = server
    for content in (b"\0\1\2\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"GET /x\r\n\r\n", b"\x16\x03\x01\r\n\r\n"):
        with socket.create_connection(address, 20) as connection:
            connection.sendall(content)
            received = b"".join(iter(lambda: connection.recv(65536), b""))
        head, _, body = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["message"]


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
SHORT_TIMES = (
    "from tprl_hf.serving import connections, limits; connections.HEAD_SECONDS = limits.BODY_SECONDS = 3; "
    "connections.SHUTDOWN_SECONDS = 1; connections.MAX_CONNECTIONS = 100"
)


@contextlib.contextmanager
def slow_connections(address, number, beginning):
    """Connections that send a byte from time to time. Gives what each received before the server closed it."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.create_connection(address, 30)) for _ in range(number)]
        for connection in found:
            connection.sendall(beginning)
        yield found


def until_closed(connections, seconds) -> list[bytes]:
    """Sends bytes slowly until the server has closed all connections, which it does within a time."""
    received = dict.fromkeys(connections, b"")
    open_ones, end = set(connections), time.monotonic() + seconds
    while open_ones:
        assert time.monotonic() < end, f"{len(open_ones)} of {len(connections)} are still open"
        time.sleep(0.2)
        for connection in list(open_ones):
            try:
                connection.sendall(b"x")
                connection.setblocking(False)
                content = connection.recv(65536)
                received[connection] += content
                if not content:
                    open_ones.discard(connection)
            except BlockingIOError:
                pass
            except OSError:
                open_ones.discard(connection)
            finally:
                connection.setblocking(True)
    return list(received.values())


def test_slow_connections_end_and_do_not_shut_others_out_and_the_server_ends_in_time():
    with served(setting=SHORT_TIMES) as (process, _, address):
        body = b"Content-Length: 1000\r\n\r\n{"
        with slow_connections(address, 64, HEAD) as heads, slow_connections(address, 64, HEAD + body) as bodies:
            for _ in range(3):
                assert send(address, question()).status == 200  # the oldest slow ones made room
            with ThreadPoolExecutor(2) as clients:
                late = [clients.submit(until_closed, some, 15) for some in (heads, bodies)]
                for one in late:
                    answers = [content for content in one.result() if content]
                    assert answers and all(content.startswith(b"HTTP/1.1 408") for content in answers)
                    _, _, first = answers[0].partition(b"\r\n\r\n")
                    assert "within 3 seconds" in json.loads(first)["error"]["message"]
        silent = socket.create_connection(address, 30)
        assert silent.recv(1) == b""  # one that says nothing at all is closed too
        silent.close()

        long = {**LONG, "generation_config": json.dumps({"min_new_tokens": 1000, "max_new_tokens": 1000})}
        with ThreadPoolExecutor(8) as clients:
            answers = [clients.submit(send, address, question(**long, stream=number % 2 == 0)) for number in range(8)]
            time.sleep(1)
            start = time.monotonic()
            process.terminate()
            assert process.wait(30) == -15
            assert time.monotonic() - start < 1 + 5 + 2  # SHUTDOWN_SECONDS, LAST_SECONDS, a busy machine
            told = [answer.result().refusal() for answer in answers]
        assert all(message is None or "The server ends" in message for message in told) and any(told)


def test_remote_images_are_bounded_in_schemes_and_time():
    """No redirect leaves http; an image that comes byte by byte ends the request in time."""

    class Web(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path.removeprefix("/to/"))
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.2)

        def log_message(self, *words):
            pass

    setting = "from tprl_hf.serving import limits; limits.FETCH_SECONDS = 2"
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), Web) as web,
        socket.create_server(("127.0.0.1", 0)) as ftp,
        served("--allow-remote-images", setting=setting) as (process, _, address),
    ):
        Thread(target=web.serve_forever, daemon=True).start()
        ftp.settimeout(0.1)
        port = ftp.getsockname()[1]
        for to in (f"ftp://127.0.0.1:{port}/x", "file:///etc/hostname", data_url(picture())):
            answer = send(address, of_image(f"http://127.0.0.1:{web.server_port}/to/{to}"))
            assert answer.status == 400 and "cannot be fetched" in answer.refusal()
        with pytest.raises(TimeoutError):
            ftp.accept()  # nobody came
        slow = of_image(f"http://127.0.0.1:{web.server_port}/slow")
        with pulse_of(address, process.pid) as pulse, ThreadPoolExecutor(4) as clients:
            answers = list(clients.map(lambda _: send(address, slow), range(4)))
        assert all("within 2 seconds" in answer.refusal() and answer.seconds < 8 for answer in answers)
        assert max(pulse.seconds) < HEALTH_SECONDS
        web.shutdown()


def of_image(url):
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
