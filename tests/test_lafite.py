"""Diffusion in feature space: what each prediction means, components, balanced batches, denoising, inversion."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import CPU, streams
from torch import nn

from dbad.diffusion.batches import validation_loss
from dbad.families.lafite.model import (
    INVERSION_STEPS,
    MIN_SNR,
    Components,
    FeatureImages,
    denoise,
    estimate,
    feature_loss,
    feature_schedule,
    invert,
    patch_differences,
    surroundings,
    unlikelihood,
    upsampled,
)
from dbad.networks.features import Standardisation
from dbad.training.loop import StepBatches

ABAR = feature_schedule()
PREDICTIONS = ["x0", "v", "epsilon"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Believing(nn.Module):
    """A network that takes every feature map for `clean(z_t, abar_t)` and says so as the `prediction` asks.

    Where the map is noised it expects the squared error exp(`log_error`).
    """

    def __init__(self, prediction, clean, log_error=0.0):
        super().__init__()
        self.prediction, self.clean, self.told, self.log_error = prediction, clean, [], log_error

    def forward(self, z_t, t):
        self.told.append(t.tolist())
        z_t, noised = z_t[:, :-1], z_t[:, -1:]
        level = ABAR[t].view(-1, 1, 1, 1)
        x = self.clean(z_t, level)
        noise = (z_t - level.sqrt() * x) / (1 - level).sqrt()
        sample = {"x0": x, "epsilon": noise, "v": level.sqrt() * noise - (1 - level).sqrt() * x}[self.prediction]
        return SimpleNamespace(sample=torch.cat([sample.to(z_t.dtype), self.log_error * noised], dim=1))


def knowing(x, prediction="x0"):
    return Believing(prediction, lambda z_t, level: x.double())


# ------------------------------------------------------------------------------------------ schedule and predictions

def test_the_schedule_runs_from_almost_no_noise_to_almost_nothing_else():
    """arXiv:2102.09672, Eq. 17: abar_t = f(t) / f(0), f(t) = cos((t / T + 0.008) / 1.008 pi / 2)^2."""
    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    assert ABAR.shape == (1000,) and ABAR.dtype == torch.float64 and (ABAR.diff() < 0).all()
    assert ABAR[0] > 0.9999 and ABAR[-1] < 1e-5
    for t in (0, 333, 666, 900):
        assert float(ABAR[t]) == pytest.approx(f(t + 1) / f(0), rel=1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_clean_features_follow_from_every_prediction(prediction):
    """The noise of a map that is nearly nothing else is known up to rounding, and rounding is divided by sqrt(abar)."""
    x, z = normal(5, 6, 4, 4), normal(5, 6, 4, 4, seed=1)
    t = torch.tensor([0, 1, 250, 600, 900])
    level = ABAR[t].view(-1, 1, 1, 1)
    z_t = (level.sqrt() * x + (1 - level).sqrt() * z).float()
    found = estimate(knowing(x, prediction), z_t, t, ABAR, prediction, "fp32").clean
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", [1, 300, 700, 900])
def test_the_weight_makes_the_loss_the_squared_error_of_what_is_predicted(prediction, t):
    """x_0 is off by sqrt(1 - abar) times the error of v, and by sqrt((1 - abar) / abar) times that of the noise."""
    x, z, error = (normal(3, 6, 4, 4, seed=seed) for seed in range(3))
    batch = {"features": x, "noise": z, "timestep": torch.full((3,), t), "noised": torch.ones(3, 1, 4, 4)}
    exact = knowing(x, prediction)

    def wrong(z_t, t):
        return SimpleNamespace(sample=exact(z_t, t).sample + 0.1 * torch.cat([error, 0 * error[:, :1]], dim=1))

    loss = float(feature_loss(wrong, batch, ABAR, prediction, "fp32")["squared_error"])
    snr = float(ABAR[t] / (1 - ABAR[t]))
    expected = float((0.1 * error).square().mean()) * (min(1, MIN_SNR / snr) if prediction == "epsilon" else 1)
    assert loss == pytest.approx(expected, rel=1e-2)
    assert float(feature_loss(exact, batch, ABAR, prediction, "fp32")["squared_error"]) == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------------------ surroundings

def test_patches_that_are_not_noised_reach_the_network_as_they_are_and_it_is_told_which():
    x, z, noised = normal(2, 6, 4, 4), normal(2, 6, 4, 4, seed=1), (normal(2, 1, 4, 4, seed=2) > 0).float()
    seen = []

    def net(z_t, t):
        seen.append(z_t)
        return SimpleNamespace(sample=torch.zeros_like(z_t))
    batch = {"features": x, "noise": z, "timestep": torch.tensor([999, 400]), "noised": noised}
    found = feature_loss(net, batch, ABAR, "x0", "fp32")
    level = ABAR[batch["timestep"]].float().view(-1, 1, 1, 1)
    torch.testing.assert_close(seen[0], torch.cat([
        noised * (level.sqrt() * x + (1 - level).sqrt() * z) + (1 - noised) * x, noised], dim=1))
    alone = (noised * x.square()).sum() / noised.sum() / 6
    torch.testing.assert_close(found["squared_error"], alone)           # of x_0 = 0, where it was asked for


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_the_error_that_is_expected_is_the_one_that_is_made(factor):
    """e / E + log E is least for E = e, and nothing but E follows from it."""
    x = normal(3, 6, 4, 4)
    batch = {"features": x, "noise": x, "timestep": torch.full((3,), 500), "noised": torch.ones(3, 1, 4, 4)}
    error = x.square().mean(dim=1, keepdim=True)

    def net(log_error):
        return lambda z_t, t: SimpleNamespace(sample=torch.cat([0 * x, log_error], dim=1))
    right, wrong = (float(feature_loss(net((error * by).log()), batch, ABAR, "x0", "fp32")["error_nll"])
                    for by in (1, factor))
    assert right == pytest.approx(float(1 + error.log().mean()), rel=1e-5) and wrong > right
    clean = (0 * x).requires_grad_()
    found = feature_loss(lambda z_t, t: SimpleNamespace(sample=torch.cat([clean, 0 * error], dim=1)), batch, ABAR, "x0",
                         "fp32")
    assert torch.autograd.grad(found["error_nll"], clean, allow_unused=True, retain_graph=True)[0].abs().max() == 0
    assert torch.autograd.grad(found["squared_error"], clean)[0].abs().max() > 0


def test_every_patch_is_asked_for_once_without_being_seen():
    x, seen = normal(2, 6, 6, 6), []

    def net(z_t, t):
        assert t.tolist() == [999, 999]
        seen.append(z_t[:, -1:])
        torch.testing.assert_close(z_t[:, :-1] * (1 - z_t[:, -1:]), x * (1 - z_t[:, -1:]))
        hidden = (z_t[:, :-1] - x).abs().sum(dim=1, keepdim=True) > 0.1
        assert torch.equal(hidden.float(), z_t[:, -1:])
        return SimpleNamespace(sample=torch.full_like(z_t, len(seen)))
    found = surroundings(net, x, streams(2), ABAR, "x0", "fp32", sides=(2, 8))
    assert len(seen) == 4 and all(torch.equal(first + second, torch.ones(2, 1, 6, 6))
                                  for first, second in (seen[:2], seen[2:]))
    small = torch.tensor([[1., 2, 1], [2, 1, 2], [1, 2, 1]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    large = torch.tensor([[3., 4], [4, 3]]).repeat_interleave(3, 0).repeat_interleave(3, 1)     # of half the grid
    asked = torch.stack([small, large]).expand(2, -1, -1, -1)
    torch.testing.assert_close(found.expected, asked.exp())
    torch.testing.assert_close(found.found, (x[:, None] - asked[:, :, None]).square().mean(dim=2))


@pytest.mark.parametrize("grid", [4, 7, 32])
def test_images_are_noised_everywhere_or_in_blocks(grid):
    data = FeatureImages({"part0": torch.zeros(1, 2, grid, grid).half()}, 0, "train", 4)
    noised = data.__getitems__([(step, 0, 0) for step in range(400)])["noised"]
    assert noised.shape == (400, 1, grid, grid) and set(noised.unique().tolist()) == {0, 1}
    shares = noised.flatten(1).mean(dim=1)
    assert 0 < shares.min() and 0.05 < float((shares == 1).float().mean()) < 0.3
    assert 0.2 < float(shares[shares < 1].mean()) < 0.5
    corners = {tuple(map(tuple, mask.nonzero().tolist())) for mask in noised[:, 0]}
    assert len(corners) > 10


# ------------------------------------------------------------------------------------------ denoising

@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("start, num_steps", [(1, 1), (50, 50), (300, 3), (600, 1), (800, 7)])
def test_a_network_that_knows_the_answer_is_believed(prediction, start, num_steps):
    x = normal(2, 6, 4, 4)
    found = denoise(knowing(x, prediction), normal(2, 6, 4, 4, seed=1), streams(2), ABAR, start, num_steps, prediction,
                    "fp32")
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


def test_also_from_pure_noise():
    x = normal(2, 6, 4, 4)
    torch.testing.assert_close(denoise(knowing(x), 0 * x, streams(2), ABAR, 1000, 5, "x0", "fp32"), x)


def test_the_network_is_told_the_timestep_that_the_features_were_noised_to():
    """At first it sees sqrt(abar) x + sqrt(1 - abar) z with the noise of the streams; the last step ends at 0."""
    seen = []
    x = normal(2, 6, 4, 4)
    net = Believing("x0", lambda z_t, level: seen.append(z_t) or x)
    denoise(net, x, streams(2), ABAR, 600, 3, "x0", "fp32")
    assert net.told == [[599, 599], [399, 399], [199, 199]]
    noise = torch.stack([torch.randn(6, 4, 4, generator=stream) for stream in streams(2)])
    level = float(ABAR[599])
    torch.testing.assert_close(seen[0], level ** 0.5 * x + (1 - level) ** 0.5 * noise)


# ------------------------------------------------------------------------------------------ inversion

@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_inversion_turns_unit_gaussian_features_by_the_angles_of_the_schedule(prediction):
    """For such data E[x_0 | z_t] = sqrt(abar) z_t. With sqrt(abar) = cos a, a step of DDIM from a to b is then

    cos b cos a z + sin b sin a z = cos(b - a) z: the end point is x times the product of the cosines.
    """
    x = normal(2, 6, 4, 4)
    net = Believing(prediction, lambda z_t, level: level.sqrt() * z_t)
    angles = [math.acos(float(ABAR[t]) ** 0.5) for t in (0, *INVERSION_STEPS)]
    shrunk = math.prod(math.cos(b - a) for a, b in zip(angles, angles[1:], strict=False))
    torch.testing.assert_close(invert(net, x, ABAR, prediction, "fp32"), shrunk * x, rtol=1e-4, atol=1e-4)
    assert net.told == [[0, 0], [333, 333], [666, 666]]
    assert shrunk == pytest.approx(math.cos(math.pi / 6) ** 3, abs=0.01)       # three steps of about 30 degrees


def test_features_that_the_model_expects_lead_to_likely_noise_and_others_do_not():
    """A model that takes everything for 0 leaves what is not 0 in the noise."""
    x = torch.zeros(1, 6, 4, 4)
    x[..., 2, 1] = 3
    found = unlikelihood(invert(knowing(torch.zeros(1, 6, 4, 4)), x, ABAR, "x0", "fp32"))
    assert found.flatten().argmax() == 2 * 4 + 1 and found[..., 0, 0] == 0


def test_unlikelihood_is_the_negative_log_likelihood_of_a_standard_normal_without_its_constant():
    z = normal(2, 6, 4, 4)
    likelihood = torch.distributions.Normal(0, 1).log_prob(z).mean(dim=1, keepdim=True)
    torch.testing.assert_close(unlikelihood(z), -likelihood - math.log(2 * math.pi) / 2)
    assert unlikelihood(z).shape == (2, 1, 4, 4)


# ------------------------------------------------------------------------------------------ maps

def test_differences_of_patches_are_squared_euclidean_distances():
    a, b = normal(2, 6, 4, 4), normal(2, 6, 4, 4, seed=1)
    found = patch_differences(a, b)
    assert found.shape == (2, 1, 4, 4)
    assert float(found[1, 0, 2, 3]) == pytest.approx(float(torch.dist(a[1, :, 2, 3], b[1, :, 2, 3])) ** 2, rel=1e-5)


def test_a_map_keeps_a_constant_and_the_place_of_its_peak_when_it_is_brought_to_the_image():
    assert torch.equal(upsampled(torch.full((2, 1, 4, 4), 3.0), 32), torch.full((2, 1, 32, 32), 3.0))
    peak = torch.zeros(1, 1, 4, 4)
    peak[0, 0, 1, 2] = 1
    row, column = divmod(int(upsampled(peak, 32).argmax()), 32)
    assert 8 <= row < 16 and 16 <= column < 24


# ------------------------------------------------------------------------------------------ components

def good(*counts, channels=6):
    """Features by category, of a spread of its own in every channel: `counts` images of 4x4 patches each."""
    spread = torch.linspace(2, 0.2, channels).view(-1, 1, 1)
    mix = torch.linalg.qr(normal(channels, channels)).Q
    return {f"part{i}": torch.einsum("nchw,cd->ndhw", normal(count, channels, 4, 4, seed=i) * spread * (1 + 0.3 * i),
                                     mix).half().numpy() for i, count in enumerate(counts)}


PLAIN = Standardisation(torch.zeros(6), torch.ones(6))


def mean_square(components, part):
    return float(components.project(PLAIN.apply(torch.from_numpy(part))).square().mean())


@pytest.mark.parametrize("count", [1, 4, 6])
def test_the_basis_is_orthonormal_and_training_components_have_mean_square_one(count):
    """Every category counts alike, so that it is the mean over categories that is 1."""
    features = good(20, 5)
    fitted = Components.fit(features, PLAIN, count)
    assert fitted.basis.shape == (6, count) and fitted.basis.dtype == torch.float32
    torch.testing.assert_close(fitted.basis.T @ fitted.basis, torch.eye(count), rtol=0, atol=1e-5)
    assert np.mean([mean_square(fitted, part) for part in features.values()]) == pytest.approx(1, rel=1e-4)


def test_the_share_that_components_hold_is_that_of_the_variance():
    features = good(40)
    values = torch.from_numpy(features["part0"]).double()
    total = float(values.square().sum())
    for count in (1, 3, 6):
        fitted = Components.fit(features, PLAIN, count)
        held = torch.einsum("nchw,cd->ndhw", values, fitted.basis.double()).square().sum()
        assert fitted.kept == pytest.approx(float(held) / total, rel=1e-6)
    assert fitted.kept == pytest.approx(1)


def test_components_come_in_the_order_of_their_variance_and_are_uncorrelated():
    features = good(40)
    found = Components.fit(features, PLAIN, 6).project(torch.from_numpy(features["part0"]).float())
    covariance = torch.cov(found.movedim(1, 0).flatten(1), correction=0) + torch.outer(*[found.mean((0, 2, 3))] * 2)
    variances = covariance.diag()
    assert (variances.diff() < 0).all() and float((covariance - variances.diag()).abs().max()) < 1e-4


def test_all_components_keep_distances_up_to_the_scale():
    features = good(10)
    fitted = Components.fit(features, PLAIN, 6)
    a, b = normal(3, 6, 4, 4), normal(3, 6, 4, 4, seed=1)
    torch.testing.assert_close(patch_differences(fitted.project(a), fitted.project(b)) * fitted.scale ** 2,
                               patch_differences(a, b))


def test_neither_the_order_of_categories_nor_the_number_of_their_images_matters():
    """The second category three times over is the same category with more images."""
    features = good(8, 3)
    expected = Components.fit(features, PLAIN, 4)
    turned = Components.fit(dict(reversed(features.items())), PLAIN, 4)
    repeated = Components.fit(features | {"part1": np.tile(features["part1"], (3, 1, 1, 1))}, PLAIN, 4)
    for other in (turned, repeated):
        torch.testing.assert_close(other.basis, expected.basis, rtol=1e-4, atol=1e-5)
        assert (other.scale, other.kept) == pytest.approx((expected.scale, expected.kept))
    alone = Components.fit({"part0": features["part0"]}, PLAIN, 4)
    assert alone.scale != pytest.approx(expected.scale, rel=0.01)


def test_more_images_than_are_in_memory_at_once_make_no_difference():
    features = good(35)
    whole = torch.from_numpy(features["part0"]).double().movedim(1, -1).flatten(0, -2)
    values = torch.linalg.eigvalsh(whole.T @ whole / len(whole)).flip(0)
    fitted = Components.fit(features, PLAIN, 2)
    assert fitted.scale == pytest.approx(float(values[:2].mean().sqrt()), rel=1e-6)


def test_components_are_fitted_to_standardised_features():
    features = good(20)
    shift = np.array([5, -3, 0, 2, 1, 0], np.float16).reshape(1, -1, 1, 1)
    moved = {"part0": (features["part0"] + shift).astype(np.float16)}
    own = Components.fit(moved, Standardisation.fit(moved.values()), 6)
    assert own.scale == pytest.approx(1, rel=1e-4)              # the mean variance of standardised channels


def test_more_components_than_channels_are_all_there_are():
    assert Components.fit(good(4), PLAIN, 100).basis.shape == (6, 6)


def test_saved_components_are_plain_values_and_give_the_same():
    fitted = Components.fit(good(10), PLAIN, 3)
    state = fitted.state()
    x = normal(2, 6, 4, 4)
    assert torch.equal(Components(**state).project(x), fitted.project(x))
    assert {type(value) for value in state.values()} == {torch.Tensor, float}


# ------------------------------------------------------------------------------------------ batches

def images(purpose="train", seed=0, batch_size=4, counts=(2, 7, 3)):
    """Feature maps that say which category and image they are."""
    parts = {f"part{c}": torch.tensor([100.0 * c + n for n in range(count)]).view(-1, 1, 1, 1).expand(-1, 2, 4, 4)
             .half() for c, count in enumerate(counts)}
    return FeatureImages(parts, seed, purpose, batch_size)


def test_every_category_is_asked_for_equally_often_whatever_its_number_of_images():
    data = images()
    asked = [int(data.__getitems__([(0, 0, index)])["features"][0, 0, 0, 0]) for index in range(len(data))]
    assert Counter(value // 100 for value in asked) == {0: 7, 1: 7, 2: 7}
    for category, count in enumerate((2, 7, 3)):
        of_it = Counter(value % 100 for value in asked if value // 100 == category)
        assert set(of_it) == set(range(count)) and max(of_it.values()) - min(of_it.values()) <= 1


def test_an_epoch_of_batches_has_every_index_once():
    data = images()
    wanted = [index for batch in StepBatches(len(data), 3, 0, 7, seed=0) for _, _, index in batch]
    assert sorted(wanted) == list(range(len(data)))


def test_a_batch_has_the_promised_fields():
    batch = images().__getitems__([(3, slot, slot) for slot in range(4)])
    assert batch.keys() == {"features", "noise", "timestep", "noised"}
    assert batch["features"].shape == batch["noise"].shape == (4, 2, 4, 4)
    assert batch["features"].dtype == batch["noise"].dtype == torch.float32 and batch["timestep"].dtype == torch.int64


def test_noise_and_timestep_follow_from_seed_purpose_step_and_slot_alone():
    def drawn(step, slot, index=0, **how):
        batch = images(**how).__getitems__([(step, slot, index)])
        return torch.cat([batch["noise"].flatten(), batch["timestep"].float()])

    first = drawn(3, 1)
    assert torch.equal(drawn(3, 1, index=5), first)             # another image
    together = images().__getitems__([(3, 0, 0), (3, 1, 0)])
    assert torch.equal(together["noise"][1].flatten(), first[:-1])
    for other in (drawn(4, 1), drawn(3, 2), drawn(3, 1, seed=1), drawn(3, 1, purpose="validation")):
        assert not torch.isclose(other[:-1], first[:-1]).any()


def test_every_batch_has_one_timestep_from_each_of_as_many_equal_ranges():
    for step in range(20):
        timesteps = images(batch_size=8).__getitems__([(step, slot, 0) for slot in range(8)])["timestep"]
        assert (timesteps // 125).tolist() == list(range(8))


# ------------------------------------------------------------------------------------------ validation

def test_the_loss_on_held_out_images_is_the_same_every_time_and_sees_every_image():
    data = images("validation", counts=(2, 3))
    seen = []

    def net(z_t, t):
        seen.append((z_t, t))
        return SimpleNamespace(sample=torch.zeros_like(z_t))

    def loss_of(batch):
        return feature_loss(net, batch, ABAR, "x0", "fp32")["squared_error"]
    torch.manual_seed(1)
    first = validation_loss(data, loss_of, CPU)
    torch.manual_seed(2)
    assert validation_loss(data, loss_of, CPU) == first
    assert len(seen) == 4 and all(torch.equal(a, b) for a, b in zip(seen[0] + seen[1], seen[2] + seen[3], strict=True))
    batches = [data.__getitems__([(0, slot, slot % 6) for slot in range(begin, begin + 4)]) for begin in (0, 4)]
    expected = [(batch["noised"] * batch["features"].square()).sum() / batch["noised"].sum() / 2 for batch in batches]
    assert first == pytest.approx(float(sum(expected)) / 2)             # of x_0 = 0


def test_a_network_that_knows_its_images_has_no_loss_on_them_and_is_asked_without_gradients():
    data = FeatureImages({"part0": torch.full((3, 2, 4, 4), 0.5).half()}, 0, "validation", 2)

    class Knowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.tensor(0.5))

        def forward(self, z_t, t):
            sample = self.value * torch.ones_like(z_t)
            sample[:, -1] = 0
            assert not sample.requires_grad
            return SimpleNamespace(sample=sample)

    net = Knowing()
    for name in ("squared_error", "error_nll"):
        assert validation_loss(data, lambda batch, name=name: feature_loss(net, batch, ABAR, "x0", "fp32")[name],
                               CPU) == 0
