"""What the auto-encoder learns from: the terms of its loss, and who learns from which."""

import sys
from types import ModuleType

import pytest
import torch
from helpers import CPU, one_line, random_images, stream
from torch import nn
from torch.distributions import Normal, kl_divergence

from dbad.errors import UserError
from dbad.families.diad import adversarial
from dbad.families.diad.adversarial import (
    AdversarialAutoencoder,
    PatchDiscriminator,
    Terms,
    adaptive_weight,
    build_perceptual,
    feature_distance,
    held_out_losses,
    hinge_loss,
    kl_to_standard_normal,
    mean_over_categories,
    reconstruction_terms,
)
from dbad.families.diad.autoencoder import SIZES, BalancedImages, Size, build_autoencoder, from_imagenet, to_imagenet
from dbad.training.loop import fit
from dbad.training.plan import Place, Plan


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", Size((8, 8, 16, 16), 1, 4))


def network():
    torch.manual_seed(0)
    return build_autoencoder("tiny", 32)


def pixels(num_images: int, seed: int = 0) -> list[torch.Tensor]:
    return list(((random_images(num_images, 32, seed) + 1) * 127.5).round().to(torch.uint8))


def batch_of(step: int = 0, num_images: int = 2) -> dict[str, torch.Tensor]:
    noise = torch.randn(num_images, 4, 4, 4, generator=stream(0, "noise"))
    return {"image": random_images(num_images, 32), "noise": noise, "step": torch.full((num_images,), step)}


def learner(start: int = 3, perceptual=None, discriminator: bool = True) -> AdversarialAutoencoder:
    torch.manual_seed(1)
    return AdversarialAutoencoder(network(), PatchDiscriminator(8) if discriminator else None,
                                  Terms(0.3, 1e-2, 0.5, start), perceptual, "fp32")


def gradients(module: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None and p.grad.any()]


# The terms

def test_the_reconstruction_loss_is_l1_and_the_weighted_distance_of_the_images():
    x, y = to_imagenet(random_images(2)), to_imagenet(random_images(2, seed=1))
    terms = reconstruction_terms(x, y, lambda a, b: (a - b).square().mean(), weight=0.3)
    l1 = float((x - y).abs().mean())
    distance = float((random_images(2) - random_images(2, seed=1)).square().mean())
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(
        {"l1": l1, "perceptual": distance, "reconstruction": l1 + 0.3 * distance}, rel=1e-4)
    assert float(reconstruction_terms(x, y, None, weight=0.3)["reconstruction"]) == pytest.approx(l1)


def test_kl_is_zero_for_a_standard_normal_and_else_that_of_torchs_distributions():
    zero = torch.zeros(3, 4, 2, 2)
    assert kl_to_standard_normal(zero, zero) == 0
    mean, logvar = torch.randn(2, 3, 4, 2, 2, generator=stream(0))
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(zero, 1 + zero)).sum() / 3
    torch.testing.assert_close(kl_to_standard_normal(mean, logvar), expected)


@pytest.mark.parametrize("real, fake, loss", [(1.0, -1.0, 0), (5.0, -9.0, 0), (0.0, 0.0, 1), (-1.0, 1.0, 2),
                                              (1.0, 2.0, 1.5)])
def test_the_hinge_loss_asks_for_logits_beyond_one(real, fake, loss):
    assert float(hinge_loss(torch.full((2, 1, 3, 3), real), torch.full((2, 1, 3, 3), fake))) == loss


@pytest.mark.parametrize("of_reconstruction, of_generator, weight", [
    ((3.0, 4.0), (0.0, 2.0), 5 / 2.0001), ((3.0, 4.0), (0.0, 0.0), 1e4), ((0.0, 0.0), (1.0, 1.0), 0),
    ((3e6, 4e6), (0.6, 0.8), 1e4)])
def test_the_adaptive_weight_is_the_ratio_of_two_gradients(of_reconstruction, of_generator, weight):
    w = torch.zeros(2, requires_grad=True)
    a, b = torch.tensor(of_reconstruction), torch.tensor(of_generator)
    found = adaptive_weight((a * w).sum(), (b * w).sum(), w)
    assert float(found) == pytest.approx(weight, rel=1e-5) and not found.requires_grad


def test_features_are_compared_by_their_directions():
    right, up, left = (torch.tensor(direction).view(1, 2, 1, 1).expand(3, 2, 4, 4)
                       for direction in ((2.0, 0.0), (0.0, 9.0), (-1.0, 0.0)))
    assert float(feature_distance([right, up], [5 * right, up])) == 0
    assert float(feature_distance([right], [up])) == pytest.approx(2)
    assert float(feature_distance([right, right], [left, up])) == pytest.approx(4 + 2)
    half = torch.cat([right[..., :2], up[..., :2]], dim=3)
    assert float(feature_distance([right], [half])) == pytest.approx(1)       # places are averaged


