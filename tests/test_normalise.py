"""Maps in units of what good images show: at the same pixel, or at the same local contrast."""
import pytest
import torch
from helpers import one_line, random_images

from dbad.errors import UserError
from dbad.families.ddim.normalise import fit, interpolate, load_normalisation, log_contrast, save_normalisation


def noise(num_images: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    """Good images' maps: (N, 1, size, size), mean 1, standard deviation 0.1."""
    return 1 + 0.1 * torch.randn(num_images, 1, size, size, generator=torch.Generator().manual_seed(seed))


def half_busy(num_images: int, size: int = 32) -> torch.Tensor:
    """Images whose left half is flat and whose right half is grain."""
    images = torch.zeros(num_images, 3, size, size)
    images[..., size // 2:] = random_images(num_images, size)[..., size // 2:]
    return images


def test_by_location_a_place_that_always_differs_counts_no_more_than_others():
    maps = noise(40)
    maps[..., :8, :] *= 20
    found = fit("location", {"pixel": maps}, random_images(40, 32))
    normalised = found({"pixel": torch.cat([maps[:1], maps[:1]])}, random_images(2, 32))["pixel"]
    loud, quiet = normalised[..., :4, :].mean(), normalised[..., 16:, :].mean()
    assert 0.3 < loud / quiet < 4 and maps[..., :4, :].mean() / maps[..., 16:, :].mean() > 15


def test_by_location_a_defect_stands_out_where_good_images_are_quiet():
    maps = noise(40)
    maps[..., :8, :] *= 20
    defective = maps[:1].clone()
    defective[..., 20, 20] = 10         # half of what is usual in the loud part
    peak = fit("location", {"pixel": maps}, random_images(40, 32))({"pixel": defective}, random_images(1, 32))["pixel"]
    assert peak.flatten().argmax() == 20 * 32 + 20


def test_a_large_image_is_normalised_as_crops_of_it_are():
    """With tiles, the statistics are those of crops, and the map that they normalise is that of the whole image."""
    large, maps = random_images(1, 256), noise(1, 256)
    smooth = torch.nn.functional.avg_pool2d(large, 9, 1, 4)
    crops, parts = (t.unfold(2, 32, 32).unfold(3, 32, 32).movedim((2, 3), (0, 1)).flatten(0, 2) for t in (smooth, maps))
    found = fit("contrast", {"pixel": parts}, crops)
    whole = found({"pixel": maps}, smooth)["pixel"]
    torch.testing.assert_close(found({"pixel": parts[9:10]}, crops[9:10])["pixel"][..., 8:24, 8:24],
                               whole[..., 40:56, 40:56])


def test_by_contrast_busy_places_count_no_more_than_flat_ones_wherever_they_are():
    images = half_busy(20)
    maps = noise(20)
    maps[..., 16:] *= 20
    found = fit("contrast", {"pixel": maps}, images)
    turned = found({"pixel": maps[:1].flip(3)}, images[:1].flip(3))["pixel"]     # busy on the left now
    assert 0.2 < turned[..., :12].mean() / turned[..., 20:].mean() < 6 and maps[..., 20:].mean() > 15
    swapped = found({"pixel": maps[:1]}, images[:1].flip(3))["pixel"]            # flat ground that differs like grain
    assert swapped[..., 20:].mean() > 10 * turned[..., :12].mean()


@pytest.mark.parametrize("kind", ["location", "contrast"])
def test_a_normalised_map_is_at_least_0_and_finite_even_if_good_images_never_differ(kind):
    maps, images = torch.zeros(5, 1, 16, 16), torch.zeros(5, 3, 16, 16)
    found = fit(kind, {"pixel": maps, "feature": maps}, images)
    result = found({"pixel": maps + 1, "feature": maps}, images)
    for values in result.values():
        assert values.min() >= 0 and values.isfinite().all()
    assert result["pixel"].min() > 0 and result["feature"].max() == 0


@pytest.mark.parametrize("kind", ["location", "contrast"])
def test_the_unit_of_the_differences_does_not_matter(kind):
    maps, images = noise(10, 16), random_images(10, 16)
    one, other = (fit(kind, {"pixel": maps * unit}, images)({"pixel": maps * unit}, images)["pixel"]
                  for unit in (1, 1000))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["location", "contrast"])
def test_an_image_is_normalised_the_same_alone_and_in_a_batch(kind):
    maps, images = noise(10, 16), random_images(10, 16)
    found = fit(kind, {"pixel": maps}, images)
    torch.testing.assert_close(found({"pixel": maps[3:4]}, images[3:4])["pixel"],
                               found({"pixel": maps}, images)["pixel"][3:4])


@pytest.mark.parametrize("kind", ["location", "contrast"])
def test_the_statistics_are_read_back_as_they_were_written(kind, tmp_path):
    found = fit(kind, {"pixel": noise(4, 16), "feature": noise(4, 16, 1)}, random_images(4, 16))
    save_normalisation(found, tmp_path / "n.safetensors")
    back = load_normalisation(tmp_path / "n.safetensors")
    assert (back.kind, back.names) == (found.kind, found.names)
    assert all(torch.equal(getattr(back, name), getattr(found, name)) for name in ("mean", "std", "levels"))


def test_maps_of_another_size_cannot_be_normalised_by_location():
    found = fit("location", {"pixel": noise(4, 16)}, random_images(4, 16))
    with pytest.raises(UserError) as error:
        found({"pixel": noise(1, 32)}, random_images(1, 32))
    assert "32" in one_line(error) and "16" in one_line(error)


@pytest.mark.parametrize("content", [None, b"no tensors"])
def test_a_missing_or_foreign_file_is_named(content, tmp_path):
    path = tmp_path / "normalisation.safetensors"
    if content:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_normalisation(path)
    assert str(path) in one_line(error) and "evaluation.py" in one_line(error)


def test_contrast_is_that_of_the_neighbourhood():
    """Flat ground has the least; stripes have the more, the stronger they are, and a step has it at its edge only."""
    flat = torch.zeros(1, 3, 64, 64)
    stripes = torch.zeros(1, 3, 64, 64)
    stripes[..., ::2] = 0.5
    step = torch.zeros(1, 3, 64, 64)
    step[..., 32:] = 1
    values = [float(log_contrast(image, 64)[..., 32, 16]) for image in (flat, stripes, 2 * stripes, step)]
    assert values[0] == pytest.approx(torch.tensor(0.01).log().item()) and values[0] < values[1] < values[2]
    assert values[3] == pytest.approx(values[0], abs=1e-3) and log_contrast(step, 64)[0, 0, 32, 32] > values[0] + 1


def test_interpolation_passes_through_its_points_and_is_constant_beyond():
    levels, values = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([5.0, 7.0, 1.0])
    where = torch.tensor([-9.0, 0.0, 0.5, 1.0, 2.0, 3.0, 9.0])
    torch.testing.assert_close(interpolate(where, levels, values), torch.tensor([5.0, 5, 6, 7, 4, 1, 1]))
