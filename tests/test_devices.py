"""Every tensor of a step is on one device: all that computes on a GPU, run with tensors that pretend to be on one."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import drawn, random_images, reconstruction, tiny_detector, tiny_unet
from pretend import cuda_device
from torch import nn

from dbad.calibration.thresholds import Calibration, calibrate
from dbad.diffusion.batches import NoisedImages, denoising_loss, validation_loss
from dbad.diffusion.ddim import schedule
from dbad.families.ddim import objectives
from dbad.families.ddim import search as tuning
from dbad.families.ddim.detector import plain_parts
from dbad.families.ddim.normalise import fit
from dbad.families.ddim.options import DiffusionOptions
from dbad.families.ddim.reconstruct import Denoiser, reconstruct_all
from dbad.families.diad import adversarial, autoencoder, latents
from dbad.families.diad.detector import DiadDetector
from dbad.families.diad.model import Size, random_diad
from dbad.families.diad.options import DiadSettings
from dbad.families.lafite import lessons, search
from dbad.families.lafite import model as lafite
from dbad.families.lafite.bank import Bank, build_bank
from dbad.families.lafite.detector import FeatureDetector, FeatureSpace
from dbad.families.lafite.discriminator import Discriminator
from dbad.families.lafite.lessons import Good
from dbad.families.lafite.options import FeatureSettings
from dbad.families.search import pseudo_validation
from dbad.fields import PRESETS, default_of, fields_of
from dbad.networks import features
from dbad.networks.extractors import EMBEDDED, build_extractor
from dbad.networks.features import PatchExtractor, Standardisation
from dbad.networks.unet import build_unet
from dbad.records import Sample
from dbad.runtime.device import Machine, attend
from dbad.training.early_stopping import Best

SIZE, GRID = 32, 4
LATENT = Size(128, (32, 32, 32, 32), 8, "tiny", (8, 8, 8, 8), 2)
ALL = dict.fromkeys(("discriminator_contrib", "knn_contrib", "edit_contrib", "denoise_contrib", "inversion_contrib"),
                    1.0)
FEATURES = FeatureSettings(neighbours=3, editing=True, feature_start=300, feature_steps_back=2, context_power=0.5,
                           **ALL, blur_sigma=4.0, top_share=0.001, center_crop=0, seed=0, patching=False,
                           intensity="auto")


@pytest.fixture(scope="module")
def pretrained():
    return build_extractor(EMBEDDED, (0, 1), SIZE)


@pytest.fixture
def extractor(pretrained):
    """One of its own for every test: moved to the device, its weights are fake."""
    return copy.deepcopy(pretrained)


@pytest.fixture
def device(extractor):
    with cuda_device() as device:
        yield device


def pixels(count: int, size: int = SIZE) -> list[torch.Tensor]:
    return [torch.from_numpy(drawn(index, size)).movedim(-1, 0).contiguous() for index in range(count)]


def on(device: torch.device, data, loss_of, count: int = 2) -> dict[str, torch.Tensor]:
    """The losses of a batch that the training loop has brought to the device."""
    batch = data.__getitems__([(0, slot, slot) for slot in range(count)])
    losses = loss_of({name: value.to(device) for name, value in batch.items()})
    assert all(value.device.type == "cuda" for value in losses.values())
    return losses


def test_tensors_of_two_devices_do_not_meet_unnoticed(device):
    """The tool of this file works: without a GPU, the mistake is found that ends a run on a machine with one."""
    with torch.device(device):
        net = nn.Conv2d(3, 3, 1)
    assert net(torch.zeros(1, 3, 4, 4, device=device)).device.type == "cuda"
    with pytest.raises(RuntimeError, match="same device"):
        net(torch.zeros(1, 3, 4, 4))
    with pytest.raises(TypeError, match="numpy"):
        net.weight.detach().numpy()


# ------------------------------------------------------------------------------------------ lafite, knn

def feature_detector(device, extractor, diffused: bool = True) -> FeatureDetector:
    patches = PatchExtractor(extractor, GRID)
    channels = patches.channels
    components = lafite.Components(torch.eye(channels)[:, :32], 1.0, 1.0) if diffused else None
    standardisation = Standardisation(torch.zeros(channels), torch.ones(channels))
    space = FeatureSpace(patches, standardisation, 20.0, components, "x0", ("bolt",))
    bank = Bank(torch.zeros(40, channels).half(), {"bolt": 40}, {}, torch.zeros(40, 3, 8, 8, dtype=torch.uint8))
    settings = FEATURES if diffused else replace(FEATURES, context_power=0.0, discriminator_contrib=0.0,
                                                 denoise_contrib=0.0, inversion_contrib=0.0)
    with torch.device(device):
        net = build_unet(GRID, (32,), 1, (), image_channels=33) if diffused else None
    return FeatureDetector(settings=settings, machine=Machine(device, "fp32", 2), space=space, bank=bank, net=net,
                           judge=Discriminator(8).eval() if diffused else None,
                           calibration=Calibration(dict.fromkeys(
                               ("discriminator", "knn", "edit", "denoise", "inversion"), 1.0), 1.0, 2.0))


@pytest.mark.parametrize("diffused", [True, False])
def test_features_are_compared_on_one_device(diffused, device, extractor):
    detector = feature_detector(device, extractor, diffused)
    found = detector(torch.zeros(3, 3, SIZE, SIZE))
    assert found.anomaly_map.device.type == found.reconstruction.device.type == "cpu"
    calibrate(detector.combine, [detector.parts(torch.zeros(1, 3, SIZE, SIZE))[0]], 0.999, 0.6)


def test_a_discriminator_and_a_bank_come_to_the_device_of_the_detector(device, extractor):
    """Where they are made does not matter: a network that was taught on the CPU once ended every run on a GPU."""
    detector = feature_detector(device, extractor)
    detector = replace(detector, judge=Discriminator(8).eval(),
                       bank=Bank(torch.zeros(40, detector.space.patches.channels).half(), {"bolt": 40}, {}))
    assert detector.bank.vectors.device.type == "cuda"
    detector.parts(torch.zeros(2, 3, SIZE, SIZE))


def test_lafite_learns_from_damage_searches_and_calibrates_on_one_device(device, extractor, tmp_path, monkeypatch):
    """From features of good images to thresholds, as train_lafite.py goes, but for the training of the denoiser."""
    monkeypatch.setattr(lessons, "train_discriminator", partial(lessons.train_discriminator, steps=1))
    for name in ("NUM_TAUGHT", "NUM_PSEUDO"):
        monkeypatch.setattr(lessons, name, 4)
    for name in ("NEIGHBOURS", "STARTS", "STEPS", "WEIGHTS", "POWERS", "BLURS", "SHARES"):
        monkeypatch.setattr(search, name, getattr(search, name)[-2:])
    detector = feature_detector(device, extractor)
    images = pixels(8)
    extracted = np.zeros((8, detector.space.patches.channels, GRID, GRID), np.float16)
    named = [Sample(Path(f"{index}.png"), "bolt", "good") for index in range(8)]
    good = {"bolt": Good(named, named[:2], images, extracted, extracted[:2])}
    learnt = lessons.learn_from_damage(detector, good, (), judged=True, tune_minutes=1.0, bank_mb=0.05, folder=tmp_path)
    detector = learnt.detector(detector, None)
    calibrate(detector.combine, [detector.parts(torch.zeros(1, 3, SIZE, SIZE))[0]], 0.999, 0.6)


@pytest.mark.parametrize("prediction", ["x0", "v", "epsilon"])
def test_a_step_of_lafite_is_on_one_device(prediction, device):
    with torch.device(device):
        net = build_unet(GRID, (32,), 1, (), image_channels=33)
    data = lafite.FeatureImages({"bolt": torch.zeros(4, 32, GRID, GRID).half()}, 0, "train", 2)
    loss_of = partial(lafite.feature_loss, net, abar=lafite.feature_schedule(), prediction=prediction,
                      precision="fp32")
    on(device, data, loss_of)
    validation_loss(data, lambda batch: loss_of(batch)["loss"], device)


def test_a_bank_is_chosen_on_one_device(device, extractor, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_batches", features._batches.__wrapped__)    # inference mode passes fakes by
    patches = PatchExtractor(extractor, GRID)
    extracted = features.extract_features(patches, pixels(3), tmp_path, batch_size=2, device=device)
    standardisation = Standardisation.fit([extracted])
    bank = build_bank({"bolt": extracted}, standardisation, 0.002 * patches.channels / 48, 0, {}, device,
                      show_progress=False, images={"bolt": pixels(3)})
    assert bank.vectors.device.type == "cuda" and bank.pixels.device.type == "cpu"
    queries = torch.zeros(5, patches.channels, device=device)
    assert bank.edit(queries, 2, bank.temperature(queries)).device.type == "cuda"


# ------------------------------------------------------------------------------------------ ddim

@pytest.mark.parametrize("changes", [{}, {"patching": True}])
@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_conditioned_denoising_is_on_one_device(changes, sampler, device, extractor):
    detector = tiny_detector(extractor, 16, device=device, conditioning="blend", eta=0.0 if sampler == "dpm++" else 1.0,
                             steps_to_regenerate=3, sampler=sampler, **changes)
    found = detector(torch.zeros(1, 3, 24, 24) if changes else torch.zeros(3, 3, 16, 16))
    assert found.anomaly_map.device.type == "cpu"


@pytest.mark.parametrize("kind", ["location", "contrast"])
def test_normalised_maps_are_made_of_one_device(kind, device, extractor):
    detector = tiny_detector(extractor, 16, device=device)
    found = detector.differences(torch.zeros(3, 3, 16, 16))
    normalisation = fit(kind, plain_parts(found, detector.settings.layer_weights), found.reconstruction)
    replace(detector, normalisation=normalisation).parts(torch.zeros(2, 3, 16, 16))


def test_the_search_for_ddims_settings_is_on_one_device(device, extractor, monkeypatch):
    for name in ("STARTS", "WEIGHTS", "STEPS"):
        monkeypatch.setattr(tuning, name, getattr(tuning, name)[-1:])
    detector = tiny_detector(extractor, 16, device=device)
    images = pseudo_validation(random_images(2), ["a.png", "b.png"], random_images(2), 0, 4)
    tuning.DdimSearch(detector, images).run()


@pytest.mark.parametrize("objective", objectives.OBJECTIVES)
def test_a_step_of_the_extractor_is_on_one_device(objective, device, extractor, monkeypatch):
    monkeypatch.setattr(objectives.copy, "deepcopy", lambda network: network)      # which fake tensors cannot
    with torch.device(device):
        unet = tiny_unet()
    images = torch.zeros(4, 3, 16, 16)
    counterparts = objectives.denoise_towards(Denoiser(unet, schedule(1000, "linear")), images, reconstruction(),
                                              Machine(device, "fp32", 2), 0)
    model, loss_of = objectives.network_and_loss(objective, extractor, 0.1, device, "fp32")
    data = objectives.Pairs(images, counterparts)
    model = model.to(device)
    on(device, data, lambda batch: loss_of(model, batch))
    objectives.held_out_losses(model, data, loss_of, 2, device)
    best = Best(1)
    best.judge(0, 1.0, list(model.parameters()))
    best.copy_to(list(model.parameters()))


@pytest.mark.parametrize("damage", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_a_step_of_the_denoiser_is_on_one_device(prediction, damage, device, monkeypatch):
    monkeypatch.setattr(NoisedImages, "_damaged", lambda self, images, wanted: images + 0.5)    # drawn on the CPU
    with torch.device(device):
        unet = tiny_unet()
    data = NoisedImages(pixels(3, 16), 0, "train", 2, "gaussian", 1000, flip=True, rotate=5.0, color_jitter=0.1,
                        damage=(lambda *_: None) if damage else None)
    abar = schedule(1000, "linear")
    on(device, data, lambda batch: {"loss": denoising_loss(unet, batch, abar, "fp32", prediction)})
    validation_loss(data, lambda batch: denoising_loss(unet, batch, abar, "fp32", prediction), device)
    reconstruct_all(Denoiser(unet, abar, prediction=prediction), torch.zeros(2, 3, 16, 16), reconstruction(),
                    Machine(device, "fp32", 2), 0)


# ------------------------------------------------------------------------------------------ diad

def test_a_model_of_diad_learns_and_inspects_on_one_device(device, extractor):
    torch.manual_seed(0)
    with torch.device(device):
        model = random_diad(LATENT)
    model.set_trainable(whole_unet=True)
    encoded = latents.encode_all(model, pixels(2, LATENT.resolution), 2, device, "fp32")
    data = latents.LatentImages([encoded], 0, "train", 2, 1, 1000)
    on(device, data, lambda batch: {"loss": latents.latent_loss(model, batch, model.abar, "fp32")})
    settings = DiadSettings(latent_start=250, latent_steps_back=2, paper_exact=False, map_sigma=5.0, center_crop=0,
                            feature_resolution=SIZE, seed=0, patching=False, intensity="auto")
    detector = DiadDetector(settings=settings, machine=Machine(device, "fp32", 2), model=model, extractor=extractor,
                            calibration=Calibration({"feature": 0.1}, 1.0, 0.5, scores=(0.3, 0.4)))
    found = detector(torch.zeros(3, 3, LATENT.resolution, LATENT.resolution))
    assert found.anomaly_map.device.type == found.reconstruction.device.type == "cpu"
    assert detector.autoencoded(torch.zeros(1, 3, 128, 128)).device.type == "cpu"


@pytest.mark.parametrize("step", [0, 5])
def test_a_step_of_the_auto_encoder_is_on_one_device(step, device, monkeypatch):
    monkeypatch.setattr(adversarial, "adaptive_weight", lambda loss, *others: loss.detach())    # needs gradients
    perceptual = adversarial.build_perceptual("features", EMBEDDED, 32)
    with torch.device(device):
        model = adversarial.AdversarialAutoencoder(
            autoencoder.build_autoencoder("tiny", 32), adversarial.PatchDiscriminator(8),
            adversarial.Terms(0.3, 1e-2, 0.5, 3), perceptual, "fp32")
    data = autoencoder.BalancedImages([pixels(2)], 2, 1, 0)
    batch = {name: value.to(device) for name, value in data.__getitems__([(step, 0, 0), (step, 1, 1)]).items()}
    losses = model(batch)
    assert all(value.device.type == "cuda" for value in losses.values())
    adversarial.held_out_losses(model.autoencoder, {"bolt": pixels(2)}, perceptual, 0.3, 2, "fp32")
    autoencoder.latent_scale(model.autoencoder, pixels(2), 2, "fp32")


def test_every_preset_builds_on_the_device_that_it_is_for(device):
    """Shapes and devices of the networks at full size: nothing is computed, so that it costs no memory."""
    declared = fields_of(DiffusionOptions)
    for preset in PRESETS:
        values = {name: default_of(field, preset) for name, field in declared.items()}
        with torch.device(device):
            unet = build_unet(values["resolution"], values["channels"], values["layers_per_block"],
                              values["attention_levels"])
        x = torch.zeros(2, 3, values["resolution"], values["resolution"], device=device)
        assert unet(x, torch.zeros(2, dtype=torch.int64, device=device)).sample.shape == x.shape


def test_attention_on_cuda_is_that_kernel_whose_gradients_are_the_same_twice():
    """The switches are there without a GPU too; as they were, afterwards."""
    cuda = torch.backends.cuda
    kernels = [name for name in ("flash", "mem_efficient", "cudnn") if hasattr(cuda, f"enable_{name}_sdp")]
    assert len(kernels) >= 2
    try:
        attend(fused=False)
        assert cuda.math_sdp_enabled() and not any(getattr(cuda, f"{name}_sdp_enabled")() for name in kernels)
    finally:
        attend(fused=True)
    assert cuda.math_sdp_enabled() and all(getattr(cuda, f"{name}_sdp_enabled")() for name in kernels)
