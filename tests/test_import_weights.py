"""Published checkpoints: recognised by what they hold, converted without a change of their output."""

import os

import pytest
import torch
from diffusers import UNet2DModel
from helpers import one_line, random_images, tiny_unet
from torch import nn
from torch.nn import functional as F

from dbad.checkpoints.weights import load_unet, model_config, save_weights
from dbad.errors import UserError
from dbad.families.ddim import importing
from dbad.families.ddim.importing import BACKBONES
from dbad.families.ddim.published import Found, recognise
from dbad.families.ddim.weights import convert
from dbad.families.import_weights import main, run
from dbad.files.atomic import read_json, write_json
from dbad.files.names import MODEL_CONFIG, TRAIN_OPTIONS
from dbad.networks.extractors import build_extractor, load_extractor, save_extractor
from dbad.options.resolve import resolve
from evaluation import Options

# DDAD's U-Net as its code computes it, under its names: what the converted one is held against

class Residual(nn.Module):
    def __init__(self, inputs, outputs, width, resample=None):
        super().__init__()
        self.resample = resample
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.embed_layers = nn.Sequential(nn.SiLU(), nn.Linear(width, outputs))
        self.out_layers = nn.Sequential(nn.GroupNorm(32, outputs), nn.SiLU(), nn.Dropout(0.3),
                                        nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, time):
        h = self.in_layers[:2](x)
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        if self.resample == "up":
            h, x = (v.repeat_interleave(2, 2).repeat_interleave(2, 3) for v in (h, x))
        h = self.in_layers[2](h) + self.embed_layers(time)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class SelfAttention(nn.Module):
    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(32, channels)
        self.to_qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x, time):
        found = []
        for head in self.to_qkv(self.norm(x.flatten(2))).chunk(self.heads, dim=1):
            q, k, v = head.chunk(3, dim=1)                                      # (N, C / heads, places) each
            weight = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(dim=2)
            found.append(v @ weight.transpose(1, 2))
        return x + self.proj_out(torch.cat(found, dim=1)).view_as(x)


class Ddad(nn.Module):
    """`channels` of the levels, the full resolution first; attention where a level has 32, 16 or 8 px."""

    def __init__(self, channels, resolution, heads, layers=2):
        super().__init__()
        base, width, last = channels[0], 4 * channels[0], len(channels) - 1

        def attention(level):
            return [SelfAttention(channels[level], heads)] if resolution >> level in (32, 16, 8) else []

        self.time_embedding = nn.Sequential(nn.Identity(), nn.Linear(base, width), nn.SiLU(), nn.Linear(width, width))
        self.down = nn.ModuleList([nn.ModuleList([nn.Conv2d(3, base, 3, padding=1)])])
        self.up = nn.ModuleList()
        c, skips = base, [base]
        for level, outputs in enumerate(channels):
            for _ in range(layers):
                self.down.append(nn.ModuleList([Residual(c, outputs, width), *attention(level)]))
                skips.append(c := outputs)
            if level < last:
                self.down.append(nn.ModuleList([Residual(c, c, width, "down")]))
                skips.append(c)
        self.middle = nn.ModuleList([Residual(c, c, width), SelfAttention(c, heads), Residual(c, c, width)])
        for level in range(last, -1, -1):
            for j in range(layers + 1):
                parts = [Residual(c + skips.pop(), channels[level], width), *attention(level)]
                c = channels[level]
                if level and j == layers:
                    parts.append(Residual(c, c, width, "up"))
                self.up.append(nn.ModuleList(parts))
        self.out = nn.Sequential(nn.GroupNorm(32, c), nn.SiLU(), nn.Conv2d(c, 3, 3, padding=1))

    def forward(self, x, t):
        half = self.time_embedding[1].in_features // 2
        angle = t * 10000.0 ** (-torch.arange(half) / half)
        time = self.time_embedding(torch.cat([angle.sin(), angle.cos()])[None])
        x = self.down[0][0](x)
        skips = [x]
        for parts in self.down[1:]:
            for part in parts:
                x = part(x, time)
            skips.append(x)
        for part in self.middle:
            x = part(x, time)
        for parts in self.up:
            x = torch.cat([x, skips.pop()], dim=1)
            for part in parts:
                x = part(x, time)
        return self.out(x)


