"""build_diad.py as a user starts it: what it assembles, and what it refuses in one line."""

import pytest
import torch
from helpers import random_images, streams
from ldm import random_stable_diffusion
from safetensors.torch import save_file

from build_diad import Options, run
from dbad.checkpoints.weights import save_pickle
from dbad.families.diad.autoencoder import build_autoencoder, save_autoencoder
from dbad.families.diad.reconstruction import reconstruct
from dbad.families.diad.storage import load_diad
from dbad.files.atomic import read_json, write_json


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Stable Diffusion's file, small: the network, and where it is saved."""
    network, path = random_stable_diffusion(), tmp_path_factory.mktemp("published") / "sd.ckpt"
    torch.save({"state_dict": network.state_dict()}, path)
    return network, path


def test_stable_diffusion_is_assembled_with_a_fine_tuned_auto_encoder(published, tmp_path, script, capsys):
    """The SG network is the U-Net's encoder and middle, its outputs and its hint's last layer are zero."""
    network, path = published
    torch.manual_seed(1)
    own = build_autoencoder("tiny", 128, scale=0.7)
    save_autoencoder(own, tmp_path / "autoencoder")
    script("build_diad.py", "--stable_diffusion", path, "--autoencoder", tmp_path / "autoencoder", "--out",
           tmp_path / "out")
    assert f"The model is in {tmp_path / 'out'}" in capsys.readouterr().out
    model = load_diad(tmp_path / "out")
    assert model.resolution == 256 and model.autoencoder.config.scaling_factor == 0.7
    assert torch.equal(model.autoencoder.decoder.conv_out.weight, own.decoder.conv_out.weight)
    assert torch.equal(model.unet.conv_in.weight, network.model["diffusion_model"].input_blocks[0][0].weight)
    torch.testing.assert_close(model.prompt, network.empty_prompt(), rtol=0, atol=1e-5)
    guide = model.guide.controlnet.state_dict()
    copied = {key: value for key, value in model.unet.state_dict().items()
              if key.startswith(("conv_in.", "time_embedding.", "down_blocks.", "mid_block."))}
    assert copied and all(torch.equal(guide[key], value) for key, value in copied.items())
    zero = {key for key in guide if key.startswith("controlnet_")}
    assert guide.keys() == copied.keys() | zero and not any(guide[key].any() for key in zero)
    assert not model.guide.embedding.conv_out.weight.any() and model.guide.embedding.conv_in.weight.any()
    assert all(layer.weight.any() for layer in model.guide.fusion.down)
    assert read_json(tmp_path / "out" / "build_arg_config.json")["stable_diffusion"] == str(path)


def test_stable_diffusions_own_auto_encoder_and_a_stored_prompt_are_taken_if_named(published, tmp_path):
    network, path = published
    state = {key: value for key, value in network.state_dict().items() if not key.startswith("cond_stage_model.")}
    save_file(state, tmp_path / "sd.safetensors")
    save_pickle({"prompt": torch.ones(1, 77, 64)}, tmp_path / "prompt.pt")
    given = dict(stable_diffusion=tmp_path / "sd.safetensors", autoencoder=tmp_path / "sd.safetensors",
                 prompt_embedding=tmp_path / "prompt.pt", resolution=128)
    model = load_diad(run(Options(**given, out=tmp_path / "half", weights="bf16", paper_exact=True)))
    assert model.resolution == 128 and model.unet.dtype == model.autoencoder.dtype == torch.bfloat16
    assert not any(layer.weight.any() for layer in model.guide.fusion.down)
    assert torch.equal(model.prompt, torch.ones(1, 77, 64, dtype=torch.bfloat16))
    expected = network.first_stage_model.decoder.conv_out.weight.bfloat16()
    assert torch.equal(model.autoencoder.decoder.conv_out.weight, expected)


def test_the_tiny_size_needs_nothing_and_follows_from_the_seed(tmp_path):
    folders = [run(Options(random=True, size="tiny", seed=seed, out=tmp_path / name))
               for name, seed in (("a", 3), ("b", 3), ("c", 4))]
    a, b, c = ([path.read_bytes() for path in sorted(folder.glob("*.safetensors"))] for folder in folders)
    assert len(a) == 4 and a == b and all(x != y for x, y in zip(a, c, strict=True))
    model, image = load_diad(folders[0]), random_images(1, 128)
    assert reconstruct(model, image, streams(1), num_steps=1).shape == image.shape


def test_a_dry_run_writes_nothing(tmp_path, script, capsys):
    script("build_diad.py", "--random", "--size", "sd15", "--out", tmp_path / "out", "--dry_run")
    printed = capsys.readouterr().out
    assert "size = sd15" in printed and "would write" in printed and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("words", "found"), [
    ("", "--stable_diffusion: not given; expected the weights of Stable Diffusion 1.5, or --random"),
    ("--stable_diffusion SD --random", "both given"),
    ("--random", "--random: expected --size too, tiny, middle, sd15"),
    ("--stable_diffusion SD", "--autoencoder: not given; expected one that was fine-tuned"),
    ("--stable_diffusion SD --autoencoder gone", "--autoencoder gone: no such file or folder"),
    ("--stable_diffusion SD --autoencoder SD --size tiny", "--size only with --random"),
    ("--random --size tiny --resolution 70", "resolution 70: expected a multiple of 64 px"),
    ("--random --size tiny --prompt_embedding PROMPT", "embedding of the prompt, 1x77x8: expected 1x77x32"),
    ("--stable_diffusion SD2 --autoencoder SD", "Stable Diffusion 2.x (embeddings 1024 wide)"),
    ("--stable_diffusion TEXTLESS --autoencoder SD", "has no text encoder; expected the empty prompt's embedding as"),
    ("--random --size tiny --out TAKEN", "nothing is overwritten"),
    ("--random --size tiny --out SD", "expected a folder, found a file"),
    ("--random --size huge", "invalid choice: 'huge'"),
])
def test_a_mistake_is_one_line_and_nothing_is_written(words, found, published, tmp_path, script, capsys):
    network, path = published
    unet = {key: value for key, value in network.state_dict().items() if key.startswith("model.")}
    wide = {key: torch.ones(len(value), 1024) if "attn2.to_k" in key else value for key, value in unet.items()}
    files = {"SD2": lambda at: save_pickle(wide, at), "TEXTLESS": lambda at: save_pickle(unet, at),
             "PROMPT": lambda at: save_pickle({"prompt": torch.ones(1, 77, 8)}, at),
             "TAKEN": lambda at: write_json(at / "model_config.json", {})}
    for name in files.keys() & set(words.split()):
        files[name](tmp_path / name)
    places = {"SD": path} | {name: tmp_path / name for name in files}
    words = [places.get(word, word) for word in words.split()]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as error:
        script("build_diad.py", "--out", tmp_path / "out", *words)
    printed = capsys.readouterr().err
    assert error.value.code == 2 and printed.count("\n") == 1 and found in printed
    assert sorted(tmp_path.rglob("*")) == before