# Perceptual networks

def test_the_distance_of_features_needs_no_download_and_teaches_the_reconstruction_only():
    distance = build_perceptual("features", "efficientnet_lite0", 32)
    x, y = random_images(2, 32), random_images(2, 32, seed=1).requires_grad_()
    assert float(distance(x, x)) == pytest.approx(0, abs=1e-5)
    found = distance(x, y)
    found.backward()
    assert float(found.detach()) > 0.1 and y.grad.any()
    assert build_perceptual("none", "efficientnet_lite0", 32) is None


def test_lpips_without_its_package_names_two_ways_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match="pip install lpips, or use --perceptual features") as error:
        build_perceptual("lpips", "", 32)
    one_line(error)


def lpips_that(made) -> ModuleType:
    module = ModuleType("lpips")
    module.LPIPS = made
    return module


def test_lpips_without_its_network_names_the_file_and_two_ways_out(monkeypatch):
    def unreachable(**_):
        raise OSError("no route to host")

    monkeypatch.setitem(sys.modules, "lpips", lpips_that(unreachable))
    with pytest.raises(UserError, match=r"put vgg16-397923af.pth into .*, or use --perceptual features") as error:
        build_perceptual("lpips", "", 32)
    one_line(error)


def test_lpips_sees_images_from_minus_one_to_one_and_is_not_trained(monkeypatch):
    class Watched(nn.Conv2d):
        def __init__(self, net, verbose):
            super().__init__(3, 1, 1)
            assert net == "vgg" and not verbose

        def forward(self, x, y):
            self.seen = x, y
            return super().forward((x - y).abs()).mean(dim=(1, 2, 3), keepdim=True)

    made = []
    monkeypatch.setitem(sys.modules, "lpips", lpips_that(lambda **options: made.append(Watched(**options)) or made[0]))
    images, others = random_images(2), random_images(2, seed=1)
    terms = reconstruction_terms(to_imagenet(images), to_imagenet(others), build_perceptual("lpips", "", 16), 1.0)
    torch.testing.assert_close(made[0].seen, (images, others))
    assert terms["perceptual"].ndim == 0 and not any(p.requires_grad for p in made[0].parameters())
    assert not made[0].training


# The discriminator

