"""A server in a process of its own, requests as no client library sends them, and what the process holds meanwhile."""

import base64
import contextlib
import http.client
import io
import json
import os
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import IO, Any
from urllib.parse import urlsplit

from PIL import Image

Address = tuple[str, int]
JSON = {"Content-Type": "application/json"}


@contextlib.contextmanager
def served(
    *words: str, setting: str = "", stderr: IO[str] | None = None
) -> Iterator[tuple[subprocess.Popen, str, Address]]:
    """
    Runs `tprl serve` on a free port, and ends it as a user would.

    Args:
        words (`str`): Of the command line.
        setting (`str`): A line of Python that runs before, for limits that are not options.
        stderr (`IO`, *optional*): Where its log goes.

    Yields:
        The process, its first line, and where it listens.
    """
    code = f"import sys; from tprl_hf.cli.main import main; {setting}\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "serve", *words, "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
    try:
        line = process.stdout.readline()
        assert line.startswith("Serving "), line
        place = urlsplit(line.split(" at ")[1].split(" ")[0])
        yield process, line, (place.hostname, place.port)
    finally:
        process.terminate()
        assert process.wait(30) == -15
        process.stdout.close()


@dataclass
class Answer:
    status: int
    content: bytes
    seconds: float

    def json(self) -> Any:
        return json.loads(self.content)

    def refusal(self) -> str | None:
        """The message of a refusal as the protocol has it; `None` for an answer."""
        if self.content.startswith(b"data: "):
            *_, last = [event[6:] for event in self.content.decode().split("\n\n") if event]
            if last == "[DONE]":
                return None
            found = json.loads(last)
            assert found["error"]["type"] in ("invalid_request_error", "server_error")
            return found["error"]["message"]
        found = self.json()
        if self.status < 400:
            assert "error" not in found
            return None
        assert isinstance(found["error"]["message"], str) and found["error"]["message"]
        return found["error"]["message"]


def send(
    address: Address,
    body: Any,
    headers: dict[str, str] | None = None,
    timeout: float = 120,
    path: str = "/v1/chat/completions",
    method: str = "POST",
) -> Answer:
    """One request on a connection of its own; a body that is not bytes is made JSON."""
    connection = http.client.HTTPConnection(*address, timeout=timeout)
    start = time.monotonic()
    with contextlib.closing(connection):
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, content, JSON if headers is None else headers)
        answer = connection.getresponse()
        return Answer(answer.status, answer.read(), time.monotonic() - start)


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def picture(width: int = 40, height: int = 30, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "PNG")
    return file.getvalue()


def header_of(width: int, height: int) -> bytes:
    """A PNG that says a size, and has next to no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def question(text: str = "is there a red circle ?", images: tuple[bytes, ...] = (), **fields: Any) -> dict[str, Any]:
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
    return {"messages": [message], "max_tokens": 1, **fields}


def memory_mb(pid: int, name: str = "VmRSS") -> float:
    """Memory of a process now (VmRSS) or at most so far (VmHWM)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1000
    raise ValueError(f"There is no {name}.")


@dataclass
class Pulse:
    """How long /health took, whoever asked else: by the clock, and without the time that nobody had a core for it."""

    by_the_clock: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def waited_for_a_core(thread: Path) -> float:
    """Seconds in which a thread could have run, and others had all cores."""
    return int((thread / "schedstat").read_text().split()[1]) / 1e9


@contextlib.contextmanager
def pulse_of(address: Address, pid: int, pause: float = 0.1) -> Iterator[Pulse]:
    """Asks the server of process `pid` for /health again and again. It has to be answered each time."""
    pulse, over = Pulse(), Event()
    loop = Path(f"/proc/{pid}")  # as a thread the main one, in which requests arrive

    def waited() -> float:
        return waited_for_a_core(loop) + waited_for_a_core(Path("/proc/thread-self"))

    def ask() -> None:
        while not over.is_set():
            before = waited()
            answer = send(address, None, {}, 60, "/health", "GET")
            assert answer.status == 200
            pulse.by_the_clock.append(answer.seconds)
            pulse.seconds.append(answer.seconds - (waited() - before))
            over.wait(pause)

    thread = Thread(target=ask)
    thread.start()
    try:
        yield pulse
    finally:
        over.set()
        thread.join()
