"""Pseudo-anomalies: the mask is what was changed, draws repeat, all sizes and contrasts occur, on the object."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import make_category, one_line
from PIL import Image
from scipy import ndimage

from dbad.damage import kinds, pseudo
from dbad.damage.foreground import foreground
from dbad.damage.poisson import solve_poisson
from dbad.damage.pseudo import KINDS, changed_region, generator, make, make_all
from dbad.damage.site import window as window_of
from dbad.data.demo import draw as demo
from dbad.data.images import to_float, to_pixels
from dbad.errors import UserError
from dbad.report import damage_sheet
from dbad.report.drawing import OUTLINE

SHAPES = [(32, 32), (64, 64), (256, 256), (48, 96)]


def photo(category: str = "carpet", height: int = 64, width: int | None = None, index: int = 0) -> torch.Tensor:
    """A drawn good image (3, height, width) in [-1, 1]; one that is not square is cut out of a larger one."""
    width = width or height
    pixels = demo.draw(category, index=index, size=max(height, width))[0][:height, :width]
    return to_float(torch.from_numpy(pixels.copy()).permute(2, 0, 1))


def scene(size: int = 96, halo: float = 0.0, bar: bool = False) -> tuple[torch.Tensor, np.ndarray]:
    """A rough disc (or a bar from top to bottom) on an uneven bright ground, with its shadow; and where it is."""
    y, x = np.mgrid[:size, :size] * 2 / size - 1
    away = np.abs(x) - 0.3 if bar else np.hypot(x, y) - 0.5
    random = np.random.default_rng(0)
    ground = 0.75 + 0.1 * x - 0.05 * y ** 2 - halo * np.exp(-np.clip(away, 0, None) / 0.15)
    values = np.where(away < 0, 0.35 + 0.05 * np.sin(40 * x) * np.sin(40 * y), ground)
    pixels = np.clip(values + 0.005 * random.standard_normal(values.shape), 0, 1)
    return to_float(torch.from_numpy(np.round(pixels * 255)).expand(3, -1, -1)), away < 0


def same(first: list, second: list) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.image, b.image) and torch.equal(a.mask, b.mask) and a.kind == b.kind
        for a, b in zip(first, second, strict=True))


# ------------------------------------------------------------------------------------------ one anomaly

@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_holds_every_changed_pixel_and_hardly_another(kind, shape):
    image, other = photo("carpet", *shape), photo("carpet", *shape, index=1)
    before = image.clone()
    made = make(image, kind, generator(0, kind), [image, other])
    assert torch.equal(image, before)
    assert made.kind == kind and made.image.shape == image.shape and made.mask.shape == (1, *shape)
    assert made.image.dtype == made.mask.dtype == torch.float32
    assert set(made.mask.unique().tolist()) == {0.0, 1.0}
    changed = (made.image != image).any(dim=0, keepdim=True)
    assert not changed[made.mask == 0].any()
    assert changed[made.mask == 1].float().mean() > 0.9
    assert torch.equal(made.image, to_float(torch.from_numpy(to_pixels(made.image)).permute(2, 0, 1)))
    assert made.area == pytest.approx(float(made.mask.mean()))
    change = (made.image - image).abs().amax(dim=0)[made.mask[0] == 1].mean() / 2
    assert made.contrast == pytest.approx(float(change), abs=1e-5)


def test_pixels_between_the_8_bit_levels_stay_as_they_are_outside_the_mask():
    image = photo() * 0.99
    made = make(image, "spots", generator(0))
    outside = (made.mask == 0).expand_as(image)
    assert torch.equal(made.image[outside], image[outside])


@pytest.mark.parametrize("kind", KINDS)
def test_a_gray_image_stays_gray(kind):
    gray = to_float(torch.from_numpy(to_pixels(photo())).permute(2, 0, 1).float().mean(0).round().expand(3, -1, -1))
    made = make(gray, kind, generator(1, kind))
    assert torch.equal(made.image[0], made.image[1]) and torch.equal(made.image[0], made.image[2])


def test_a_kind_that_paints_colours_is_gray_on_a_gray_image(monkeypatch):
    def red(site):
        here = window_of(site, 5)
        return here, here.pixels + np.array([0.4, 0, 0])
    monkeypatch.setitem(kinds.KINDS, "spots", red)
    made = make(torch.zeros(3, 32, 32), "spots", generator(0))
    assert torch.equal(made.image[0], made.image[2]) and made.contrast == pytest.approx(0.4 / 3, abs=0.01)


def test_sizes_and_contrasts_vary_within_their_ranges():
    image = photo(height=128)
    made = [make(image, "cut_paste", generator(draw)) for draw in range(12)]
    made += [make(image, kind, generator(draw)) for kind in ("texture", "stain", "poisson_paste") for draw in range(12)]
    areas, contrasts = ([getattr(m, name) for m in made] for name in ("area", "contrast"))
    assert min(areas) < 0.003 and max(areas) > 0.02
    assert min(areas) >= 0.5 * pseudo.AREA[0] and max(areas) <= 1.3 * pseudo.AREA[1]
    assert min(contrasts) < 0.1 and max(contrasts) > 0.25 and min(contrasts) > 0.03


def test_one_to_six_spots_of_1_5_to_5_percent_of_the_side_are_drawn():
    """At 200 px a dot is 3 to 10 px wide, a quarter longer at most, and its edge may reach a pixel further."""
    image, counts, extents = torch.zeros(3, 200, 200), [], []
    for draw in range(30):
        labels, count = ndimage.label(make(image, "spots", generator(draw)).mask[0].numpy(), np.ones((3, 3)))
        counts.append(count)
        extents += [max(part.stop - part.start for part in box) for box in ndimage.find_objects(labels)]
    assert min(counts) == 1 and 3 <= max(counts) <= 6
    assert 2 <= min(extents) <= 6 and np.quantile(extents, 0.8) <= 14       # those that touch count as one wide spot


@pytest.mark.parametrize("level", [-1.0, 0.0, 1.0])
def test_an_even_image_gets_the_kinds_that_can_be_seen_on_it(level):
    image = torch.full((3, 40, 40), level)
    for kind in ("warp", "blur", "poisson_paste"):
        with pytest.raises(UserError, match=f"{kind}: not visible on this image of 40x40 px") as error:
            make(image, kind, generator(0))
        one_line(error)
    made = make_all([image])
    assert len(made) == len(KINDS) and all(m.mask.any() and m.contrast > 0.03 for m in made)
    assert {"spots", "scratch", "stain"} <= {m.kind for m in made}.difference({"warp", "blur", "poisson_paste"})


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'rust': expected one of cut_paste, "):
        make(photo(), "rust", generator(0))


# ------------------------------------------------------------------------------------------ many anomalies

def test_the_same_seed_draws_the_same_anomalies_and_another_seed_others():
    images, names = [photo(index=i) for i in range(2)], ["a.png", "b.png"]
    first = make_all(images, names, seed=3)
    assert same(first, make_all(torch.stack(images), names, seed=3))
    other = make_all(images, names, seed=4)
    assert not any(torch.equal(a.mask, b.mask) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("names", [["c.png", "a.png", "b.png"], None])
def test_the_order_of_the_images_changes_nothing(names):
    images = [photo(index=i) for i in range(3)]
    made = make_all(images, names, seed=1, per_image=4)
    order = [2, 0, 1]
    again = make_all([images[i] for i in order], names and [names[i] for i in order], seed=1, per_image=4)
    assert same([made[4 * i + k] for i in order for k in range(4)], again)


def test_images_of_several_shapes_lend_each_other_pieces():
    images = [photo("carpet", 48, 96), photo("hazelnut", 96, 48), photo("pcb", 40)]
    made = make_all(images)
    assert [m.image.shape for m in made] == [i.shape for i in images for _ in KINDS]


def test_the_kinds_take_turns():
    images = [photo("pcb", index=i) for i in range(5)]
    assert Counter(m.kind for m in make_all(images, per_image=2)) == Counter(KINDS)
    assert [m.kind for m in make_all(images[:1], per_image=len(KINDS))] == list(KINDS)


def test_a_second_anomaly_of_a_kind_on_an_image_is_another_one():
    made = make_all([photo("pcb")], per_image=2 * len(KINDS))
    for kind in KINDS:
        first, second = (m for m in made if m.kind == kind)
        assert not torch.equal(first.mask, second.mask)


@pytest.mark.parametrize("names, message", [(["a", "a"], "a occurs twice"), (["a"], "1 names for 2 images")])
def test_names_must_tell_the_images_apart(names, message):
    with pytest.raises(ValueError, match=message):
        make_all([photo(), photo(index=1)], names)


# ------------------------------------------------------------------------------------------ what counts as changed

def window(value: int = 100, noise: int = 0, size: int = 40) -> np.ndarray:
    spread = np.random.default_rng(0).integers(-noise, noise + 1, (size, size, 1)) if noise else 0
    return np.broadcast_to(value + spread, (size, size, 3)).astype(np.uint8)


def test_a_clear_change_is_found_as_it_is_and_its_mean_is_the_contrast():
    before, after = window(), window().copy()
    after[10:20, 5:25, 1] += 51
    region, contrast = changed_region(before, after, side=40)
    assert np.array_equal(region, (after != before).any(axis=2)) and contrast == pytest.approx(0.2)


def test_pinholes_belong_to_the_region_and_a_wide_untouched_middle_does_not():
    after = window().copy()
    after[5:35, 5:35] += 50
    after[8, 8] = after[15:25, 15:25] = 100
    region, _ = changed_region(window(), after, side=40)
    assert region[8, 8] and not region[16:24, 16:24].any() and not region[:5].any()


def test_crumbs_beside_a_large_change_are_left_out():
    after = window().copy()
    after[5:25, 5:25] += 60
    after[32:34, 32:34] += 60
    region, _ = changed_region(window(), after, side=40)
    assert region[5:25, 5:25].all() and not region[30:].any()


def test_a_faint_change_is_not_seen_and_a_rough_surface_hides_more():
    for noise, step, seen in ((0, 5, False), (0, 16, True), (40, 16, False), (40, 60, True)):
        after = window(noise=noise).copy()
        after[10:30, 10:30] += step
        assert (changed_region(window(noise=noise), after, side=40) is not None) == seen, (noise, step)


def test_smoothing_a_rough_surface_is_seen_where_as_large_a_shift_is_not():
    before, smoothed, shifted = (window(noise=24).copy() for _ in range(3))
    smoothed[10:30, 10:30] = 100
    shifted[10:30, 10:30] += 12         # the mean change of smoothing it
    assert changed_region(before, smoothed, side=40) is not None
    assert changed_region(before, shifted, side=40) is None


# ------------------------------------------------------------------------------------------ the object

@pytest.mark.parametrize("size", [48, 96, 300])
@pytest.mark.parametrize("options", [{}, {"halo": 0.12}, {"bar": True}], ids=str)
def test_the_foreground_is_the_object_without_its_shadow(options, size):
    image, truth = scene(size, **options)
    found = foreground(image)
    assert found.shape == (1, size, size) and found.dtype == torch.bool
    found = found[0].numpy()
    assert (found & truth).sum() / (found | truth).sum() > 0.9


def test_the_foreground_of_a_drawn_nut_is_round_and_inside_the_frame():
    for index in range(4):
        found = foreground(photo("hazelnut", 128, index=index))[0]
        assert 0.15 < found.float().mean() < 0.5
        assert not (found[0].any() or found[-1].any() or found[:, 0].any() or found[:, -1].any())


def test_the_foreground_of_a_drawn_board_is_the_board_and_not_its_parts():
    for index in range(8):
        assert foreground(photo("pcb", 128, index=index)).float().mean() > 0.7


@pytest.mark.parametrize("image", [photo("carpet", 96), torch.zeros(3, 32, 32), torch.ones(3, 2, 5),
                                   photo("pcb", 1, 20)], ids=["carpet", "even", "tiny", "line"])
def test_what_fills_the_frame_is_foreground_everywhere(image):
    assert foreground(image).shape == (1, *image.shape[1:]) and foreground(image).all()


@pytest.mark.parametrize("kind", KINDS)
def test_anomalies_lie_on_the_object(kind):
    image, truth = scene()
    near = ndimage.binary_dilation(truth, iterations=4)
    for draw in range(3):
        mask = make(image, kind, generator(draw, kind)).mask[0].numpy() > 0
        assert not mask[~near].any() and (mask & truth).any()


# ------------------------------------------------------------------------------------------ Poisson's equation

def laplacian(values: np.ndarray) -> np.ndarray:
    """Sum of the differences to the four neighbours, (h, w, 3), for pixels that have all four."""
    kernel = np.array([[0, -1, 0], [-1, 4, -1], [0, -1, 0]])[..., None]
    return ndimage.convolve(values, kernel, mode="nearest")


def region_of(shape: str) -> np.ndarray:
    y, x = np.mgrid[:30, :40]
    return np.hypot(y - 14, x - 18) < 11 if shape == "disc" else (np.abs(y - x) < 4) & (y > 2) & (y < 26)


@pytest.mark.parametrize("shape", ["disc", "band"])
def test_a_pasted_piece_has_the_gradients_of_its_source_and_meets_its_surroundings(shape):
    target, guide = np.random.default_rng(0).random((2, 30, 40, 3))
    region = region_of(shape)
    pasted = solve_poisson(target, guide, region)
    np.testing.assert_array_equal(pasted[~region], target[~region])
    np.testing.assert_allclose(laplacian(pasted)[region], laplacian(guide)[region], atol=1e-9)


def test_pasting_a_piece_onto_itself_changes_nothing_but_its_brightness_is_free():
    target = np.random.default_rng(1).random((30, 40, 3))
    pasted = solve_poisson(target, target + 0.3, region_of("disc"))
    np.testing.assert_allclose(pasted, target, atol=1e-9)


def test_a_fill_without_gradients_is_harmonic_and_stays_within_its_border():
    target = np.random.default_rng(2).random((30, 40, 3))
    region = region_of("disc")
    filled = solve_poisson(target, np.zeros_like(target), region)
    ring = ndimage.binary_dilation(region) & ~region
    assert np.abs(laplacian(filled)[region]).max() < 1e-9
    assert filled[region].min() >= target[ring].min() and filled[region].max() <= target[ring].max()


def test_a_region_at_the_frame_is_solved_with_the_neighbours_it_has():
    target = np.full((12, 12, 3), 0.4)
    region = np.zeros((12, 12), bool)
    region[:5, :5] = True
    np.testing.assert_allclose(solve_poisson(target, np.zeros_like(target), region), target, atol=1e-9)


# ------------------------------------------------------------------------------------------ the sheet

def test_the_sheet_shows_every_kind_on_every_image_and_outlines_it():
    images = [photo("pcb", 48, 96), photo("pcb", 64)]
    sheet = np.asarray(damage_sheet.preview(images, ["a.png", "b.png"], side=96))
    columns = len(KINDS) + 1
    assert sheet.shape[1] == 6 + columns * (96 + 6)
    outlined = (sheet == OUTLINE).all(axis=2).any(axis=0)
    tiles = [outlined[6 + k * 102:102 + k * 102].any() for k in range(columns)]
    assert tiles == [False] + [True] * len(KINDS)


def test_the_command_line_writes_a_sheet(tmp_path, capsys):
    make_category(tmp_path, "bolt", num_train=3, size=16)
    out = tmp_path / "sheet.png"
    damage_sheet.main(["--dataset_path", str(tmp_path), "--item", "bolt", "--out", str(out), "--resolution", "32",
                       "--rows", "2"])
    assert capsys.readouterr().out == f"The sheet is {out}\n"
    assert Image.open(out).width > len(KINDS) * 192


@pytest.mark.parametrize("flags, message", [
    (["--item", "nut"], "no such category"),
    (["--item", "bolt", "--resolution", "8"], "--resolution 8 --rows 6: expected at least 16 pixels"),
    (["--item", "bolt", "--resolution", "4"], "--resolution 4: expected at least 8"),
])
def test_a_mistake_ends_in_one_line(tmp_path, capsys, flags, message):
    make_category(tmp_path, "bolt")
    with pytest.raises(SystemExit) as stopped:
        damage_sheet.main(["--dataset_path", str(tmp_path), "--out", str(tmp_path / "sheet.png"), *flags])
    assert stopped.value.code == 2
    assert re.fullmatch(f"[^\n]*{re.escape(message)}[^\n]*\n", capsys.readouterr().err)
