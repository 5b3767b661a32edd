"""Short videos from files: which frames are read, how fast they were, and a sentence for what is not read."""

from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from tests.test_processors import run_without
from tprl_hf.pictures import PictureError
from tprl_hf.videos import MAX_FRAMES, Video, check, is_container, is_video, open_video, spread

COLOURS = [(12 * number, 255 - 12 * number, 40) for number in range(20)]
DECODERS = [name for name in ("cv2", "av") if find_spec(name)]


def write_animation(path, colours=COLOURS, milliseconds=50, size=(24, 16)):
    """One frame for each colour."""
    first, *others = [Image.new("RGB", size, colour) for colour in colours]
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=0, **lossless)
    return path


def write_mp4(path, colours=COLOURS, fps=20):
    cv2 = pytest.importorskip("cv2", reason="pip install opencv-python-headless")
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, (48, 32))
    for red, green, blue in colours:
        writer.write(np.full((32, 48, 3), (blue, green, red), np.uint8))
    writer.release()
    return path


def middle(frame: Image.Image) -> np.ndarray:
    return np.array(frame.getpixel((frame.width // 2, frame.height // 2)), int)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_frames_of_an_animated_picture_are_spread_over_it(tmp_path, name):
    path = write_animation(tmp_path / name)
    assert is_video(path) and not is_container(path)
    video = open_video(path)
    wanted = [COLOURS[number] for number in (0, 2, 5, 7, 10, 12, 15, 17)]
    assert [frame.mode for frame in video.frames] == ["RGB"] * MAX_FRAMES
    assert all(np.abs(middle(frame) - c).max() <= 8 for frame, c in zip(video.frames, wanted, strict=True))
    assert video.fps == pytest.approx(8 / 1.0)  # eight frames of one second
    assert video.metadata["duration"] == pytest.approx(1.0)


def test_a_short_one_is_read_whole_and_without_times_it_is_as_fast_as_browsers_show_it(tmp_path):
    path = write_animation(tmp_path / "a.gif", COLOURS[::7], milliseconds=0)
    video = open_video(path)
    assert len(video.frames) == 3 and video.fps == pytest.approx(10)
    assert video.metadata["frames_indices"] == [0, 1, 2] and spread(3) == [0, 1, 2]


def test_still_pictures_and_pages_are_not_videos(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "still.gif")
    pages = [Image.new("RGB", (8, 8), colour) for colour in COLOURS[:2]]
    pages[0].save(tmp_path / "pages.tiff", save_all=True, append_images=pages[1:])
    assert not is_video(tmp_path / "still.gif") and not is_video(tmp_path / "pages.tiff")


def test_frames_of_a_video_file_are_spread_over_it(tmp_path):
    path = write_mp4(tmp_path / "a.mp4")
    assert is_container(path) and is_video(path)
    video = open_video(path)
    assert len(video.frames) == MAX_FRAMES and video.frames[0].size == (48, 32)
    wanted = [COLOURS[number] for number in spread(20)]
    assert all(np.abs(middle(frame) - c).max() <= 12 for frame, c in zip(video.frames, wanted, strict=True))
    assert video.fps == pytest.approx(8)


def test_what_takes_too_long_to_read_is_refused(tmp_path):
    path = write_animation(tmp_path / "slow.gif", COLOURS[:2], milliseconds=40_000)
    with pytest.raises(PictureError, match="The video takes 80 s; at most 60 s are read"):
        open_video(path)
    with pytest.raises(PictureError, match="300 frames of 2600 x 2600 pixels, which is too much"):
        check("The video", 300, (2600, 2600), seconds=10)
    if "cv2" in DECODERS:
        with pytest.raises(PictureError, match="takes 80 s"):
            open_video(write_mp4(tmp_path / "slow.mp4", COLOURS * 4, fps=1))


@pytest.mark.skipif(not DECODERS, reason="pip install opencv-python-headless")
def test_a_damaged_file_gets_a_sentence(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"\0\0\0\x18ftypmp42" + b"\0" * 200)
    with pytest.raises(PictureError, match=r"The video (is damaged|does not say how many frames)"):
        open_video(path)


def test_without_a_decoder_it_says_what_to_install_and_what_to_send_instead(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"\0\0\0\x18ftypmp42" + b"\0" * 200)
    code = f"from tprl_hf.videos import open_video\nopen_video({str(path)!r})"
    done = run_without(code, "cv2", "av")
    assert "pip install opencv-python-headless, or send an animated GIF or WEBP." in done.stderr


@pytest.mark.parametrize("start", [b"#EXTM3U\n#EXT-X", b"ffconcat version 1.0\n", b"", b"RIFF1234WAVEfmt "])
def test_lists_of_further_files_are_not_handed_to_a_decoder(tmp_path, start):
    path = tmp_path / "list.mp4"
    path.write_bytes(start)
    assert not is_container(path)
    with pytest.raises(PictureError):
        is_video(path)


def test_metadata_is_what_video_processors_take():
    from transformers.video_utils import VideoMetadata

    metadata = VideoMetadata(**Video([Image.new("RGB", (4, 4))] * 4, fps=2).metadata)
    assert metadata.timestamps == [0, 0.5, 1.0, 1.5] and metadata.sampled_fps == 2
