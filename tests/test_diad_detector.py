"""The detector of the DiAD family, what makes its thresholds, and the latents that its training sees."""

import dataclasses

import pytest
import torch
from helpers import CPU, MACHINE, one_line, random_images, streams
from torch.nn import functional as F

from dbad.calibration.thresholds import Calibration
from dbad.diffusion.batches import validation_loss
from dbad.diffusion.noise import image_stream
from dbad.errors import UserError
from dbad.families.detector import load_detector
from dbad.families.diad.detector import DiadDetector, extractor_settings
from dbad.families.diad.latents import LatentImages, encode_all, latent_loss
from dbad.families.diad.model import Size, random_diad
from dbad.families.diad.options import DiadSettings
from dbad.families.diad.reconstruction import anomaly_map, image_score, reconstruct
from dbad.families.diad.storage import save_diad
from dbad.families.digests import digests
from dbad.families.registry import FAMILIES
from dbad.families.runs import calibration_file, load_calibration
from dbad.files.atomic import read_json, write_json
from dbad.files.names import TRAIN_OPTIONS
from dbad.networks.extractors import build_extractor

SMALL = Size(128, (32, 32, 32, 32), 8, "tiny", (8, 8, 8, 8), 2)
SETTINGS = DiadSettings(latent_start=250, latent_steps_back=2, paper_exact=False, map_sigma=5.0, center_crop=0,
                        feature_resolution=64, seed=0, patching=False, intensity="auto")


@pytest.fixture(scope="module")
def extractor():
    return build_extractor("efficientnet_lite0", (1, 2), 64)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return random_diad(SMALL).requires_grad_(False)


@pytest.fixture
def detector(model, extractor):
    return detector_of(model, extractor)


def detector_of(model, extractor, batch_size: int = 3, **changes) -> DiadDetector:
    calibration = Calibration({"feature": 0.1}, 1.0, 0.5, scores=(0.3, 0.4))
    return DiadDetector(settings=dataclasses.replace(SETTINGS, **changes), model=model, extractor=extractor,
                        machine=MACHINE._replace(batch_size=batch_size), calibration=calibration)


# What it says of an image

def test_the_map_tells_how_the_features_of_image_and_sample_differ(detector, model, extractor):
    images = random_images(2, 128)
    parts, samples = detector.parts(images)
    expected = reconstruct(model, images, [image_stream(0, image) for image in images], 250, 2)
    torch.testing.assert_close(samples, expected)
    torch.testing.assert_close(parts["feature"], anomaly_map(extractor, images, expected, 5.0))
    found, score = detector.combine(parts, {"feature": 0.1})
    torch.testing.assert_close(found, 10 * parts["feature"])
    torch.testing.assert_close(score, image_score(found))
    prediction = detector(images)
    assert prediction.anomaly_map.shape == (2, 1, 128, 128) and prediction.maps.keys() == {"feature"}
    assert prediction.decision.tolist() == (score >= 0.5).tolist()


def test_an_image_that_comes_back_as_it_is_has_no_anomaly(detector, model, monkeypatch):
    monkeypatch.setattr("dbad.families.diad.detector.reconstruct", lambda model, images, *how: images)
    assert detector(random_images(1, 128)).score.item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("changes", [{"seed": 1}, {"latent_start": 600}, {"latent_steps_back": 1},
                                     {"paper_exact": True}, {"map_sigma": 0.0}, {"center_crop": 128}])
def test_every_setting_counts(changes, detector, model, extractor):
    images = random_images(1, 128)
    assert not torch.equal(detector_of(model, extractor, **changes)(images).anomaly_map, detector(images).anomaly_map)


def test_without_diffusion_the_auto_encoder_is_left(detector, model):
    images = random_images(2, 128)
    with torch.no_grad():
        torch.testing.assert_close(detector.autoencoded(images), model.decode(model.encode(images)))


# In a run folder

@pytest.fixture
def folder(model, extractor, tmp_path):
    """A run of two categories as train_diad.py leaves it, with thresholds by hand."""
    save_diad(model, tmp_path)
    settings = dataclasses.replace(SETTINGS, **extractor_settings(extractor))
    found = digests(tmp_path, FAMILIES["diad"], settings)
    for name, threshold in ((None, 3.0), ("bolt", 1.0), ("nut", 2.0)):
        Calibration({"feature": 0.1}, 1.0, threshold, settings=settings.record(), digests=found,
                    method="diad").save(calibration_file(tmp_path, name, ["bolt", "nut"]))
    write_json(tmp_path / TRAIN_OPTIONS, {"item": ["bolt", "nut"]})
    return tmp_path


def test_a_run_folder_is_recognised_and_gives_the_same(folder, detector, extractor):
    images = random_images(2, 128)
    for name, threshold in ((None, 3.0), ("bolt", 1.0), ("nut", 2.0)):
        loaded = load_detector(folder, "cpu", "fp32", category=name)
        assert isinstance(loaded, DiadDetector)
        assert loaded.settings == dataclasses.replace(SETTINGS, **extractor_settings(extractor))
        assert loaded.calibration.image_threshold == threshold
    torch.testing.assert_close(loaded(images).score, detector(images).score)


def test_another_extractor_than_calibrated_with_is_refused(folder):
    content = read_json(folder / "calibration.json")
    content["settings"]["extractor_weights"] = "other"
    write_json(folder / "calibration.json", content)
    with pytest.raises(UserError, match="calibrated with weights of efficientnet_lite0") as error:
        load_detector(folder, "cpu", "fp32")
    one_line(error)


