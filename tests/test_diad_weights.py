"""Published weights of Stable Diffusion, auto-encoders and DiAD: recognised, converted without a change, or refused."""

import os
import sys
import types

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from helpers import one_line, random_images
from ldm import TextModel, random_stable_diffusion
from safetensors.torch import save_file
from torch import nn

import dbad.checkpoints.__main__ as checkpoints_module
from dbad.checkpoints.weights import load_pickle
from dbad.errors import UserError
from dbad.families.diad import autoencoder
from dbad.families.diad.autoencoder import from_imagenet, to_imagenet
from dbad.families.diad.conversion import convert_diad, is_diad
from dbad.families.diad.empty_prompt import empty_prompt
from dbad.families.diad.model import compose
from dbad.families.diad.single_files import read_weights
from dbad.families.diad.storage import load_diad, save_diad
from dbad.families.diad.weights import read_autoencoder, read_prompt, read_stable_diffusion
from dbad.families.import_weights import run
from dbad.files.atomic import write_json

IMAGES, NOISE, TIMES = random_images(2, 128), torch.randn(2, 4, 16, 16), torch.tensor([901, 1])


@pytest.fixture(scope="module")
def published():
    """DiAD's networks, small, as its own code computes them; only to be read."""
    return random_stable_diffusion(guided=True)


def save(path, state, **beside):
    """A file as Lightning writes it, or a plain one, or safetensors."""
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save({"state_dict": state, **beside} if beside else state, path)
    return path


@pytest.fixture
def bookkeeping(monkeypatch):
    """What Stable Diffusion's first files hold beside their tensors: Lightning's class, and a number of numpy's."""
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    callback = type("ModelCheckpoint", (), {"__module__": names[-1]})
    sys.modules[names[-1]].ModelCheckpoint = callback
    return {"epoch": 3, "callbacks": {callback: {"best_model_score": np.float64(0.5), "mode": "min"}}}


# DiAD

