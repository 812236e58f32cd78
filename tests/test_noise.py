"""Noise: its moments, its spectrum, and that an image's noise is its own whatever surrounds it."""

import pytest
import torch
from helpers import random_images, streams

from dbad.diffusion import noise
from dbad.diffusion.noise import draw, image_stream, stream

KINDS = ["gaussian", "simplex"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_pixel_has_zero_mean_and_unit_variance(kind):
    """Over n draws the mean has a standard deviation of 1 / sqrt(n), the variance of at most sqrt(2 / n)."""
    num_draws = 2000
    z = draw(kind, (3, 8, 8), streams(num_draws, "moments"))
    mean, variance = z.mean(dim=0), z.var(dim=0)
    assert mean.abs().max() < 5 / num_draws ** 0.5
    assert (variance - 1).abs().max() < 5 * (2 / num_draws) ** 0.5
    assert abs(float(variance.mean()) - 1) < 0.03


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 16, 24), (3, 5, 7)])
def test_noise_is_float32_on_the_cpu_one_image_per_stream(kind, shape):
    z = draw(kind, shape, streams(2))
    assert z.shape == (2, *shape) and z.dtype == torch.float32 and z.device.type == "cpu"
    assert z.isfinite().all() and not torch.equal(z[0], z[1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_stream_gives_the_same_noise_whatever_the_batch_and_its_order(kind):
    shape = (3, 16, 16)
    together = draw(kind, shape, streams(8))
    assert torch.equal(torch.cat([draw(kind, shape, [s]) for s in streams(8)]), together)
    assert torch.equal(draw(kind, shape, streams(8)[::-1]), together.flip(0))
    assert torch.equal(draw(kind, shape, [*streams(3, "others"), streams(8)[5]])[3], together[5])


@pytest.mark.parametrize("kind", KINDS)
def test_every_call_moves_the_streams_on(kind):
    running = streams(2)
    first, second = draw(kind, (3, 8, 8), running), draw(kind, (3, 8, 8), running)
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])) < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_drawing_leaves_the_global_random_state_alone(kind):
    before = torch.random.get_rng_state()
    draw(kind, (3, 8, 8), streams(2))
    assert torch.equal(torch.random.get_rng_state(), before)


def spectrum(kind: str, size: int = 64) -> torch.Tensor:
    """Mean power of the noise at radial frequencies 0, 1, ... cycles per image."""
    power = torch.fft.fft2(draw(kind, (1, size, size), streams(40, "spectrum"))).abs().square().mean(dim=(0, 1))
    frequency = torch.fft.fftfreq(size) * size
    radius = (frequency[:, None] ** 2 + frequency[None] ** 2).sqrt().round().int()
    return torch.stack([power[radius == r].mean() for r in range(size // 2)])


def test_the_power_of_simplex_noise_falls_with_frequency_and_that_of_gaussian_noise_does_not():
    simplex, gaussian = spectrum("simplex"), spectrum("gaussian")
    bands = torch.stack([simplex[a:b].mean() for a, b in ((1, 4), (4, 8), (8, 16), (16, 32))])
    assert (bands[:-1] > 2 * bands[1:]).all()
    assert gaussian[1:].max() / gaussian[1:].min() < 3


def test_neighbouring_pixels_of_simplex_noise_are_alike():
    z = draw("simplex", (3, 32, 32), streams(20, "neighbours"))
    assert (z[..., 1:] * z[..., :-1]).mean() > 0.8
    assert abs(float((draw("gaussian", (3, 32, 32), streams(20))[..., 1:] * z[..., :-1]).mean())) < 0.05


def test_simplex_noise_is_not_tied_to_the_corner_of_the_lattice():
    """At a lattice point of all octaves at once every gradient would have no say, and the noise would be 0."""
    z = draw("simplex", (3, 8, 8), streams(500, "corner"))
    assert abs(float(z[:, 0, 0, 0].var()) - 1) < 0.3


def test_an_unknown_kind_of_noise_is_refused():
    with pytest.raises(ValueError, match="'pink': expected gaussian or simplex"):
        draw("pink", (3, 8, 8), streams(1))


def first_number(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def test_a_stream_follows_from_its_seed_and_keys_alone():
    numbers = [first_number(stream(*keys)) for keys in ((0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, 0), (0, "0"))]
    assert len(set(numbers)) == len(numbers)
    torch.manual_seed(123)
    assert first_number(stream(0, "a")) == numbers[0]


def test_the_stream_of_an_image_follows_from_its_pixels_and_the_seed_alone():
    image, other = random_images(2)
    number = first_number(image_stream(0, image))
    assert first_number(image_stream(0, torch.stack([other, image])[1])) == number
    other_order_in_memory = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert first_number(image_stream(0, other_order_in_memory)) == number
    assert first_number(image_stream(0, image.double())) == number
    assert first_number(image_stream(1, image)) != number
    assert first_number(image_stream(0, other)) != number
    changed = image.clone()
    changed[0, 0, 0] += 2 / 255 if changed[0, 0, 0] < 0 else -2 / 255       # one level of one pixel
    assert first_number(image_stream(0, changed)) != number


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 40, 24)])
def test_the_variance_of_simplex_noise_is_exactly_1(shape):
    """Gradients are independent with components of variance 1/3, so it is a third of each row's sum of squares.

    A gradient that several octaves shared would count in it with the square of its total weight.
    """
    matrix, num_points = noise._simplex_matrix(*shape)
    assert torch.equal(matrix.col_indices().unique(), torch.arange(3 * num_points, dtype=torch.int32))
    dense = matrix.to_dense()
    assert dense.shape == (shape[0] * shape[1] * shape[2], 3 * num_points)
    torch.testing.assert_close(dense.square().sum(dim=1) / 3, torch.ones(len(dense)), rtol=1e-5, atol=0)


def test_the_matrix_of_simplex_noise_is_made_once_per_shape():
    noise._simplex_matrix.cache_clear()
    for _ in range(3):
        draw("simplex", (3, 8, 8), streams(1))
    assert noise._simplex_matrix.cache_info().misses == 1