def random_ddad(channels=(32, 64), resolution=32, heads=2) -> Ddad:
    """Every weight and bias random, so that none of them can be left out unnoticed."""
    torch.manual_seed(0)
    network = Ddad(channels, resolution, heads).eval()
    for name, value in network.named_parameters():
        spread = 0.2 if value.ndim == 1 else value[0].numel() ** -0.5
        nn.init.normal_(value, 1.0 if value.ndim == 1 and name.endswith("weight") else 0.0, spread)
    return network


def save(path, network, prefix="module."):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({prefix + name: value for name, value in network.state_dict().items()}, path)
    return path


# DDAD's U-Net

@pytest.mark.parametrize(("channels", "resolution", "heads", "prefix"), [
    ((32, 64, 96), 64, 2, "module."),           # the full resolution has no attention, the deeper levels have
    ((32, 32, 64), 16, 2, ""),
    ((64, 128), 32, 4, "module."),
    ((32, 32, 64, 64), 128, 2, "module."),
])
@torch.no_grad()
def test_the_converted_network_computes_what_ddads_does(channels, resolution, heads, prefix, tmp_path):
    network = random_ddad(channels, resolution, heads)
    run(save(tmp_path / "2000", network, prefix), tmp_path / "out")
    unet = load_unet(tmp_path / "out", "final.pt")
    x = torch.randn(2, 3, 16, 16)
    for t in (0, 24, 249, 999):
        expected = network(x, t)
        assert expected.std() > 0.1
        torch.testing.assert_close(unet(x, t).sample, expected, rtol=0, atol=1e-5)
    assert model_config(unet) == read_json(tmp_path / "out" / MODEL_CONFIG)


@pytest.mark.parametrize(("base", "heads", "millions"), [(64, 4, 32.95), (32, 2, 8.26)])
def test_the_published_networks_have_their_size_and_attention_at_32_16_and_8_px(base, heads, millions):
    channels = tuple(base * multiplier for multiplier in (1, 1, 2, 2, 4, 4))
    with torch.device("meta"):
        state = Ddad(channels, 256, heads).state_dict()
    config, weights = convert(state)
    assert sum(value.numel() for value in weights.values()) / 1e6 == pytest.approx(millions, abs=0.005)
    assert config["sample_size"] == 256 and tuple(config["block_out_channels"]) == channels
    assert config["down_block_types"] == ["ResnetDownsampleBlock2D"] * 3 + ["AttnDownBlock2D"] * 3
    assert config["up_block_types"] == ["AttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"] * 3
    assert config["attention_heads"] == heads


def test_the_settings_are_those_published_for_the_category_the_folder_is_called_after(tmp_path):
    message = run(save(tmp_path / "screw" / "2000", random_ddad()).parent, tmp_path / "out")
    trained = read_json(tmp_path / "out" / TRAIN_OPTIONS)
    options = resolve(Options(item="screw", run_id="out", dataset_path=tmp_path), trained)
    assert (options.conditioning, options.recon_weight, options.eta) == ("ddad", 2.0, 1.0)
    assert (options.start_at_timestep, options.steps_to_regenerate, options.patching) == (250, 10, False)
    assert (trained["resolution"], trained["epochs_diffusion"], trained["train_steps"]) == (32, 2000, 1000)
    assert (trained["beta_schedule"], trained["noise_kind"]) == ("linear", "gaussian")
    assert "U-Net of DDAD" in message and "published for screw, 2" in message and "train_extractor.py" in message


def test_a_folder_of_another_name_tells_no_category(tmp_path):
    assert "example settings" in run(save(tmp_path / "mine" / "weights.pt", random_ddad()), tmp_path / "out")
    trained = read_json(tmp_path / "out" / TRAIN_OPTIONS)
    assert "item" not in trained and trained["recon_weight"] == 2.0


