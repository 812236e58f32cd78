"""The detector of the LafitE family: what its parts are, that nothing else matters to them, and its run folder."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, MACHINE, one_line, random_images
from torch import nn

import dbad
from dbad.calibration.thresholds import Calibration
from dbad.checkpoints.weights import load_pickle, save_pickle
from dbad.diffusion.noise import image_stream
from dbad.errors import UserError
from dbad.families.detector import load_detector, open_detector
from dbad.families.digests import digests
from dbad.families.lafite import run_folder as feature_runs
from dbad.families.lafite.bank import Bank, build_bank
from dbad.families.lafite.detector import FeatureDetector, FeatureSpace
from dbad.families.lafite.discriminator import Discriminator, num_planes
from dbad.families.lafite.model import Components, denoise, feature_schedule, upsampled
from dbad.families.lafite.options import PARTS, FeatureMapOptions, FeatureSettings
from dbad.families.lafite.run_folder import load_discriminator, load_space, save_run, save_space
from dbad.families.registry import FAMILIES
from dbad.families.runs import calibration_file
from dbad.families.settings import Settings
from dbad.fields import fields_of
from dbad.files.atomic import write_json
from dbad.files.names import BANK, CALIBRATION, MODEL_CONFIG, SPACE, TRAIN_OPTIONS
from dbad.maps import blur
from dbad.networks.extractors import EMBEDDED, build_extractor
from dbad.networks.features import PatchExtractor, Standardisation, to_maps, to_patches
from dbad.networks.unet import build_unet

SIZE, GRID = 32, 4
ALL = {f"{name}_contrib": 1.0 for name in PARTS}
SETTINGS = FeatureSettings(neighbours=3, editing=True, feature_start=300, feature_steps_back=2, context_power=0.0,
                           **ALL, blur_sigma=4.0, top_share=0.0, center_crop=0, seed=0, patching=False,
                           intensity="auto")
SCALES = {"discriminator": 0.7, "knn": 40.0, "edit": 40.0, "denoise": 60.0, "inversion": 0.5}
BY_HAND = Calibration(SCALES, 1.0, 2.0)
LEARNT = ["a", "b"]
JUDGE = "discriminator-a.pt"


@pytest.fixture(scope="module")
def patches():
    return PatchExtractor(build_extractor(EMBEDDED, (0, 1), SIZE), GRID)


@pytest.fixture(scope="module")
def learnt(patches):
    """Feature space and memory bank of a few images, as train_lafite.py makes them."""
    images = {name: [to_bytes(image) for image in random_images(4, SIZE, seed)] for seed, name in enumerate("ab")}
    with torch.no_grad():
        train = {name: patches(torch.stack(part).float() / 127.5 - 1).half().numpy() for name, part in images.items()}
    standardisation = Standardisation.fit(train.values())
    bank = build_bank(train, standardisation, 1.0, 0, patches.description(), CPU, show_progress=False, images=images)
    components = Components.fit(train, standardisation, 32)
    return FeatureSpace(patches, standardisation, 20.0, components, "v", ("a", "b")), bank


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return build_unet(GRID, (32,), 1, (), image_channels=32 + 1)


@pytest.fixture(scope="module")
def judge():
    """Of random weights, for two layers: distances to the nearest and the edited patch, two of it, and four errors."""
    torch.manual_seed(0)
    made = Discriminator(8)
    made.mean.fill_(2.0)
    made.usual.fill_(-0.5)
    return made.eval()


@pytest.fixture
def detector(learnt, net, judge):
    """`detector(network, settings...)`: calibrated by hand."""
    def make(network=net, bank=learnt[1], space=learnt[0], batch_size=8, calibration=BY_HAND, **changes):
        return FeatureDetector(settings=dataclasses.replace(SETTINGS, **changes), calibration=calibration,
                               machine=MACHINE._replace(batch_size=batch_size), space=space, bank=bank, net=network,
                               judge=judge)
    return make


class Knowing(nn.Module):
    """A network that says that the clean components are `x`, in the order of the batch, by its prediction of v.

    The squared error that it expects is exp(`log_error`).
    """

    def __init__(self, x, log_error=0.0):
        super().__init__()
        self.x, self.log_error = x, log_error

    def forward(self, z_t, t):
        z_t, noised = z_t[:, :-1], z_t[:, -1:]
        level = feature_schedule()[t].view(-1, 1, 1, 1)
        noise = (z_t - level.sqrt() * self.x) / (1 - level).sqrt()
        v = level.sqrt() * noise - (1 - level).sqrt() * self.x
        return SimpleNamespace(sample=torch.cat([v, self.log_error + 0 * noised], dim=1))


def to_bytes(image):
    return ((image + 1) * 127.5).round().to(torch.uint8)


def alone(*names):
    """Settings in which only these parts count, sharp and at the maximum."""
    return {f"{name}_contrib": float(name in names) for name in PARTS} | {"blur_sigma": 0.0}


# ------------------------------------------------------------------------------------------ what a part is

def test_a_patch_of_the_bank_is_at_no_distance(detector, learnt):
    images = random_images(3, SIZE, seed=5)
    own = to_patches(detector().features(images))
    exact = detector(bank=Bank(own, {"a": len(own)}, {}), **alone("knn"))
    assert exact.parts(images)[0]["knn"].abs().max() == 0
    assert exact.parts(random_images(3, SIZE, seed=6))[0]["knn"].min() > 0


def test_training_images_are_next_to_the_bank_that_is_made_of_them(detector):
    """A bank is kept in float16: of standardised features that rounds off less than a thousandth."""
    near = detector(**alone("knn")).parts(random_images(4, SIZE, seed=1))[0]["knn"]
    far = detector(**alone("knn")).parts(random_images(4, SIZE, seed=7))[0]["knn"]
    assert near.max() < 1e-4 * far.min()


def test_with_one_neighbour_the_edited_patch_is_the_nearest_one(detector):
    parts, _ = detector(neighbours=1, **alone("knn", "edit")).parts(random_images(3, SIZE, seed=5))
    torch.testing.assert_close(parts["edit"], parts["knn"], rtol=1e-4, atol=1e-4)
    three, _ = detector(neighbours=3, **alone("knn", "edit")).parts(random_images(3, SIZE, seed=5))
    assert torch.equal(three["knn"], parts["knn"]) and not torch.allclose(three["edit"], parts["edit"], rtol=0.01)


def test_a_network_that_gives_back_the_features_finds_no_difference(detector, learnt):
    images = random_images(3, SIZE, seed=5)
    x = learnt[0].components.project(detector().features(images))
    for editing in (True, False):
        parts, _ = detector(Knowing(x), editing=editing, **alone("denoise")).parts(images)
        assert parts["denoise"].max() < 1e-6


def test_a_network_that_gives_back_the_edited_features_differs_by_the_edit(detector, learnt, patches):
    """What comes back is compared with the features as they were: here with all components, up to their scale."""
    images, (space, bank) = random_images(3, SIZE, seed=5), learnt
    every = [to_maps(bank.vectors.float(), GRID).numpy()]
    components = Components.fit({"a": every[0]}, Standardisation(torch.zeros(40), torch.ones(40)), patches.channels)
    space = space._replace(components=components)
    features = detector().features(images)
    edited = to_maps(bank.edit(to_patches(features), 3, space.tau), GRID)
    settings = alone("edit", "denoise")
    parts, _ = detector(Knowing(components.project(edited)), space=space, **settings).parts(images)
    torch.testing.assert_close(parts["denoise"] * components.scale ** 2, parts["edit"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("editing", [True, False])
def test_what_is_denoised_is_the_edited_features_or_the_plain_ones(editing, detector, learnt, net):
    images, (space, bank) = random_images(2, SIZE, seed=5), learnt
    features = detector().features(images)
    begun = to_maps(bank.edit(to_patches(features), 3, space.tau), GRID) if editing else features
    project = space.components.project
    streams = [image_stream(0, image) for image in images]
    clean = denoise(net, project(begun), streams, feature_schedule(), 300, 2, "v", "fp32")
    expected = (clean - project(features)).square().sum(dim=1, keepdim=True)
    parts, _ = detector(editing=editing, **alone("denoise")).parts(images)
    torch.testing.assert_close(parts["denoise"], upsampled(expected, SIZE), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_distances_are_divided_by_a_power_of_what_the_network_expects(power, detector, learnt):
    images = random_images(2, SIZE, seed=5)
    x = learnt[0].components.project(detector().features(images))
    plain, _ = detector(Knowing(x + 1, 3.0)).parts(images)
    found, _ = detector(Knowing(x + 1, 3.0), context_power=power).parts(images)
    for name, part in found.items():
        unit = 1 if name in ("inversion", "discriminator") else math.exp(3 * power)
        torch.testing.assert_close(part * unit, plain[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("neighbours", [1, 9])
def test_the_discriminator_judges_by_all_distances_to_three_neighbours(neighbours, detector, learnt, judge):
    images, (space, bank) = random_images(2, SIZE, seed=5), learnt
    features = detector().features(images)
    clean = space.components.project(features) + 2
    nearest, _ = bank.nearest(to_patches(features), 1)
    squares = (to_maps(bank.edit(to_patches(features), 3, space.tau), GRID) - features).square()
    layers = squares.split(list(space.patches.extractor.channels), dim=1)
    known = [to_maps(nearest.square(), GRID), squares.sum(dim=1, keepdim=True),
             *(part.sum(dim=1, keepdim=True) for part in layers),
             torch.full_like(squares[:, :2], math.exp(1.5)), torch.full_like(squares[:, :2], 4.0)]
    expected = torch.nn.functional.softplus(judge(torch.cat(known, dim=1).log()).mean(dim=1, keepdim=True) + 0.5)
    parts, _ = detector(Knowing(clean, 1.5), neighbours=neighbours, **alone("discriminator")).parts(images)
    torch.testing.assert_close(parts["discriminator"], upsampled(expected, SIZE), rtol=1e-3, atol=1e-4)


def test_large_blocks_are_hidden_for_the_discriminator_alone(detector):
    images, known = random_images(2, SIZE, seed=5), {}
    for name, made, judged in (("power", detector(**alone("edit"), context_power=0.5), False),
                               ("taught", detector(**alone("edit")), True),
                               ("judging", detector(**alone("discriminator")), False)):
        known[name] = made.look_up(images, judged=judged).context
    for found in known["taught"], known["judging"]:
        assert found.expected.shape == found.found.shape == (2, 2, GRID, GRID)
        assert all(torch.equal(one, two[:, :1]) for one, two in zip(known["power"], found, strict=True))


@pytest.mark.parametrize("names", [("discriminator",), ("knn",), ("edit",), ("denoise",), ("inversion",),
                                   ("knn", "inversion"), PARTS])
def test_a_part_that_does_not_count_is_left_out(names, detector):
    made = detector(**alone(*names))
    assert list(made.parts(random_images(1, SIZE))[0]) == [name for name in PARTS if name in names]


def test_without_the_parts_that_need_it_the_network_is_not_asked(detector):
    class Asked(nn.Module):
        def forward(self, z_t, t):
            raise AssertionError("the network ran")

    detector(Asked(), **alone("knn", "edit")).parts(random_images(1, SIZE))


def test_a_bank_without_denoiser_refuses_what_needs_one(detector, learnt):
    space = learnt[0]._replace(components=None)
    for name in ("discriminator", "denoise", "inversion"):
        with pytest.raises(UserError, match="--inversion_contrib and --context_power: this run has a memory") as error:
            detector(None, space=space, **alone("knn", name))
        one_line(error)
    with pytest.raises(UserError, match="no denoiser"):
        detector(None, space=space, context_power=0.5, **alone("knn"))
    assert detector(None, space=space, **alone("knn", "edit"))(random_images(1, SIZE)).score > 0


def test_the_anomaly_map_is_the_weighted_sum_of_its_scaled_and_blurred_parts(detector):
    scales = dict(zip(PARTS, (0.3, 2.0, 3.0, 5.0, 7.0), strict=True))
    weights = dict(zip(PARTS, (0.75, 0.5, 1.0, 2.0, 0.25), strict=True))
    settings = {f"{name}_contrib": weight for name, weight in weights.items()}
    images = random_images(2, SIZE, seed=5)
    sharp = detector(**settings | {"blur_sigma": 0.0}).parts(images)[0]
    found = detector(**settings, calibration=Calibration(scales, 1.0, 2.0))(images)
    expected = sum(weights[name] * blur(sharp[name], 4.0 * SIZE / 256) / scales[name] for name in PARTS)
    torch.testing.assert_close(found.anomaly_map, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(found.score, found.anomaly_map.amax(dim=(1, 2, 3)))


def test_a_center_crop_leaves_the_border_out(detector):
    found = detector(center_crop=128)(random_images(1, SIZE, seed=5)).anomaly_map
    assert found[..., 8:24, 8:24].min() > 0 and found[..., :8, :].max() == found[..., :, 24:].max() == 0


# ------------------------------------------------------------------------------------------ mosaic

def test_an_image_whose_patches_are_all_known_is_its_own_mosaic(detector):
    images = random_images(4, SIZE, seed=1)[[2, 0]]
    _, mosaic = detector().parts(images)
    assert mosaic.shape == images.shape and torch.equal(to_bytes(mosaic), to_bytes(images))


def test_the_mosaic_of_another_image_is_put_together_of_pieces_of_training_images(detector):
    known = torch.cat([random_images(4, SIZE, seed) for seed in (0, 1)])
    _, mosaic = detector().parts(random_images(1, SIZE, seed=5))

    def pieces(images):
        return {piece.numpy().tobytes() for piece in to_bytes(images).unfold(2, 8, 8).unfold(3, 8, 8)
                .permute(0, 2, 3, 1, 4, 5).flatten(0, 2).contiguous()}
    assert len(pieces(mosaic)) > 4 and pieces(mosaic) <= pieces(known)


def test_a_bank_without_pixels_gives_no_mosaic(detector, learnt):
    found = detector(bank=dataclasses.replace(learnt[1], pixels=None))(random_images(2, SIZE))
    assert found.reconstruction is None and found.score.isfinite().all()


def test_a_grid_that_does_not_divide_the_image_gives_a_mosaic_of_the_whole_image(learnt, detector):
    extractor = learnt[0].patches.extractor
    odd = PatchExtractor(extractor, 5)
    pixels = torch.randint(0, 256, (len(learnt[1].vectors), 3, 6, 6), dtype=torch.uint8)
    _, mosaic = detector(space=learnt[0]._replace(patches=odd), bank=dataclasses.replace(learnt[1], pixels=pixels),
                         **alone("knn")).parts(random_images(2, SIZE))
    assert mosaic.shape == (2, 3, SIZE, SIZE) and mosaic.isfinite().all()


# ------------------------------------------------------------------------------------------ nothing else matters

def assert_same(one, other):
    torch.testing.assert_close(one.score, other.score, rtol=1e-4, atol=0)
    torch.testing.assert_close(one.anomaly_map, other.anomaly_map, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(one.reconstruction, other.reconstruction)


def test_neither_the_batch_nor_the_order_changes_a_prediction(detector):
    images = random_images(5, SIZE, seed=5)
    together = detector(batch_size=8)(images)
    assert_same(detector(batch_size=2)(images), together)
    turned = detector(batch_size=3)(images.flip(0))
    torch.testing.assert_close(turned.score.flip(0), together.score, rtol=1e-4, atol=0)
    assert detector()(images[3]).score == pytest.approx(float(together.score[3]), rel=1e-4)
    assert len(set(together.score.tolist())) == 5


def test_the_same_detector_says_the_same_twice_and_another_seed_something_else(detector):
    images = random_images(2, SIZE, seed=5)
    torch.manual_seed(1)
    first = detector()(images)
    torch.manual_seed(2)
    assert torch.equal(detector()(images).score, first.score)
    other = detector(seed=1)(images)
    assert not torch.allclose(other.maps["denoise"], first.maps["denoise"], rtol=1e-3)
    for name in ("knn", "edit", "inversion"):           # nothing is drawn for these
        assert torch.equal(other.maps[name], first.maps[name])


def test_a_prediction_has_the_promised_fields(detector):
    found = detector()(random_images(2, 40))
    assert found.anomaly_map.shape == (2, 1, SIZE, SIZE) and found.score.shape == (2,)
    assert found.reconstruction.shape == (2, 3, SIZE, SIZE) and found.reconstruction.abs().max() <= 1
    for part in (found.anomaly_map, *found.maps.values()):
        assert part.shape == (2, 1, SIZE, SIZE) and part.dtype == torch.float32 and part.device.type == "cpu"
        assert part.min() >= 0 and part.isfinite().all()


# ------------------------------------------------------------------------------------------ settings

def test_the_settings_are_the_options_of_the_scripts():
    assert set(fields_of(FeatureSettings)) == set(fields_of(FeatureMapOptions, Settings)) | {"discriminator"}
    assert FeatureSettings.of(SimpleNamespace(**vars(SETTINGS), method="lafite", grid=4)) == SETTINGS
    assert FeatureSettings.read(SETTINGS.record()) == SETTINGS


@pytest.mark.parametrize("setting, value", [
    ("neighbours", 9), ("editing", False), ("feature_start", 600), ("feature_steps_back", 5), ("context_power", 0.5),
    ("discriminator_contrib", 3.0), ("knn_contrib", 0.0), ("edit_contrib", 2.0), ("denoise_contrib", 0.5),
    ("inversion_contrib", 0.0), ("blur_sigma", 16.0), ("top_share", 0.1), ("center_crop", 64)])
def test_every_setting_shapes_the_prediction(setting, value, detector):
    images = random_images(2, SIZE, seed=5)
    assert not torch.isclose(detector(**{setting: value})(images).score, detector()(images).score, rtol=1e-4).any()


# ------------------------------------------------------------------------------------------ in the run folder

@pytest.fixture
def run_folder(learnt, detector, judge, tmp_path, monkeypatch):
    """What train_lafite.py leaves of the networks of `detector`, calibrated together and for category a.

    The backbone is built once for all tests, which saves half a second in each.
    """
    def built(*about):
        assert about == (EMBEDDED, [0, 1], SIZE)
        return learnt[0].patches.extractor

    monkeypatch.setattr(feature_runs, "build_extractor", built)
    folder = tmp_path / "both"
    save_run(folder, detector(), {JUDGE: judge})
    recalibrate(folder)
    return folder


def calibration_of(folder, threshold, method="lafite", **changes):
    settings = dataclasses.replace(SETTINGS, discriminator=JUDGE if method == "lafite" else "", **changes)
    return Calibration(SCALES, 1.0, threshold, method=method, settings=settings.record(),
                       digests=digests(folder, FAMILIES[method], settings))


def recalibrate(folder, method="lafite", **changes):
    for category, threshold in (("a", 1.0), (None, 1e6)):
        calibration_of(folder, threshold, method, **changes).save(calibration_file(folder, category, LEARNT))
    write_json(folder / TRAIN_OPTIONS, {"item": LEARNT})


def test_the_detector_of_a_run_folder_is_the_one_that_was_saved(run_folder, detector):
    images = random_images(3, SIZE, seed=5)
    found = dbad.load_detector(run_folder, device="cpu", precision="fp32")
    assert isinstance(found, FeatureDetector)
    assert_same(found(images), detector()(images))


def test_told_a_category_it_has_the_thresholds_of_that_category(run_folder):
    image = random_images(1, SIZE, seed=5)
    together, own = (load_detector(run_folder, "cpu", "fp32", category=name) for name in (None, "a"))
    assert (together.calibration.image_threshold, own.calibration.image_threshold) == (1e6, 1.0)
    assert not together(image).decision and own(image).decision
    assert torch.equal(together(image).score, own(image).score)
    with pytest.raises(UserError, match="no thresholds for c; expected one of a, b") as error:
        load_detector(run_folder, "cpu", category="c")
    one_line(error)


def test_space_and_bank_come_back_as_they_were(run_folder, learnt, detector):
    space, bank = learnt
    found = load_space(run_folder)
    assert found.patches.description() == space.patches.description()
    assert (found.tau, found.prediction, found.categories) == (space.tau, "v", ("a", "b"))
    assert torch.equal(found.components.basis, space.components.basis)
    assert (found.components.scale, found.components.kept) == (space.components.scale, space.components.kept)
    assert torch.equal(found.standardisation.mean, space.standardisation.mean)
    before = (run_folder / SPACE).read_bytes(), (run_folder / BANK).read_bytes()
    save_run(run_folder, detector(space=found, bank=bank), {})
    assert ((run_folder / SPACE).read_bytes(), (run_folder / BANK).read_bytes()) == before


def test_a_run_without_denoiser_needs_no_weights(run_folder, learnt):
    save_space(learnt[0]._replace(components=None), run_folder)
    for name in ("final.pt", MODEL_CONFIG, JUDGE):
        (run_folder / name).unlink()
    recalibrate(run_folder, method="knn", discriminator_contrib=0.0, denoise_contrib=0.0, inversion_contrib=0.0)
    found = load_detector(run_folder, "cpu", "fp32")
    assert found.net is None and found(random_images(1, SIZE)).maps.keys() == {"knn", "edit"}


def test_other_weights_of_the_backbone_than_were_learnt_with_are_refused(run_folder):
    state = load_pickle(run_folder / SPACE)
    save_pickle(state | {"about": state["about"] | {"weights": "0123456789abcdef"}}, run_folder / SPACE)
    with pytest.raises(UserError, match=f"made with weights of {EMBEDDED} that differ") as error:
        load_space(run_folder)
    assert str(run_folder / SPACE) in one_line(error)


def test_a_bank_of_other_layers_never_meets_the_features(run_folder, learnt, detector):
    other = dataclasses.replace(learnt[1], features=learnt[1].features | {"layers": [1, 2]})
    save_run(run_folder, detector(bank=other), {})
    with pytest.raises(UserError, match=r"a bank of features with layers \[1, 2\]; expected \[0, 1\]") as error:
        open_detector(run_folder, calibration_of(run_folder, 1.0), MACHINE)
    assert str(run_folder / BANK) in one_line(error)


@pytest.mark.parametrize("missing", ["about", "standardisation", "tau", "components", "prediction", "categories"])
def test_a_file_that_is_no_feature_space_is_told(missing, run_folder):
    state = load_pickle(run_folder / SPACE)
    state.pop(missing)
    save_pickle(state, run_folder / SPACE)
    with pytest.raises(UserError, match="not a feature space written by train_lafite.py") as error:
        load_space(run_folder)
    assert str(run_folder / SPACE) in one_line(error)


def test_a_discriminator_comes_back_as_it_was_and_another_file_is_told(run_folder, judge):
    known = torch.randn(2, num_planes(2), 5, 5)
    assert torch.equal(load_discriminator(run_folder / JUDGE, 2).surprise(known), judge.surprise(known))
    with pytest.raises(UserError, match="not a discriminator written by train_lafite.py") as error:
        load_discriminator(run_folder / "final.pt", 2)
    one_line(error)
    with pytest.raises(UserError, match="for 8 numbers per patch; expected 9; run train_lafite.py") as error:
        load_discriminator(run_folder / JUDGE, 3)
    assert str(run_folder / JUDGE) in one_line(error)


@pytest.mark.parametrize("name", ["final.pt", SPACE, BANK, JUDGE])
def test_files_that_changed_after_the_calibration_are_refused(name, run_folder):
    state = load_pickle(run_folder / name)
    save_pickle(state | {next(iter(state)): next(iter(state.values()))} | {"more": 1}, run_folder / name)
    with pytest.raises(UserError, match="differs from the file that .* was measured with") as error:
        load_detector(run_folder, "cpu")
    assert str(run_folder / name) in one_line(error)


@pytest.mark.parametrize("name", ["final.pt", SPACE, BANK, JUDGE, MODEL_CONFIG, CALIBRATION])
def test_a_missing_file_of_the_run_folder_is_named(name, run_folder):
    (run_folder / name).unlink()
    with pytest.raises(UserError, match="no such file") as error:
        load_detector(run_folder, "cpu")
    assert str(run_folder / name) in one_line(error)
