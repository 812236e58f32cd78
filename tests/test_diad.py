"""The model of the diad family: what guides, what learns, what reconstructs, and its files."""

import json

import pytest
import torch
from helpers import one_line, random_images, streams
from torch.nn import functional as F

from dbad.diffusion.ddim import visited_timesteps
from dbad.errors import UserError
from dbad.families.diad import model as diad
from dbad.families.diad.model import SIZES, Size, SpatialFusion, build_unet, random_diad
from dbad.families.diad.reconstruction import anomaly_map, image_score, reconstruct
from dbad.families.diad.storage import assign, load_diad, save_diad
from dbad.files.atomic import read_json, write_json
from dbad.files.names import MODEL_CONFIG
from dbad.maps import blur
from dbad.networks.extractors import build_extractor

SMALL = Size(128, (32, 32, 64, 64), 32, "tiny", (16, 16, 32, 32))       # latents 16x16, the deepest level 2x2


def random_model(guided: bool = True, seed: int = 0):
    """A small model; `guided` makes the SG network's outputs, which begin at zero, random."""
    torch.manual_seed(seed)
    model = random_diad(SMALL)
    if guided:
        outputs = [*model.guide.controlnet.controlnet_down_blocks, model.guide.controlnet.controlnet_mid_block,
                   model.guide.embedding.conv_out]
        for layer in outputs:
            torch.nn.init.normal_(layer.weight, 0, layer.weight[0].numel() ** -0.5)
    return model


@pytest.fixture(scope="module")
def model():
    """Only to be read."""
    return random_model()