@pytest.mark.parametrize("value", [None, "250", 0])
def test_thresholds_with_a_setting_that_is_none_are_refused(folder, value):
    content = read_json(folder / "calibration.json")
    content["settings"]["latent_start"] = value
    write_json(folder / "calibration.json", content)
    with pytest.raises(UserError, match=r"not a calibration \(latent_start .*run train_diad.py again") as error:
        load_calibration(folder / "calibration.json")
    one_line(error)


# What the training sees

def images_of(count: int, seed: int) -> list[torch.Tensor]:
    return list(((random_images(count, 128, seed) + 1) * 127.5).round().to(torch.uint8))


@pytest.fixture(scope="module")
def encoded(model):
    """Of two categories with 2 and 5 images."""
    return [encode_all(model, images_of(count, count), 2, CPU, "fp32") for count in (2, 5)]


def latents_of(encoded, batch_size: int = 4, accumulate: int = 1, purpose: str = "train", **changes) -> LatentImages:
    return LatentImages(encoded, **{"seed": 0, "num_timesteps": 250} | changes, purpose=purpose, batch_size=batch_size,
                        accumulate=accumulate)


def test_categories_take_turns_whatever_their_sizes(encoded):
    data = latents_of(encoded)
    assert len(data) == 10
    batch = data.__getitems__([(0, slot, slot) for slot in range(10)])["image"]
    a, b = (torch.stack(list(part.images)).float() / 127.5 - 1 for part in encoded)
    torch.testing.assert_close(batch[0::2], a[[0, 1, 0, 1, 0]])
    torch.testing.assert_close(batch[1::2], b)


def test_a_step_is_the_same_however_it_is_divided_into_batches(encoded):
    whole = latents_of(encoded, 4, 1).__getitems__([(5, slot, slot + 3) for slot in range(4)])
    parts = [latents_of(encoded, 2, 2).__getitems__([(batch, slot, 2 * (batch - 10) + slot + 3) for slot in range(2)])
             for batch in (10, 11)]
    for name, value in whole.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), value, rtol=0, atol=0)


def test_latents_are_samples_of_their_distribution(model, encoded):
    """Which is kept in half precision; every step draws anew."""
    data, image = latents_of(encoded), encoded[0].images[0].float()[None] / 127.5 - 1
    mean, std = model.posterior(image)
    drawn = data.__getitems__([(step, 0, 0) for step in range(300)])["latent"]
    torch.testing.assert_close(drawn.mean(0), mean[0], rtol=0, atol=float(6 * std.max() / 300 ** 0.5) + 2e-3)
    torch.testing.assert_close(drawn.std(0).mean(), std.mean(), rtol=0.05, atol=0)
    assert encoded[0].posterior.dtype == torch.float16 and encoded[0].posterior.shape == (2, 2, 4, 16, 16)


def test_timesteps_and_noise_are_those_of_the_image_s_number_in_the_training(encoded):
    data = latents_of(encoded, 4, 2)
    batch = data.__getitems__([(number // 4, number % 4, 0) for number in range(16)])
    assert [int(t) // 32 for t in batch["timestep"][:7]] == list(range(7)) and int(batch["timestep"].max()) < 250
    assert len({float(z[0, 0, 0]) for z in batch["noise"]}) == 16
    other = latents_of(encoded, 4, 2, "validation").__getitems__([(0, 0, 0)])
    assert not torch.equal(other["noise"][0], batch["noise"][0])


def test_the_loss_is_zero_for_a_network_that_knows_the_noise(model, encoded):
    batch = latents_of(encoded).__getitems__([(0, slot, slot) for slot in range(4)])

    def oracle(z_t, t, images):
        level = model.abar.float()[t].view(-1, 1, 1, 1)
        return (z_t - level.sqrt() * batch["latent"]) / (1 - level).sqrt()
    assert float(latent_loss(oracle, batch, model.abar, "fp32")) == pytest.approx(0, abs=1e-8)
    zero = float(latent_loss(lambda z_t, t, images: torch.zeros_like(z_t), batch, model.abar, "fp32"))
    assert zero == pytest.approx(float(batch["noise"].square().mean()))


def test_the_held_out_loss_is_the_same_every_time(model, encoded):
    data = latents_of(encoded, purpose="validation")
    first, again = (validation_loss(data, lambda batch: latent_loss(model, batch, model.abar, "fp32"), CPU)
                    for _ in range(2))
    assert first == again and 0.5 < first < 5


def test_streams_give_the_noise_that_latents_are_noised_with(model):
    """At timestep start - 1; the network that knows it leads back to the image's own latents."""
    images = random_images(1, 128)
    z_0, seen = model.encode(images), []
    noise = torch.randn(4, 16, 16, generator=streams(1)[0])

    class Oracle(torch.nn.Module):
        resolution, autoencoder, abar = model.resolution, model.autoencoder, model.abar
        encode, decode, hint = model.encode, model.decode, model.hint

        def predict_noise(self, z_t, t, hint):
            seen.append((t, z_t))
            return noise[None]
    found = reconstruct(Oracle(), images, streams(1), 250, 2)
    assert [t for t, _ in seen] == [249, 124]
    level = float(model.abar[249])
    torch.testing.assert_close(seen[0][1], level ** 0.5 * z_0 + (1 - level) ** 0.5 * noise)
    assert F.l1_loss(found, model.decode(z_0)) < 1e-3
