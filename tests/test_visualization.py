import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from tests.families.stock_processors import STOCK, save
from tests.families.tiny_models import build
from tests.families.tiny_processor import make_processor
from tests.test_processors import absent
from tprl_hf.evaluation.answers import chat_inputs
from tprl_hf.missing_packages import load_processor
from tprl_hf.modeling import Block, TokenLayout, TPRLForConditionalGeneration
from tprl_hf.pruners import UniformPruner
from tprl_hf.visualization import (
    Figure,
    Panel,
    draw_figures,
    draw_kept_tokens,
    figures_by_block,
    figures_to_html,
    image_from_pixel_values,
    seen_frames,
    seen_pictures,
    tile_pictures,
)

PATCH = 12


@pytest.fixture
def image() -> Image.Image:
    """48 × 36 pixels of dark noise: four columns and three rows of patches."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 120, (3 * PATCH, 4 * PATCH, 3), dtype=np.uint8))


@pytest.fixture
def layout() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(12) // 4, torch.arange(12) % 4


def interior(picture: Image.Image, row: int, column: int) -> np.ndarray:
    """A patch without its rim, where lines may be."""
    return np.asarray(picture)[row * PATCH + 2 : (row + 1) * PATCH - 2, column * PATCH + 2 : (column + 1) * PATCH - 2]


class TestDrawKeptTokens:
    def test_kept_patches_are_untouched_and_pruned_ones_fade(self, image, layout):
        keep_mask = torch.tensor([True, False, False, True] * 3)
        picture = draw_kept_tokens(image, keep_mask, *layout, width=image.width)
        assert picture.size == image.size
        for row, column, kept in zip(*layout, keep_mask, strict=True):
            if kept:
                assert np.array_equal(interior(picture, row, column), interior(image, row, column))
            else:
                assert interior(picture, row, column).min() > 200

    def test_on_a_pale_picture_kept_and_pruned_patches_are_told_apart(self, layout):
        white = Image.new("RGB", (4 * PATCH, 3 * PATCH), "white")
        keep_mask = torch.tensor([True, False, False, True] * 3)
        picture = draw_kept_tokens(white, keep_mask, *layout, width=white.width)
        for row, column, kept in zip(*layout, keep_mask, strict=True):
            assert (interior(picture, row, column).min() == 255) == bool(kept)

    def test_the_layout_says_where_a_token_lies_whatever_the_order(self, image, layout):
        keep_mask = torch.rand(12, generator=torch.manual_seed(0)) > 0.5
        order = torch.randperm(12, generator=torch.manual_seed(1))
        there = draw_kept_tokens(image, keep_mask, *layout)
        shuffled = draw_kept_tokens(image, keep_mask[order], *(part[order] for part in layout))
        assert there.tobytes() == shuffled.tobytes()

    def test_lists_and_arrays_do_as_tensors_do(self, image, layout):
        keep_mask = torch.arange(12) % 5 == 0
        as_lists = draw_kept_tokens(image, keep_mask.tolist(), *(part.tolist() for part in layout))
        assert as_lists.tobytes() == draw_kept_tokens(image, keep_mask, *layout).tobytes()

    def test_the_image_keeps_its_proportions_and_is_not_written_to(self, image, layout):
        before = image.tobytes()
        assert draw_kept_tokens(image, [True] * 12, *layout, width=100, boxes=[[0, 0, 9, 9]]).size == (100, 75)
        assert image.tobytes() == before

    @pytest.mark.parametrize("keep_mask", [[True] * 11, [], [[True] * 12]])
    def test_a_mask_of_another_shape_is_refused_with_the_shapes(self, image, layout, keep_mask):
        with pytest.raises(ValueError, match=r"of one length .*\(12,\)"):
            draw_kept_tokens(image, keep_mask, *layout)


class TestImageFromPixelValues:
    def test_it_undoes_the_normalisation(self, image):
        mean, std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
        pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255
        normalised = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        assert image_from_pixel_values(normalised, mean, std).tobytes() == image.tobytes()

    def test_flattened_patches_are_refused(self):
        with pytest.raises(ValueError, match=r"got \[16, 1176\]"):
            image_from_pixel_values(torch.zeros(16, 1176), [0.5] * 3, [0.5] * 3)


class TestFigures:
    @pytest.fixture
    def figure(self, image, layout) -> Figure:
        panels = [
            Panel("all 12 tokens", "red", is_correct=True),
            Panel("<random>", "a & b", torch.arange(12) < 4, torch.linspace(0, 1, 12), False),
        ]
        return Figure(image, *layout, panels, title='Is "x" < y?', boxes=[[1, 1, 5, 5]])

    def test_a_page_is_as_wide_as_its_longest_row_and_as_high_as_its_figures(self, figure):
        one = draw_figures([figure])
        assert draw_figures([figure, figure]).width == one.width == 2 * 18 + 2 * 176 + 14
        assert one.height < draw_figures([figure, figure]).height < 2 * one.height
        assert draw_figures([figure], scale=2).width == 2 * one.width

    def test_long_texts_stay_on_the_page(self, figure):
        plain = draw_figures([figure])
        figure.panels[1].text = "word" * 100
        assert draw_figures([figure]).size == plain.size
        figure.title = "many words " * 20
        assert draw_figures([figure]).width == plain.width and draw_figures([figure]).height > plain.height

    def test_no_figure_is_refused(self):
        with pytest.raises(ValueError, match="no figure"):
            draw_figures([])

    def test_the_html_page_needs_nothing_from_elsewhere(self, figure):
        page = figures_to_html([figure], "Kept", ["seed 7"])
        assert not re.search(r"https?:|<script|<link|src=|@import", page)
        (data,) = re.findall(r"data:image/png;base64,([\w+/=]+)", page)
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (352, 264)

    def test_the_html_page_fits_a_phone_and_a_dark_screen(self, figure):
        page = figures_to_html([figure], "Kept")
        assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
        light, dark = page.split("@media (prefers-color-scheme: dark)")
        names = [set(re.findall(r"(--\w+):", part.split("}}")[0])) for part in (light, dark)]
        assert names[0] == names[1] >= {"--ink", "--page", "--veil", "--hatch"}  # no colour of one for the other

    def test_the_html_page_tells_each_patchs_fate_and_score(self, figure):
        page = figures_to_html([figure], "Kept")
        assert (page.count('class="patch kept"'), page.count('class="patch pruned"')) == (4, 8)
        assert 'data-tip="row 0, column 0: kept, score 0"' in page
        assert 'data-tip="row 2, column 3: pruned, score 1"' in page

    def test_texts_are_escaped(self, figure):
        page = figures_to_html([figure], "<Kept>", ["a < b"])
        assert "<title>&lt;Kept&gt;</title>" in page and "a &lt; b" in page
        assert "&lt;random&gt;" in page and "a &amp; b" in page and "Is &quot;x&quot; &lt; y?" in page


class TestFiguresByBlock:
    """An overview of 2 × 2 and crops of 3 × 4 with newlines, then an image of 2 × 3."""

    @pytest.fixture
    def blocks(self) -> TokenLayout:
        crops = [Block(2, 2), Block(3, 4, row_newline=True), Block(1, 1, separator=True)]
        return TokenLayout.from_blocks([crops, [Block(2, 3)]])

    @pytest.fixture
    def panels(self, blocks) -> list[Panel]:
        count = len(blocks.row)
        return [Panel("whole"), Panel("some", "", torch.arange(count) % 2 == 0, torch.arange(count) / count)]

    def test_each_grid_has_its_figure_without_separators(self, blocks, panels, image):
        figures = figures_by_block([image, image.rotate(90)], blocks, panels, "Where?", [[1, 1, 5, 5]])
        assert [len(figure.rows) for figure in figures] == [4, 12, 6]
        assert [figure.image.size for figure in figures] == [image.size, image.size, image.size]
        assert figures[1].title == "Where?  [2 of 3: 3 × 4 tokens]"
        assert figures[1].panels[0].keep_mask is None and all(figure.boxes for figure in figures)
        kept = sum(int(figure.panels[1].keep_mask.sum()) for figure in figures)
        assert kept == int((panels[1].keep_mask & ~blocks.protected).sum())
        page = figures_to_html(figures, "Kept")
        assert page.count('class="patch kept"') == kept
        assert page.count('class="patch') == 22
        assert draw_figures(figures).height > draw_figures(figures[:2]).height

    def test_tiles_have_pictures_of_their_own(self, blocks, panels):
        tiles = tile_pictures(torch.rand(1, 3, 3, 12, 18), [0.5] * 3, [0.5] * 3)
        figures = figures_by_block(tiles, blocks, panels, boxes=[[1, 1, 5, 5]])
        assert [figure.image.tobytes() for figure in figures] == [tile.tobytes() for tile in tiles]
        assert not any(figure.boxes for figure in figures)

    def test_tokens_without_a_place_are_drawn_in_their_order_and_not_over_the_image(self, image):
        keep_mask = torch.arange(12) % 5 == 0
        (figure,) = figures_by_block([image], TokenLayout.from_blocks([[Block(1, 12)]]), [Panel("", "", keep_mask)])
        assert figure.title == "[12 tokens in their order: they stand for no place in the image]"
        assert figure.image.getextrema() == ((255, 255),) * 3
        assert (4 * figure.rows + figure.columns).tolist() == list(range(12))
        assert figure.panels[0].keep_mask.tolist() == keep_mask.tolist()

    def test_a_strip_of_an_image_is_an_image(self):
        strip = Image.new("RGB", (240, 20), "red")
        (figure,) = figures_by_block([strip], TokenLayout.from_blocks([[Block(1, 12)]]), [Panel("")])
        assert figure.image is strip

    def test_pictures_that_fit_neither_are_refused(self, blocks, panels, image):
        with pytest.raises(ValueError, match="3 grids of 2 images, but there are 4 pictures"):
            figures_by_block([image] * 4, blocks, panels)

    def test_frames_of_a_video_have_pictures_of_their_own(self, image):
        layout = TokenLayout.from_blocks([[Block(3, 4)] * 3])
        frames = [image, image.rotate(90), image.rotate(180)]
        figures = figures_by_block(frames, layout, [Panel("kept", keep_mask=torch.arange(36) < 12)])
        assert [figure.image.tobytes() for figure in figures] == [frame.tobytes() for frame in frames]
        assert [int(figure.panels[0].keep_mask.sum()) for figure in figures] == [12, 0, 0]


@pytest.mark.parametrize("shape", [(12, 96), (1, 12, 96), (12, 3, 4, 4), (1, 3, 4, 48), (1, 1, 8, 8)])
def test_of_flattened_patches_the_whole_image_is_drawn(image, shape):
    """Patches one by one, beside each other in a strip, or of other channels are no picture."""
    layout = TokenLayout.from_blocks([[Block(3, 4)]])
    assert seen_pictures([image], make_processor(), {"pixel_values": torch.zeros(shape)}, layout) == [image]


def test_pixels_that_were_not_normalised_are_drawn_as_they_are(image):
    processor = make_processor()
    processor.image_processor.do_normalize = False
    pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 255
    (seen,) = seen_pictures([image], processor, {"pixel_values": pixels}, TokenLayout.from_blocks([[Block(3, 4)]]))
    assert seen.tobytes() == image.tobytes()


def patches_of(image: Image.Image, side: int) -> torch.Tensor:
    """The patches of an image, row by row, [P, 3, side, side] in [-1, 1]."""
    pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1) / 127.5 - 1
    rows = [
        pixels[:, y : y + side, x : x + side]
        for y in range(0, image.height, side)
        for x in range(0, image.width, side)
    ]
    return torch.stack(rows)


class TestFlattenedTiles:
    """An overview of 8 × 12 pixels and a tile of 8 × 8, in patches of 4 × 4, as two families hand them over."""

    layout = TokenLayout.from_blocks([[Block(1, 1)], [Block(1, 1)]])

    @pytest.fixture
    def tiles(self) -> list[Image.Image]:
        generator = np.random.default_rng(0)
        shapes = ((8, 12, 3), (8, 8, 3))
        return [Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]

    def seen(self, **inputs) -> list[bytes]:
        processor = make_processor()
        processor.image_processor.image_mean = processor.image_processor.image_std = [0.5] * 3
        whole = Image.new("RGB", (20, 20))
        return [picture.tobytes() for picture in seen_pictures([whole], processor, inputs, self.layout)]

    def test_a_row_for_each_patch_padded_to_the_longest_tile(self, tiles):
        rows = torch.zeros(2, 6, 48)
        for number, tile in enumerate(tiles):
            own = patches_of(tile, 4).permute(0, 2, 3, 1).flatten(1)
            rows[number, : len(own)] = own
        shapes = torch.tensor([[2, 3], [2, 2]])
        assert self.seen(pixel_values=rows, spatial_shapes=shapes) == [tile.tobytes() for tile in tiles]

    def test_patches_of_all_tiles_beside_each_other(self, tiles):
        strip = torch.cat([patch for tile in tiles for patch in patches_of(tile, 4)], dim=-1)[None]
        shapes = torch.tensor([[2, 3], [2, 2]])
        assert self.seen(pixel_values=strip, target_sizes=shapes) == [tile.tobytes() for tile in tiles]


class TestFrames:
    @pytest.fixture
    def frames(self) -> list[Image.Image]:
        return [Image.new("RGB", (12, 8), (40 * number, 0, 0)) for number in range(5)]

    def test_of_flattened_frames_the_first_of_each_group_is_drawn(self, frames):
        """As of Qwen-VL, which reads two frames as one."""
        layout = TokenLayout.from_blocks([[Block(2, 3)] * 3])
        inputs = {"pixel_values_videos": torch.zeros(72, 96)}
        assert seen_frames(frames, make_processor(), inputs, layout) == [frames[0], frames[2], frames[4]]

    def test_frames_that_were_cut_are_drawn_as_cut_and_separators_have_no_picture(self, frames):
        processor = make_processor()
        processor.video_processor = processor.image_processor
        layout = TokenLayout.from_blocks([[*[Block(2, 3)] * 5, Block(1, 1, separator=True)]])
        pixels = torch.zeros(1, 5, 3, 6, 6)
        seen = seen_frames(frames, processor, {"pixel_values_videos": pixels}, layout)
        assert [picture.size for picture in seen] == [(6, 6)] * 5

    def test_grids_that_fit_no_frames_are_refused(self, frames):
        layout = TokenLayout.from_blocks([[Block(2, 3)] * 4])
        with pytest.raises(ValueError, match="5 frames lie in 4 grids"):
            seen_frames(frames, make_processor(), {"pixel_values_videos": torch.zeros(96, 96)}, layout)


COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]


def quadrants(width: int, height: int) -> Image.Image:
    """Red, green, blue and white, from the upper left to the lower right."""
    small = Image.new("RGB", (2, 2))
    small.putdata(COLOURS)
    return small.resize((width, height), Image.Resampling.NEAREST)


@pytest.mark.parametrize("family", STOCK)
@torch.no_grad()
def test_pictures_are_what_the_tower_saw_without_padding(family, tmp_path):
    """A wide and a high image: whole, cut to a square, in tiles, or padded to a common size, as the family has it."""
    if names := absent(family):
        pytest.skip(f"its processor needs {', '.join(names)}: pip install 'tprl_hf[processors]'")
    save(family, tmp_path)
    processor, images = load_processor(tmp_path), [quadrants(48, 24), quadrants(24, 48)]
    inputs = chat_inputs(processor, [{"images": images, "prompt": "what colour is the cat ?"}])
    model = TPRLForConditionalGeneration.from_base_model(build(family), latent_dim=8).eval()
    with model.using(UniformPruner(keep_ratio=0.5)):
        plan = model.prune(**inputs)
    seen = seen_pictures(images, processor, inputs, plan.layout)
    figures = figures_by_block(seen, plan.layout, [Panel("kept", keep_mask=plan.keep_mask)])
    content = ~plan.layout.protected
    assert sum(len(figure.rows) for figure in figures) == int(content.sum())
    for figure in figures:
        right, bottom = figure.image.width - 2, figure.image.height - 2
        corners = [figure.image.getpixel(place) for place in ((1, 1), (right, 1), (1, bottom), (right, bottom))]
        # of several images LLaVA-OneVision makes squares, and tokens lie over what is added
        squared = {(122, 116, 104)} if family == "llava_onevision" else set()
        assert set(corners) <= {*COLOURS, *squared}, "padding is not a part of the picture"
    whole = [figure for figure in figures if figure.image.size in {image.size for image in images}]
    assert all(figure.image.getpixel((1, 1)) == COLOURS[0] for figure in whole)
