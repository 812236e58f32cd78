"""Tiles: they cover the image, overlap as asked, and blend back into it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbad.data.tiling import pad_to, stitch, tile_batches, tile_places, tile_starts

repeatable = settings(deadline=None, derandomize=True, max_examples=150)
shares = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9])


@repeatable
@given(length=st.integers(1, 300), tile=st.integers(1, 100), overlap=shares)
def test_tiles_cover_a_side_from_end_to_end_and_overlap_as_asked(length, tile, overlap):
    starts = tile_starts(length, tile, overlap)
    assert starts[0] == 0 and starts[-1] == max(0, length - tile)
    for a, b in zip(starts, starts[1:], strict=False):
        assert a < b
        assert a + tile - b >= min(int(tile * overlap), tile - 1)


@repeatable
@given(length=st.integers(1, 300), tile=st.integers(1, 100), overlap=shares)
def test_no_tile_is_superfluous(length, tile, overlap):
    """One tile fewer could not keep the overlap: its steps would have to be longer than allowed."""
    count, step = len(tile_starts(length, tile, overlap)), max(1, int(tile * (1 - overlap)))
    assert count == 1 or (count - 2) * step < length - tile


def test_places_are_listed_row_by_row():
    assert tile_places(20, 30, 16, 0.25) == [(0, 0), (0, 7), (0, 14), (4, 0), (4, 7), (4, 14)]


def picture(height: int, width: int, channels: int = 3) -> torch.Tensor:
    return torch.rand(channels, height, width, generator=torch.Generator().manual_seed(height * 1000 + width))


@repeatable
@given(height=st.integers(1, 70), width=st.integers(1, 70), tile=st.sampled_from([1, 2, 5, 16, 32]),
       batch_size=st.integers(1, 7), overlap=shares)
def test_stitching_the_cut_tiles_gives_back_the_image(height, width, tile, batch_size, overlap):
    if tile == 1 and height * width > 400:
        height, width = height % 20 + 1, width % 20 + 1
    image = picture(height, width)
    back = stitch(tile_batches(image, tile, batch_size, overlap), height, width, tile)
    assert back.shape == image.shape
    torch.testing.assert_close(back, image, rtol=0, atol=5e-6)       # a pixel may lie in 100 tiles


@pytest.mark.parametrize("height, width", [(256, 256), (300, 700), (257, 1000), (64, 520), (31, 17)])
def test_stitching_gives_back_images_of_usual_sizes(height, width):
    image = picture(height, width)
    torch.testing.assert_close(stitch(tile_batches(image, 256, 4, 0.25), height, width, 256), image, rtol=0,
                               atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batches_hold_at_most_so_many_tiles_with_their_places(batch_size):
    image = picture(40, 50)
    places = []
    for chosen, tiles in tile_batches(image, 16, batch_size, 0.25):
        assert len(chosen) == len(tiles) <= batch_size and tiles.shape[1:] == (3, 16, 16)
        for (top, left), tile in zip(chosen, tiles, strict=True):
            assert torch.equal(tile, image[:, top:top + 16, left:left + 16])
        places += chosen
    assert places == tile_places(40, 50, 16, 0.25)


def test_the_order_of_tiles_and_their_batches_does_not_change_the_image():
    image = picture(40, 50)
    tiles = list(tile_batches(image, 16, 1, 0.5))
    torch.testing.assert_close(stitch(tiles[::-1], 40, 50, 16), stitch(tile_batches(image, 16, 5, 0.5), 40, 50, 16))


def test_tiles_that_disagree_blend_without_a_seam():
    """Left tile 0, right tile 1: along the overlap the blend rises steadily and in small steps."""
    tiles = [([(0, 0)], torch.zeros(1, 1, 16, 16)), ([(0, 8)], torch.ones(1, 1, 16, 16))]
    row = stitch(tiles, 16, 24, 16)[0, 8]
    steps = row[1:] - row[:-1]
    assert row[0] == 0 and row[-1] == 1 and (steps >= 0).all() and steps.max() < 0.25


@repeatable
@given(height=st.integers(1, 40), width=st.integers(1, 40), tile=st.integers(1, 40))
def test_a_smaller_image_is_extended_by_its_edge_pixels(height, width, tile):
    image = picture(height, width)
    padded = pad_to(image, tile)
    assert padded.shape == (3, max(height, tile), max(width, tile))
    assert torch.equal(padded[:, :height, :width], image)
    assert (padded[:, height:] == padded[:, height - 1:height]).all()
    assert (padded[:, :, width:] == padded[:, :, width - 1:width]).all()


@pytest.mark.parametrize("overlap, left", [(0.25, 0.05), (0.5, 0.02)])     # without a window it would be 0.75
def test_what_is_wrong_at_the_border_of_every_tile_shows_no_grid(overlap, left):
    """A network knows nothing beyond a tile's border; tiles that are wrong by 1 there are faded out of the map."""
    tile = torch.ones(1, 1, 16, 16)
    tile[..., 1:-1, 1:-1] = 0
    tiles = [([place], tile) for place in tile_places(64, 64, 16, overlap)]
    found = stitch(tiles, 64, 64, 16)[0, 1:-1, 1:-1]        # the border of the image lies in one tile only
    assert 0 < found.max() < left
