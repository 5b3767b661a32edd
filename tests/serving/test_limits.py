"""Who waits, and how much all requests hold together; the page's table of limits is that of the code."""

import asyncio
import random
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

pytest.importorskip("starlette")

from starlette.exceptions import HTTPException

from tprl_hf.pictures import MAX_PIXELS
from tprl_hf.serving import chat_requests, connections, limits
from tprl_hf.serving.images import SentImage, fetch
from tprl_hf.serving.limits import Limits, WaitingRoom
from tprl_hf.serving.places import Places

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def test_the_limits_of_the_page_are_those_of_the_code():
    table = PAGE.split("## Limits\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| ([a-zA-Z].*?) \| (.*?) \|", table, re.M))
    default = Limits()
    expected = {
        "body of a request": f"{default.max_bytes / 1e6:g} MB",
        "commas and brackets": f"{limits.MAX_JSON_VALUES:,}",
        "messages, and parts": f"{limits.MAX_MESSAGES:,}",
        "characters of all messages": f"{limits.MAX_TEXT:,}",
        "images": str(default.max_images),
        "pixels of all images": f"{MAX_PIXELS / 1e6:g} million",
        "tokens of an answer": f"{default.max_tokens:,}; ",
        "beams; texts in `stop`": f"{chat_requests.MAX_STOPS} of {chat_requests.MAX_STOP_LENGTH:,} characters; "
        f"{chat_requests.MAX_BIASES}",
        "requests that wait": str(default.max_waiting),
        "bytes of all requests": f"{WaitingRoom(default).max_bytes / 1e6:g} MB",
        "connections": f"{connections.MAX_CONNECTIONS}; ",
        "time for the head": f"{connections.HEAD_SECONDS:g} s; {limits.BODY_SECONDS:g} s",
        "time for all remote images": f"{limits.FETCH_SECONDS:g} s",
        "time to end": f"{connections.SHUTDOWN_SECONDS:g} s for answers in progress, "
        f"then {connections.LAST_SECONDS} s",
    }
    for beginning, value in expected.items():
        (found,) = [text for name, text in rows.items() if name.startswith(beginning)]
        assert value in found, beginning


# ---- bodies ----


async def chunks(*sizes: int, forever: bool = False):
    for size in sizes:
        yield b"x" * size
        await asyncio.sleep(0)
    if forever:
        await asyncio.sleep(60)


def status_of(room: WaitingRoom, *sizes: int, **how) -> int:
    """Of the answer to a body that comes in parts; 200 for one that is read, which stays."""
    try:
        assert len(asyncio.run(room.read(chunks(*sizes, **how)))) == sum(sizes)
    except HTTPException as refusal:
        return refusal.status_code
    return 200


def test_bodies_that_are_refused_leave_no_trace(monkeypatch):
    """Too large, too many bytes of all, too many that wait, too slow: each gives back what it held."""
    room = WaitingRoom(Limits(max_bytes=100, max_waiting=2))
    room.max_bytes = 170
    assert status_of(room, 60, 40) == 200
    assert status_of(room, 60, 41) == 413
    assert status_of(room, 60, 15) == 503  # 100 of 170 are held
    with monkeypatch.context() as patch:
        patch.setattr(limits, "BODY_SECONDS", 0.1)
        assert status_of(room, 10, forever=True) == 408
    assert (room.num_waiting, room.num_bytes) == (1, 100)
    assert status_of(room, 50) == 200
    assert status_of(room) == 503  # two wait
    for held in (100, 50):
        room.leave(held)
    assert (room.num_waiting, room.num_bytes) == (0, 0)
    assert status_of(room, 60, 40) == 200


# ---- pixels ----


@pytest.mark.parametrize("seed", range(20))
def test_pixels_that_are_open_never_exceed_the_room_and_all_of_it_comes_back(seed):
    """Whoever waits may leave, at any moment."""
    draw = random.Random(seed)
    room, least = 10, 2
    places, held, most = Places(room, least), [], []

    async def client() -> None:
        size = draw.randint(0, 10)
        turn = await places.take(size)
        held.append(turn.size)
        most.append(sum(held))
        try:
            for _ in range(draw.randrange(4)):
                await asyncio.sleep(0)
        finally:
            held.remove(turn.size)
            turn.end()
            turn.end()  # a second time changes nothing
        assert turn.size == max(size, least)

    async def run() -> list:
        tasks = []
        for _ in range(40):
            tasks.append(asyncio.create_task(client()))
            for _ in range(draw.randrange(2)):
                await asyncio.sleep(0)
            if draw.random() < 0.4:
                draw.choice(tasks).cancel()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)

    ended = asyncio.run(run())
    assert all(one is None or isinstance(one, asyncio.CancelledError) for one in ended)
    assert len(most) > 10 and max(most) <= room
    assert places.room == room and not held
    assert all(place.done() for _, place in places.waiting)


def test_who_comes_later_does_not_overtake():
    """A small one waits behind a large one, so that this one gets its turn; one that has left is passed over."""

    async def run() -> list[str]:
        places, begun = Places(10, 1), []
        first = await places.take(8)

        async def client(name: str, size: int) -> None:
            turn = await places.take(size)
            begun.append(name)
            turn.end()

        tasks = [asyncio.create_task(client(*one)) for one in (("leaves", 10), ("large", 5), ("small", 1))]
        await asyncio.sleep(0)
        tasks[0].cancel()
        await asyncio.sleep(0)
        assert begun == []
        first.end()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert places.room == 10
        return begun

    assert asyncio.run(run()) == ["large", "small"]


def test_fetched_images_are_held_and_bring_no_password(monkeypatch, tmp_path):
    """Those of `.netrc` belong to whoever runs the server, who lets clients name addresses."""
    (tmp_path / "netrc").write_text("default login operator password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    told = []

    class Web(BaseHTTPRequestHandler):
        def do_GET(self):
            told.append(self.headers["Authorization"])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(bytes(50))

        def log_message(self, *words):
            pass

    held: list[int] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Web) as web:
        Thread(target=web.serve_forever, daemon=True).start()
        images = [SentImage(url=f"http://127.0.0.1:{web.server_port}/{name}") for name in "ab"]
        asyncio.run(fetch(images, 100, held.append))
        web.shutdown()
    assert told == [None, None] and sum(held) == 100
    room = WaitingRoom(Limits())
    room.num_bytes = room.max_bytes + 1
    with pytest.raises(HTTPException, match="holds as much as it can"):
        room.refuse_more()
