"""The metrics against masks worked by hand, scikit-learn, and a slow literal form of each definition."""

import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn import metrics as sklearn_metrics

from dbad.metrics import (
    PixelHistogram,
    areas,
    aupro,
    auroc,
    average_precision,
    f1_max,
    image_metrics,
    pixel_metrics,
    pro_curve,
    rates,
    roc_curve,
)
from dbad.metrics.histogram import Pool

repeatable = settings(deadline=None, derandomize=True, max_examples=200)


# The definitions, word for word and in rational numbers


def regions_of(mask):
    """The 8-connected regions of a (H, W) mask, as lists of pixels, by walking from neighbour to neighbour."""
    left, regions = {tuple(map(int, pixel)) for pixel in np.argwhere(mask)}, []
    while left:
        region, open_pixels = [], [left.pop()]
        while open_pixels:
            y, x = open_pixels.pop()
            region.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            open_pixels += near
        regions.append(region)
    return regions


def literal_pro_curve(masks, maps):
    """(fpr, pro) of no threshold at all and of every distinct score, highest first, as Fractions."""
    images = list(zip(masks, maps, strict=True))
    good = [score for mask, scores in images for score in scores[~mask]]
    regions = [[scores[pixel] for pixel in region] for mask, scores in images for region in regions_of(mask)]
    curve = [(Fraction(0), Fraction(0))]
    for threshold in sorted({s for scores in maps for s in scores.flat}, reverse=True):
        shares = [Fraction(sum(s >= threshold for s in region), len(region)) for region in regions]
        false = Fraction(sum(s >= threshold for s in good), len(good))
        curve.append((false, sum(shares) / len(regions)))
    return curve


def area_up_to(curve, limit):
    """Area under straight lines between the points of a curve, cut at `limit`, divided by it."""
    area = Fraction(0)
    for (x0, y0), (x1, y1) in zip(curve, curve[1:], strict=False):
        if x0 < limit and x1 > x0:
            end = min(x1, limit)
            y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
            area += (end - x0) * (y0 + y_end) / 2
    return area / limit


def literal_f1_max(labels, scores):
    """The best F1 of all distinct thresholds, as a Fraction, and the highest threshold that reaches it."""
    def f1(threshold):
        called = [(label, score >= threshold) for label, score in zip(labels, scores, strict=True)]
        wrong = sum(label != call for label, call in called)
        true = sum(label and call for label, call in called)
        return Fraction(2 * int(true), 2 * int(true) + int(wrong))
    return max((f1(threshold), threshold) for threshold in set(scores))


# Random cases with many ties


@st.composite
def labelled_scores(draw):
    size = draw(st.integers(2, 40))
    labels = draw(st.lists(st.integers(0, 1), min_size=size, max_size=size).filter(lambda x: 0 < sum(x) < len(x)))
    return np.array(labels), np.array(draw(st.lists(st.integers(-4, 4), min_size=size, max_size=size)))


@st.composite
def small_maps(draw):
    """One to three images of different sizes, with up to six distinct scores."""
    masks, maps = [], []
    for _ in range(draw(st.integers(1, 3))):
        height, width = draw(st.integers(1, 6)), draw(st.integers(1, 6))
        pixels = height * width
        masks.append(np.array(draw(st.lists(st.booleans(), min_size=pixels, max_size=pixels))).reshape(height, width))
        scores = draw(st.lists(st.integers(-3, 3), min_size=pixels, max_size=pixels))
        maps.append(np.array(scores, np.float32).reshape(height, width) / 8)
    assume(any(mask.any() for mask in masks) and not all(mask.all() for mask in masks))
    return masks, maps


