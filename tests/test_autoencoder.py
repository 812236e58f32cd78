"""The KL auto-encoder: ranges, the images it learns from, its latents, its files and the published ones."""

import dataclasses
import re
import sys
from types import ModuleType

import pytest
import torch
from helpers import one_line, random_images, stream, tiny_unet
from safetensors.torch import load_file
from torchvision.transforms.functional import normalize

from dbad.checkpoints.weights import model_config
from dbad.errors import UserError
from dbad.families.diad import autoencoder
from dbad.families.diad.autoencoder import (
    PUBLISHED_SCALE,
    SIZES,
    BalancedImages,
    Size,
    build_autoencoder,
    from_imagenet,
    import_autoencoder,
    latent_scale,
    load_autoencoder,
    load_start,
    reconstruct,
    save_autoencoder,
    to_imagenet,
)
from dbad.files.atomic import read_json, write_json
from dbad.files.names import AUTOENCODER, MODEL_CONFIG
from dbad.training.loop import StepBatches

SMALL = Size((8, 8, 16, 16), 1, 4)


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    """Every size has few channels here; kl-f8 keeps its two layers, so that its files have the published names."""
    for name in SIZES:
        monkeypatch.setitem(SIZES, name, SMALL._replace(layers_per_block=2) if name == "kl-f8" else SMALL)


def network(size: str = "tiny", seed: int = 0):
    torch.manual_seed(seed)
    return build_autoencoder(size, 32)


def pixels(num_images: int, seed: int = 0) -> list[torch.Tensor]:
    return list(((random_images(num_images, 32, seed) + 1) * 127.5).round().to(torch.uint8))


# Ranges