def latents(num_images: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(num_images, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


# Guidance

@torch.no_grad()
def test_the_fusion_is_its_formula():
    torch.manual_seed(0)
    fusion = SpatialFusion((2, 3, 3), (3, 5, 5))
    o = [torch.randn(2, c, side, side) for c, side in zip((2, 3, 3, 3, 5, 5), (8, 8, 8, 4, 4, 4), strict=True)]
    new = fusion([None] * 6 + o)
    for k in range(3):
        total = o[3 + k].double()
        for j in range(3):
            x = F.conv2d(o[j], fusion.down[3 * j + k].weight, stride=2, padding=1).double()
            mean, variance = x.mean(dim=(2, 3), keepdim=True), x.var(dim=(2, 3), keepdim=True, correction=0)
            normed = (x - mean) / (variance + 1e-5).sqrt()
            total = total + normed * torch.sigmoid(normed)
        torch.testing.assert_close(new[k].double(), total * torch.sigmoid(total), rtol=0, atol=1e-5)


@pytest.mark.parametrize("zero_fusion", [False, True])
@torch.no_grad()
def test_a_new_guide_changes_nothing(zero_fusion):
    made = random_model(guided=False)
    model = diad.compose(made.autoencoder, made.unet, SMALL.hint_channels, 128, zero_fusion=zero_fusion)
    z, t = latents(2), torch.tensor([901, 7])
    plain = model.unet(z, t, model.prompt.expand(2, -1, -1)).sample
    assert torch.equal(model.predict_noise(z, t, model.hint(random_images(2, 128))), plain)


@pytest.mark.parametrize("zero_fusion", [False, True])
def test_only_a_fusion_that_begins_at_random_learns(zero_fusion):
    """The published one is zero, and so is what it gets and nothing else uses: neither ever has a gradient."""
    made = random_model(guided=False)
    model = diad.compose(made.autoencoder, made.unet, SMALL.hint_channels, 128, zero_fusion=zero_fusion)
    model.set_trainable()
    sources = model.guide.controlnet.controlnet_down_blocks[6:9]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        (model(latents(1), torch.tensor([500]), random_images(1, 128)) - latents(1, 2)).square().mean().backward()
        optimizer.step()
    learnt = [bool(layer.weight.grad.any()) for layer in (*model.guide.fusion.down, *sources)]
    assert learnt == [not zero_fusion] * 12


@torch.no_grad()
def test_the_guide_reaches_the_three_deepest_skips_and_the_middle_and_no_other(model):
    """Seen where the decoder takes them: the skips arrive from the deepest to the first."""
    def seen(run):
        taken = {"middle": None, "skips": []}

        def look(block, args, kwargs):
            taken["skips"] += reversed(kwargs["res_hidden_states_tuple"])
            if taken["middle"] is None:
                taken["middle"] = kwargs["hidden_states"]
        hooks = [block.register_forward_pre_hook(look, with_kwargs=True) for block in model.unet.up_blocks]
        run()
        for hook in hooks:
            hook.remove()
        return taken["skips"][::-1], taken["middle"]

    z, t, prompt, hint = latents(2), torch.tensor([901, 7]), model.prompt.expand(2, -1, -1), model.hint(
        random_images(2, 128))
    plain, plain_middle = seen(lambda: model.unet(z, t, prompt))
    guided, guided_middle = seen(lambda: model.predict_noise(z, t, hint))
    deepest, middle = model.guide(z, t, prompt, hint)
    assert len(plain) == len(guided) == 12
    for index in range(9):
        assert torch.equal(guided[index], plain[index])
    for index in range(3):
        assert deepest[index].abs().max() > 0.1
        torch.testing.assert_close(guided[9 + index], plain[9 + index] + deepest[index])
    torch.testing.assert_close(guided_middle, plain_middle + middle)


# Training

def test_only_the_guide_and_the_decoder_learn():
    model = random_model()
    model.set_trainable()
    model(latents(1), torch.tensor([500]), random_images(1, 128)).square().mean().backward()
    learnt = {name for name, p in model.named_parameters() if p.grad is not None}
    expected = {name for name, _ in model.named_parameters()
                if name.startswith(("guide.", "unet.up_blocks.", "unet.conv_norm_out.", "unet.conv_out."))
                and not any(f"controlnet_down_blocks.{index}." in name for index in range(6))}     # nothing uses those
    assert learnt == expected == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("whole_unet", [False, True])
def test_the_frozen_encoder_keeps_no_activations(whole_unet):
    model = random_model()
    model.set_trainable(whole_unet)
    inside, kept, outputs = [False], [0], []

    def pack(tensor):
        kept[0] += inside[0]
        return tensor

    encoder = [*model.unet.down_blocks, model.unet.mid_block]
    for block in encoder:
        block.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True))
        block.register_forward_hook(lambda block, args, output: (inside.__setitem__(0, False), outputs.append(
            output[0] if isinstance(output, tuple) else output))[:0] or None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(latents(1), torch.tensor([500]), random_images(1, 128))
    assert len(outputs) == 5
    assert (kept[0] > 0) == whole_unet
    assert [output.grad_fn is not None for output in outputs] == [whole_unet] * 5


def test_computing_activations_twice_gives_the_same_gradients():
    def trained(twice):
        """The number of tensors kept for the backward pass, and the gradients."""
        model, kept = random_model(), []
        model.set_trainable()
        if twice:
            model.checkpoint_gradients()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(1) or x, lambda x: x):
            loss = model(latents(1), torch.tensor([500]), random_images(1, 128)).square().mean()
        num_kept = len(kept)
        loss.backward()
        return num_kept, [p.grad for p in model.parameters() if p.grad is not None]

    (all_kept, expected), (fewer_kept, found) = trained(False), trained(True)
    assert fewer_kept < all_kept
    torch.testing.assert_close(found, expected)


# Inspection

