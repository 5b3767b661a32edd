"""Pictures of every mode and in every state: read as they look, or refused by name; never a traceback."""

import base64
import io

import numpy as np
import pytest
from PIL import Image, ImageOps
from starlette.exceptions import HTTPException

from tests.families.tiny_processor import make_processor
from tests.stand_ins.noise import noise
from tprl_hf import pictures
from tprl_hf.cli.main import main
from tprl_hf.data import jsonl_samples
from tprl_hf.evaluation.answers import chat_inputs
from tprl_hf.pictures import FORMATS, PictureError, image_digest, open_picture, picture_of, to_rgb
from tprl_hf.serving.images import read_url
from tprl_hf.serving.limits import Limits
from tprl_hf.training.answer_batches import open_images, undecoded

RAMP = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
GREY = (RAMP / 257).round()


def content_of(image, file_format="PNG", **settings):
    file = io.BytesIO()
    image.save(file, file_format, **settings)
    return file.getvalue()


def bomb():
    """A small file of many pixels: more than we read, fewer than Pillow itself refuses."""
    return content_of(Image.new("1", (10_000, 5_001)))


def palette_with_transparency():
    image = Image.new("P", (8, 8))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 1)
    return content_of(image, transparency=0)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(RAMP),
        Image.frombytes("I;16B", (8, 8), RAMP.astype(">u2").tobytes()),
        Image.fromarray(RAMP.astype(np.int32)),
    ],
    ids=lambda image: image.mode,
)
def test_16_bits_are_scaled(image):
    read = [np.asarray(to_rgb(image)).astype(int)]
    read += [np.asarray(open_picture(content_of(image, one))) for one in ("PNG", "TIFF") if image.mode == "I;16"]
    for one in read:
        assert one.shape == (8, 8, 3) and np.abs(one - GREY[..., None]).max() <= 1


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_without_black_and_white_are_refused(mode):
    image = Image.fromarray(np.full((4, 4), 1e6 if mode == "I" else 0.5).astype({"I": "int32", "F": "float32"}[mode]))
    with pytest.raises(PictureError, match=f"mode {mode} from .*save it in 8 bits"):
        to_rgb(image)


def test_what_is_transparent_shows_white():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    assert np.abs(np.subtract(to_rgb(half).getpixel((0, 0)), (255, 127, 127))).max() <= 1
    assert to_rgb(Image.new("LA", (8, 8), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    read = open_picture(palette_with_transparency())
    assert read.getpixel((0, 0)) == (0, 0, 255) and read.getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I"])
def test_every_mode_becomes_rgb(mode):
    assert to_rgb(Image.new(mode, (5, 4))).mode == "RGB"


def test_cmyk_jpeg_keeps_its_colours():
    image = Image.new("RGB", (16, 16), (200, 30, 60))
    read = open_picture(content_of(image.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(np.subtract(read.getpixel((8, 8)), (200, 30, 60))).max() <= 4


def test_turned_as_the_camera_was_held():
    image = Image.new("RGB", (8, 4))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    read = open_picture(content_of(image, exif=exif))
    assert read.size == (4, 8)
    opened = Image.open(io.BytesIO(content_of(image, exif=exif)))
    assert read.tobytes() == ImageOps.exif_transpose(opened).tobytes()
    # a row may hold it opened; the digest is of what is seen
    assert picture_of(opened).size == (4, 8) and picture_of(opened).tobytes() == read.tobytes()
    assert image_digest({"image": opened}) == image_digest({"image": read}) != image_digest({"image": image})


def broken(tmp_path):
    """What is wrong with a file called .png, and the words that say so."""
    whole = content_of(noise((64, 64), 50))
    made = {
        "truncated": (whole[: len(whole) // 2], "is damaged"),
        "bomb": (bomb(), "10000 x 5001 pixels; at most 50,000,000"),
        "thread": (content_of(Image.new("1", (1, 4000))), "1 x 4000 pixels; a side is at most 100 times the other"),
        "empty": (b"", f"none of {', '.join(FORMATS)}"),
        "text": (b"a picture", "none of"),
        "script": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) run\n", "none of"),
        "wide": (content_of(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"), "save it in 8 bits"),
    }
    for name, (content, _) in made.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    return {tmp_path / f"{name}.png": words for name, (_, words) in made.items()}


def test_what_cannot_be_read_is_refused_by_name_everywhere(tmp_path, capsys):
    for path, words in broken(tmp_path).items():
        with pytest.raises(PictureError, match=words) as error:
            open_picture(path)
        assert str(path) in str(error.value)
        with pytest.raises(PictureError, match=words):
            open_images([{"bytes": None, "path": str(path)}])
        with pytest.raises(PictureError, match=words):
            picture_of({"bytes": path.read_bytes(), "path": None})
        assert main(["generate", "--image", str(path), "--question", "is there a star ?"]) == 2
        told = capsys.readouterr().err
        assert words in told and "Traceback" not in told and told.count("\n") == 1
        url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        with pytest.raises(HTTPException) as refusal:
            read_url(url, Limits()).open()
        assert refusal.value.status_code == 400 and words in refusal.value.detail


def test_pillows_own_limit_is_a_refusal_too(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(PictureError, match="has more pixels; at most"):
        open_picture(content_of(Image.new("RGB", (8, 8))))


def test_rows_of_json_lines_are_read_so(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "wide.png")
    (tmp_path / "own.jsonl").write_text('{"image": "wide.png", "prompt": "word5", "answer": "word6"}\n')
    rows = list(undecoded(jsonl_samples(tmp_path / "own.jsonl")))
    found = chat_inputs(make_processor(), rows)["pixel_values"]
    grey = {"images": [Image.fromarray(GREY.astype(np.uint8)).convert("RGB")], "prompt": "word5"}
    assert (found - chat_inputs(make_processor(), [grey])["pixel_values"]).abs().max() < 0.05
    assert found.std() > 0.1
    (tmp_path / "wide.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"wide\.png is not an image .* none of"):
        chat_inputs(make_processor(), rows)


def test_the_limit_is_one():
    assert pictures.MAX_PIXELS < Image.MAX_IMAGE_PIXELS  # so that ours is told, and Pillow warns of none