def test_imagenet_normalisation_is_torchvisions_and_can_be_undone():
    images = random_images(2)
    there = to_imagenet(images)
    torch.testing.assert_close(there, normalize((images + 1) / 2, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(from_imagenet(there), images)


# Images

@pytest.mark.parametrize("counts", [(1, 5, 12), (3,), (7, 2)])
def test_every_category_has_its_share_whatever_its_number_of_images(counts):
    images = [[torch.full((3, 8, 8), 40 * c + i, dtype=torch.uint8) for i in range(n)] for c, n in enumerate(counts)]
    data = BalancedImages(images, batch_size=4, accumulate=1, seed=0)
    assert len(data) == len(counts) * max(counts)
    seen = [((data.__getitems__(batch)["image"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
            for batch in StepBatches(len(data), 4, 0, len(data) * 5, seed=1)]
    values = torch.tensor(sum(seen, []))
    for begin in range(0, len(values), len(data)):      # every pass over the data
        one_pass = values[begin:begin + len(data)]
        assert torch.bincount(one_pass // 40, minlength=len(counts)).tolist() == [max(counts)] * len(counts)
        for c, n in enumerate(counts):
            times = torch.bincount(one_pass[one_pass // 40 == c] - 40 * c, minlength=n)
            assert times.max() - times.min() <= 1 and times.min() >= 1


def test_images_and_noise_do_not_depend_on_how_a_step_is_divided():
    whole = BalancedImages([pixels(3), pixels(5, seed=1)], batch_size=4, accumulate=1, seed=0)
    divided = dataclasses.replace(whole, batch_size=2, accumulate=2)
    one = [whole.__getitems__(batch) for batch in StepBatches(len(whole), 4, 0, 4, seed=0)]
    two = [divided.__getitems__(batch) for batch in StepBatches(len(whole), 2, 0, 8, seed=0)]
    for key in ("image", "noise", "step"):
        assert torch.equal(torch.cat([b[key] for b in one]), torch.cat([b[key] for b in two])), key
    noise = torch.cat([b["noise"] for b in one])
    assert noise.shape == (16, 4, 4, 4) and len({float(n[0, 0, 0]) for n in noise}) == 16


# What it has learnt

def test_a_reconstruction_is_the_same_every_time_and_of_the_image_s_size():
    model, images = network().eval(), random_images(2, 32)
    assert model.encode(to_imagenet(images)).latent_dist.mean.shape == (2, 4, 4, 4)
    assert torch.equal(reconstruct(model, images, "fp32"), reconstruct(model, images, "fp32"))
    assert reconstruct(model, images, "fp32").shape == images.shape


def test_scaled_latents_have_unit_variance():
    model, images = network().eval(), pixels(4)
    model.quant_conv.weight.data[:4] *= 10      # of the means
    scale = latent_scale(model, images, 3, "fp32")
    with torch.no_grad():
        posterior = model.encode(to_imagenet(torch.stack(images) / 127.5 - 1)).latent_dist
    drawn = posterior.mean + posterior.std * torch.randn(500, *posterior.mean.shape, generator=stream(0))
    assert float((drawn * scale).std()) == pytest.approx(1, rel=1e-2)
    assert abs(float(drawn.std()) - 1) > 0.2       # without the scale they have not


# Files

def test_kl_f8_is_the_published_network(monkeypatch):
    """83,653,863 weights, as Stable Diffusion's auto-encoder has; latents of an eighth of the side."""
    monkeypatch.undo()
    with torch.device("meta"):
        model = build_autoencoder("kl-f8", 256)
        assert sum(p.numel() for p in model.parameters()) == 83_653_863
        assert model.encode(torch.zeros(1, 3, 256, 256)).latent_dist.mean.shape == (1, 4, 32, 32)


def test_a_saved_auto_encoder_is_loaded_as_it_was(tmp_path):
    model = network()
    model.register_to_config(scaling_factor=0.7)
    save_autoencoder(model, tmp_path)
    loaded = load_autoencoder(tmp_path)
    images = random_images(2, 32)
    assert torch.equal(reconstruct(loaded, images, "fp32"), reconstruct(model.eval(), images, "fp32"))
    assert loaded.config.scaling_factor == 0.7 and not loaded.training
    assert load_file(tmp_path / AUTOENCODER).keys() == model.state_dict().keys()
    assert load_start(tmp_path)[1] == "tiny"
    assert sorted(path.name for path in tmp_path.iterdir()) == [AUTOENCODER, MODEL_CONFIG]


def spoil_config(folder):
    write_json(folder / MODEL_CONFIG, model_config(tiny_unet()))


def spoil_size(folder):
    write_json(folder / MODEL_CONFIG, read_json(folder / MODEL_CONFIG) | {"block_out_channels": [8, 8, 16, 32]})


def truncate(folder):
    content = (folder / AUTOENCODER).read_bytes()
    (folder / AUTOENCODER).write_bytes(content[:len(content) // 2])


@pytest.mark.parametrize("spoil, says", [
    (lambda folder: (folder / MODEL_CONFIG).unlink(), "no trained auto-encoder; train it first"),
    (lambda folder: (folder / AUTOENCODER).unlink(), f"{AUTOENCODER}: no such checkpoint"),
    (spoil_config, f"{MODEL_CONFIG}: does not describe an AutoencoderKL"),
    (spoil_size, "weights of another architecture"), (truncate, "not a safetensors file, or a truncated one")])
def test_a_folder_without_a_whole_auto_encoder_is_refused(spoil, says, tmp_path):
    save_autoencoder(network(), tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=says) as error:
        load_autoencoder(tmp_path)
    assert str(tmp_path) in one_line(error)


# Published files

LATENT_DIFFUSION_NAMES = {
    r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)": r"\1.\2.block.\3",
    r"down_blocks\.(\d+)\.downsamplers\.0": r"down.\1.downsample", "conv_norm_out": "norm_out",
    r"up_blocks\.(\d+)\.upsamplers\.0": r"up.\1.upsample", "conv_shortcut": "nin_shortcut",
    r"mid_block\.resnets\.0": "mid.block_1", r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0": "mid.attn_1", "group_norm": "norm", r"to_([qkv])": r"\1", r"to_out\.0": "proj_out"}


def in_latent_diffusions_names(model) -> dict[str, torch.Tensor]:
    """Its decoder counts levels from the deepest one, and its attention is made of 1x1 convolutions."""
    state = {}
    for name, value in model.state_dict().items():
        for ours, theirs in LATENT_DIFFUSION_NAMES.items():
            name = re.sub(ours, theirs, name)
        name = re.sub(r"up\.(\d)", lambda found: f"up.{3 - int(found[1])}", name)
        state[name] = value[:, :, None, None] if "attn_1" in name and value.ndim == 2 else value
    return state


ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})


@pytest.fixture
def lightning(monkeypatch):
    """A checkpoint as Lightning writes it is keyed by a class, which only its package has."""
    parts = ModelCheckpoint.__module__.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
    sys.modules[ModelCheckpoint.__module__].ModelCheckpoint = ModelCheckpoint


def test_a_published_checkpoint_is_imported_under_our_names(lightning, monkeypatch, tmp_path):
    model = network("kl-f8")
    state = in_latent_diffusions_names(model) | {"loss.discriminator.main.0.weight": torch.zeros(1)}
    torch.save({"state_dict": state, "callbacks": {ModelCheckpoint: {"best": 1}}, "epoch": 3}, tmp_path / "kl-f8.ckpt")
    torch.save({f"first_stage_model.{name}": value for name, value in state.items()}, tmp_path / "sd.ckpt")
    monkeypatch.delitem(sys.modules, ModelCheckpoint.__module__)
    for name in ("kl-f8.ckpt", "sd.ckpt"):
        loaded, size = load_start(tmp_path / name)
        assert size == "kl-f8" and not loaded.training and loaded.config.scaling_factor == PUBLISHED_SCALE == 0.18215
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key


class Evil:
    """Unpickling it runs code."""

    def __reduce__(self):
        return open, ("executed", "w")


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize("content, says", [
    (lambda state: without(state, "decoder.up.0.block.1.conv1.weight"), "not a KL-f8 auto-encoder .*1 of 244 tensors"),
    (lambda state: state | {"decoder.conv_in.weight": torch.zeros(3)}, "not a KL-f8 auto-encoder .*decoder.conv_in"),
    (lambda state: {"conv_in.weight": torch.zeros(3), 5: torch.zeros(1)}, "not a KL-f8 auto-encoder .*244 of 244"),
    (lambda state: [1, 2], "not a KL-f8 auto-encoder"),
    (lambda state: state | {"evil": Evil()}, "refused, since loading it could run code")])
def test_a_file_that_is_no_published_auto_encoder_is_refused(content, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.ckpt"
    torch.save(content(in_latent_diffusions_names(network("kl-f8"))), path)
    with pytest.raises(UserError, match=says) as error:
        import_autoencoder(path)
    assert str(path) in one_line(error) and not (tmp_path / "executed").exists()


def test_an_auto_encoder_of_no_known_size_is_not_gone_on_with(tmp_path, monkeypatch):
    save_autoencoder(network(), tmp_path)
    for name in SIZES:
        monkeypatch.setitem(autoencoder.SIZES, name, Size((32, 64, 64, 64), 1, 8))
    with pytest.raises(UserError, match="8 8 16 16 channels with 1 layers each; expected one of the sizes") as error:
        load_start(tmp_path)
    one_line(error)
