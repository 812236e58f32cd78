"""Patch features: the layers on one grid, the cache that never mixes them up, and their standardisation."""

import json

import numpy as np
import pytest
import torch
from helpers import CPU, one_line
from torch import nn

from dbad.checkpoints.weights import load_pickle, save_pickle
from dbad.errors import UserError
from dbad.networks.extractors import EMBEDDED, Extractor, Stage, build_extractor
from dbad.networks.features import PatchExtractor, Standardisation, extract_features, on_grid, to_maps, to_patches


class Pyramid(nn.Module):
    """A backbone of strides 2 and 8: `scale` times the image, averaged."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, images):
        return [nn.functional.avg_pool2d(images * self.scale, stride) for stride in (2, 8)]


def tiny(scale=1.0, layers=(0, 1), resolution=16, mean=0.0, name="pyramid", **how):
    stages = {layer: Stage(3, 2 + 6 * k) for k, layer in enumerate(layers)}
    extractor = Extractor(name, Pyramid(scale), stages, (mean,) * 3, (1.0,) * 3, resolution)
    return PatchExtractor(extractor, **{"grid": 4} | how)


def pictures(count=5, seed=0):
    random = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, 256, (count, 3, 16, 16), generator=random, dtype=torch.uint8))


def extract(model, images, folder, **how):
    return extract_features(model, images, folder, **{"batch_size": 2, "device": CPU} | how)


def fails(*_):
    raise AssertionError("the network ran again")


# ------------------------------------------------------------------------------------------ on one grid

@pytest.mark.parametrize("side", [1, 3, 4, 7, 8, 32])
@pytest.mark.parametrize("smoothing", [1, 3])
def test_a_constant_layer_stays_constant_on_any_grid(side, smoothing):
    values = torch.tensor([1.5, -2.0]).view(1, 2, 1, 1)
    grid = on_grid(values.expand(3, 2, side, side), 4, smoothing)
    torch.testing.assert_close(grid, values.expand(3, 2, 4, 4))


def test_a_finer_layer_is_averaged_over_the_area_of_each_patch():
    layer = torch.rand(2, 3, 8, 8)
    by_hand = layer.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean(dim=(3, 5))
    torch.testing.assert_close(on_grid(layer, 4), by_hand)


def test_a_coarser_layer_is_interpolated_between_the_centres_of_its_patches():
    layer = torch.tensor([[0.0, 1.0]]).expand(1, 1, 2, 2)
    torch.testing.assert_close(on_grid(layer, 4)[0, 0, 1], torch.tensor([0.0, 0.25, 0.75, 1.0]))


def test_smoothing_is_the_mean_of_the_neighbours_there_are():
    layer = torch.arange(9.0).view(1, 1, 3, 3)
    smoothed = on_grid(layer, 3, smoothing=3)[0, 0]
    assert smoothed[1, 1] == 4
    assert smoothed[0, 0] == (0 + 1 + 3 + 4) / 4 and smoothed[2, 1] == (3 + 4 + 5 + 6 + 7 + 8) / 6


def test_layers_are_concatenated_in_their_order():
    extractor = build_extractor(EMBEDDED, (0, 1, 3), resolution=64)
    model = PatchExtractor(extractor, grid=8)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        features, layers = model(images), extractor(images)
    assert features.shape == (2, model.channels, 8, 8) and model.channels == 16 + 24 + 112
    assert torch.equal(features[:, 16:40], on_grid(layers[1], 8))


def test_patches_go_image_by_image_and_row_by_row_and_back():
    maps = torch.rand(2, 5, 3, 3)
    patches = to_patches(maps)
    assert patches.shape == (18, 5) and torch.equal(patches[9 + 3 * 1 + 2], maps[1, :, 1, 2])
    assert torch.equal(to_maps(patches, 3), maps)


@pytest.mark.parametrize("how", [{"grid": 0}, {"smoothing": 2}, {"smoothing": 0}])
def test_a_grid_or_filter_that_cannot_be_is_refused(how):
    with pytest.raises(ValueError, match=next(iter(how))):
        tiny(**how)


# ------------------------------------------------------------------------------------------ on the disk

@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_cached_features_are_those_of_the_network_in_the_images_order(tmp_path, batch_size):
    model, images = tiny(), pictures()
    features = extract(model, images, tmp_path, batch_size=batch_size)
    with torch.no_grad():
        expected = model(torch.stack(images).float() / 127.5 - 1)
    assert features.dtype == np.float16 and features.shape == (5, 6, 4, 4)
    np.testing.assert_allclose(features, expected.numpy(), rtol=2 ** -11, atol=1e-7)
    assert isinstance(features, np.memmap) and not features.flags.writeable


def test_features_are_extracted_once(tmp_path, monkeypatch):
    first = np.array(extract(tiny(), pictures(), tmp_path))
    monkeypatch.setattr(PatchExtractor, "forward", fails)
    assert np.array_equal(extract(tiny(), pictures(), tmp_path, batch_size=3), first)


def test_the_file_says_what_it_is(tmp_path):
    extract(tiny(smoothing=3), pictures(), tmp_path)
    path, = tmp_path.glob("*.json")
    about = json.loads(path.read_text())
    assert {"backbone": "pyramid", "layers": [0, 1], "resolution": 16, "grid": 4, "smoothing": 3,
            "shape": [5, 6, 4, 4]}.items() <= about.items()


@pytest.mark.parametrize("changed", [
    {"scale": 1.001}, {"name": "other"}, {"layers": (0, 2)}, {"resolution": 32}, {"grid": 5}, {"smoothing": 3},
    {"mean": 0.5}])
def test_features_of_another_backbone_weights_layers_size_or_grid_are_never_mixed(tmp_path, changed):
    extract(tiny(), pictures(), tmp_path)
    features = extract(tiny(**changed), pictures(), tmp_path)
    alone = extract(tiny(**changed), pictures(), tmp_path / "alone")
    assert len(list(tmp_path.glob("*.npy"))) == 2 and np.array_equal(features, alone)


@pytest.mark.parametrize("images", [pictures(4), pictures(seed=1), pictures()[::-1]])
def test_features_of_other_images_or_another_order_are_never_mixed(tmp_path, images):
    extract(tiny(), pictures(), tmp_path)
    assert np.array_equal(extract(tiny(), images, tmp_path), extract(tiny(), images, tmp_path / "alone"))


def _truncate(npy, about):
    npy.write_bytes(npy.read_bytes()[:-1])


def _change_a_byte(npy, about):
    content = bytearray(npy.read_bytes())
    content[-7] ^= 1
    npy.write_bytes(content)


def _lose_the_description(npy, about):
    about.unlink()


def _break_the_description(npy, about):
    about.write_text(about.read_text()[:-20])


def _describe_other_features(npy, about):
    about.write_text(json.dumps(json.loads(about.read_text()) | {"backbone": "other"}))


def _put_another_array(npy, about):
    np.save(npy, np.zeros((5, 6, 4, 4), np.float32))


def _put_no_array(npy, about):
    npy.write_bytes(b"features")


def _empty(npy, about):
    npy.write_bytes(b"")


@pytest.mark.parametrize("spoil", [_truncate, _change_a_byte, _lose_the_description, _break_the_description,
                                   _describe_other_features, _put_another_array, _put_no_array, _empty])
def test_a_file_that_is_not_whole_or_foreign_is_made_again(tmp_path, spoil):
    before = np.array(extract(tiny(), pictures(), tmp_path))
    npy, about = next(tmp_path.glob("*.npy")), next(tmp_path.glob("*.json"))
    whole = npy.read_bytes(), about.read_bytes()
    spoil(npy, about)
    assert np.array_equal(extract(tiny(), pictures(), tmp_path), before)
    assert (npy.read_bytes(), about.read_bytes()) == whole


def test_an_extraction_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    original, calls = PatchExtractor.forward, []

    def breaks(self, images):
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, images)

    monkeypatch.setattr(PatchExtractor, "forward", breaks)
    with pytest.raises(KeyboardInterrupt):
        extract(tiny(), pictures(), tmp_path)
    assert calls == [2, 2] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("scale, reach", [(1e6, "1e+06"), (float("nan"), "nan")])
def test_features_beyond_float16_are_told_and_not_written(tmp_path, scale, reach):
    images = [torch.full((3, 16, 16), 255, dtype=torch.uint8)]
    with pytest.raises(UserError) as error:
        extract(tiny(scale), images, tmp_path)
    assert "--extractor pyramid" in one_line(error) and reach in one_line(error) and "65504" in one_line(error)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_folders_place_is_told(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError) as error:
        extract(tiny(), pictures(), tmp_path / "cache")
    assert str(tmp_path / "cache") in one_line(error)


# ------------------------------------------------------------------------------------------ standardisation

def parts(counts=(40, 3), seed=0):
    random = np.random.default_rng(seed)
    offsets, scales = np.array([0, 5, -300]).reshape(3, 1, 1), np.array([1, 0.1, 20]).reshape(3, 1, 1)
    return [(random.standard_normal((count, 3, 4, 4)) * scales + offsets).astype(np.float16) for count in counts]


def test_training_features_get_zero_mean_and_unit_variance_over_all_categories():
    features = parts()
    standardised = Standardisation.fit(features).apply(torch.from_numpy(np.concatenate(features))).double()
    var, mean = torch.var_mean(standardised, dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros(3).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(var, torch.ones(3).double(), rtol=1e-5, atol=0)


def test_inverting_gives_the_features_back():
    features = torch.from_numpy(parts()[0])
    fitted = Standardisation.fit(parts())
    torch.testing.assert_close(fitted.invert(fitted.apply(features)), features.float(), rtol=1e-6, atol=1e-4)


def test_patches_are_standardised_like_maps():
    fitted, maps = Standardisation.fit(parts()), torch.from_numpy(parts()[1])
    assert torch.equal(to_patches(fitted.apply(maps)), fitted.apply(to_patches(maps)))


@pytest.mark.parametrize("value", [0.0, 0.1, -1000.0])
def test_a_channel_that_is_constant_in_training_is_only_centred(value):
    features = parts()[0]
    features[:, 1] = value
    fitted = Standardisation.fit([features])
    applied = fitted.apply(torch.from_numpy(features))
    assert fitted.std[1] == 1 and (fitted.std[[0, 2]] != 1).all()
    assert applied[:, 1].abs().max() < 1e-3 and applied.isfinite().all()


def test_a_small_variation_about_a_large_mean_is_no_constant():
    features = np.full((20, 1, 4, 4), 1000, np.float16)
    features[::2] = 1000.5
    fitted = Standardisation.fit([features])
    torch.testing.assert_close(fitted.std, torch.tensor([0.25]))


def test_what_was_fitted_opens_without_running_code(tmp_path):
    fitted = Standardisation.fit(parts())
    save_pickle(fitted.state(), tmp_path / "standardisation.pt")
    loaded = Standardisation.from_state(load_pickle(tmp_path / "standardisation.pt"))
    assert torch.equal(loaded.mean, fitted.mean) and torch.equal(loaded.std, fitted.std)
