"""Difference maps: what they vanish for, what does not change them, and how blur and fusion keep totals."""

import pytest
import torch
from helpers import one_line, random_images
from scipy import ndimage
from torch.nn import functional as F

from dbad import maps as dbad_maps
from dbad.errors import UserError
from dbad.maps import blur, feature_maps, fuse, image_score, pixel_map


def features(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, c, s, s, generator=generator) for c, s in ((8, 8), (16, 4))]


def test_equal_images_have_no_difference():
    images = random_images(2)
    assert torch.equal(pixel_map(images, images), torch.zeros(2, 1, 16, 16))
    same = feature_maps(features(), features(), (16, 16))
    assert same.shape == (2, 2, 16, 16) and same.min() >= 0 and same.max() < 1e-6


def test_differences_are_symmetric():
    one, other = random_images(2, seed=1), random_images(2, seed=2)
    assert torch.equal(pixel_map(one, other), pixel_map(other, one))
    torch.testing.assert_close(feature_maps(features(1), features(2), (16, 16)),
                               feature_maps(features(2), features(1), (16, 16)))


def test_the_pixel_map_is_the_largest_squared_difference_of_the_colours():
    image, other = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    image[0, :, 0, 0] = torch.tensor([0.1, -0.4, 0.2])              # half of it in [0, 1]
    expected = torch.zeros(1, 1, 2, 2)
    expected[0, 0, 0, 0] = 0.2 ** 2
    torch.testing.assert_close(pixel_map(image, other), expected)
    assert pixel_map(torch.ones(1, 3, 1, 1), -torch.ones(1, 3, 1, 1)) == 1


def test_the_mean_absolute_difference_is_between_0_and_1():
    image, other = random_images(1, seed=1), random_images(1, seed=2)
    expected = ((image + 1) / 2 - (other + 1) / 2).abs().mean(dim=1, keepdim=True)
    torch.testing.assert_close(pixel_map(image, other, "mean_abs"), expected)
    assert pixel_map(torch.ones(1, 3, 1, 1), -torch.ones(1, 3, 1, 1), "mean_abs") == 1


def test_the_feature_map_does_not_change_when_features_are_scaled():
    a, b = features(1), features(2)
    scaled = feature_maps([f * 7 for f in a], [f * 0.03 for f in b], (16, 16))
    torch.testing.assert_close(scaled, feature_maps(a, b, (16, 16)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_opposite_features_differ_by_2_in_every_layer(kernel):
    ones = [torch.ones(1, 4, 6, 6), torch.ones(1, 8, 3, 3)]
    found = feature_maps(ones, [-f for f in ones], (12, 12), kernel)
    torch.testing.assert_close(found, torch.full((1, 2, 12, 12), 2.0))


def test_orthogonal_features_differ_by_1_per_layer():
    a, b = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4)
    a[:, 0], b[:, 1] = 1, 1
    torch.testing.assert_close(feature_maps([a], [b], (8, 8)), torch.ones(1, 1, 8, 8))


def test_every_layer_has_its_own_map():
    a, b = features(1), features(2)
    single = [feature_maps([x], [y], (16, 16)) for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(feature_maps(a, b, (16, 16)), torch.cat(single, dim=1))


def test_features_are_smoothed_by_the_mean_of_their_neighbours():
    """At a corner the mean filter of side 3 averages the 4 features there, in the middle 9."""
    a = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    b = torch.ones(1, 4, 5, 5)
    found = feature_maps([a], [b], (5, 5), kernel=3)[0, 0]
    for row, column, rows, columns in ((0, 0, slice(0, 2), slice(0, 2)), (2, 2, slice(1, 4), slice(1, 4))):
        mean = a[0, :, rows, columns].mean(dim=(1, 2))
        expected = 1 - torch.cosine_similarity(mean, torch.ones(4), dim=0)
        torch.testing.assert_close(found[row, column], expected)


def test_the_feature_map_of_an_image_does_not_depend_on_its_batch():
    a, b = features(1), features(2)
    alone = feature_maps([f[1:] for f in a], [f[1:] for f in b], (16, 16))
    torch.testing.assert_close(alone, feature_maps(a, b, (16, 16))[1:])


def test_features_of_another_number_of_layers_are_an_error():
    with pytest.raises(ValueError):
        feature_maps(features(), features()[:1], (16, 16))


# Blur

@pytest.mark.parametrize("sigma", [0.25, 1.0, 4.0, 30.0])
def test_blur_keeps_a_constant_map(sigma):
    maps = torch.full((2, 1, 16, 24), 0.37)
    torch.testing.assert_close(blur(maps, sigma), maps)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.5])
