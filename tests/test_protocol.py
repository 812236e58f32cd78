"""How pixel metrics are measured: the part of the image that counts, the resolution, the images that have a mask."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import inspection, one_line, save_drawn, save_mask, tiny_detector, with_settings

from dbad import metrics
from dbad.calibration.thresholds import Calibration, calibrate
from dbad.errors import UserError
from dbad.fields import check
from dbad.inspection import loop
from dbad.inspection.loop import measure, measure_pixels
from dbad.maps import central_window, cropped, image_score
from dbad.metrics.protocol import Protocol, resized_map
from dbad.networks.extractors import build_extractor
from dbad.records import Sample
from dbad.report.results import headline, mask_words


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

def test_at_the_network_s_resolution_maps_and_masks_are_compared_as_they_are(pictures):
    mask = np.zeros((4, 4), bool)
    mask[:2, :2] = True
    found = [inspection(pictures[0], np.zeros((4, 4)), mask & False), inspection(pictures[1], np.ones((4, 4)), mask)]
    pairs = list(Protocol().pairs(found, pictures))
    assert np.array_equal(pairs[1][0], mask) and np.array_equal(pairs[1][1], np.ones((4, 4)))


def test_at_the_original_resolution_masks_are_those_of_the_files_and_maps_are_upsampled(pictures):
    values = np.arange(16, dtype=np.float32).reshape(4, 4)
    found = [inspection(sample, values, np.zeros((4, 4), bool)) for sample in pictures]
    (no_mask, good), (mask, bad) = Protocol("original").pairs(found, pictures)
    assert good.shape == bad.shape == (24, 32) and not no_mask.any()
    assert mask.sum() == 12 * 16 and mask[:12, :16].all()
    assert bad[0, 0] == 0 and bad[-1, -1] == pytest.approx(15) and np.array_equal(bad, resized_map(values, (24, 32)))


def test_upsampling_keeps_a_constant_map_and_never_leaves_the_range():
    np.testing.assert_allclose(resized_map(np.full((3, 5), 2.5, np.float32), (40, 17)), 2.5, rtol=1e-6)
    values = np.random.default_rng(0).random((6, 6), np.float32)
    larger = resized_map(values, (50, 31))
    assert values.min() - 1e-6 <= larger.min() <= larger.max() <= values.max() + 1e-6


def test_a_crop_counts_at_the_original_resolution_too(pictures):
    found = [inspection(sample, np.ones((4, 4)), np.zeros((4, 4), bool)) for sample in pictures]
    (_, good), (mask, _) = Protocol("original", 128).pairs(found, pictures)
    assert good.shape == mask.shape == (12, 16) and mask.sum() == 6 * 8


def test_the_results_say_how_they_were_measured(pictures):
    calibration = Calibration({}, 1.0, 1.0)
    masks = [np.zeros((4, 4), bool), np.eye(4, dtype=bool)]
    found = [inspection(*entry) for entry in zip(pictures, np.random.default_rng(0).random((2, 4, 4)), masks,
                                                 strict=True)]
    for protocol, resolution, crop in ((Protocol(), "the detector's resolution", "full frame"),
                                       (Protocol("original", 224), "the files' own size", "central 224 of 256 px")):
        measured, _ = measure(found, calibration, pictures, protocol)
        assert measured["protocol"]["resolution"].startswith(resolution)
        assert measured["protocol"]["crop"].startswith(crop) and "binary" in measured["protocol"]["masks"]
        assert measured["pixel"]["method"] == "exact"
        assert measured["pixel"]["num_pixels"] == (32 if protocol == Protocol() else 2 * 21 * 28)


def test_without_defect_pixels_there_are_no_pixel_metrics_and_a_reason(pictures):
    found = [inspection(sample, np.ones((4, 4)), np.zeros((4, 4), bool)) for sample in pictures]
    measured, curves = measure(found, Calibration({}, 1.0, 1.0), pictures, Protocol())
    assert measured["pixel"] is None and "no pixel metrics" in measured["reason"] and curves.pro is None
    assert measured["masks"]["num_empty"] == 1 and measured["image"]["auroc"] == 0.5


def test_without_masks_there_are_no_pixel_metrics_and_a_reason(pictures):
    nothing = np.zeros((4, 4), bool)
    found = [inspection(pictures[0], np.zeros((4, 4)), nothing), inspection(pictures[1], np.ones((4, 4)))]
    measured, _ = measure(found, Calibration({}, 1.0, 1.0), pictures, Protocol())
    assert measured["pixel"] is None and "no mask" in measured["reason"] and measured["image"]["auroc"] == 1


def test_pixel_metrics_are_those_of_the_images_that_have_a_mask(pictures):
    """The map of the image without mask, which is wrong everywhere, changes image metrics alone."""
    mask, crack = np.eye(4, dtype=bool), pictures[1]
    found = [inspection(pictures[0], np.zeros((4, 4)), mask & False), inspection(crack, 1.0 * mask, mask)]
    without = replace(crack, path=crack.path.with_name("001.png"), mask=None)
    more = [*found, inspection(without, -np.ones((4, 4)))]
    alone, _ = measure(found, Calibration({}, 1.0, 1.0), pictures, Protocol())
    for resolution in ("network", "original"):
        measured, curves = measure(more, Calibration({}, 1.0, 1.0), [*pictures, without], Protocol(resolution))
        assert measured["image"]["auroc"] == 0.5 and curves.pro is not None
        assert measured["masks"] == {"num_found": 1, "num_missing": 1, "num_empty": 0, "num_cut": 0,
                                     "missing": ["001.png"], "empty": [], "cut": []}
        assert measured["protocol"]["images"] == "2 of 3, without the defective ones that have no mask"
        if resolution == "network":
            assert measured["pixel"] == alone["pixel"] and measured["pixel"]["auroc"] == 1
    assert alone["protocol"]["images"] == "all" and alone["masks"]["num_missing"] == 0


def test_masks_that_are_empty_or_were_cut_are_named(pictures):
    mask = np.eye(4, dtype=bool)
    cracks = [replace(pictures[1], path=pictures[1].path.with_name(f"{i}.png")) for i in range(3)]
    values = np.ones((4, 4))
    found = [inspection(pictures[0], 0 * values, mask & False), inspection(cracks[0], values, mask),
             inspection(cracks[1], values, mask & False), inspection(cracks[2], values, mask, cut=True)]
    measured, _ = measure(found, Calibration({}, 1.0, 1.0), [pictures[0], *cracks], Protocol())
    assert measured["masks"] == {"num_found": 3, "num_missing": 0, "num_empty": 1, "num_cut": 1, "missing": [],
                                 "empty": ["1.png"], "cut": ["2.png"]}
    line = headline("bolt", measured, False)
    assert line.endswith(", 1 defective image with an empty mask (1.png)") and "no mask" not in line
    assert mask_words(measured["masks"], ("cut",)) == ["1 mask with shades, cut in the middle of their range (2.png)"]


def test_the_headline_counts_masks_and_names_few(pictures):
    cracks = [replace(pictures[1], path=pictures[1].path.with_name(f"{i:03}.png"), mask=None) for i in range(300)]
    found = [inspection(pictures[0], np.zeros((4, 4)), np.zeros((4, 4), bool)),
             inspection(pictures[1], np.eye(4), np.eye(4, dtype=bool))]
    found += [inspection(sample, np.ones((4, 4))) for sample in cracks]
    measured, _ = measure(found, Calibration({}, 1.0, 1.0), [*pictures, *cracks], Protocol())
    assert headline("bolt", measured, False).endswith(
        ", no mask for 300 of 301 defective images, which pixel metrics leave out (000.png, 001.png, 002.png and 297 "
        "more)")
    assert len(measured["masks"]["missing"]) == 300
    measured, _ = measure([found[0], *found[2:]], Calibration({}, 1.0, 1.0), [pictures[0], *cracks], Protocol())
    assert headline("bolt", measured, False).endswith("no pixel metrics: no mask of a defective test image")
    assert measured["protocol"]["images"] == "none"


def test_more_pixels_than_fit_are_measured_by_histogram_to_the_same_numbers(monkeypatch):
    rng = np.random.default_rng(0)
    pairs = [(rng.random((32, 32)) > 0.9, rng.random((32, 32), np.float32)) for _ in range(8)]
    exact, rates, curve = measure_pixels(pairs, 0.7)
    monkeypatch.setattr(loop.metrics, "MAX_EXACT_PIXELS", 3000)
    streamed, same_rates, streamed_curve = measure_pixels(iter(pairs), 0.7)
    assert (exact["method"], streamed["method"]) == ("exact", "histogram") and rates == same_rates
    assert rates == metrics.rates([m for m, _ in pairs], [v for _, v in pairs], 0.7)
    for name, value in exact.items():
        if name != "method":
            assert streamed[name] == pytest.approx(value, abs=1e-4)
    assert np.interp(0.3, *streamed_curve[:2]) == pytest.approx(np.interp(0.3, *curve[:2]), abs=0.02)
