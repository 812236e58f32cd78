"""Feature extractors: shapes, frozen statistics, the saved file, and what happens without weights or network."""

import pytest
import torch
from helpers import drawn, one_line, random_images
from PIL import Image

from dbad.data.images import to_float, to_uint8
from dbad.errors import UserError
from dbad.networks.extractors import EMBEDDED, Stage, build_extractor, load_extractor, save_extractor, usual_layers


@pytest.fixture(scope="module")
def embedded():
    return build_extractor(EMBEDDED, resolution=64)


@pytest.mark.parametrize("layers, shapes", [
    (None, [(24, 16), (40, 8), (112, 4)]),
    ((0, 4), [(16, 32), (320, 2)]),
    ((3, 1, 1), [(24, 16), (112, 4)]),
])
def test_the_embedded_extractor_gives_a_map_of_each_layers_stride(layers, shapes):
    extractor = build_extractor(EMBEDDED, layers, resolution=64)
    with torch.no_grad():
        features = extractor(random_images(2, 32))
    assert [tuple(f.shape) for f in features] == [(2, c, s, s) for c, s in shapes]
    assert extractor.channels == tuple(c for c, _ in shapes) and not extractor.training


@pytest.mark.parametrize("name", ["resnet18", "resnet10t", "mobilenetv3_small_050", "convnext_atto"])
def test_by_default_the_layers_have_strides_4_8_and_16(name):
    extractor = build_extractor(name, resolution=64, pretrained=False)
    with torch.no_grad():
        features = extractor(random_images(1, 64))
    assert [tuple(f.shape[2:]) for f in features] == [(16, 16), (8, 8), (4, 4)]
    assert tuple(f.shape[1] for f in features) == extractor.channels


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mixer_s16_224"])
def test_a_transformer_gives_the_layers_after_each_quarter_for_images_of_another_size(name):
    extractor = build_extractor(name, resolution=64, pretrained=False)
    depth = {"vit_tiny_patch16_224": 12, "mixer_s16_224": 8}[name]
    assert extractor.layers == tuple(depth * quarter // 4 - 1 for quarter in (1, 2, 3))
    found = extractor(random_images(2, 64))
    assert [f.shape[2:] for f in found] == 3 * [(4, 4)] and [f.shape[1] for f in found] == list(extractor.channels)
    blocks = extractor.backbone.model.blocks
    assert len(blocks) == extractor.layers[-1] + 1, "blocks behind the last layer are not computed"


def test_a_backbone_without_the_usual_strides_names_those_it_has():
    with pytest.raises(UserError) as error:
        usual_layers("odd", [Stage(8, 2), Stage(8, 32)])
    assert "odd" in (line := one_line(error)) and "2, 32" in line and "--extractor_layers" in line


def test_a_backbone_that_gives_features_in_another_order_of_dimensions_is_turned_or_refused():
    """Channels come second: cosine distances are taken along them."""
    try:
        extractor = build_extractor("swin_tiny_patch4_window7_224", (0,), 224, pretrained=False)
    except UserError:
        return
    with torch.no_grad():
        feature, = extractor(random_images(1, 224))
    assert feature.shape[1] == extractor.channels[0]


def test_the_embedded_weights_belong_to_the_layers_they_are_in(embedded):
    """A batch norm knows the mean of its input from ImageNet: pictures give about that, channel by channel.

    Weights in the wrong place, of the same shape, would make that correlation vanish.
    """
    correlations = []

    def compare(module, inputs):
        means = torch.stack([inputs[0].mean(dim=(0, 2, 3)), module.running_mean])
        correlations.append(float(torch.corrcoef(means)[0, 1]))

    norms = [m for m in embedded.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_pre_hook(compare) for norm in norms]
    pictures = torch.stack([to_float(to_uint8(Image.fromarray(drawn(i, 64)))) for i in range(16)])
    with torch.no_grad():
        embedded(pictures)
    for hook in hooks:
        hook.remove()
    assert len(correlations) == len(norms) > 30
    assert sorted(correlations)[len(norms) // 2] > 0.6
    assert all((norm.running_var >= 0).all() for norm in norms)


def test_the_embedded_weights_are_the_same_every_time(embedded):
    again = build_extractor(EMBEDDED, resolution=64).state_dict()
    assert all(torch.equal(again[key], value) for key, value in embedded.state_dict().items())


def test_features_of_like_images_are_more_alike_than_those_of_unlike_ones(embedded):
    images = torch.nn.functional.interpolate(random_images(2, 8), (64, 64), mode="bilinear")
    grain = 0.01 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, others = embedded(images), embedded(images + grain)
    for a, b in zip(features, others, strict=True):
        like = torch.cosine_similarity(a.flatten(1), b.flatten(1)).min()
        unlike = torch.cosine_similarity(a[:1].flatten(1), a[1:].flatten(1)).max()
        assert like > 0.9 and unlike < 0.8


def test_images_of_any_size_are_brought_to_the_extractors(embedded):
    with torch.no_grad():
        small, large = embedded(random_images(1, 16)), embedded(random_images(1, 200))
    assert [f.shape for f in small] == [f.shape for f in large]


@pytest.mark.parametrize("name, mean, std", [(EMBEDDED, (127 / 255,) * 3, (128 / 255,) * 3),
                                             ("resnet18", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
def test_images_reach_the_backbone_as_it_was_trained(name, mean, std):
    """Its own mean becomes 0, and one standard deviation above it 1."""
    extractor = build_extractor(name, (1,), 32, pretrained=False)
    seen = []
    extractor.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))
    with torch.no_grad():
        for deviations in (0.0, 1.0):
            extractor(((mean + deviations * std) * 2 - 1).expand(1, 3, 32, 32))
    torch.testing.assert_close(seen[0], torch.zeros(1, 3, 32, 32), rtol=0, atol=1e-6)
    torch.testing.assert_close(seen[1], torch.ones(1, 3, 32, 32), rtol=0, atol=1e-5)


def test_batch_norm_statistics_do_not_drift_in_training():
    extractor = build_extractor(EMBEDDED, (1,), resolution=32)
    wrapped = torch.nn.Sequential(extractor)                # as inside the auto-encoder
    wrapped.train()
    statistics = {k: v.clone() for k, v in extractor.state_dict().items() if "running" in k or "num_batches" in k}
    images = random_images(4, 32)
    in_training = extractor(images)[0]
    in_training.sum().backward()
    assert len(statistics) > 10
    assert all(torch.equal(extractor.state_dict()[k], v) for k, v in statistics.items())
    assert extractor.training and any(p.grad is not None for p in extractor.parameters())
    wrapped.eval()
    assert torch.equal(extractor(images)[0], in_training)


@pytest.mark.parametrize("name, layers, resolution", [(EMBEDDED, (1, 2), 48), ("resnet10t", (0, 2), 32),
                                                      ("resnet18", (1,), 32)])
def test_a_saved_extractor_gives_the_same_features(name, layers, resolution, tmp_path):
    extractor = build_extractor(name, layers, resolution, pretrained=name == EMBEDDED)
    with torch.no_grad():
        for parameter in extractor.parameters():
            parameter.mul_(1.01)                            # adapted
        save_extractor(extractor, tmp_path / "extractor.pt")
        loaded = load_extractor(tmp_path / "extractor.pt")
        images = random_images(2, 32)
        assert all(torch.equal(a, b) for a, b in zip(extractor(images), loaded(images), strict=True))
    assert (loaded.name, loaded.layers, loaded.resolution) == (name, layers, resolution) and not loaded.training
    assert torch.equal(loaded.mean, extractor.mean) and torch.equal(loaded.std, extractor.std)


@pytest.mark.parametrize("content", [{}, [1, 2], {"name": EMBEDDED}, {"weight": torch.zeros(3)}])
def test_a_file_that_is_no_extractor_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "extractor.pt")
    with pytest.raises(UserError, match="not a feature extractor") as error:
        load_extractor(tmp_path / "extractor.pt")
    assert str(tmp_path / "extractor.pt") in one_line(error)


def test_weights_that_do_not_fit_the_backbone_are_refused(tmp_path):
    state = {"name": EMBEDDED, "layers": [1], "resolution": 32, "state_dict": {"backbone.x": torch.zeros(3)}}
    torch.save(state, tmp_path / "extractor.pt")
    with pytest.raises(UserError, match="do not fit") as error:
        load_extractor(tmp_path / "extractor.pt")
    assert str(tmp_path / "extractor.pt") in one_line(error)


@pytest.mark.parametrize("name", ["no_such_backbone", "resnet1001"])
def test_an_unknown_backbone_is_refused(name):
    with pytest.raises(UserError, match=f"--extractor {name}") as error:
        build_extractor(name)
    one_line(error)


@pytest.fixture
def no_network(monkeypatch):
    """Every attempt to build a backbone with weights fails as it does without a network."""
    import timm
    from torchvision import models
    timm_create, torchvision_create = timm.create_model, models.get_model

    def create(name, *args, pretrained=False, **keywords):
        if pretrained:
            raise OSError("could not reach the server\nafter several\nattempts")
        return timm_create(name, *args, pretrained=False, **keywords)

    def get(name, weights=None, **keywords):
        if weights is not None:
            raise OSError("<urlopen error>")
        return torchvision_create(name, weights=None, **keywords)

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(models, "get_model", get)


@pytest.mark.parametrize("name, layers", [(EMBEDDED, (5,)), ("resnet18", (1, 9)), ("resnet10t", (7,))])
def test_a_missing_layer_is_refused_before_anything_is_downloaded(name, layers, no_network):
    with pytest.raises(UserError, match=f"--extractor_layers {layers[-1]}: {name} has the layers 0 1 2 3 4") as error:
        build_extractor(name, layers)
    one_line(error)


@pytest.mark.parametrize("name, file", [("resnet18", "resnet18-f37072fd.pth"), ("resnet10t", "timm/resnet10t.c3_in1k")])
def test_weights_that_cannot_be_had_are_an_error_that_names_the_file_and_both_ways_out(name, file, no_network):
    with pytest.raises(UserError, match=f"--extractor {name}") as error:
        build_extractor(name)
    message = one_line(error)
    assert file in message
    assert "put the file there" in message and f"--extractor {EMBEDDED}" in message


def test_the_embedded_extractor_needs_no_network(no_network):
    assert build_extractor(EMBEDDED, (1,), 32).channels == (24,)