@pytest.mark.parametrize(("spoil", "found"), [
    (lambda state: state.update({"up.0.0.extra.weight": torch.ones(1)}), "up.0.0.extra.weight"),
    (lambda state: state.pop("middle.0.out_layers.3.bias"), "mid_block.resnets.0.conv2.bias"),
    (lambda state: state.update({"down.1.0.embed_layers.1.weight": torch.ones(64, 128)}), "time_emb_proj.weight"),
    (lambda state: [state.pop(name) for name in list(state) if name.startswith("down.4.")], "other levels"),
    (lambda state: [state.pop(name) for name in list(state) if "down" in name and "qkv" in name], "without attention"),
    (lambda state: state.update({"down.0.0.weight": torch.ones(48, 3, 3, 3)}), "48 base channels"),
    (lambda state: state.update({"down.0.0.weight": torch.ones(32, 1, 3, 3)}), "images of 1 channels"),
])
def test_a_network_that_ddads_code_does_not_make_is_refused(spoil, found, tmp_path):
    state = random_ddad((32, 32, 64), 16).state_dict()
    spoil(state)
    torch.save(state, tmp_path / "2000")
    with pytest.raises(UserError, match=found) as error:
        run(tmp_path / "2000", tmp_path / "out")
    assert str(tmp_path / "2000") in one_line(error) and not (tmp_path / "out").exists()


# Diffusion-Based-AD

THEIR_ARGUMENTS = {
    "checkpoint_dir": "checkpoints", "run_name": "h", "mvtec_item": "hazelnut", "flip": True, "rotate": 5.0,
    "color_jitter": 0.05, "resolution": 32, "epochs": 1000, "save_n_epochs": 50, "dataset_path": "D:/data",
    "train_steps": 1000, "beta_schedule": "linear", "device": "cuda", "reconstruction_weight": 0.1, "eta": 0.2,
    "batch_size": 8, "noise_kind": "gaussian", "crop": True, "log_dir": "logs", "img_dir": None, "plt_imgs": False,
    "calc_val_loss": True, "extractor_path": "checkpoints/hazelnut_01.pt", "checkpoint_name": "epoch_1000.pt"}
THEIR_MODEL = {
    "sample_size": 32, "in_channels": 3, "out_channels": 3, "layers_per_block": 2, "block_out_channels": [32, 32, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]}


def their_run(folder, **arguments):
    """A run folder as that project leaves it, with an earlier checkpoint; returns its last network."""
    write_json(folder / "model_config.json", THEIR_MODEL)
    write_json(folder / "train_arg_config.json", THEIR_ARGUMENTS | arguments)
    torch.manual_seed(0)
    for name in ("epoch_950.pt", "epoch_1000.pt"):
        network = UNet2DModel(**THEIR_MODEL).eval()
        torch.save(network.state_dict(), folder / name)
    return network


@torch.no_grad()
def test_a_run_of_diffusion_based_ad_gives_the_same_output(tmp_path):
    network = their_run(tmp_path / "h")
    message = run(tmp_path / "h", tmp_path / "out")
    unet = load_unet(tmp_path / "out", "final.pt")
    x = torch.randn(2, 3, 32, 32)
    for t in (0, 249, 999):
        assert torch.equal(unet(x, t).sample, network(x, t).sample)
    assert "U-Net of Diffusion-Based-AD, 32 px" in message and "epoch_1000.pt" in message


def test_its_settings_are_those_it_was_trained_with(tmp_path):
    their_run(tmp_path / "h")
    run(tmp_path / "h", tmp_path / "out")
    trained = read_json(tmp_path / "out" / TRAIN_OPTIONS)
    options = resolve(Options(item="hazelnut", run_id="out", dataset_path=tmp_path), trained)
    assert (options.conditioning, options.recon_weight, options.eta, options.patching) == ("blend", 0.1, 0.2, True)
    assert (options.start_at_timestep, options.steps_to_regenerate) == (250, 25)
    assert (trained["resolution"], trained["epochs_diffusion"], trained["rotate"]) == (32, 1000, 5.0)
    with pytest.raises(UserError, match="trained with hazelnut"):
        resolve(Options(item="screw", run_id="out", dataset_path=tmp_path), trained)


