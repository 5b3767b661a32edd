"""How many requests have their images opened at a time: few large ones, or more small ones."""

import asyncio
from collections import deque


class Places:
    """
    Room for the pixels of requests that were prepared. First come, first served.

    Args:
        room (`int`): Pixels of all of them.
        least (`int`): Pixels that a request counts at least.
    """

    def __init__(self, room: int, least: int):
        self.room, self.least = room, least
        self.waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, num_pixels: int) -> "Turn":
        """Waits for room, and takes it."""
        size = max(num_pixels, self.least)
        if self.waiting or size > self.room:
            place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.waiting.append((size, place))
            try:
                await place
            except asyncio.CancelledError:
                if place.done() and not place.cancelled():
                    self.give(size)
                raise
        else:
            self.room -= size
        return Turn(self, size)

    def give(self, size: int) -> None:
        """Gives room back, and lets those in who have waited longest."""
        self.room += size
        while self.waiting and (self.waiting[0][1].done() or self.waiting[0][0] <= self.room):
            wanted, place = self.waiting.popleft()
            if not place.done():  # the one who waited may be gone
                self.room -= wanted
                place.set_result(None)


class Turn:
    """
    The place of one request.

    Args:
        places ([`Places`]): Of which it was taken.
        size (`int`): Its pixels.
    """

    def __init__(self, places: Places, size: int):
        self.places, self.size = places, size
        self.loop = asyncio.get_running_loop()
        self.ended = False

    def end(self) -> None:
        """Gives the place back, once."""
        if not self.ended:
            self.ended = True
            self.places.give(self.size)
