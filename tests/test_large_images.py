"""Benchmark of large images: what it draws is what it promises, and a grid of tiles is seen where there is one."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import one_line, tiny_detector
from PIL import Image
from scipy import ndimage

from benchmarks import large_images
from benchmarks.seams import border_ratios, measure_seams, near_borders
from dbad.data.categories import find_category
from dbad.data.demo import draw
from dbad.data.tiling import stitch, tile_places, tile_starts
from dbad.errors import UserError
from dbad.families.ddim.detector import DdimDetector
from dbad.files.atomic import write_json
from dbad.options.resolve import plain, resolve

SHAPE, TILE = (512, 640), 64      # without overlap, tiles fit exactly


def read(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def span(mask: np.ndarray) -> float:
    """The longest way across the pixels of a mask, in px."""
    places = np.argwhere(mask)
    return float(np.hypot(*(places[:, None] - places[None]).T).max() + 1)


def test_defects_are_about_8_px_and_the_masks_are_where_the_images_differ(tmp_path):
    """At half the side, which is faster; their size is in px."""
    draw.write_demo(tmp_path, ("carpet",), 512, 0, 0, 1, 0, large_images.DEFECT_PX)
    for defect in draw.CATEGORIES["carpet"]:
        image = np.asarray(Image.open(tmp_path / "carpet" / "test" / defect / "000.png"))
        mask = np.asarray(Image.open(tmp_path / "carpet" / "ground_truth" / defect / "000_mask.png")) > 0
        good, _ = draw.draw("carpet", defect, size=512, defect_px=large_images.DEFECT_PX, flawless=True)
        assert image.shape == (512, 512, 3) and 6 <= span(mask) <= 12
        change = np.abs(image.astype(int) - good).max(axis=2)
        assert not change[~ndimage.binary_dilation(mask, np.ones((3, 3)), 2)].any()
        assert np.median(change[mask]) > 12      # levels; noise has 1.5


def test_the_same_seed_draws_the_same_images_and_another_one_others():
    first, again, other = (draw.draw("carpet", "cut", 1, seed, size=256, defect_px=8)[0] for seed in (4, 4, 5))
    assert (first == again).all() and (first != other).mean() > 0.5


def noise(seed: int) -> np.ndarray:
    """A map without a grid: smooth noise of mean 1."""
    return ndimage.gaussian_filter(np.random.default_rng(seed).exponential(size=SHAPE), 2)


def lines(overlap: float, tile: int = TILE) -> np.ndarray:
    """1 on the first and last row and column of every tile, elsewhere 0; a little blurred, as maps are."""
    rows, columns = (np.isin(np.arange(n), [e for s in tile_starts(n, tile, overlap) for e in (s, s + tile - 1)])
                     for n in SHAPE)
    return ndimage.gaussian_filter((rows[:, None] | columns[None]).astype(float), 1)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_a_grid_that_is_put_in_is_found(overlap):
    for seed in range(3):
        found = measure_seams(noise(seed) + 0.2 * lines(overlap), TILE, overlap, num_shifts=199)
        assert found.border > found.expected + 0.02 and found.p_value <= 0.02


@pytest.mark.parametrize("overlap", [0.25, 0.5])
def test_its_energy_stands_out(overlap):
    """Many times that of noise, which is about 1, and above that of other periods."""
    without = [measure_seams(noise(seed), TILE, overlap, num_shifts=9) for seed in range(8)]
    assert 0.5 < np.median([found.energy for found in without]) < 2
    assert sum(found.energy > found.usual for found in without) <= 2
    found = measure_seams(noise(0) + 0.3 * lines(overlap), TILE, overlap, num_shifts=9)
    assert found.energy > 10 and found.energy > found.usual


def test_no_grid_is_found_in_noise():
    """A p-value below 0.1 comes about once in ten maps."""
    p_values = [measure_seams(noise(seed), TILE, 0.25, num_shifts=99).p_value for seed in range(20)]
    assert sum(p < 0.1 for p in p_values) <= 5 and 0.3 < np.mean(p_values) < 0.7


def test_a_grid_of_another_period_is_not_taken_for_that_of_the_tiles():
    values = noise(0) + 0.2 * lines(0.0, tile=37)
    assert measure_seams(values, TILE, 0.25, num_shifts=199).p_value > 0.05
    assert measure_seams(values, 37, 0.0, num_shifts=199).p_value <= 0.02


def test_tiles_that_are_wrong_at_their_borders_are_caught():
    """As a stitched map shows them; with an overlap less is left of them."""
    tile = torch.ones(1, 1, TILE, TILE)
    tile[..., 2:-2, 2:-2] = 0
    found = {}
    for overlap in (0.0, 0.25):
        tiles = [([place], tile) for place in tile_places(*SHAPE, TILE, overlap)]
        found[overlap] = measure_seams(stitch(tiles, *SHAPE, TILE)[0].numpy() + noise(1), TILE, overlap, 199)
    plain, blended = found[0.0], found[0.25]
    assert plain.p_value <= 0.02 and plain.border > 1.2
    assert blended.border - blended.expected < 0.2 * (plain.border - plain.expected)


def test_borders_are_the_pixels_next_to_where_tiles_start_and_end():
    places = np.arange(64, 192)
    start, moved = near_borders(places, tile=64, period=64.0, shifts=np.array([0.0, 10.0]))
    assert places[start > 0].tolist() == [64, 65, 126, 127, 128, 129, 190, 191]
    assert places[moved > 0].tolist() == [72, 73, 74, 75, 136, 137, 138, 139]
    (overlapping,) = near_borders(places, tile=64, period=48.0, shifts=np.zeros(1))      # ends lie 16 px behind starts
    expected = [at + k for at in (62, 94, 110, 142, 158, 190) for k in range(4)]
    assert places[overlapping > 0].tolist() == expected[2:-2]


def test_the_ratio_of_borders_to_the_rest_is_that_of_the_means():
    rng = np.random.default_rng(0)
    values, rows, columns = rng.uniform(size=(20, 30)), rng.integers(0, 2, (4, 20)), rng.integers(0, 2, (4, 30))
    expected = []
    for r, c in zip(rows > 0, columns > 0, strict=True):
        on = r[:, None] | c[None]
        expected.append(values[on].mean() / values[~on].mean())
    np.testing.assert_allclose(border_ratios(values, rows.astype(float), columns.astype(float)), expected)


def test_a_map_of_a_few_tiles_is_refused():
    with pytest.raises(UserError) as error:
        measure_seams(np.ones((200, 200)), TILE, 0.25)
    assert "200x200 px" in one_line(error)


def test_memory_is_measured_of_a_whole_prediction():
    side, batch_size, tile, tiles, seconds, peak, before = large_images.predict(100, 4)
    assert (side, batch_size, tile, tiles) == (100, 4, 64, 4)
    assert seconds > 0 and 0.1 < before <= peak < 100


def test_tiles_and_resized_images_are_compared_under_the_same_options(tmp_path, monkeypatch):
    runs = []

    def run(options):
        runs.append(plain(resolve(options)))
        write_json(tmp_path / "metrics.json", {
            "image": {"auroc": 0.9, "ap": 0.8}, "pixel": {"auroc": 0.7, "ap": 0.6, "aupro_0.3": 0.1 * len(runs)},
            "seconds_per_image": 0.5})
        return tmp_path

    monkeypatch.setattr(large_images, "COUNTS", (4, 1, 1))
    monkeypatch.setattr(large_images.train_tune_eval, "run", run)
    large_images.main(["demo", "--out", str(tmp_path), "--side", "32"])
    tiles, resized = runs
    assert {name for name in tiles if tiles[name] != resized[name]} == {"patching", "run_id"}
    assert tiles["patching"] and tiles["eval_resolution"] == "original" and not tiles["tune"]
    assert len(find_category(Path(tiles["dataset_path"]), "carpet").train) == 4
    rows = read(tmp_path / "compared.csv")
    assert [(row["images"], row["aupro"], row["ms_per_image"]) for row in rows] == [
        ("tiles", "0.1", "500.0"), ("resized", "0.2", "500.0")]


def test_the_seams_of_a_detector_are_measured(tmp_path, monkeypatch):
    """With a detector whose tiles are wrong at their borders; the table and the picture show it."""
    random = torch.Generator().manual_seed(0)

    def wrong_at_borders(detector, tiles):
        found = 1 + torch.rand(len(tiles), 5, 16, 16, generator=random)
        found[..., 1:-1, 1:-1] -= 1
        return found

    detector = tiny_detector(torch.nn.Identity(), patching=True)
    monkeypatch.setattr(DdimDetector, "_differences", wrong_at_borders)
    monkeypatch.setattr(large_images, "load_detector", lambda folder, batch_size: detector)
    draw.write_demo(tmp_path / "data" / "seed0", ("carpet",), 128, 1, 3, 1)
    large_images.main(["seams", "--item", "carpet", "--out", str(tmp_path), "--num_images", "2"])
    blended, plain = read(tmp_path / "seams.csv")
    assert (blended["overlap"], plain["overlap"], plain["good_images"]) == ("0.25", "0.0", "2")
    assert float(plain["p_value"]) <= 0.01 and float(plain["border_ratio"]) > 1.5 > float(blended["border_ratio"])
    assert Image.open(tmp_path / "seams-carpet-seed0.png").width > 600