def test_any_of_its_checkpoints_can_be_chosen_by_its_path(tmp_path):
    their_run(tmp_path / "h")
    run(tmp_path / "h" / "epoch_950.pt", tmp_path / "out")
    ours, theirs = (torch.load(tmp_path / path, weights_only=True) for path in ("out/final.pt", "h/epoch_950.pt"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_its_simplex_noise_is_said_to_differ(tmp_path):
    their_run(tmp_path / "h", noise_kind="simplex")
    assert "unit variance" in run(tmp_path / "h", tmp_path / "out")
    assert read_json(tmp_path / "out" / TRAIN_OPTIONS)["noise_kind"] == "simplex"


@pytest.mark.parametrize(("change", "found"), [
    ({"beta_schedule": "sigmoid"}, "sigmoid"), ({"noise_kind": "perlin"}, "perlin"),
    ({"eta": None}, "train_arg_config.json: eta null: expected"), ({"preset": "base"}, "a run of this project"),
    ({"checkpoint_name": "gone.pt"}, "has 2 U-Nets .epoch_1000.pt, epoch_950.pt.")])
def test_a_run_that_cannot_be_taken_over_is_one_line(change, found, tmp_path):
    their_run(tmp_path / "h", **change)
    with pytest.raises(UserError, match=found) as error:
        run(tmp_path / "h", tmp_path / "out")
    assert str(tmp_path / "h") in one_line(error) and not (tmp_path / "out").exists()


def test_a_unet_without_its_two_files_is_one_line(tmp_path):
    save_weights(tiny_unet().state_dict(), tmp_path / "final.pt")
    with pytest.raises(UserError, match="model_config.json: no such file") as error:
        run(tmp_path / "final.pt", tmp_path / "out")
    one_line(error)


# Feature extractors

@pytest.fixture(scope="module")
def backbone():
    """The smallest backbone that DDAD's code knows, with random weights and statistics."""
    from torchvision.models import resnet50
    torch.manual_seed(0)
    network = resnet50(weights=None).eval()
    for name, value in network.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(value, 0, 0.1)
    return network


@pytest.mark.parametrize(("prefix", "project"), [("module.", "DDAD"), ("model.", "Diffusion-Based-AD")])
@torch.no_grad()
def test_a_published_extractor_gives_the_features_of_layers_2_and_3(prefix, project, backbone, tmp_path):
    path = save(tmp_path / "feat4", backbone, prefix)
    if project == "Diffusion-Based-AD":         # torchvision has left out what is not needed
        torch.save({name: value for name, value in torch.load(path).items()
                    if not name.startswith(("model.layer4", "model.fc"))}, path)
    assert f"feature extractor of {project}, resnet50" in run(path, tmp_path / "out")
    extractor = load_extractor(tmp_path / "out" / "extractor.pt")
    assert (extractor.layers, extractor.strides, extractor.resolution) == ((2, 3), (8, 16), 256)

    images = random_images(1, 256)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = ((images + 1) / 2 - mean) / std
    x = backbone.layer1(backbone.maxpool(backbone.relu(backbone.bn1(backbone.conv1(x)))))
    layer2 = backbone.layer2(x)
    torch.testing.assert_close(extractor(images), [layer2, backbone.layer3(layer2)])


@pytest.mark.parametrize("name", BACKBONES)
def test_the_backbone_is_told_by_its_shapes(name, monkeypatch, tmp_path):
    with torch.device("meta"):
        state = build_extractor(name, (2, 3), pretrained=False).backbone.state_dict()
    monkeypatch.setattr(importing, "read_checkpoint", lambda path: {f"module.{key}": state[key] for key in state})
    assert importing.extractor_of(tmp_path / "feat4", 256).name == name


def test_another_resnet_is_refused(tmp_path):
    from torchvision.models import resnet18
    path = save(tmp_path / "feat4", resnet18(weights=None))
    with pytest.raises(UserError, match="expected one of wide_resnet101_2, wide_resnet50_2, resnet50") as error:
        run(path, tmp_path / "out")
    one_line(error)


# From the command line to a result

def test_an_imported_run_is_calibrated_and_inspects(workplace, script, backbone, capsys):
    save(workplace / "theirs" / "hazelnut" / "1500", random_ddad())
    save(workplace / "theirs" / "hazelnut" / "feat3", backbone)
    assert recognise(workplace / "theirs" / "hazelnut") == Found(
        "DDAD", workplace / "theirs" / "hazelnut" / "1500", workplace / "theirs" / "hazelnut" / "feat3")
    main(["theirs/hazelnut", "--out", "checkpoints/ddad"])
    assert "python evaluation.py --item hazelnut --run_id ddad --dataset_path FOLDER" in capsys.readouterr().out
    assert sorted(os.listdir("checkpoints/ddad")) == ["extractor.pt", "final.pt", MODEL_CONFIG, TRAIN_OPTIONS]
    flags = "--item hazelnut --run_id ddad --dataset_path data --device cpu --precision fp32".split()
    script("evaluation.py", *flags)
    script("inference_ddim.py", *flags)
    assert (workplace / "results" / "ddad" / "metrics.json").is_file()


def test_parts_may_come_one_after_the_other_but_nothing_is_written_over(backbone, tmp_path):
    unet, feat = save(tmp_path / "a" / "2000", random_ddad()), save(tmp_path / "a" / "feat4", backbone)
    out = tmp_path / "out"
    run(unet, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "next: python evaluation.py" in run(feat, out)
    assert load_extractor(out / "extractor.pt").resolution == 32        # that of the U-Net
    for path in (unet, feat, unet.parent):
        with pytest.raises(UserError, match="nothing is overwritten") as error:
            run(path, out)
        one_line(error)
    assert before == {name: (out / name).read_bytes() for name in before}


# What is none of these

@pytest.mark.parametrize(("content", "found"), [
    (torch.ones(2), "found Tensor"),
    ({"epoch": 3, "state_dict": {}}, "found a dictionary .epoch, state_dict."),
    ({f"layer.{k}.weight": torch.ones(1) for k in range(6)},
     "state dict of 6 tensors .layer.0.weight, layer.1.weight, layer.2.weight, layer.3.weight and 2 more."),
    (nn.Linear(1, 1), "refused, since loading it could run code; .* torch.save.model.state_dict"),
])
def test_a_file_that_is_none_of_these_is_described(content, found, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=found) as error:
        run(tmp_path / "a.pt", tmp_path / "out")
    assert str(tmp_path / "a.pt") in one_line(error) and not (tmp_path / "out").exists()


def test_files_that_are_no_checkpoints_are_one_line(tmp_path):
    (tmp_path / "a.pt").write_text("not a checkpoint")
    (tmp_path / "images").mkdir()
    (tmp_path / "empty").mkdir()
    save_extractor(build_extractor("resnet18", (1,), 32, pretrained=False), tmp_path / "images" / "extractor.pt")
    for path, found in ((tmp_path / "a.pt", "not a checkpoint"), (tmp_path / "gone", "no such file or folder"),
                        (tmp_path, "found a.pt, empty/, images/"), (tmp_path / "empty", "found an empty folder"),
                        (tmp_path / "images" / "extractor.pt", "extractor of this project")):
        with pytest.raises(UserError, match=found) as error:
            run(path, tmp_path / "out")
        assert str(path) in one_line(error)


def test_a_folder_with_several_networks_asks_for_one_whatever_torch_wrote_them(tmp_path):
    state = random_ddad().state_dict()
    torch.save(state, tmp_path / "1000", _use_new_zipfile_serialization=False)      # as before torch 1.6
    assert recognise(tmp_path) == Found("DDAD", tmp_path / "1000", None)
    torch.save(state, tmp_path / "2000")
    with pytest.raises(UserError, match="has 2 U-Nets .1000, 2000.") as error:
        recognise(tmp_path)
    one_line(error)


@pytest.mark.parametrize("words", [[], ["a.pt"], ["a.pt", "--out", "b", "--colour"], ["gone.pt", "--out", "b"]])
def test_a_wrong_command_line_is_one_line_and_status_2(words, capsys):
    with pytest.raises(SystemExit) as error:
        main(words)
    printed = capsys.readouterr().err
    assert error.value.code == 2 and printed.count("\n") == 1
