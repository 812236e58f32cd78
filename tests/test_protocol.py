"""How pixel metrics are measured: the part of the image that counts, the resolution, the images that have a mask."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import measured, one_line, save_drawn, save_mask, tiny_detector, with_settings

from dbad import metrics
from dbad.calibration.thresholds import calibrate
from dbad.data.intensity import UNKNOWN
from dbad.errors import UserError
from dbad.fields import check
from dbad.inspection.reading import read_test
from dbad.maps import central_window, cropped, image_score
from dbad.metrics import pixels
from dbad.metrics.pixels import PixelMetrics
from dbad.metrics.protocol import Protocol, resized_map
from dbad.networks.extractors import build_extractor
from dbad.records import Sample
from dbad.report.results import headline, mask_words

NOTHING = np.zeros((4, 4), bool)


@pytest.fixture
def pictures(tmp_path) -> list[Sample]:
    """A good and a defective image of 24 x 32 px, the defect in the upper left quarter."""
    good = Sample(save_drawn(tmp_path / "test" / "good" / "000.png", 0, (24, 32)), "bolt", "good")
    return [good, Sample(save_drawn(tmp_path / "test" / "crack" / "000.png", 1, (24, 32)), "bolt", "crack",
                         save_mask(tmp_path / "mask.png", (24, 32)))]


# ------------------------------------------------------------------------------------------ the central part

@pytest.mark.parametrize("shape, crop, height, width", [
    ((256, 256), 224, (16, 240), (16, 240)),        # the papers' protocol
    ((64, 64), 224, (4, 60), (4, 60)),
    ((128, 256), 128, (32, 96), (64, 192)),         # the same share of each side
    ((256, 256), 0, (0, 256), (0, 256)),
    ((256, 256), 256, (0, 256), (0, 256)),
    ((4, 4), 1, (1, 2), (1, 2)),                    # never nothing
])
def test_the_central_window_keeps_its_share_of_each_side(shape, crop, height, width):
    assert central_window(shape, crop) == (slice(*height), slice(*width))


def test_outside_the_central_window_a_map_is_zero_and_scores_nothing():
    maps = torch.ones(2, 1, 16, 16)
    maps[0, 0, 0, 0] = 9            # in the corner
    maps[1, 0, 8, 8] = 7
    inside = cropped(maps, 128)
    assert image_score(inside).tolist() == [1, 7]
    assert inside.sum() == 2 * 64 + 6 and image_score(cropped(maps, 0)).tolist() == [9, 7]


def test_a_detector_with_a_crop_looks_at_the_centre_only():
    extractor = build_extractor("efficientnet_lite0", None, 32)
    whole = tiny_detector(extractor)
    centre = with_settings(whole, center_crop=128)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    full, part = whole(images), centre(images)
    assert torch.equal(part.anomaly_map[..., 4:12, 4:12], full.anomaly_map[..., 4:12, 4:12])
    assert part.anomaly_map.count_nonzero() <= 2 * 64
    torch.testing.assert_close(part.score, full.anomaly_map[..., 4:12, 4:12].amax(dim=(1, 2, 3)))


def test_calibration_with_a_crop_measures_scales_and_thresholds_there():
    """The border, a thousand times as different, changes nothing."""
    def parts(border: float) -> list[dict[str, torch.Tensor]]:
        maps = torch.rand(5, 1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        outer = torch.full_like(maps, border)
        outer[..., 4:12, 4:12] = maps[..., 4:12, 4:12]
        return [{"pixel": m} for m in outer]

    def combine(p, scales):
        anomaly_map = cropped(p["pixel"] / scales["pixel"], 128)
        return anomaly_map, image_score(anomaly_map)

    quiet, loud = (calibrate(combine, parts(border), 0.9, 0.5, 128) for border in (0, 1000))
    assert quiet == loud and quiet.num_pixels == 5 * 64
    assert quiet.pixel_threshold == pytest.approx(1)        # the scale is the same quantile of the same pixels


def test_a_crop_beyond_the_image_is_refused():
    from train_tune_eval import Options
    with pytest.raises(UserError) as error:
        check(Options(item=("bolt",), center_crop=300))
    assert "--center_crop 300: expected at most 256" in one_line(error)


# ------------------------------------------------------------------------------------------ the resolution

def test_at_the_network_s_resolution_maps_and_masks_are_compared_as_they_are():
    values, mask = np.ones((4, 4), np.float32), np.zeros((4, 4), bool)
    mask[:2, :2] = True
    found_mask, found = Protocol().pair(values, mask)
    assert np.array_equal(found_mask, mask) and np.array_equal(found, values)


def test_at_the_original_resolution_masks_are_those_of_the_files_and_maps_are_upsampled(pictures):
    values = np.arange(16, dtype=np.float32).reshape(4, 4)
    (no_mask, good), (mask, bad) = (Protocol("original").pair(values, found.mask, found.own_mask) for found in (
        read_test(sample, 4, UNKNOWN, own_mask=True) for sample in pictures))
    assert good.shape == bad.shape == (24, 32) and not no_mask.any()
    assert mask.sum() == 12 * 16 and mask[:12, :16].all()
    assert bad[0, 0] == 0 and bad[-1, -1] == pytest.approx(15) and np.array_equal(bad, resized_map(values, (24, 32)))


def test_upsampling_keeps_a_constant_map_and_never_leaves_the_range():
    np.testing.assert_allclose(resized_map(np.full((3, 5), 2.5, np.float32), (40, 17)), 2.5, rtol=1e-6)
    values = np.random.default_rng(0).random((6, 6), np.float32)
    larger = resized_map(values, (50, 31))
    assert values.min() - 1e-6 <= larger.min() <= larger.max() <= values.max() + 1e-6


def test_a_crop_counts_at_the_original_resolution_too(pictures):
    (_, good), (mask, _) = (Protocol("original", 128).pair(np.ones((4, 4), np.float32), found.mask, found.own_mask)
                            for found in (read_test(sample, 4, UNKNOWN, own_mask=True) for sample in pictures))
    assert good.shape == mask.shape == (12, 16) and mask.sum() == 6 * 8


def test_the_results_say_how_they_were_measured(pictures):
    entries = []
    for sample, values in zip(pictures, np.random.default_rng(0).random((2, 4, 4)), strict=True):
        found = read_test(sample, 4, UNKNOWN, own_mask=True)
        entries.append((sample, values, found.mask, found.own_mask))
    for protocol, resolution, crop in ((Protocol(), "the detector's resolution", "full frame"),
                                       (Protocol("original", 224), "the files' own size", "central 224 of 256 px")):
        found, _ = measured(entries, protocol)
        assert found["protocol"]["resolution"].startswith(resolution)
        assert found["protocol"]["crop"].startswith(crop) and "binary" in found["protocol"]["masks"]
        assert found["pixel"]["method"] == "exact"
        assert found["pixel"]["num_pixels"] == (32 if protocol == Protocol() else 2 * 21 * 28)


def test_without_defect_pixels_there_are_no_pixel_metrics_and_a_reason(pictures):
    found, curves = measured([(sample, np.ones((4, 4)), NOTHING) for sample in pictures], Protocol())
    assert found["pixel"] is None and "no pixel metrics" in found["reason"] and curves.pro is None
    assert found["masks"]["num_empty"] == 1 and found["image"]["auroc"] == 0.5


def test_without_masks_there_are_no_pixel_metrics_and_a_reason(pictures):
    found, _ = measured([(pictures[0], np.zeros((4, 4)), NOTHING), (pictures[1], np.ones((4, 4)))], Protocol())
    assert found["pixel"] is None and "no mask" in found["reason"] and found["image"]["auroc"] == 1


def test_pixel_metrics_are_those_of_the_images_that_have_a_mask(pictures):
    """The map of the image without mask, which is wrong everywhere, changes image metrics alone."""
    mask, crack, own = np.eye(4, dtype=bool), pictures[1], read_test(pictures[1], 4, UNKNOWN, own_mask=True).own_mask
    few = [(pictures[0], np.zeros((4, 4)), NOTHING, own & False), (crack, 1.0 * mask, mask, own)]
    without = replace(crack, path=crack.path.with_name("001.png"), mask=None)
    alone, _ = measured(few, Protocol())
    for resolution in ("network", "original"):
        found, curves = measured([*few, (without, -np.ones((4, 4)))], Protocol(resolution))
        assert found["image"]["auroc"] == 0.5 and curves.pro is not None
        assert found["masks"] == {"num_found": 1, "num_missing": 1, "num_empty": 0, "num_cut": 0,
                                  "missing": ["001.png"], "empty": [], "cut": []}
        assert found["protocol"]["images"] == "2 of 3, without the defective ones that have no mask"
        if resolution == "network":
            assert found["pixel"] == alone["pixel"] and found["pixel"]["auroc"] == 1
    assert alone["protocol"]["images"] == "all" and alone["masks"]["num_missing"] == 0


def test_masks_that_are_empty_or_were_cut_are_named(pictures):
    mask, values = np.eye(4, dtype=bool), np.ones((4, 4))
    cracks = [replace(pictures[1], path=pictures[1].path.with_name(f"{i}.png")) for i in range(3)]
    found, _ = measured([(pictures[0], 0 * values, NOTHING), (cracks[0], values, mask), (cracks[1], values, NOTHING),
                         (cracks[2], values, mask, None, True)], Protocol())
    assert found["masks"] == {"num_found": 3, "num_missing": 0, "num_empty": 1, "num_cut": 1, "missing": [],
                              "empty": ["1.png"], "cut": ["2.png"]}
    line = headline("bolt", found, False)
    assert line.endswith(", 1 defective image with an empty mask (1.png)") and "no mask" not in line
    assert mask_words(found["masks"], ("cut",)) == ["1 mask with gray levels, cut in the middle of their range (2.png)"]


def test_the_headline_counts_masks_and_names_few(pictures):
    cracks = [replace(pictures[1], path=pictures[1].path.with_name(f"{i:03}.png"), mask=None) for i in range(300)]
    good, bad = (pictures[0], np.zeros((4, 4)), NOTHING), (pictures[1], np.eye(4), np.eye(4, dtype=bool))
    unmasked = [(sample, np.ones((4, 4))) for sample in cracks]
    found, _ = measured([good, bad, *unmasked], Protocol())
    assert headline("bolt", found, False).endswith(
        ", no mask for 300 of 301 defective images, which pixel metrics leave out (000.png, 001.png, 002.png and 297 "
        "more)")
    assert len(found["masks"]["missing"]) == 300
    found, _ = measured([good, *unmasked], Protocol())
    assert headline("bolt", found, False).endswith("no pixel metrics: no mask of a defective test image")
    assert found["protocol"]["images"] == "none"


# ------------------------------------------------------------------------------------------ many pixels

def drawn_pairs(num_images: int = 8) -> list[tuple[np.ndarray, np.ndarray]]:
    """Masks and maps that do not follow from each other; the last image has no defect."""
    rng = np.random.default_rng(0)
    return [(rng.random((32, 32)) > (0.9 if i < num_images - 1 else 2), rng.random((32, 32), np.float32))
            for i in range(num_images)]


def pixel_metrics(pairs, threshold: float = 0.7):
    """Metrics, rates and PRO curve of images that come one by one."""
    found = PixelMetrics(threshold)
    for mask, values in pairs:
        found.add(mask, values)
        values[:] = -1              # whoever gave it may use it again
    return (*found.result(), found.rates)


def test_more_pixels_than_fit_are_measured_by_histogram_to_the_same_numbers(monkeypatch):
    exact, curve, rates = pixel_metrics(drawn_pairs())
    monkeypatch.setattr(metrics, "MAX_EXACT_PIXELS", 3000)
    streamed, streamed_curve, same_rates = pixel_metrics(drawn_pairs())
    assert (exact["method"], streamed["method"]) == ("exact", "histogram") and rates == same_rates
    assert rates == metrics.rates(*zip(*drawn_pairs(), strict=True), 0.7)
    for name, value in exact.items():
        if name != "method":
            assert streamed[name] == pytest.approx(value, abs=1e-4)
    assert np.interp(0.3, *streamed_curve[:2]) == pytest.approx(np.interp(0.3, *curve[:2]), abs=0.02)


@pytest.mark.parametrize("limit", [0, 1, 3000, 7 * 1024, 8 * 1024 - 1])
def test_maps_that_are_not_kept_have_the_exact_metrics_of_maps_rounded_to_float16(limit, monkeypatch):
    masks, maps = zip(*drawn_pairs(), strict=True)
    rounded = [values.astype(np.float16) for values in maps]
    rates = metrics.rates(masks, maps, 0.7)
    expected, curve = metrics.pixel_metrics(masks, rounded), metrics.pro_curve(masks, rounded, 400)
    monkeypatch.setattr(pixels, "MAX_FLOAT32_PIXELS", limit)
    found, found_curve, found_rates = pixel_metrics(zip(masks, maps, strict=True))
    assert found.pop("method") == "exact, maps rounded to float16" and expected.pop("method") == "exact"
    assert found == pytest.approx(expected, abs=1e-12) and found_rates == rates       # rates are those of float32
    np.testing.assert_allclose(found_curve, curve)


def test_up_to_the_limit_metrics_are_those_of_the_maps_as_they_are(monkeypatch):
    monkeypatch.setattr(pixels, "MAX_FLOAT32_PIXELS", 8 * 1024)
    masks, maps = zip(*drawn_pairs(), strict=True)
    expected = metrics.pixel_metrics(masks, maps)
    assert pixel_metrics(zip(masks, maps, strict=True))[0] == expected


def test_a_usual_test_set_is_measured_as_it_is():
    assert 200 * 256 ** 2 <= pixels.MAX_FLOAT32_PIXELS < metrics.MAX_EXACT_PIXELS


def test_from_rounded_maps_on_to_the_histogram_no_pixel_is_lost(monkeypatch):
    expected, curve, rates = pixel_metrics(drawn_pairs())
    monkeypatch.setattr(pixels, "MAX_FLOAT32_PIXELS", 2000)
    monkeypatch.setattr(metrics, "MAX_EXACT_PIXELS", 5000)
    found, found_curve, found_rates = pixel_metrics(drawn_pairs())
    assert found["method"] == "histogram" and found_rates == rates and found["num_pixels"] == expected["num_pixels"]
    for name in ("auroc", "ap", "f1_max", "aupro_0.3", "aupro_0.05"):
        assert found[name] == pytest.approx(expected[name], abs=1e-3)
    assert np.interp(0.3, *found_curve[:2]) == pytest.approx(np.interp(0.3, *curve[:2]), abs=0.02)


def test_rounded_maps_keep_their_order_whatever_their_sign_and_range():
    values = np.array([[-1e9, -3, -1e-9, -0.0, 0.0, 1e-9, 0.5, 0.50001, 3, 1e9]], np.float32)
    places = pixels._places(values)[0].astype(int)
    assert (np.diff(places) >= 0).all() and (places[2:6] == places[3]).all()        # too small for float16: all are 0
    np.testing.assert_allclose(pixels._scores(places), [-65504, -3, 0, 0, 0, 0, 0.5, 0.5, 3, 65504])