def random_maps(num_images=6, size=48, largest_radius=5, seed=0):
    """Smooth noise, higher on one to three discs and a single pixel in two of three images: (N, H, W) bool, float32."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    masks = np.zeros((num_images, size, size), bool)
    for index in np.flatnonzero(np.arange(num_images) % 3):
        for _ in range(random.integers(1, 4)):
            centre_y, centre_x, radius = random.integers(0, [size, size, largest_radius + 1])
            masks[index] |= (y - centre_y) ** 2 + (x - centre_x) ** 2 <= radius ** 2
        masks[index, index % size, (7 * index) % size] = True
    noise = random.normal(size=masks.shape) + 0.5 * masks
    return masks, ndimage.gaussian_filter(noise, (0, 2, 2)).astype(np.float32)


# AUPRO


HAND_MASK = np.array([
    [1, 0, 0, 1, 0],
    [0, 0, 0, 0, 1],
    [0, 0, 0, 1, 1],
])  # fmt: skip
HAND_MAP = np.array([
    [6, 7, 1, 8, 5],
    [5, 1, 1, 1, 4],
    [4, 1, 1, 2, 8],
])  # fmt: skip


@pytest.mark.parametrize(
    ("limit", "area"), [(0.05, 0.0125), (0.3, 0.175), (0.35, 0.175 + 0.0390625), (0.4, 0.25625), (1.0, 0.85625)]
)
def test_aupro_of_a_mask_worked_by_hand(limit, area):
    """Ten good pixels, one region of one pixel and one of four that touch at a corner.

    Score 8 finds half of the larger region, a mean of 1/4; 7 the first good pixel, at 0.1; 6 the smaller region, 3/4;
    5 two more good pixels, at 0.3; 4 one good pixel and a quarter of the larger region at once, a ramp to 7/8 at 0.4;
    2 the rest of it; 1 the other good pixels.
    """
    assert aupro([HAND_MASK], [HAND_MAP], limit) == pytest.approx(area / limit, abs=1e-12)


def test_the_other_pixel_metrics_of_a_mask_worked_by_hand():
    """The five defect scores 8 8 6 4 2 beat 10, 10, 9, 6 1/2 and 6 of the ten good 7 5 5 4 1 1 1 1 1 1."""
    found = pixel_metrics([HAND_MASK], [HAND_MAP])
    assert found["auroc"] == 41.5 / 50
    assert found["ap"] == pytest.approx((2 * 1 + 3 / 4 + 4 / 8 + 5 / 9) / 5, abs=1e-12)
    assert (found["f1_max"], found["f1_max_threshold"]) == (2 * 5 / (5 + 9), 2)
    assert (found["method"], found["num_pixels"]) == ("exact", 15)


@repeatable
@given(small_maps(), st.sampled_from([Fraction(1, 20), Fraction(3, 10), Fraction(1, 2), Fraction(1)]))
def test_aupro_is_the_literal_definition_in_rational_numbers(images, limit):
    masks, maps = images
    expected = area_up_to(literal_pro_curve(masks, maps), limit)
    assert aupro(masks, maps, float(limit)) == pytest.approx(float(expected), abs=1e-10)


def test_aupro_is_the_literal_definition_on_larger_maps_with_few_distinct_scores():
    masks, maps = random_maps(num_images=3, size=32)
    maps = np.round(maps * 50)
    curve = literal_pro_curve(masks, maps)
    for limit in (Fraction(1, 20), Fraction(3, 10), Fraction(1)):
        assert aupro(masks, maps, float(limit)) == pytest.approx(float(area_up_to(curve, limit)), abs=1e-10)


def test_a_constant_map_gives_the_straight_line():
    """From (0, 0) to (1, 1): the area up to the limit is limit^2 / 2, and half the limit when divided by it."""
    masks = np.zeros((2, 8, 8), bool)
    masks[0, 2:4, 2:4] = masks[1, 7, 7] = True
    maps = np.full(masks.shape, 0.3, np.float32)
    for limit in (0.05, 0.3, 1.0):
        assert aupro(masks, maps, limit) == pytest.approx(limit / 2, abs=1e-15)
    assert auroc(masks, maps) == 0.5
    assert average_precision(masks, maps) == 5 / 128


def test_a_perfect_map_gives_one_and_its_negative_zero():
    masks, _ = random_maps()
    maps = masks.astype(np.float32)
    assert (auroc(masks, maps), average_precision(masks, maps)) == (1, 1)
    assert auroc(masks, -maps) == 0
    for limit in (0.05, 0.3, 1):
        assert aupro(masks, maps, limit) == pytest.approx(1, abs=1e-12)
        assert aupro(masks, -maps, limit) == 0


def test_a_small_region_counts_as_much_as_a_large_one():
    mask, scores = np.zeros((20, 20), bool), np.zeros((20, 20))
    mask[0, 0] = mask[5:15, 5:15] = True
    scores[0, 0] = 1
    assert aupro([mask], [scores], 1e-9) == pytest.approx(0.5, abs=1e-6)


# AUROC, AP and F1-max


@repeatable
@given(labelled_scores())
def test_auroc_and_average_precision_agree_with_scikit_learn(case):
    labels, scores = case
    assert auroc(labels, scores) == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores), abs=1e-12)
    expected = sklearn_metrics.average_precision_score(labels, scores)
    assert average_precision(labels, scores) == pytest.approx(expected, abs=1e-12)


def test_pixel_metrics_agree_with_scikit_learn_on_smooth_maps():
    masks, maps = random_maps()
    found, flat = pixel_metrics(masks, maps), (masks.ravel(), maps.ravel())
    assert found["auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(*flat), abs=1e-12)
    assert found["ap"] == pytest.approx(sklearn_metrics.average_precision_score(*flat), abs=1e-12)
    precision, recall, _ = sklearn_metrics.precision_recall_curve(*flat)
    assert found["f1_max"] == pytest.approx(np.max(2 * precision * recall / (precision + recall + 1e-300)), abs=1e-12)


@repeatable
@given(labelled_scores())
def test_f1_max_is_the_best_over_all_thresholds_and_the_highest_of_them(case):
    labels, scores = case
    expected, threshold = literal_f1_max(labels.tolist(), scores.tolist())
    assert f1_max(labels, scores) == (pytest.approx(float(expected), abs=1e-12), threshold)


def test_the_f1_threshold_reaches_that_f1():
    masks, maps = random_maps()
    f1, threshold = f1_max(masks, maps)
    assert rates(masks, maps, threshold).f1 == f1
    assert rates(masks, maps, np.nextafter(np.float32(threshold), np.float32(np.inf))).f1 < f1


def test_image_metrics_are_the_single_functions():
    labels, scores = [0, 0, 1, 1, 0, 1], [0.1, 0.7, 0.3, 0.9, 0.2, 0.7]
    f1, threshold = f1_max(labels, scores)
    assert image_metrics(labels, scores) == {
        "auroc": auroc(labels, scores),
        "ap": average_precision(labels, scores),
        "f1_max": f1,
        "f1_max_threshold": threshold,
        "num_good": 3,
        "num_defective": 3,
    }


def test_pixel_metrics_are_the_single_functions():
    masks, maps = random_maps()
    f1, threshold = f1_max(masks, maps)
    assert pixel_metrics(masks, maps, method="exact") == {
        "auroc": auroc(masks, maps),
        "ap": average_precision(masks, maps),
        "f1_max": f1,
        "f1_max_threshold": threshold,
        "aupro_0.3": pytest.approx(aupro(masks, maps), abs=1e-12),
        "aupro_0.05": pytest.approx(aupro(masks, maps, limit=0.05), abs=1e-12),
        "method": "exact",
        "num_pixels": maps.size,
    }


# What must not change a result


def without_threshold(metrics):
    return {name: value for name, value in metrics.items() if name != "f1_max_threshold"}


INCREASING = {
    "scaled to 1e-30": lambda x: x.astype(np.float64) * 1e-30,
    "moved by 1e6": lambda x: x.astype(np.float64) + 1e6,
    "cubed": lambda x: x.astype(np.float64) ** 3,
    "exponential": lambda x: np.exp(x.astype(np.float64) * 30),
    "ranks": lambda x: np.unique(x, return_inverse=True)[1].reshape(x.shape),
    "one huge outlier": lambda x: np.where(x == x.max(), np.float32(3e38), x),
}


@pytest.mark.parametrize("change", INCREASING)
@pytest.mark.parametrize("method", ["exact", "histogram"])
def test_an_increasing_change_of_the_scores_changes_no_metric(change, method, monkeypatch):
    monkeypatch.setattr(PixelHistogram, "GOOD_EDGES", PixelHistogram.GOOD_EDGES[::64])
    monkeypatch.setattr(PixelHistogram, "GOOD_BUFFER", 5000)
    masks, maps = random_maps()
    changed = INCREASING[change](maps)
    assert len(np.unique(changed)) == len(np.unique(maps)) and not np.array_equal(changed, maps)
    before, after = (pixel_metrics(masks, scores, method) for scores in (maps, changed))
    assert without_threshold(after) == without_threshold(before)


def test_scores_that_only_float64_tells_apart_are_not_merged():
    scores = 1 + np.array([0, 1, 2, 3]) * 1e-12
    assert len(np.unique(scores.astype(np.float32))) == 1
    assert auroc([0, 0, 1, 1], scores) == 1
    assert aupro([[[0, 0, 1, 1]]], scores.reshape(1, 1, 4)) == 1


def test_integers_that_only_int64_tells_apart_are_not_merged():
    scores = 2 ** 60 + np.array([0, 1, 2, 3])
    assert len(np.unique(scores.astype(np.float64))) == 1
    assert auroc([0, 0, 1, 1], scores) == 1


def test_minus_zero_and_zero_are_tied():
    scores = np.where(np.arange(64) % 3, np.float32(-0.0), np.float32(0.0))
    labels = np.arange(64) % 2
    assert auroc(labels, scores) == 0.5
    assert aupro(labels.reshape(1, 8, 8), scores.reshape(1, 8, 8)) == pytest.approx(0.15, abs=1e-12)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.float16, np.float32, np.float64])
def test_the_type_of_the_scores_does_not_matter(dtype):
    assert pixel_metrics([HAND_MASK], [HAND_MAP.astype(dtype)]) == pixel_metrics([HAND_MASK], [HAND_MAP])


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
def test_the_type_of_the_masks_does_not_matter(dtype):
    masks, maps = random_maps()
    assert pixel_metrics(masks.astype(dtype), maps) == pixel_metrics(masks, maps)


def test_all_forms_of_giving_images_are_the_same():
    masks, maps = random_maps()
    expected = pixel_metrics(masks, maps)
    assert pixel_metrics(masks[:, None], maps[:, None]) == expected
    assert pixel_metrics(masks, maps[:, None]) == expected
    assert pixel_metrics(list(masks), list(maps)) == expected
    assert pixel_metrics(masks.transpose(0, 2, 1), maps.transpose(0, 2, 1)) == pytest.approx(expected)
    assert auroc(list(masks), list(maps)) == auroc(masks.ravel(), maps.ravel()) == expected["auroc"]


def test_tensors_are_as_good_as_arrays():
    torch = pytest.importorskip("torch")
    masks, maps = random_maps()
    tensors = torch.from_numpy(masks[:, None]).float(), torch.from_numpy(maps[:, None])
    assert pixel_metrics(*tensors) == pixel_metrics(list(tensors[0]), list(tensors[1])) == pixel_metrics(masks, maps)
    assert rates(*tensors, threshold=0.1) == rates(masks, maps, threshold=0.1)


def test_the_order_of_the_images_does_not_matter():
    masks, maps = random_maps()
    assert pixel_metrics(masks[::-1], maps[::-1]) == pytest.approx(pixel_metrics(masks, maps), abs=1e-12)


def test_what_was_given_is_left_as_it_was():
    masks, maps = random_maps()
    masks, copies = masks.astype(np.uint8), (masks.astype(np.uint8), maps.copy())
    aupro(masks, maps)
    pixel_metrics(masks[2:3], maps[2:3], "histogram")
    roc_curve(masks, maps)
    np.testing.assert_array_equal(masks, copies[0])
    np.testing.assert_array_equal(maps, copies[1])


# Curves


@repeatable
@given(small_maps())
def test_every_point_of_the_curves_is_what_its_threshold_gives(images):
    masks, maps = images
    fpr, tpr, thresholds = roc_curve(masks, maps)
    at = [rates(masks, maps, threshold) for threshold in thresholds]
    assert fpr.tolist() == [r.false_positive_rate for r in at]
    assert tpr.tolist() == [r.true_positive_rate for r in at]
    assert (np.diff(thresholds) < 0).all() and (np.diff(fpr) + np.diff(tpr) > 0).all()
    assert (fpr[0], tpr[0], thresholds[0], fpr[-1], tpr[-1]) == (0, 0, np.inf, 1, 1)


@repeatable
@given(small_maps())
def test_every_threshold_gives_a_point_on_the_curves(images):
    """Between the corners that are listed the literal curves are straight."""
    masks, maps = images
    found, labels, scores = roc_curve(masks, maps), [m.ravel() for m in masks], [s.ravel() for s in maps]
    expected = sklearn_metrics.roc_curve(np.concatenate(labels), np.concatenate(scores), drop_intermediate=False)
    literal = np.array(literal_pro_curve(masks, maps), float).T
    for (x, y), (all_x, all_y) in [(found[:2], expected[:2]), (pro_curve(masks, maps)[:2], literal)]:
        # As functions of x + y, which never stays where it is, vertical stretches need no special care.
        np.testing.assert_allclose(np.interp(all_x + all_y, x + y, x), all_x, atol=1e-12)
        assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)


def test_the_areas_under_the_curves_are_the_metrics():
    masks, maps = random_maps()
    fpr, tpr, _ = roc_curve(masks, maps)
    assert sklearn_metrics.auc(fpr, tpr) == pytest.approx(auroc(masks, maps), abs=1e-12)
    fpr, pro, _ = pro_curve(masks, maps)
    assert sklearn_metrics.auc(fpr, pro) == pytest.approx(aupro(masks, maps, limit=1.0), abs=1e-12)


def test_a_thinned_curve_keeps_its_ends_and_stays_near_the_whole():
    masks, maps = random_maps()
    whole, thinned = pro_curve(masks, maps), pro_curve(masks, maps, max_points=50)
    assert len(whole[0]) > 200 and 25 < len(thinned[0]) <= 50
    points = np.stack(whole, 1).tolist()
    assert all(point in points for point in np.stack(thinned, 1).tolist())
    assert [column[0] for column in thinned] == [column[0] for column in whole]
    assert [column[-1] for column in thinned] == [column[-1] for column in whole]
    steps = np.diff(thinned[0]) + np.diff(thinned[1])
    assert steps.max() < 2 * 2 / 49 + np.max(np.diff(whole[0]) + np.diff(whole[1]))


# Rates


def test_rates_of_a_case_worked_by_hand():
    found = rates([0, 0, 0, 0, 1, 1, 1], [0.1, 0.5, 0.2, 0.3, 0.5, 0.4, 0.9], threshold=0.5)
    assert found.as_dict() == {
        "tp": 2, "fp": 1, "tn": 3, "fn": 1,
        "true_positive_rate": 2 / 3, "true_negative_rate": 3 / 4,
        "false_positive_rate": 1 / 4, "false_negative_rate": 1 / 3,
        "accuracy": 5 / 7, "precision": 2 / 3, "f1": 2 / 3,
    }  # fmt: skip


@repeatable
@given(labelled_scores(), st.integers(-5, 5))
def test_the_counts_are_scikit_learns_confusion_matrix(case, threshold):
    labels, scores = case
    found = rates(labels, scores, threshold)
    expected = sklearn_metrics.confusion_matrix(labels, scores >= threshold, labels=[0, 1])
    np.testing.assert_array_equal([[found.tn, found.fp], [found.fn, found.tp]], expected)


def test_a_rate_of_nothing_is_none():
    only_good = rates([0, 0], [0.1, 0.2], threshold=0.5)
    assert only_good.true_positive_rate is only_good.false_negative_rate is only_good.precision is only_good.f1 is None
    assert (only_good.true_negative_rate, only_good.accuracy) == (1, 1)
    only_defects = rates([1, 1], [0.1, 0.7], threshold=0.5)
    assert only_defects.true_negative_rate is only_defects.false_positive_rate is None
    assert (only_defects.true_positive_rate, only_defects.precision) == (0.5, 1)


def test_pixel_rates_of_images_of_different_sizes_are_those_of_all_their_pixels():
    masks, maps = [HAND_MASK, HAND_MASK[:2]], [HAND_MAP, HAND_MAP[:2]]
    flat = [np.concatenate([image.ravel() for image in images]) for images in (masks, maps)]
    assert rates(masks, maps, threshold=5) == rates(*flat, threshold=5)


def test_a_threshold_is_not_rounded_to_the_type_of_the_scores():
    score = np.float32(0.3)
    just_above = np.nextafter(np.float64(score), 1)
    assert np.float32(just_above) == score
    assert rates(np.ones(1, bool), np.array([score]), float(score)).tp == 1
    assert rates(np.ones(1, bool), np.array([score]), float(just_above)).tp == 0


# Histogram


@pytest.fixture(scope="module")
def many_pixels():
    return random_maps(num_images=40, size=160, largest_radius=40)


@pytest.fixture
def small_buffers(monkeypatch):
    """With an eighth of the bins, a million pixels pass through several levels of summaries, as many more would."""
    monkeypatch.setattr(PixelHistogram, "GOOD_BUFFER", 1 << 16)
    monkeypatch.setattr(PixelHistogram, "DEFECT_BUFFER", 1 << 15)
    monkeypatch.setattr(PixelHistogram, "GOOD_EDGES", PixelHistogram.GOOD_EDGES[::8])
    monkeypatch.setattr(PixelHistogram, "DEFECT_EDGES", PixelHistogram.DEFECT_EDGES[::8])


SCORES = {
    "smooth": lambda maps: maps,
    "in a narrow range far from 0": lambda maps: 1000 + maps.astype(np.float64),
    "pressed against 1": lambda maps: 1 - np.exp(-30 * (maps.astype(np.float64) + 2)),
    "with one huge outlier": lambda maps: np.where(maps == maps.max(), np.float32(1e38), maps),
    "of 256 levels": lambda maps: np.interp(maps, [maps.min(), maps.max()], [0, 255]).astype(np.uint8),
    "mostly zero": lambda maps: np.maximum(maps, np.quantile(maps, 0.9)),
    "rising from image to image": lambda maps: maps + np.linspace(0, 1, len(maps), dtype=np.float32)[:, None, None],
    "falling from image to image": lambda maps: maps - np.linspace(0, 1, len(maps), dtype=np.float32)[:, None, None],
}


@pytest.mark.parametrize("kind", SCORES)
def test_the_histogram_is_within_1e_4_of_the_exact_metrics(kind, many_pixels, small_buffers):
    masks, maps = many_pixels[0], SCORES[kind](many_pixels[1])
    exact, histogram = pixel_metrics(masks, maps, "exact"), pixel_metrics(masks, maps, "histogram")
    assert histogram.pop("method") == "histogram" and exact.pop("method") == "exact"
    assert without_threshold(histogram) == pytest.approx(without_threshold(exact), abs=1e-4, rel=0)
    at_threshold = rates(masks, maps, histogram["f1_max_threshold"])
    assert at_threshold.f1 == pytest.approx(exact["f1_max"], abs=1e-3)


RANKS = {
    "random": lambda n: np.random.default_rng(0).permutation(n),
    "rising": np.arange,
    "falling": lambda n: np.arange(n)[::-1],
    "tied": lambda n: np.random.default_rng(0).permutation(n) // 700,
}


@pytest.mark.parametrize("with_shares", [False, True])
@pytest.mark.parametrize("order", RANKS)
def test_a_pool_moves_a_rank_by_half_a_bin_when_it_condenses_and_a_bin_when_it_merges(order, with_shares):
    num_bins, buffer = 100, 2500
    scores = RANKS[order](4 * buffer)
    for num_buffers, num_moves in [(1, 0.5), (4, 2.5)]:
        pool, num_scores = Pool(np.linspace(0, 1, num_bins, endpoint=False), buffer), num_buffers * buffer
        for part in np.split(scores[:num_scores], num_buffers):
            pool.add(part, np.ones(len(part)) if with_shares else None)
        points = pool.points()
        assert len(points.score) <= num_bins and points.count.sum() == num_scores
        at = np.arange(scores.max() + 1)
        exact = np.searchsorted(np.sort(scores[:num_scores]), at)
        condensed = np.append(0, np.cumsum(points.count))[np.searchsorted(points.score, at)]
        assert np.abs(condensed - exact).max() <= num_moves * num_scores / num_bins + 1


def test_the_histogram_keeps_a_bounded_number_of_points(many_pixels, small_buffers):
    histogram = PixelHistogram()
    histogram.update(*many_pixels)
    for pool, num_pixels in [(histogram.good, histogram.num_good), (histogram.defects, histogram.num_defective)]:
        num_points, num_buffers = len(pool.points().score), num_pixels // pool.buffer
        assert num_buffers > 1 and len(pool.summaries) <= 1 + np.log2(num_buffers)
        assert num_points < len(pool.edges) * len(pool.summaries) + pool.buffer < num_pixels


def test_the_histogram_is_exact_while_its_buffers_last():
    masks, maps = random_maps()
    histogram = pixel_metrics(masks, maps, "histogram")
    assert histogram == pixel_metrics(masks, maps, "exact") | {"method": "histogram"}


def test_batches_of_any_size_make_the_same_histogram(many_pixels, small_buffers):
    masks, maps = many_pixels
    histogram, reused = PixelHistogram(), np.empty_like(maps[:7])
    for start in range(0, len(maps), 7):
        batch = reused[:len(maps[start:start + 7])]
        batch[:] = maps[start:start + 7]                            # one array for all batches, as a caller may keep
        histogram.update(masks[start:start + 7], batch)
    assert histogram.metrics() == histogram.metrics() == pixel_metrics(masks, maps, "histogram")


def test_a_histogram_gives_the_curves_too(many_pixels, small_buffers):
    histogram = PixelHistogram()
    histogram.update(*many_pixels)
    pairs = [(histogram.roc_curve(), roc_curve(*many_pixels)), (histogram.pro_curve(), pro_curve(*many_pixels))]
    at = np.linspace(0, 1, 200)
    for (x, y, thresholds), (exact_x, exact_y, exact_thresholds) in pairs:
        assert (thresholds[0], thresholds[-1]) == (exact_thresholds[0], exact_thresholds[-1])
        np.testing.assert_allclose(np.interp(at, x, y), np.interp(at, exact_x, exact_y), atol=1e-3)
    assert len(histogram.pro_curve(max_points=10)[0]) <= 10


def test_auto_sorts_until_there_are_too_many_pixels(monkeypatch):
    masks, maps = random_maps()
    assert pixel_metrics(masks, maps)["method"] == "exact"
    monkeypatch.setattr(areas, "MAX_EXACT_PIXELS", maps.size - 1)
    assert pixel_metrics(masks, maps)["method"] == "histogram"


@pytest.mark.parametrize("function", [aupro, pixel_metrics])
def test_the_exact_metrics_need_one_copy_of_the_maps_and_some_for_the_defects(function, many_pixels):
    masks, maps = many_pixels
    tracemalloc.start()
    function(masks, maps)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.6 * maps.nbytes + 100 * masks.sum()


# Nonsense


GOOD, MASK, MAP = np.zeros((1, 2, 3), int), np.array([[[0, 1, 1], [0, 0, 0]]]), np.arange(6.0).reshape(1, 2, 3)

NONSENSE = {
    "no defect": (GOOD, MAP, "none of 6"),
    "no good pixel": (GOOD + 1, MAP, "all of 6"),
    "NaN": (MASK, np.where(MAP == 2, np.nan, MAP), "finite, found nan"),
    "infinite": (MASK, np.where(MAP == 2, np.inf, MAP), "finite, found inf"),
    "minus infinite": (MASK, np.where(MAP == 2, -np.inf, MAP), "finite, found -inf"),
    "another shape": (MASK, MAP.reshape(1, 3, 2), "equal"),
    "grey levels": (255 * MASK, MAP, "binary, 0 or 1 only, found 255"),
    "soft masks": (0.5 * MASK, MAP, "binary, 0 or 1 only, found 0.5"),
    "masks of text": (MASK.astype(str), MAP, "found type"),
    "complex scores": (MASK, MAP + 1j, "found type complex"),
    "no image": (MASK[:0], MAP[:0], "there is no image|empty"),
}


@pytest.mark.parametrize("case", NONSENSE)
@pytest.mark.parametrize(
    "metric", [auroc, average_precision, f1_max, image_metrics, aupro, pixel_metrics, roc_curve, pro_curve]
)
@pytest.mark.filterwarnings("error")
def test_nonsense_is_an_error_of_one_line_and_never_a_number(metric, case):
    masks, maps, message = NONSENSE[case]
    with pytest.raises(ValueError, match=message) as error:
        metric(masks, maps)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_an_error_in_a_histogram_too(case):
    masks, maps, message = NONSENSE[case]
    with pytest.raises(ValueError, match=message):
        pixel_metrics(masks, maps, "histogram")


def test_an_error_names_the_image():
    with pytest.raises(ValueError, match="map of image 1 must be finite, found nan"):
        aupro([MASK[0], MASK[0]], [MAP[0], MAP[0] * np.nan])
    with pytest.raises(ValueError, match=r"of image 1: mask \(2, 2\), map \(2, 3\)"):
        aupro([MASK[0], MASK[0, :, 1:]], [MAP[0], MAP[0]])
    with pytest.raises(ValueError, match="2 images have a mask, 1 a map"):
        aupro([MASK[0], MASK[0]], [MAP[0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: aupro(MASK, MAP, limit=0), "limit"),
        (lambda: aupro(MASK, MAP, limit=1.1), "limit"),
        (lambda: aupro(MASK, MAP, limit=float("nan")), "limit"),
        (lambda: aupro(MASK[0], MAP[0]), r"\(H, W\)"),
        (lambda: aupro([MASK[0]] * 2, [MAP[0], MAP[0].astype(int)]), "different types"),
        (lambda: pixel_metrics(MASK, MAP, method="fast"), "method"),
        (lambda: roc_curve(MASK, MAP, max_points=1), "max_points"),
        (lambda: rates(MASK, MAP, float("nan")), "threshold"),
        (lambda: rates([], [], 0.5), "empty"),
        (lambda: rates([0, 1], [0.5, np.nan], 0.5), "finite"),
    ],
)
def test_an_argument_that_cannot_be_is_an_error_that_names_it(call, message):
    with pytest.raises(ValueError, match=message):
        call()