def test_blur_spreads_an_impulse_as_a_gaussian_of_the_same_total(sigma):
    maps = torch.zeros(1, 1, 33, 33)
    maps[0, 0, 16, 16] = 5.0
    blurred = blur(maps, sigma)[0, 0]
    torch.testing.assert_close(blurred.sum(), torch.tensor(5.0))
    assert torch.equal(blurred, blurred.flip(0)) and torch.equal(blurred, blurred.flip(1))
    torch.testing.assert_close(blurred, blurred.T)
    offsets = torch.arange(-16, 17.0)
    variance = (blurred.sum(0) * offsets ** 2).sum() / 5
    assert abs(float(variance) - sigma ** 2) < 0.05 * sigma ** 2 + 0.03     # sampled and cut off at 4 sigma
    assert blurred[16, 16] == blurred.max()


@pytest.mark.parametrize("matrix_side", [0, 1024])
@pytest.mark.parametrize("sigma", [0.5, 2.0, 6.0])
def test_blur_is_the_gaussian_filter_of_scipy_whichever_way_it_is_computed(matrix_side, sigma, monkeypatch):
    monkeypatch.setattr(dbad_maps, "MATRIX_SIDE", matrix_side)
    maps = torch.rand(2, 1, 40, 56, generator=torch.Generator().manual_seed(0))
    expected = ndimage.gaussian_filter(maps.numpy(), (0, 0, sigma, sigma), truncate=4, mode="mirror")
    torch.testing.assert_close(blur(maps, sigma), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_blur_with_sigma_0_changes_nothing():
    maps = torch.rand(2, 1, 8, 8)
    assert torch.equal(blur(maps, 0.0), maps)


def test_a_larger_sigma_on_a_larger_map_is_the_same_blur():
    """Twice the pixels and twice the sigma give the same picture; this is why sigma is given for 256 px."""
    coarse = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    small = F.interpolate(coarse, (32, 32), mode="bilinear")
    large = F.interpolate(small, scale_factor=2, mode="nearest")
    reduced = F.avg_pool2d(blur(large, 8.0), 2)
    torch.testing.assert_close(reduced, blur(small, 4.0), rtol=0, atol=0.01)
    assert (reduced - small).abs().max() > 0.1


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 3), (16, 4)])
def test_blur_of_a_map_smaller_than_its_kernel_is_finite_and_in_range(shape):
    maps = torch.rand(1, 1, *shape)
    blurred = blur(maps, 4.0)
    assert blurred.shape == maps.shape and blurred.min() >= maps.min() - 1e-6 and blurred.max() <= maps.max() + 1e-6


def test_blur_treats_every_map_of_a_batch_alone():
    maps = torch.rand(3, 1, 16, 16)
    torch.testing.assert_close(blur(maps, 2.0)[1:2], blur(maps[1:2], 2.0))


# Fusion and score

def test_fusion_weighs_each_part_in_units_of_its_scale():
    parts = {"pixel": torch.full((1, 1, 2, 2), 0.2), "feature": torch.full((1, 1, 2, 2), 3.0)}
    fused = fuse(parts, {"pixel": 0.1, "feature": 6.0}, {"pixel": 0.7, "feature": 0.5})
    torch.testing.assert_close(fused, torch.full((1, 1, 2, 2), 0.7 * 2 + 0.5 * 0.5))


def test_a_part_without_weight_does_not_count_at_all():
    parts = {"pixel": torch.full((1, 1, 2, 2), float("nan")), "feature": torch.ones(1, 1, 2, 2)}
    fused = fuse(parts, {"pixel": 1.0, "feature": 2.0}, {"pixel": 0.0, "feature": 1.0})
    torch.testing.assert_close(fused, torch.full((1, 1, 2, 2), 0.5))
    torch.testing.assert_close(fuse(parts, {"feature": 2.0}, {"pixel": 0.0, "feature": 1.0}), fused)
    with pytest.raises(UserError) as error:
        fuse(parts, {"feature": 2.0}, {"pixel": 1.0, "feature": 1.0})
    assert "no scale for the pixel map" in one_line(error)


def test_the_score_is_the_largest_value_of_each_map():
    maps = torch.zeros(3, 1, 4, 4)
    maps[0, 0, 1, 2], maps[2, 0, 3, 3] = 4.0, 0.5
    assert image_score(maps).tolist() == [4.0, 0.0, 0.5]


def test_the_score_is_the_mean_of_the_highest_share():
    maps = torch.arange(100.0).view(1, 1, 10, 10)
    assert [float(image_score(maps, share)) for share in (0, 0.001, 0.02, 0.1, 1)] == [99, 99, 98.5, 94.5, 49.5]