@torch.no_grad()
def test_an_imported_diad_computes_what_the_original_does(published, bookkeeping, tmp_path, capsys):
    path = save(tmp_path / "diad.ckpt", published.state_dict(), **bookkeeping)
    checkpoints_module.main(["import", str(path), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "networks of DiAD" in said and "256 px" in said and "never learnt" not in said
    model = load_diad(tmp_path / "out")
    images, prompt = to_imagenet(IMAGES), published.empty_prompt()
    torch.testing.assert_close(model.prompt, prompt, rtol=0, atol=1e-5)

    z = published.first_stage_model.mean(images)
    torch.testing.assert_close(model.encode(IMAGES), 0.18215 * z, rtol=0, atol=1e-5)
    decoded = from_imagenet(published.first_stage_model.decode(z)).clamp(-1, 1)
    torch.testing.assert_close(model.decode(0.18215 * z), decoded, rtol=0, atol=1e-5)
    prompt = prompt.expand(2, -1, -1)
    control = published.control_model(NOISE, TIMES, prompt, images)
    expected = published.model["diffusion_model"](NOISE, TIMES, prompt, control)
    assert expected.std() > 0.1 and min(output.std() for output in control[9:]) > 0.1
    torch.testing.assert_close(model.predict_noise(NOISE, TIMES, model.hint(IMAGES)), expected, rtol=0, atol=1e-5)


def test_what_is_imported_can_be_read_again_and_is_not_written_over(published, tmp_path):
    path = save(tmp_path / "a.ckpt", published.state_dict())
    run(path, tmp_path / "out")
    names = sorted(os.listdir(tmp_path / "out"))
    assert names == ["autoencoder.safetensors", "guide.safetensors", "model_config.json", "prompt.safetensors",
                     "unet.safetensors"]
    before = [(tmp_path / "out" / name).read_bytes() for name in names]
    with pytest.raises(UserError, match="nothing is overwritten") as error:
        run(path, tmp_path / "out")
    one_line(error)
    assert before == [(tmp_path / "out" / name).read_bytes() for name in names]
    again = read_autoencoder(tmp_path / "out")
    assert torch.equal(again.decoder.conv_out.weight, published.first_stage_model.decoder.conv_out.weight)
    torch.testing.assert_close(read_prompt(tmp_path / "out" / "prompt.safetensors"), published.empty_prompt())


def test_a_fusion_that_never_learnt_is_said_to_be_one(published, tmp_path):
    state = {key: torch.zeros_like(value) if ".down" in key and key.startswith("control") else value
             for key, value in published.state_dict().items()}
    assert "SFF block are all zero" in run(save(tmp_path / "a.ckpt", state), tmp_path / "out")


@pytest.mark.parametrize(("spoil", "found"), [
    (lambda s: s.pop("control_model.zero_convs.11.0.weight"), "controlnet_down_blocks.11.weight: none instead of"),
    (lambda s: s.pop("control_model.down23.0.weight"), "fusion.down.5.weight: none instead of 96x64x3x3"),
    (lambda s: s.update({"model.diffusion_model.out.2.weight": torch.ones(4, 8, 3, 3)}), "conv_out.weight: 4x8x3x3"),
    (lambda s: s.pop("first_stage_model.post_quant_conv.bias"), "post_quant_conv.bias: none instead of 4"),
    (lambda s: [s.pop(key) for key in list(s) if key.startswith("first_stage")], "no auto-encoder"),
    (lambda s: [s.pop(key) for key in list(s) if key.startswith("cond_stage")], "text encoder is not CLIP's"),
    (lambda s: [s.pop(key) for key in list(s) if "attn2" in key], "without attention to a text"),
    (lambda s: s.update({"model.diffusion_model.input_blocks.1.0.in_layers.2.weight": torch.ones(48, 32, 3, 3)}),
     "a U-Net of channels 48 32 64 96: expected four multiples of 32"),
])
def test_a_file_that_diads_code_does_not_write_is_one_line(spoil, found, published, tmp_path):
    state = dict(published.state_dict())
    spoil(state)
    assert is_diad(state)
    with pytest.raises(UserError, match=found) as error:
        convert_diad(state, tmp_path / "a.ckpt")
    assert str(tmp_path / "a.ckpt") in one_line(error)


def test_what_is_none_of_the_known_files_is_told_of_diad_too(tmp_path):
    path = save(tmp_path / "a.pt", {"layer.weight": torch.ones(1)})
    with pytest.raises(UserError, match="or the file of DiAD") as error:
        run(path, tmp_path / "out")
    one_line(error)


# Stable Diffusion

def save_folder(folder, published):
    """Stable Diffusion as diffusers saves it."""
    path = save(folder.with_suffix(".ckpt"), published.state_dict())
    read_stable_diffusion(path)[0].save_pretrained(folder / "unet")
    read_autoencoder(path).save_pretrained(folder / "vae")
    (folder / "text_encoder").mkdir()
    text = published.cond_stage_model["transformer"]["text_model"].state_dict()
    save(folder / "text_encoder" / "model.safetensors", {f"text_model.{key}": value for key, value in text.items()})
    return folder


@pytest.mark.parametrize("form", ["ckpt", "safetensors", "folder"])
@torch.no_grad()
def test_stable_diffusion_is_read_from_files_and_folders(form, published, bookkeeping, tmp_path):
    if form == "folder":
        path = save_folder(tmp_path / "sd", published)
    else:
        path = save(tmp_path / f"sd.{form}", published.state_dict(), **bookkeeping if form == "ckpt" else {})
    unet, prompt = read_stable_diffusion(path)
    text = published.empty_prompt()
    torch.testing.assert_close(prompt, text, rtol=0, atol=1e-5)
    expected = published.model["diffusion_model"](NOISE, TIMES, text.expand(2, -1, -1), [0.0] * 13)
    torch.testing.assert_close(unet(NOISE, TIMES, text.expand(2, -1, -1)).sample, expected, rtol=0, atol=1e-5)
    mean = read_autoencoder(path).encode(IMAGES).latent_dist.mean
    torch.testing.assert_close(mean, published.first_stage_model.mean(IMAGES), rtol=0, atol=1e-5)


def test_a_moving_average_beside_the_weights_is_left_out(published, tmp_path):
    state = {key: value for key, value in published.state_dict().items() if key.startswith("model.")}
    averages = {f"model_ema.{key.replace('.', '')}": value + 1 for key, value in state.items()}
    unet, _ = read_stable_diffusion(save(tmp_path / "a.safetensors", state | averages))
    assert torch.equal(unet.conv_in.weight, published.model["diffusion_model"].input_blocks[0][0].weight)


def test_without_a_text_encoder_there_is_no_prompt(published, tmp_path):
    state = {key: value for key, value in published.state_dict().items() if key.startswith("model.")}
    assert read_stable_diffusion(save(tmp_path / "a.safetensors", state))[1] is None


def widened(state, width):
    return {key: torch.ones(value.shape[0], width) if key.endswith("attn2.to_k.weight") else value
            for key, value in state.items()}


@pytest.mark.parametrize(("change", "found"), [
    (lambda s: widened(s, 1024), "Stable Diffusion 2.x .embeddings 1024 wide.; expected version 1.5"),
    (lambda s: widened(s, 2048) | {"model.diffusion_model.label_emb.0.0.weight": torch.ones(1)}, "Diffusion XL"),
    (lambda s: s | {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(32, 9, 3, 3)}, "9 input channels"),
    (lambda s: {key: value for key, value in s.items() if key.startswith("first_stage")}, "has no U-Net of Stable"),
])
def test_a_file_of_another_version_is_named_and_refused(change, found, published, tmp_path):
    path = save(tmp_path / "other.safetensors", change(dict(published.state_dict())))
    with pytest.raises(UserError, match=found) as error:
        read_stable_diffusion(path)
    assert str(path) in one_line(error)


@pytest.mark.parametrize(("config", "found"), [
    ({"cross_attention_dim": 1024, "in_channels": 4}, "Stable Diffusion 2.x"),
    ({"cross_attention_dim": 2048, "addition_embed_type": "text_time", "in_channels": 4}, "Stable Diffusion XL"),
    ({"cross_attention_dim": 768, "in_channels": 9}, "9 input channels"),
    (None, "has no unet/config.json"),
])
def test_a_folder_of_another_version_is_refused_by_its_config(config, found, tmp_path):
    if config:
        write_json(tmp_path / "unet" / "config.json", config)
    with pytest.raises(UserError, match=found) as error:
        read_stable_diffusion(tmp_path)
    assert str(tmp_path) in one_line(error)


def test_a_folder_whose_weights_are_missing_is_one_line(tmp_path):
    write_json(tmp_path / "unet" / "config.json", {"cross_attention_dim": 768, "in_channels": 4})
    write_json(tmp_path / "vae" / "config.json", {})
    for read, cls in ((read_stable_diffusion, UNet2DConditionModel), (read_autoencoder, AutoencoderKL)):
        with pytest.raises(UserError, match=f"not readable as {cls.__name__}") as error:
            read(tmp_path)
        one_line(error)


# Auto-encoders

@pytest.mark.parametrize("form", ["plain", "diffusers", "run", "model"])
@torch.no_grad()
def test_an_auto_encoder_is_read_in_every_form(form, published, tmp_path):
    """Alone under plain names beside its discriminator; as diffusers saves it; in the two kinds of run folder."""
    state = published.first_stage_model.state_dict()
    path = save(tmp_path / "kl.ckpt", state | {"loss.discriminator.main.0.weight": torch.ones(1)}, epoch=1)
    network, scale = read_autoencoder(path), 0.18215
    if form != "plain":
        path, scale = tmp_path / "folder", 0.5
        network.register_to_config(scaling_factor=scale)
        if form == "diffusers":
            network.save_pretrained(path)
        elif form == "run":
            autoencoder.save_autoencoder(network, path)
        else:
            save_diad(compose(network, read_stable_diffusion(save(tmp_path / "sd.ckpt", published.state_dict()))[0],
                              (16, 32, 96, 256), 128), path)
    found = read_autoencoder(path)
    assert found.config.scaling_factor == scale and not found.training
    mean = found.encode(IMAGES).latent_dist.mean
    torch.testing.assert_close(mean, published.first_stage_model.mean(IMAGES), rtol=0, atol=1e-5)


def test_what_has_no_auto_encoder_is_one_line(published, tmp_path):
    (tmp_path / "empty").mkdir()
    unet = {key: value for key, value in published.state_dict().items() if key.startswith("model.")}
    for path, found in ((tmp_path / "empty", "expected a run folder of finetune_autoencoder.py"),
                        (save(tmp_path / "unet.ckpt", unet), "names begin with encoder. and decoder."),
                        (tmp_path / "gone.ckpt", "no such")):
        with pytest.raises(UserError, match=found) as error:
            read_autoencoder(path)
        assert str(path) in one_line(error)


# The prompt, and what files may hold

@torch.no_grad()
def test_the_empty_prompt_is_what_the_text_encoder_says_to_its_two_tokens():
    torch.manual_seed(0)
    text = TextModel(128, vocabulary=50, layers=3)
    for name, value in text.named_parameters():
        nn.init.normal_(value, 1.0 if value.ndim == 1 and name.endswith("weight") else 0.0, 0.2)
    expected = text(torch.tensor([[48] + [49] * 76]))
    found = empty_prompt({f"any.prefix.{key}": value for key, value in text.state_dict().items()})
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found[0, 5] - found[0, 6]).abs().max() > 0.01       # the same token, in other places


def test_a_prompt_is_one_tensor_of_77_tokens(tmp_path):
    prompt = torch.randn(1, 77, 32)
    assert torch.equal(read_prompt(save(tmp_path / "a.pt", {"prompt": prompt})), prompt)
    for state in ({"prompt": torch.ones(77, 32)}, {"a": prompt, "b": prompt}):
        with pytest.raises(UserError, match="expected one tensor of shape 1x77xWIDTH, found") as error:
            read_prompt(save(tmp_path / "b.pt", state))
        one_line(error)


def test_a_file_with_code_is_refused_and_never_run(tmp_path):
    for content in (nn.Linear(1, 1), {"state_dict": {}, "callbacks": nn.Linear(1, 1)}):
        torch.save(content, tmp_path / "a.ckpt")
        with pytest.raises(UserError, match="refused, since loading it could run code") as error:
            read_weights(tmp_path / "a.ckpt")
        one_line(error)


def test_only_for_the_reading_is_the_bookkeeping_allowed(published, bookkeeping, tmp_path):
    path = save(tmp_path / "a.ckpt", {"layer.weight": torch.ones(1)}, **bookkeeping)
    assert read_weights(path).keys() == {"layer.weight"}
    with pytest.raises(UserError, match="refused"):
        load_pickle(path)