@torch.no_grad()
def test_a_prediction_does_not_depend_on_the_batch(model):
    images = random_images(3, 128)
    together = reconstruct(model, images, streams(3), num_steps=2)
    alone = torch.cat([reconstruct(model, images[i:i + 1], streams(3)[i:i + 1], num_steps=2) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    assert (together[0] - together[1]).abs().mean() > 0.01


def test_the_hint_is_computed_once_and_the_network_once_per_step(model, monkeypatch):
    calls = {"hint": 0, "unet": 0}

    def count(name, module):
        forward = module.forward
        monkeypatch.setattr(module, "forward", lambda *args, **kwargs: (
            calls.__setitem__(name, calls[name] + 1), forward(*args, **kwargs))[1])
    count("hint", model.guide.embedding)
    count("unet", model.unet)
    reconstruct(model, random_images(1, 128), streams(1), num_steps=4)
    assert calls == {"hint": 1, "unet": 4}


@pytest.mark.parametrize("paper_exact", [False, True])
@torch.no_grad()
def test_perfect_predictions_lead_back_to_the_image(paper_exact, model, monkeypatch):
    """The network is told the right timesteps; as published the last step ends at abar_0, with a little noise."""
    image, told = random_images(1, 128), []
    z_0 = model.encode(image)

    def oracle(z, t, hint):
        told.append((t, z))
        return (z - float(model.abar[t]) ** 0.5 * z_0) / (1 - float(model.abar[t])) ** 0.5
    monkeypatch.setattr(model, "predict_noise", oracle)
    found = reconstruct(model, image, streams(1), paper_exact=paper_exact)
    steps, z = [t for t, _ in told], told[0][1]
    noise = torch.randn(4, 16, 16, generator=streams(1)[0])
    torch.testing.assert_close(z, (model.abar[999] ** 0.5 * z_0 + (1 - model.abar[999]) ** 0.5 * noise).float())
    if paper_exact:
        assert steps == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
        abar, last = model.abar[901], model.abar[0]
        z_0 = (last ** 0.5 * z_0 + (1 - last) ** 0.5 * (z - abar ** 0.5 * z_0) / (1 - abar) ** 0.5).float()
    else:
        assert steps == visited_timesteps(1000, 10) == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    torch.testing.assert_close(found, model.decode(z_0), rtol=0, atol=1e-4)


@torch.no_grad()
def test_images_go_in_and_come_out_as_everywhere_in_the_project(model):
    """The auto-encoder sees them ImageNet-normalised, its latents scaled; the mean is what samples scatter around."""
    images = random_images(1, 128)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    posterior = model.autoencoder.encode(((images + 1) / 2 - mean) / std).latent_dist
    torch.testing.assert_close(model.encode(images), posterior.mean)
    torch.testing.assert_close(model.encode(images, latents(1)), posterior.mean + posterior.std * latents(1))
    decoded = model.autoencoder.decode(posterior.mean).sample
    torch.testing.assert_close(model.decode(posterior.mean), ((decoded * std + mean) * 2 - 1).clamp(-1, 1))


def test_the_schedule_is_stable_diffusions(model):
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(model.abar, (1 - betas).cumprod(0), rtol=1e-4, atol=0)


def test_half_precision_gives_nearly_the_same(model):
    images = random_images(1, 128)
    exact, half = (reconstruct(model, images, streams(1), num_steps=2, precision=p) for p in ("fp32", "bf16"))
    assert half.dtype == torch.float32 and 0 < (exact - half).abs().mean() < 0.05


def test_the_map_is_the_blurred_sum_over_the_layers():
    extractor = build_extractor("resnet18", (1, 2, 3), 64, pretrained=False)
    images, others = random_images(2, 64), random_images(2, 64, seed=1)
    assert anomaly_map(extractor, images, images).abs().max() < 1e-5
    maps = anomaly_map(extractor, images, others, sigma=0)
    with torch.no_grad():
        pairs = zip(extractor(images), extractor(others), strict=True)
        distances = [1 - F.cosine_similarity(a, b)[:, None] for a, b in pairs]
    expected = sum(F.interpolate(distance, (64, 64), mode="bilinear") for distance in distances)
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(anomaly_map(extractor, images, others), blur(maps, 5 * 64 / 256))


def test_the_score_is_the_maximum_of_eight_mean_poolings():
    """8x8 at 256 px, 2x2 at 64 px; there one pixel of 1 becomes, in each direction, the terms of (1/2 + x/2)^8."""
    maps = torch.zeros(2, 1, 64, 64)
    maps[0, 0, 30, 40], maps[1] = 1, 3
    torch.testing.assert_close(image_score(maps), torch.tensor([(70 / 256) ** 2, 3]))
    assert image_score(torch.eye(256)[None, None]) < image_score(torch.eye(64)[None, None]) < 1


# Files and sizes

@torch.no_grad()
def test_what_is_saved_is_loaded(model, tmp_path):
    save_diad(model, tmp_path)
    loaded, half = load_diad(tmp_path), load_diad(tmp_path, torch.bfloat16)
    state, other = model.state_dict(), loaded.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)
    assert not loaded.training and {value.dtype for value in half.state_dict().values()} == {torch.bfloat16}
    images = random_images(1, 128)
    expected = reconstruct(model, images, streams(1), num_steps=2)
    torch.testing.assert_close(reconstruct(loaded, images, streams(1), num_steps=2), expected)
    assert (reconstruct(half, images, streams(1), num_steps=2) - expected).abs().mean() < 0.05


def test_a_loaded_model_can_be_trained_and_its_files_stay(model, tmp_path):
    """Its tensors are the files' own pages, which a change copies."""
    save_diad(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    loaded = load_diad(tmp_path)
    with torch.no_grad():
        for value in loaded.parameters():
            value.add_(1)
    assert torch.equal(loaded.unet.conv_in.weight, model.unet.conv_in.weight + 1)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    save_diad(loaded, tmp_path)
    assert torch.equal(load_diad(tmp_path).unet.conv_in.weight, model.unet.conv_in.weight + 1)


def test_tensors_are_taken_as_they_are():
    with torch.device("meta"):
        layer = torch.nn.Linear(2, 3)
    state = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    assign(layer, state, "a")
    assert layer.weight.data_ptr() == state["weight"].data_ptr()


@pytest.mark.parametrize(("spoil", "found"), [
    (lambda folder: (folder / MODEL_CONFIG).unlink(), "build_diad.py"),
    (lambda folder: write_json(folder / MODEL_CONFIG, {"sample_size": 16}), "not describe a model of the diad family"),
    (lambda folder: change(folder, colour=1), "colour: it has no such option"),
    (lambda folder: change(folder, resolution=100), "resolution 100: expected a multiple of 64 px"),
    (lambda folder: change(folder, resolution=64), "at least twice"),
    (lambda folder: change(folder, hint_channels=[16, 32]), "hint_channels of 2 levels: expected 4"),
    (lambda folder: (folder / "guide.safetensors").unlink(), "guide.safetensors: no such file"),
    (lambda folder: (folder / "unet.safetensors").write_bytes(b"PK"), "unet.safetensors: not a safetensors file"),
    (lambda folder: (folder / "guide.safetensors").write_bytes((folder / "unet.safetensors").read_bytes()),
     "guide.safetensors: weights of another architecture"),
    (lambda folder: (folder / "prompt.safetensors").write_bytes((folder / "unet.safetensors").read_bytes()),
     "prompt.safetensors: expected a tensor prompt, 1x77x32"),
])
def test_a_broken_run_folder_is_one_line(spoil, found, model, tmp_path):
    save_diad(model, tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=found) as error:
        load_diad(tmp_path)
    assert str(tmp_path) in one_line(error)


def change(folder, **values):
    """Another model_config.json; a key that is not one of its own goes to the U-Net's."""
    config = read_json(folder / MODEL_CONFIG)
    for name, value in values.items():
        (config if name in config else config["unet"])[name] = value
    (folder / MODEL_CONFIG).write_text(json.dumps(config))


def test_channels_that_cannot_be_are_one_line():
    for channels in ((32, 32, 64), (32, 48, 64, 64)):
        with pytest.raises(UserError, match="expected four multiples of 32") as error:
            build_unet(channels, 32)
        one_line(error)


def test_the_full_size_has_the_published_number_of_parameters_and_the_others_are_small():
    def millions(*modules):
        return sum(p.numel() for module in modules for p in module.parameters()) / 1e6

    with torch.device("meta"):
        model, middle, tiny = (random_diad(SIZES[name]) for name in ("sd15", "middle", "tiny"))
    found = [millions(model.unet), millions(model.guide.controlnet, model.guide.embedding),
             millions(model.guide.fusion), millions(model.autoencoder)]
    assert found == pytest.approx([859.52, 361.28, 110.59, 83.65], abs=0.005)
    assert 80 < millions(middle) < 120 and millions(tiny) < 10
