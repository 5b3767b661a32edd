"""Short videos from files, as the frames that models read. Animated pictures need Pillow alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from tprl_hf.pictures import MAX_PIXELS, PictureError, opened, to_rgb

MAX_FRAMES = 8  # that a model reads, evenly spread over the file
MAX_SECONDS = 60
MAX_PIXELS_READ = 40 * MAX_PIXELS  # of all frames of a file together
USUAL_FPS = 10  # of an animated picture that names no time, as browsers show it
ANIMATED = GifImageFile, PngImageFile, WebPImageFile
# Packages that decode video files, and what transformers calls them.
DECODERS = {"cv2": "opencv", "av": "pyav"}


@dataclass(frozen=True)
class Video:
    """
    What a model reads of a video.

    Args:
        frames (`Sequence[PIL.Image.Image]`): In RGB and of one size, evenly spread over the video.
        fps (`float`): Of these frames.
    """

    frames: Sequence[Image.Image]
    fps: float

    @property
    def metadata(self) -> dict[str, Any]:
        """As video processors take it; these frames are the whole video to them."""
        number = len(self.frames)
        return {
            "total_num_frames": number,
            "fps": self.fps,
            "duration": number / self.fps,
            "frames_indices": list(range(number)),
        }


def is_video(file: str | Path) -> bool:
    """Whether a file is an animated picture, or a video by its first bytes; raises as [`~tprl_hf.pictures.opened`]."""
    if is_container(file):
        return True
    with opened(file, "The picture") as image:
        return is_animated(image)


def is_container(file: str | Path) -> bool:
    """
    Whether a file is MP4, MOV, WEBM, MKV or AVI. Others are not handed to a decoder: some are lists of further files,
    which it would open.
    """
    with Path(file).open("rb") as stream:
        start = stream.read(12)
    is_avi = start[:4] == b"RIFF" and start[8:12] == b"AVI "
    return start[4:8] == b"ftyp" or start[:4] == b"\x1a\x45\xdf\xa3" or is_avi


def is_animated(image: Image.Image) -> bool:
    """Pages of a TIFF are not frames."""
    return isinstance(image, ANIMATED) and bool(image.is_animated)


def open_video(file: str | Path, name: str = "The video") -> Video:
    """
    Args:
        file (`str` or `Path`):
            An animated picture, or a video file, for which opencv-python-headless or av has to be installed.
        name (`str`, *optional*, defaults to `"The video"`):
            What messages call it.

    Returns:
        [`Video`]: At most `MAX_FRAMES` frames.

    Raises:
        `PictureError`: For a file that is damaged, longer than `MAX_SECONDS` or too large, and where no decoder is
            installed.
    """
    return _decoded(file, name) if is_container(file) else _animation(file, name)


def spread(total: int) -> list[int]:
    """
    Numbers of the frames to read of so many.

    Example:

    ```python
    >>> spread(20), spread(3)
    ([0, 2, 5, 7, 10, 12, 15, 17], [0, 1, 2])
    ```
    """
    number = min(total, MAX_FRAMES)
    return [place * total // number for place in range(number)]


def check(name: str, frames: int, size: tuple[int, int], seconds: float) -> None:
    """Raises `PictureError` for what takes too long to read."""
    if seconds > MAX_SECONDS:
        raise PictureError(f"{name} takes {seconds:.0f} s; at most {MAX_SECONDS} s are read. Cut it to what matters.")
    pixels = frames * size[0] * size[1]
    if pixels > MAX_PIXELS_READ or size[0] * size[1] > MAX_PIXELS:
        raise PictureError(
            f"{name} has {frames} frames of {size[0]} x {size[1]} pixels, which is too much: shrink it."
        )


def _animation(file: str | Path, name: str) -> Video:
    with opened(file, name) as image:
        total = image.n_frames if isinstance(image, ANIMATED) else 1
        check(name, total, image.size, 0)
        wanted, frames, seconds = set(spread(total)), [], 0.0
        for number in range(total):
            image.seek(number)
            if number in wanted:
                frames.append(to_rgb(image.copy(), name))
            else:
                image.load()  # WEBP and PNG say how long a frame is shown once they have decoded it
            seconds += image.info.get("duration", 0) / 1000
    seconds = seconds or total / USUAL_FPS
    check(name, total, frames[0].size, seconds)
    return Video(frames, len(frames) / seconds)


def _decoded(file: str | Path, name: str) -> Video:
    from transformers.video_utils import load_video

    found = [backend for module, backend in DECODERS.items() if find_spec(module)]
    if not found:
        raise PictureError(
            f"{name} is a video file, and nothing here decodes such: pip install opencv-python-headless, or send an "
            "animated GIF or WEBP."
        )

    def sample(metadata: Any, **_: Any) -> list[int]:
        if metadata.total_num_frames < 1:
            raise PictureError(f"{name} does not say how many frames it has: save it as MP4.")
        size = (metadata.width, metadata.height)
        check(name, metadata.total_num_frames, size, metadata.total_num_frames / (metadata.fps or USUAL_FPS))
        return spread(metadata.total_num_frames)

    try:
        pixels, metadata = load_video(str(Path(file).resolve()), backend=found[0], sample_indices_fn=sample)
    except PictureError:
        raise
    except Exception as error:  # a damaged file makes decoders raise whatever they stumble over
        raise PictureError(f"{name} is damaged, or of a kind that {found[0]} does not decode.") from error
    frames = [Image.fromarray(frame) for frame in pixels]
    seconds = metadata.total_num_frames / (metadata.fps or USUAL_FPS)
    return Video(frames, len(frames) / seconds)
