"""Texts that end an answer, whatever pieces a stream comes in."""

import asyncio

import pytest
from transformers.cli.serving.utils import ReasoningText

from tprl_hf.serving.stopping import AnswerEnd, CutQueue


def stream(pieces, stops):
    async def run():
        queue = asyncio.Queue()
        cut = CutQueue(queue, AnswerEnd(list(stops)))
        asyncio.get_running_loop().call_later(0.01, cut.end.generated.set)
        for piece in [*pieces, None]:
            queue.put_nowait(piece)
        found = [await cut.get()]
        while found[-1] is not None:
            try:
                found.append(cut.get_nowait())
            except asyncio.QueueEmpty:
                found.append(await cut.get())
        return found[:-1], cut.end.found

    return asyncio.run(run())


TEXT = "aabaac aab, aabaabaac. the end"


@pytest.mark.parametrize("stops", [["aabaac"], ["aabaabaac"], [".", ","], ["end"], ["ende"], ["none", "the e"], []])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_a_stream_ends_where_the_whole_answer_does(stops, size):
    pieces = [TEXT[start : start + size] for start in range(0, len(TEXT), size)]
    whole = AnswerEnd(list(stops))
    expected = whole.cut(TEXT)
    found, ended = stream(pieces, stops)
    assert "".join(found) == expected and ended == whole.found == (expected != TEXT)


def test_what_cannot_begin_a_stop_is_not_held():
    found, _ = stream(["yes", " and", " no"], ["top"])
    assert found == ["yes", " and", " no"]


def test_what_a_model_thinks_does_not_end_its_answer():
    found, ended = stream([ReasoningText("stop here"), "yes stop", " no"], ["stop"])
    assert found == ["stop here", "yes "] and ended