@pytest.mark.parametrize("side", [32, 64, 256])
def test_the_discriminator_judges_patches(side):
    assert PatchDiscriminator(4)(torch.zeros(2, 3, side, side)).shape == (2, 1, side // 8 - 2, side // 8 - 2)


def test_each_judgement_is_of_a_patch_of_70_px():
    """Batch norm, through which all places see each other, is left out."""
    discriminator = PatchDiscriminator(4)
    for place, module in enumerate(discriminator):
        if isinstance(module, nn.BatchNorm2d):
            discriminator[place] = nn.Identity()
    image = torch.rand(1, 3, 192, 192, requires_grad=True)
    discriminator(image)[0, 0, 11, 11].backward()
    rows = image.grad.abs().sum(dim=(0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 70


def test_the_published_discriminator_has_its_size():
    """That of pix2pix with 64 channels and batch norm: 2,765,633 weights."""
    assert sum(p.numel() for p in PatchDiscriminator().parameters()) == 2_765_633
    assert not list(PatchDiscriminator().buffers())


# Both together

def test_the_loss_is_the_published_sum_of_its_terms():
    """Sums over the values of an image, means over the batch; the latents are sampled with the batch's noise."""
    model, batch = learner(discriminator=False, perceptual=lambda a, b: (a - b).square().mean()), batch_of()
    x = to_imagenet(batch["image"])
    with torch.no_grad():
        posterior = model.autoencoder.encode(x).latent_dist
        y = model.autoencoder.decode(posterior.mean + posterior.std * batch["noise"]).sample
    l1 = (x - y).abs().sum() / 2
    perceptual = (batch["image"] - from_imagenet(y)).square().mean() * 3 * 32 * 32
    found = model(batch)
    torch.testing.assert_close(found["loss"].detach(), l1 + 0.3 * perceptual + 1e-2 * posterior.kl().mean())
    torch.testing.assert_close(found["kl"].detach(), posterior.kl().mean())
    assert set(found) == {"loss", "l1", "perceptual", "reconstruction", "kl"}


def test_before_its_step_the_discriminator_neither_learns_nor_teaches():
    model = learner(start=3)
    found = model(batch_of(step=2))
    assert found["adaptive_weight"] == found["generator"] == found["discriminator"] == 0
    torch.testing.assert_close(found["loss"], learner(discriminator=False)(batch_of())["loss"])
    found["loss"].backward()
    assert gradients(model.autoencoder) and not gradients(model.discriminator)
    assert all(p.grad is not None for p in model.discriminator.parameters())    # or several processes would wait


def test_from_its_step_on_the_weight_of_the_generator_is_the_ratio_of_the_gradients():
    model, batch = learner(start=3), batch_of(step=3)
    found = model(batch)
    last = model.autoencoder.decoder.conv_out.weight

    def gradient(loss) -> float:
        return float(torch.autograd.grad(loss, last)[0].norm())

    x = to_imagenet(batch["image"])
    posterior = model.autoencoder.encode(x).latent_dist
    y = model.autoencoder.decode(posterior.mean + posterior.std * batch["noise"]).sample
    torch.testing.assert_close(found["generator"], -model.discriminator(y).mean())
    by_hand = gradient((x - y).abs().sum() / 2) / (gradient(found["generator"]) + 1e-4)
    assert float(found["adaptive_weight"]) == pytest.approx(by_hand, rel=1e-3) and by_hand > 1
    expected = (3 * 32 * 32 * found["reconstruction"] + 1e-2 * found["kl"] + found["discriminator"]
                + 0.5 * found["adaptive_weight"] * found["generator"])
    torch.testing.assert_close(found["loss"], expected)


def test_neither_learns_from_the_others_part_of_the_loss():
    model = learner(start=0)
    model(batch_of())["generator"].backward()
    assert gradients(model.autoencoder) and not gradients(model.discriminator)
    model.zero_grad()
    model(batch_of())["discriminator"].backward()
    assert gradients(model.discriminator) and not gradients(model.autoencoder)


def test_the_gradients_of_the_whole_loss_are_those_of_two_separate_steps():
    model, batch = learner(start=0), batch_of()
    model(batch)["loss"].backward()
    together = [p.grad.clone() for p in model.parameters()]
    found = model(batch)
    generator = found["loss"] - found["discriminator"]
    separate = [*torch.autograd.grad(generator, list(model.autoencoder.parameters()), retain_graph=True),
                *torch.autograd.grad(found["discriminator"], list(model.discriminator.parameters()))]
    torch.testing.assert_close(together, separate, rtol=1e-3, atol=1e-3)


# On held-out images

def test_the_held_out_loss_is_the_mean_over_images_then_over_categories(monkeypatch):
    monkeypatch.setattr(adversarial, "reconstruct", lambda autoencoder, images, precision: images + 0.5)
    dark, light = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.full((3, 8, 8), 255, dtype=torch.uint8)
    for batch_size in (1, 2, 8):
        found = held_out_losses(network(), {"a": [dark] * 3, "b": [dark, light, light]},
                                lambda x, y: (x - y).square().mean(), 0.2, batch_size, "fp32")
        assert found["a"]["mean_abs_error"] == pytest.approx(0.25, rel=1e-4)
        assert found["b"]["mean_abs_error"] == pytest.approx(0.25 / 3, rel=1e-4)      # light is clamped to light
        l1 = 0.25 * sum(1 / std for std in (0.229, 0.224, 0.225)) / 3
        assert found["a"] == pytest.approx({"l1": l1, "perceptual": 0.25, "reconstruction": l1 + 0.05,
                                            "mean_abs_error": 0.25}, rel=1e-4)
        means = mean_over_categories(found)
        assert means["val_mean_abs_error"] == pytest.approx((0.25 + 0.25 / 3) / 2, rel=1e-4)
        assert list(means) == ["val_loss", "val_l1", "val_perceptual", "val_mean_abs_error"]


def test_two_batches_of_two_make_the_step_of_a_batch_of_four(tmp_path, monkeypatch):
    """AdamW's first step does not show the length of a gradient, so this looks at the gradients themselves."""
    seen: list[list[torch.Tensor]] = []
    step = torch.optim.AdamW.step

    def watching(self, *args, **keywords):
        seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])
        return step(self, *args, **keywords)

    monkeypatch.setattr(torch.optim.AdamW, "step", watching)
    for batch_size, accumulate in ((4, 1), (2, 2)):
        data = BalancedImages([pixels(3), pixels(5, seed=1)], batch_size, accumulate, seed=0)
        plan = Plan(1, 1, 1, 1e-4, 0, seed=0, max_grad_norm=float("inf"), accumulate=accumulate, schedule="constant")
        place = Place(tmp_path / str(accumulate), tmp_path / "logs", "autoencoder")
        fit(learner(discriminator=False), data, lambda model, batch: model(batch), plan, place, batch_size=batch_size,
            device=CPU)
    assert len(seen) == 2 and max(float(g.abs().max()) for g in seen[0]) > 1
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert (tmp_path / "1" / "log.jsonl").read_text().count("\n") == 1


