"""Training to restore: damage in batches, targets that mean the good image, and the measure of what is restored."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import Oracle, random_images, reconstruction, streams
from hypothesis import given, settings
from hypothesis import strategies as st

from dbad.damage.drawn import Damage
from dbad.damage.pseudo import KINDS
from dbad.data.images import to_float
from dbad.data.splits import names_of
from dbad.diffusion.batches import NoisedImages, denoising_loss
from dbad.diffusion.ddim import noise_of, schedule
from dbad.diffusion.noise import stream
from dbad.families.ddim import options
from dbad.families.ddim.reconstruct import Denoiser, reconstruct
from dbad.metrics.restoration import Restoration, by_kind, restored, typical
from dbad.records import Sample

ABAR = schedule(1000, "linear")
PREDICTIONS = ("epsilon", "v", "x0")
WANTED = [(7, slot, slot % 3) for slot in range(8)]


@pytest.fixture(scope="module")
def images() -> list[torch.Tensor]:
    """Three smooth images on which damage can be seen, (3, 32, 32) uint8."""
    smooth = torch.nn.functional.interpolate(random_images(3, 4), size=(32, 32), mode="bicubic").clamp(-1, 1)
    return [((image + 1) * 127.5).round().to(torch.uint8) for image in smooth]


def noised(images, **changes) -> NoisedImages:
    given = {"seed": 3, "purpose": "train", "batch_size": 8, "noise_kind": "gaussian", "num_timesteps": 250}
    return NoisedImages(list(images), **given | changes)


# Batches

def test_the_options_name_the_kinds_of_damage_there_are():
    assert options.ALL_KINDS == KINDS


@pytest.mark.parametrize("varied", [{}, {"crop_px": 24}, {"flip": True, "rotate": 20.0, "color_jitter": 0.2}])
def test_damage_changes_nothing_else_of_a_batch(images, varied):
    plain = noised(images, **varied).__getitems__(WANTED)
    data = noised(images, **varied, damage=Damage(whole="crop_px" not in varied), damage_share=1.0)
    batch = data.__getitems__(WANTED)
    assert all(torch.equal(batch[name], plain[name]) for name in plain)
    parts = [data.__getitems__(part) for part in (WANTED[:3], WANTED[3:])]
    torch.testing.assert_close(torch.cat([part["damaged"] for part in parts]), batch["damaged"])
    changed = (batch["damaged"] - batch["image"]).abs().amax(dim=1) > 0.01
    assert 0 < changed.flatten(1).float().mean() < 0.5
    if "rotate" not in varied:      # elsewhere the image is the good one, whatever the variation
        assert all(changed.flatten(1).any(dim=1))


@pytest.mark.parametrize("share, least, most", [(0.5, 120, 200), (1.0, 320, 320)])
def test_the_given_share_of_images_is_damaged(share, least, most):
    still = noised([torch.full((3, 8, 8), 100, dtype=torch.uint8)], damage_share=share,
                   damage=lambda index, image, stream: image + 0.5)
    batch = still.__getitems__([(step, slot, 0) for step in range(40) for slot in range(8)])
    count = int((batch["damaged"] != batch["image"]).flatten(1).any(dim=1).sum())
    assert least <= count <= most


def test_damage_is_of_the_kinds_that_are_asked_for_and_follows_from_its_stream(images):
    image = to_float(images[0])
    one, again = (Damage(["missing"])(0, image, stream(1, "a")) for _ in range(2))
    other = Damage(["missing"])(0, image, stream(2, "a"))
    assert torch.equal(one, again) and not torch.equal(one, other) and not torch.equal(one, image)
    assert torch.equal(Damage(["missing"])(0, torch.zeros(3, 32, 32), stream(1, "a")), torch.zeros(3, 32, 32))


# Targets

class Answers:
    """A network that gives, in the form of a prediction, the output that means the good image."""

    def __init__(self, clean: torch.Tensor, prediction: str):
        self.clean, self.prediction = clean, prediction

    def __call__(self, x_t, t):
        level = ABAR.float()[torch.as_tensor(t)].reshape(-1, 1, 1, 1)
        eps = (x_t - level.sqrt() * self.clean) / (1 - level).sqrt()
        found = {"epsilon": eps, "x0": self.clean.expand_as(x_t),
                 "v": level.sqrt() * eps - (1 - level).sqrt() * self.clean}[self.prediction]
        return SimpleNamespace(sample=found)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_0_for_a_network_that_answers_with_the_good_image(images, prediction):
    batch = noised(images, damage=Damage(), damage_share=0.5).__getitems__(WANTED)
    right, wrong = (float(denoising_loss(Answers(clean, prediction), batch, ABAR, "fp32", prediction))
                    for clean in (batch["image"], batch["damaged"]))
    assert right < 1e-6 < 1e-3 < wrong


def test_without_damage_every_kind_of_output_has_the_same_optimum(images):
    batch = noised(images).__getitems__(WANTED)
    for prediction in PREDICTIONS:
        assert float(denoising_loss(Answers(batch["image"], prediction), batch, ABAR, "fp32", prediction)) < 1e-6


def test_the_weight_of_damage_stays_bounded_where_its_noise_does_not():
    good, t = torch.zeros(1, 3, 8, 8), torch.tensor([0])
    batch = {"image": good, "damaged": good + 0.5, "noise": torch.zeros_like(good), "timestep": t}
    nothing = lambda x_t, t: SimpleNamespace(sample=torch.zeros_like(x_t))      # noqa: E731  leaves the damage
    losses = [float(denoising_loss(nothing, batch, ABAR, "fp32", kind)) for kind in ("epsilon", "v")]
    assert all(0.5 < loss < 5 * 0.5 ** 2 + 0.01 for loss in losses)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.integers(1, 999), st.sampled_from(PREDICTIONS))
def test_any_output_gives_the_noise_that_leads_to_its_clean_image(t, prediction):
    x_t, clean, abar = random_images(1, 4), random_images(1, 4, seed=1), float(ABAR[t])
    out = Answers(clean, prediction)(x_t, t).sample
    eps = noise_of(out, x_t, abar, prediction)
    torch.testing.assert_close(abar ** 0.5 * clean + (1 - abar) ** 0.5 * eps, x_t, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_a_reconstruction_is_the_same_in_whatever_form_the_network_answers(prediction):
    y, clean = random_images(2, 8), random_images(2, 8, seed=1)
    how = reconstruction(recon_weight=0.5)
    expected = reconstruct(Denoiser(Oracle(clean, ABAR), ABAR), y, streams(2), how)
    found = reconstruct(Denoiser(Answers(clean, prediction), ABAR, prediction=prediction), y, streams(2), how)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


# The measure

@pytest.fixture
def damage():
    """(good, damaged, mask) of one image."""
    good, mask = random_images(1)[0] * 0.5, torch.zeros(1, 16, 16)
    mask[:, 3:9, 4:12] = 1
    return good, good + mask * 0.4, mask


def test_the_good_image_restores_all_and_the_damaged_one_nothing(damage):
    good, damaged, mask = damage
    assert restored(good, good, damaged, mask) == pytest.approx((1, 0))
    assert restored(damaged, good, damaged, mask) == pytest.approx((0, 0))
    assert restored((good + damaged) / 2, good, damaged, mask) == pytest.approx((0.5, 0), abs=1e-5)


def test_an_error_elsewhere_is_told_in_levels_and_costs_nothing_of_what_is_gone(damage):
    good, damaged, mask = damage
    found = restored(good + (1 - mask) * 2 / 127.5, good, damaged, mask)
    assert found == pytest.approx((1, 2), abs=1e-4) and found.merit == pytest.approx(0.8, abs=1e-4)


def test_texture_that_nobody_can_guess_does_not_count_as_damage(damage):
    """What is orthogonal to the damage has no part in it."""
    good, damaged, mask = damage
    grain = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0)) * mask
    region = mask.bool().expand_as(grain)
    grain = grain - grain[region].mean() * mask
    assert restored(good + grain, good, damaged, mask).gone == pytest.approx(1, abs=1e-4)


def test_kinds_are_told_apart_by_their_medians():
    each = [Restoration(0.1, 1.0), Restoration(0.2, 2.0), Restoration(0.9, 3.0), Restoration(0.6, 6.0)]
    assert typical(each) == (0.4, 2.5)
    assert by_kind(each, ["scar", "blur", "scar", "scar"]) == {"scar": (0.6, 3.0), "blur": (0.2, 2.0)}


def test_images_of_one_name_in_several_folders_are_told_apart():
    """As in train/good/monday/000.png and train/good/tuesday/000.png, or in two categories."""
    def samples(*paths):
        return [Sample(Path(path), "bolt", "good") for path in paths]
    assert names_of(samples("a/0.png", "a/1.png")) == ["0.png", "1.png"]
    for root in ("", "/data/"):
        found = names_of(samples(f"{root}bolt/mon/0.png", f"{root}bolt/tue/0.png", f"{root}bolt/tue/1.png"))
        assert found == ["mon/0.png", "tue/0.png", "tue/1.png"]
