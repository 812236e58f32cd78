"""Conditioned denoising: the algebra of one step, then the walk from the noised image to its reconstruction."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from helpers import CPU, Oracle, random_images, reconstruction, streams, tiny_unet

from dbad.diffusion import noise
from dbad.diffusion.ddim import conditioned_step, schedule, visited_timesteps
from dbad.families.ddim.options import Reconstruction
from dbad.families.ddim.reconstruct import Denoiser, reconstruct, reconstruct_all
from dbad.runtime.device import Machine

ABAR = schedule(1000, "linear")
SHAPE = (2, 3, 8, 8)


def way(conditioning: str = "ddad", weight: float = 0.0, eta: float = 0.0, start: int = 250, num_steps: int = 5,
        sampler: str = "ddim") -> Reconstruction:
    """How an image is reconstructed: without a pull, if not told otherwise."""
    return reconstruction(conditioning=conditioning, recon_weight=weight, eta=eta, start_at_timestep=start,
                          steps_to_regenerate=num_steps, sampler=sampler)


PLAIN = way()


def normal(*keys) -> torch.Tensor:
    return noise.draw("gaussian", SHAPE[1:], streams(SHAPE[0], *keys))


@pytest.fixture
def sample():
    """(x_t, eps, y) that have nothing to do with each other."""
    return normal("x"), normal("eps"), random_images(2, 8)


# One step

@pytest.mark.parametrize("t", [999, 700, 250, 100, 50])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_the_unconditioned_step_is_that_of_the_ddim_scheduler(sample, t, eta):
    x_t, eps, y = sample
    scheduler = DDIMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False,
                              set_alpha_to_one=True)
    scheduler.set_timesteps(10)                                         # steps of 100 timesteps
    fresh = normal("fresh") if eta else None
    expected = scheduler.step(eps, t, x_t, eta=eta, variance_noise=fresh)

    abar_t, abar_prev = float(ABAR[t]), float(ABAR[t - 100]) if t >= 100 else 1.0
    sigma = eta * ((1 - abar_t / abar_prev) * (1 - abar_prev) / (1 - abar_t)) ** 0.5
    x_prev, x_0 = conditioned_step(x_t, eps, y, abar_t, abar_prev, 0.0, sigma, fresh)
    torch.testing.assert_close(x_prev, expected.prev_sample, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(x_0, expected.pred_original_sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("w", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("sigma", [0.0, 0.2])
def test_the_step_is_the_published_formula_word_for_word(sample, w, sigma):
    x_t, eps, y = (v.double() for v in sample)
    abar_t, abar_prev, fresh = 0.7, 0.9, normal("fresh").double()       # lambda = 0.3 w is at most 1
    y_t = abar_t ** 0.5 * y + (1 - abar_t) ** 0.5 * eps
    eps_hat = eps - w * (1 - abar_t) ** 0.5 * (y_t - x_t)
    x_0 = (x_t - (1 - abar_t) ** 0.5 * eps_hat) / abar_t ** 0.5
    x_prev = abar_prev ** 0.5 * x_0 + (1 - abar_prev - sigma ** 2) ** 0.5 * eps_hat + sigma * fresh
    found = conditioned_step(x_t, eps, y, abar_t, abar_prev, w, sigma, fresh)
    torch.testing.assert_close(found, (x_prev, x_0))


@pytest.mark.parametrize("w", [0.0, 0.5, 1.0, 2.0])
def test_the_pull_interpolates_between_the_models_image_and_the_inspected_one(sample, w):
    x_t, eps, y = sample
    abar_t = float(ABAR[249])
    _, unconditioned = conditioned_step(x_t, eps, y, abar_t, 0.9, w=0.0)
    _, x_0 = conditioned_step(x_t, eps, y, abar_t, 0.9, w=w)
    share = w * (1 - abar_t)
    assert share < 1
    torch.testing.assert_close(x_0, unconditioned + share * (y - unconditioned))


@pytest.mark.parametrize("w", [0.0, 1.0, 8.0, 100.0])
def test_a_fully_explained_image_is_its_own_reconstruction(sample, w):
    """If x_t is y plus exactly the predicted noise, nothing is left to correct, whatever w."""
    _, eps, y = sample
    x_t = 0.7 ** 0.5 * y + 0.3 ** 0.5 * eps
    x_prev, x_0 = conditioned_step(x_t, eps, y, abar_t=0.7, abar_prev=0.9, w=w)
    torch.testing.assert_close(x_0, y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_prev, 0.9 ** 0.5 * y + 0.1 ** 0.5 * eps, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("w", [1 / 0.3, 5.0, 1000.0, float("inf")])
def test_a_pull_that_would_overshoot_stops_at_the_image(sample, w):
    x_t, eps, y = sample
    _, x_0 = conditioned_step(x_t, eps, y, abar_t=0.7, abar_prev=0.9, w=w)
    torch.testing.assert_close(x_0, y, rtol=0, atol=1e-6)


def test_the_last_step_returns_the_estimate_of_the_clean_image(sample):
    x_t, eps, y = sample
    x_prev, x_0 = conditioned_step(x_t, eps, y, abar_t=0.99, abar_prev=1.0, w=0.5)
    assert torch.equal(x_prev, x_0) and x_0.shape == SHAPE


def test_a_step_changes_none_of_its_arguments(sample):
    copies = [v.clone() for v in sample]
    conditioned_step(*sample, abar_t=0.7, abar_prev=0.9, w=1.0, sigma=0.1, fresh=normal("fresh"))
    assert all(torch.equal(a, b) for a, b in zip(sample, copies, strict=True))


# The second-order solver

def test_dpm_walks_as_diffusers_scheduler_does():
    y, unet = random_images(2, 8), tiny_unet(8)
    how = way(start=1000, num_steps=7, sampler="dpm++")
    visited = visited_timesteps(1000, 7)
    scheduler = DPMSolverMultistepScheduler(1000, beta_start=1e-4, beta_end=0.02, final_sigmas_type="zero",
                                            lower_order_final=False)
    scheduler.set_timesteps(timesteps=visited)
    abar = float(ABAR[999])
    x = abar ** 0.5 * y + (1 - abar) ** 0.5 * noise.draw("gaussian", y.shape[1:], streams(2))
    with torch.no_grad():
        for t in visited:
            x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    found = reconstruct(Denoiser(unet, ABAR), y, streams(2), how)
    torch.testing.assert_close(found, x.clamp(-1, 1), rtol=1e-3, atol=1e-3)


def test_dpm_is_ddim_where_the_estimate_does_not_change():
    y = random_images(2, 8)
    clean = random_images(2, 8, seed=1)
    for sampler in ("ddim", "dpm++"):
        oracle = Oracle(clean, ABAR)
        found = reconstruct(Denoiser(oracle, ABAR), y, streams(2), way(sampler=sampler))
        torch.testing.assert_close(found, clean, rtol=0, atol=1e-4)
    assert len(oracle.calls) == PLAIN.steps_to_regenerate


@pytest.mark.parametrize("num_steps, same", [(1, True), (2, True), (3, False), (10, False)])
def test_dpm_differs_from_ddim_from_three_steps_on(num_steps, same):
    y, unet = random_images(2, 8), tiny_unet(8)
    ddim, dpm = (reconstruct(Denoiser(unet, ABAR), y, streams(2), way(num_steps=num_steps, sampler=sampler))
                 for sampler in ("ddim", "dpm++"))
    assert torch.equal(ddim, dpm) == same


# The walk

@pytest.mark.parametrize("start", [1, 2, 7, 25, 99, 250, 251, 600, 1000])
def test_the_visited_timesteps_go_down_evenly_from_the_first_one(start):
    for num_steps in sorted({n for n in (1, 2, 3, 5, 7, 10, 25, 50, start // 2, start - 1, start) if 0 < n <= start}):
        visited = visited_timesteps(start, num_steps)
        gaps = [a - b for a, b in zip(visited, visited[1:], strict=False)] + [visited[-1] + 1]
        assert len(visited) == num_steps and visited[0] == start - 1
        assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


def test_the_visited_timesteps_of_the_published_setting():
    assert visited_timesteps(250, 10) == [249, 224, 199, 174, 149, 124, 99, 74, 49, 24]


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_cumulative_alphas_fall_from_nearly_1_to_nearly_0(beta_schedule):
    abar = schedule(1000, beta_schedule)
    assert abar.shape == (1000,) and abar.dtype == torch.float64
    assert (abar[1:] < abar[:-1]).all() and abar[0] > 0.999 and 0 <= abar[-1] < 1e-3


def test_the_linear_schedule_is_the_product_of_its_betas():
    expected = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)
    torch.testing.assert_close(ABAR, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("kind", ["gaussian", "simplex"])
@pytest.mark.parametrize("start, num_steps", [(250, 5), (1000, 4), (7, 7), (1, 1)])
def test_the_network_is_told_the_timestep_that_the_image_was_noised_at(kind, start, num_steps):
    y = random_images(2, 8)
    oracle = Oracle(y, ABAR)
    how = way(start=start, num_steps=num_steps)
    reconstruct(Denoiser(oracle, ABAR, kind), y, streams(2), how)
    assert [t for t, _ in oracle.calls] == visited_timesteps(start, num_steps)
    t, x_t = oracle.calls[0]
    level = float(ABAR[t])
    z = noise.draw(kind, y.shape[1:], streams(2))
    torch.testing.assert_close(x_t, level ** 0.5 * y + (1 - level) ** 0.5 * z)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("num_steps", [1, 5, 25])
def test_a_perfect_denoiser_returns_the_clean_image(eta, num_steps):
    clean, y = random_images(2, 8, seed=1), random_images(2, 8, seed=2)
    how = way(eta=eta, num_steps=num_steps)
    x = reconstruct(Denoiser(Oracle(clean, ABAR), ABAR), y, streams(2), how)
    torch.testing.assert_close(x, clean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("conditioning", ["ddad", "blend"])
def test_an_image_that_the_model_believes_in_comes_back_unchanged(conditioning, eta):
    y = random_images(2, 8)
    if conditioning == "ddad":
        x = reconstruct(Denoiser(Oracle(y, ABAR), ABAR), y, streams(2), way("ddad", 3.0, eta, 250, 5))
    else:
        x = reconstruct(Denoiser(Oracle(y, ABAR), ABAR), y, streams(2), way("blend", 0.5, eta, 250, 5))
    torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


def test_the_pull_brings_the_reconstruction_nearer_to_the_image():
    clean, y = random_images(2, 8, seed=1), random_images(2, 8, seed=2)
    distances = []
    for w in (0.0, 1.0, 3.0, 11.0):
        x = reconstruct(Denoiser(Oracle(clean, ABAR), ABAR), y, streams(2), way(weight=w))
        distances.append(float((x - y).abs().mean()))
    assert distances == sorted(distances, reverse=True) and len(set(distances)) == 4


def test_with_one_step_the_reconstruction_is_the_interpolation():
    clean, y = random_images(2, 8, seed=1), random_images(2, 8, seed=2)
    x = reconstruct(Denoiser(Oracle(clean, ABAR), ABAR), y, streams(2), way("ddad", 1.5, 0.0, 250, 1))
    share = 1.5 * (1 - float(ABAR[249]))
    torch.testing.assert_close(x, clean + share * (y - clean), rtol=0, atol=1e-5)


@pytest.mark.parametrize("weight, start, num_steps", [(0.5, 250, 1), (1.0, 1000, 1), (9.0, 500, 1)])
def test_blending_mixes_in_the_image_by_weight_times_time_after_a_plain_step(weight, start, num_steps):
    """x <- (1 - c) x + c y with c = weight * t / T, at most 1; here after a step that gives the clean image."""
    clean, y = random_images(2, 8, seed=1), random_images(2, 8, seed=2)
    x = reconstruct(Denoiser(Oracle(clean, ABAR), ABAR), y, streams(2), way("blend", weight, 0.0, start, num_steps))
    c = min(weight * start / 1000, 1.0)
    torch.testing.assert_close(x, (1 - c) * clean + c * y, rtol=0, atol=1e-5)


def test_blending_follows_its_formula_at_every_step():
    clean, y = random_images(2, 8, seed=1), random_images(2, 8, seed=2)
    oracle, w = Oracle(clean, ABAR), 0.8
    x = reconstruct(Denoiser(oracle, ABAR), y, streams(2), way("blend", w, 0.0, 250, 5))
    visited = visited_timesteps(250, 5)
    seen = [x_t for _, x_t in oracle.calls[1:]]
    for i, t in enumerate(visited):
        level, following = float(ABAR[t]), float(ABAR[visited[i + 1]]) if i < 4 else 1.0
        eps = (oracle.calls[i][1] - level ** 0.5 * clean) / (1 - level) ** 0.5
        plain = following ** 0.5 * clean + (1 - following) ** 0.5 * eps
        expected = plain + w * (t + 1) / 1000 * (y - plain)
        torch.testing.assert_close(seen[i] if i < 4 else x, expected if i < 4 else expected.clamp(-1, 1), rtol=1e-4,
                                   atol=1e-5)


def test_without_a_pull_both_ways_of_conditioning_are_plain_ddim():
    unet, y = tiny_unet(), random_images(2)
    one, other = (reconstruct(Denoiser(unet, ABAR), y, streams(2), way(c, 0.0, 0.0, 250, 2)) for c in ("ddad", "blend"))
    assert torch.equal(one, other)


def test_fresh_noise_is_drawn_at_every_step_but_the_last_and_only_if_eta_is_above_0(monkeypatch):
    drawn = []

    def counting(kind, shape, generators):
        drawn.append(kind)
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])

    monkeypatch.setattr(noise, "draw", counting)
    y = random_images(2, 8)
    for eta, count in ((0.0, 1), (0.5, 5), (1.0, 5)):       # one draw to begin with, then 4 of 5 steps
        drawn.clear()
        reconstruct(Denoiser(Oracle(-y, ABAR), ABAR), y, streams(2), way(eta=eta))
        assert len(drawn) == count


def test_the_fresh_noise_of_eta_has_its_share_of_the_variance():
    """The oracle keeps x_t' = sqrt(abar') clean + sqrt(1 - abar') times unit noise, whatever eta."""
    y, clean = torch.zeros(200, 3, 8, 8), torch.zeros(200, 3, 8, 8)
    for eta in (0.0, 1.0):
        oracle = Oracle(clean, ABAR)
        reconstruct(Denoiser(oracle, ABAR), y, streams(200), way(eta=eta))
        first, later = oracle.calls[0][1], [x_t for _, x_t in oracle.calls[1:]]
        for (t, _), x_t in zip(oracle.calls[1:], later, strict=True):
            assert abs(float(x_t.var()) / (1 - float(ABAR[t])) - 1) < 0.05
        correlation = float(torch.corrcoef(torch.stack([first.flatten(), later[-1].flatten()]))[0, 1])
        assert correlation > 0.999 if eta == 0 else correlation < 0.5


def test_the_reconstruction_stays_in_the_range_of_images():
    y = random_images(2, 8)
    x = reconstruct(Denoiser(Oracle(5 * y, ABAR), ABAR), y, streams(2), PLAIN)
    assert x.min() == -1 and x.max() == 1 and x.dtype == torch.float32


@pytest.mark.parametrize("kind", ["gaussian", "simplex"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_reconstruction_of_an_image_does_not_depend_on_its_batch(kind, eta):
    unet, images = tiny_unet(), random_images(5)
    how = way("ddad", 1.0, eta, 250, 3)
    denoiser = Denoiser(unet, ABAR, kind)
    alone = reconstruct_all(denoiser, images, how, Machine(CPU, "fp32", 1), seed=3)
    together = reconstruct_all(denoiser, images, how, Machine(CPU, "fp32", 5), seed=3)
    backwards = reconstruct_all(denoiser, images.flip(0), how, Machine(CPU, "fp32", 2), seed=3).flip(0)
    assert alone.shape == images.shape
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone, backwards, rtol=1e-4, atol=1e-5)
    other_seed = reconstruct_all(denoiser, images, how, Machine(CPU, "fp32", 5), seed=4)
    assert (other_seed - together).abs().max() > 0.01
