"""Adapting the extractor: the objectives' losses and pairs, frozen statistics, and when the training stops."""

import dataclasses
import itertools
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from helpers import CPU, one_line, random_images, reconstruction, tiny_unet
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F

import train_extractor
import train_tune_eval
from dbad.diffusion.ddim import schedule
from dbad.errors import UserError
from dbad.families.ddim import objectives
from dbad.families.ddim.objectives import (
    OBJECTIVES,
    Pairs,
    denoise_towards,
    distillation_loss,
    held_out_losses,
    network_and_loss,
)
from dbad.families.ddim.reconstruct import Denoiser, reconstruct_all
from dbad.fields import check
from dbad.networks.extractors import build_extractor, load_extractor
from dbad.options.command_line import parse
from dbad.runtime.device import Machine
from dbad.training import loop
from dbad.training.early_stopping import Best
from dbad.training.loop import fit
from dbad.training.plan import Hooks, Place, Plan

ABAR = schedule(1000, "linear")
RUN = Path("checkpoints/hazelnut")
each_objective = pytest.mark.parametrize("objective", OBJECTIVES)


# The loss of ddad

def maps_of(*directions):
    """An extractor of one layer that sees the given map, for every image of its batch one."""
    return lambda images: [torch.tensor(directions).float().view(len(directions), 2, 1, 1)]


RIGHT, UP, LEFT = (2.0, 0.0), (0.0, 0.5), (-1.0, 0.0)


@pytest.mark.parametrize("of_x_0, of_y, before_x_0, before_y, similarity, y_drift, x_drift", [
    (RIGHT, RIGHT, RIGHT, RIGHT, 0, 0, 0),
    (RIGHT, UP, RIGHT, UP, 1, 0, 0),
    (RIGHT, RIGHT, RIGHT, UP, 0, 1, 0),
    (RIGHT, RIGHT, LEFT, RIGHT, 0, 0, 2),
    (UP, LEFT, RIGHT, RIGHT, 1, 2, 1),
])
def test_the_distillation_loss_adds_up_angles_between_features(of_x_0, of_y, before_x_0, before_y, similarity, y_drift,
                                                               x_drift):
    """Parallel maps are 0 apart, those at a right angle 1, opposite ones 2, whatever their lengths."""
    image = torch.zeros(1, 3, 4, 4)
    terms = distillation_loss(maps_of(of_x_0, of_y), maps_of(before_x_0, before_y), image, image, weight=0.25)
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(
        {"loss": similarity + 0.25 * (y_drift + x_drift), "similarity": similarity, "image_drift": y_drift,
         "reconstruction_drift": x_drift}, abs=1e-6)


def test_a_map_is_compared_as_a_whole_and_layers_are_added():
    """Two places that swap their features make the map another one, though each place has a parallel one somewhere."""
    here, there = torch.zeros(2, 1, 1, 3, 2, 2)
    here[..., 0, 0, 0], there[..., 0, 1, 1] = 1, 1
    maps = torch.cat([here, there]).flatten(0, 1)
    image = torch.zeros(1, 3, 4, 4)
    assert float(distillation_loss(lambda _: [maps], lambda _: [maps], image, image, 1.0)["loss"]) == 1
    assert float(distillation_loss(lambda _: [maps] * 3, lambda _: [maps] * 3, image, image, 1.0)["loss"]) == 3


def test_only_the_adapted_network_has_a_gradient_and_it_lowers_the_loss():
    extractor = build_extractor("efficientnet_lite0", (1, 2), 32)
    model, loss_of = network_and_loss("ddad", extractor, 0.1, CPU, "fp32")
    batch = {"image": random_images(4, 32), "counterpart": random_images(4, 32, seed=1)}
    before = loss_of(model, batch)
    before["loss"].backward()
    used = [p for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        for parameter in used:
            parameter -= 1e-2 * parameter.grad
        after = loss_of(model, batch)
    assert model is extractor and len(used) > 10
    assert before["image_drift"] < 1e-5 and after["loss"] < before["loss"]
    assert after["image_drift"] > 1e-4 and after["reconstruction_drift"] > 1e-4


def test_a_heavier_weight_keeps_the_network_nearer_to_the_pretrained_one():
    drifts, batch = [], {"image": random_images(4, 32), "counterpart": random_images(4, 32, seed=1)}
    for weight in (0.0, 10.0):
        model, loss_of = network_and_loss("ddad", build_extractor("efficientnet_lite0", (1,), 32), weight, CPU, "fp32")
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        for _ in range(10):
            optimizer.zero_grad()
            loss_of(model, batch)["loss"].backward()
            optimizer.step()
        drifts.append(float(loss_of(model, batch)["image_drift"].detach()))
    assert drifts[1] < 0.5 * drifts[0]


# The pairs of ddad

def towards(images, weight=3.0, seed=0, batch_size=4):
    return denoise_towards(Denoiser(tiny_unet(), ABAR), images, reconstruction(
        recon_weight=weight, steps_to_regenerate=3), Machine(CPU, "fp32", batch_size), seed)


def test_a_pull_that_never_ends_makes_every_image_the_one_it_is_denoised_towards():
    """The share of the way to y that a step goes is then 1 down to the last one."""
    images = random_images(5)
    torch.testing.assert_close(towards(images, weight=1e6), images, rtol=0, atol=1e-4)


def test_without_a_pull_every_image_is_rebuilt_once_and_none_for_itself(monkeypatch):
    """The noised images are seen in place of their reconstructions."""
    monkeypatch.setattr(objectives, "reconstruct", lambda unet, noised, *rest: noised.clone())
    for count in (2, 3, 7, 20):
        images = random_images(count, 4)
        partner = torch.cdist(towards(images).flatten(1), images.flatten(1)).argmin(dim=1)
        assert sorted(partner.tolist()) == list(range(count)) and (partner != torch.arange(count)).all()
    assert torch.equal(towards(images[:1]), images[:1])


def test_an_image_denoised_towards_itself_is_its_conditioned_reconstruction():
    image = random_images(1)
    expected = reconstruct_all(Denoiser(tiny_unet(), ABAR), image, reconstruction(
        recon_weight=3.0, steps_to_regenerate=3), Machine(CPU, "fp32", 1), seed=0)
    torch.testing.assert_close(towards(image), expected, rtol=0, atol=1e-5)


def test_pairs_follow_from_the_seed_whatever_the_batch_size():
    images = random_images(7)
    torch.testing.assert_close(towards(images), towards(images, batch_size=3), rtol=0, atol=1e-5)
    assert torch.equal(towards(images), towards(images))
    assert (towards(images) - towards(images, seed=1)).abs().max() > 0.1


# The held-out loss

def test_the_held_out_loss_is_the_mean_over_all_images_whatever_the_batch_size():
    images, others = random_images(5), random_images(5, seed=1)

    def loss_of(model, batch):
        assert not torch.is_grad_enabled()
        return {"loss": F.mse_loss(batch["image"], batch["counterpart"]), "two": torch.tensor(2.0)}

    for batch_size in (1, 2, 5, 8):
        found = held_out_losses(nn.Identity(), Pairs(images, others), loss_of, batch_size, CPU)
        assert found == pytest.approx({"val_loss": float(F.mse_loss(images, others)), "val_two": 2.0}, rel=1e-5)


# Early stopping

STEPS_PER_EPOCH = 3


def descend(folder: Path, val_losses, patience: int, at_step=lambda step: None):
    """Train a small network whose held-out loss is `val_losses[epoch]`; the weights each report saw, and `Best`."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    data, best, seen, steps = Pairs(random_images(6, 4), random_images(6, 4, 1)), Best(patience), {}, []

    def loss_of(model, batch):
        steps.append(len(steps))
        at_step(len(steps))
        return {"loss": F.mse_loss(model(batch["image"]), batch["counterpart"])}

    def report(model, epoch):
        seen[epoch] = [p.detach().clone() for p in model.parameters()]
        return {"val_loss": val_losses[epoch]}

    num_epochs = len(val_losses) - 1
    plan = Plan(num_epochs * STEPS_PER_EPOCH, STEPS_PER_EPOCH, 1, 1e-2, 0, seed=3, settings={"patience": patience})
    model = fit(nn.Conv2d(3, 3, 1), data, loss_of, plan, Place(folder, folder / "events", "extractor"), batch_size=2,
                device=CPU, hooks=Hooks(on_report=report, best=best))
    return list(model.parameters()), best, seen, len(steps)


@pytest.mark.parametrize("val_losses, patience, last, kept", [
    ((5, 4, 3, 2, 1), 2, 4, 4),             # lower every time: to the end
    ((5, 4, 6, 7, 1), 2, 3, 1),             # the second one that is not lower stops it
    ((5, 4, 6, 3, 6, 6), 2, 5, 3),          # a lower one begins the count again
    ((5, 6, 7, 8, 9), 2, 2, 0),             # never better than before
    ((5, 4, 4, 3), 1, 2, 1),                # the same is not lower
    ((5, 4, 6, 7, 8, 9), 0, 5, 1),          # without patience it never stops early, and keeps the best all the same
    ((5, 6, 7), 0, 2, 0),
])
def test_it_stops_when_the_held_out_loss_does_and_keeps_the_weights_of_the_best_epoch(val_losses, patience, last, kept,
                                                                                      tmp_path):
    weights, best, seen, num_steps = descend(tmp_path, val_losses, patience)
    assert sorted(seen) == list(range(last + 1)) and num_steps == last * STEPS_PER_EPOCH
    assert (best.epoch, best.seen, best.first, best.loss) == (kept, last, val_losses[0], val_losses[kept])
    assert all(torch.equal(a, b) for a, b in zip(weights, seen[kept], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights, seen[last if kept != last else 0], strict=True))


@pytest.mark.parametrize("step", range(1, 10))
def test_stopped_by_hand_and_gone_on_with_it_stops_by_itself_where_an_unbroken_run_does(step, tmp_path):
    val_losses = (5, 4, 6, 7, 1)

    def stop(now):
        if now == step:
            os.kill(os.getpid(), signal.SIGINT)

    whole, unbroken, _, num_steps = descend(tmp_path / "whole", val_losses, 2)
    with pytest.raises(KeyboardInterrupt):
        descend(tmp_path / "broken", val_losses, 2, stop)
    weights, best, _, rest = descend(tmp_path / "broken", val_losses, 2)
    assert rest == num_steps - step
    assert all(torch.equal(a, b) for a, b in zip(weights, whole, strict=True))
    assert (best.epoch, best.seen, best.first, best.loss) == (unbroken.epoch, unbroken.seen, 5, 4)


def test_a_run_that_stopped_early_is_finished(tmp_path):
    whole, *_ = descend(tmp_path, (5, 4, 6, 7, 1), 2)
    weights, best, seen, num_steps = descend(tmp_path, (5, 4, 6, 7, 1), 2)
    assert not seen and num_steps == 0 and best.exhausted
    assert all(torch.equal(a, b) for a, b in zip(weights, whole, strict=True))


# The script

@pytest.fixture
def adapt(trained, script, tiny_flags):
    """`adapt(*words)`: the state dict that train_extractor.py leaves, in a copy of the finished run."""
    def run(*words):
        script("train_extractor.py", *tiny_flags("train_extractor.py"), *words)
        return load_extractor(RUN / "extractor.pt").state_dict()
    return run


def log() -> list[dict]:
    lines = [json.loads(line) for line in (RUN / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["phase"] == "extractor"]


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@each_objective
def test_weights_train_and_batch_norm_statistics_stay_bit_for_bit_as_they_were(objective, adapt):
    before = build_extractor("efficientnet_lite0", resolution=32).state_dict()
    after = adapt("--objective", objective, "--epochs_extractor", 2)
    statistics = {name for name in before if "running_" in name or "num_batches" in name}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(statistics) > 50 and not statistics & changed
    assert {"backbone.conv_stem.weight", "backbone.bn1.weight", "backbone.bn1.bias"} <= changed


TERMS = {"autoencoder": {"loss"}, "reconstruction": {"loss"},
         "ddad": {"loss", "similarity", "image_drift", "reconstruction_drift"}}


@each_objective
def test_each_term_of_the_loss_is_logged_in_training_and_held_out(objective, adapt):
    adapt("--objective", objective, "--epochs_extractor", 2, "--extractor_weight", 0.5)
    lines = log()
    terms = TERMS[objective] | {f"val_{name}" for name in TERMS[objective]}
    assert [line["epoch"] for line in lines] == [1, 2] and all(terms <= line.keys() for line in lines)
    for line in lines if objective == "ddad" else ():
        for p in ("", "val_"):
            assert line[f"{p}loss"] == pytest.approx(line[f"{p}similarity"] + 0.5 * (
                line[f"{p}image_drift"] + line[f"{p}reconstruction_drift"]), rel=1e-4)
    events = EventAccumulator("logs/hazelnut/extractor").Reload()
    for name in terms:
        assert [e.value for e in events.Scalars(f"extractor/{name}")] == pytest.approx([line[name] for line in lines])


def test_every_objective_and_every_option_of_ddad_makes_another_extractor(adapt):
    first_layers = [adapt("--no_resume", *words.split())["backbone.conv_stem.weight"] for words in (
        "--objective autoencoder", "--objective reconstruction", "--objective ddad",
        "--objective ddad --extractor_weight 1", "--objective ddad --extractor_recon_weight 0.5",
        "--objective ddad --extractor_layers 1")]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(first_layers, 2))


def test_objectives_have_their_older_spellings(adapt):
    assert same(adapt(), adapt("--no_resume", "--objective", "autoencoder"))
    reconstruction = adapt("--no_resume", "--objective", "reconstruction")
    assert same(reconstruction, adapt("--no_resume", "--use_diffusion_model"))


@pytest.mark.parametrize("objective", ["autoencoder", "ddad"])
@pytest.mark.parametrize("cls", [train_extractor.Options, train_tune_eval.Options])
def test_objectives_that_contradict_each_other_are_refused_before_any_work(cls, objective):
    with pytest.raises(UserError, match=f"--extractor_use_diff.*--objective {objective}") as error:
        parse(cls, ["--item", "x", "--extractor_use_diff", "--objective", objective])
    one_line(error)


@pytest.mark.parametrize("name, bad, good", [("extractor_weight", -0.1, 0), ("extractor_recon_weight", -1, 0),
                                             ("extractor_patience", -1, 0), ("extractor_weight", "nan", 0.5)])
def test_weights_and_patience_below_zero_are_refused(name, bad, good):
    expected = "expected a finite number" if bad == "nan" else "expected at least 0"
    with pytest.raises(UserError, match=f"--{name} {bad}.*{expected}") as error:
        check(parse(train_extractor.Options, ["--item", "x", f"--{name}={bad}"]))
    one_line(error)
    assert getattr(parse(train_extractor.Options, ["--item", "x", f"--{name}={good}"]), name) == good


@each_objective
def test_an_adaptation_that_was_stopped_goes_on_to_the_same_file(objective, adapt, monkeypatch, capsys):
    words = ("--objective", objective, "--epochs_extractor", 3)
    adapt(*words)
    unbroken, lines = (RUN / "extractor.pt").read_bytes(), log()
    for name in ("extractor.pt", "extractor_last.pt"):
        (RUN / name).unlink()
    advance, calls = loop._State.advance, iter(range(1, 100))

    def interrupting(state):
        advance(state)
        if next(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop._State, "advance", interrupting)
    with pytest.raises(SystemExit) as stop:
        adapt(*words)
    assert stop.value.code == 130 and not (RUN / "extractor.pt").exists()
    assert torch.load(RUN / "extractor_last.pt", weights_only=True)["step"] == 4
    adapt(*words)
    assert (RUN / "extractor.pt").read_bytes() == unbroken
    assert [line["val_loss"] for line in log()] == [line["val_loss"] for line in lines]


@pytest.mark.parametrize("objective, words, named", [
    ("ddad", "--extractor_weight 0.2", "--extractor_weight 0.1"),
    ("ddad", "--extractor_recon_weight 1", "--extractor_recon_weight 3.0"),
    ("reconstruction", "--recon_weight 1", "--recon_weight 2.0"),
    ("autoencoder", "--objective ddad", "--objective autoencoder"),
    ("autoencoder", "--extractor_patience 7", "--extractor_patience 3"),
])
def test_an_adaptation_is_not_gone_on_with_by_other_options(objective, words, named, adapt, capsys):
    adapt("--objective", objective)
    with pytest.raises(SystemExit):
        adapt("--objective", objective, *words.split())
    assert f"was trained with {named}" in capsys.readouterr().err.splitlines()[-1]


def test_options_of_another_objective_do_not_keep_an_adaptation_from_going_on(adapt):
    assert same(adapt(), adapt("--extractor_weight", 0.2, "--recon_weight", 1))


def test_weights_that_no_epoch_improves_on_are_kept_and_the_script_says_so(adapt, monkeypatch, capsys):
    rising = iter(range(100))
    monkeypatch.setattr(objectives, "held_out_losses", lambda *args: {"val_loss": float(next(rising))})
    after = adapt("--objective", "ddad", "--epochs_extractor", 9, "--extractor_patience", 2)
    assert same(after, build_extractor("efficientnet_lite0", resolution=32).state_dict())
    assert ("ddad: held-out loss 0 with the pretrained weights, no epoch was better, so they are kept; stopped "
            "after epoch 2") in capsys.readouterr().out
    assert [line["epoch"] for line in log()] == [1, 2]


def test_without_epochs_the_pretrained_weights_are_saved(adapt):
    assert same(adapt("--epochs_extractor", 0, "--objective", "ddad"),
                build_extractor("efficientnet_lite0", resolution=32).state_dict())


def test_patches_have_pairs_too(adapt, script, tiny_flags):
    script("train_ddim.py", *tiny_flags("train_ddim.py"), "--patching", "--no_resume")
    adapt("--objective", "ddad", "--patching")
    assert log()[0]["step"] == 4 * 9 // 4       # four crops of each of 9 images, in batches of 4


def test_the_objectives_are_those_of_the_script():
    field = next(f for f in dataclasses.fields(train_extractor.Options) if f.name == "objective")
    assert all(name in field.metadata["help"] for name in OBJECTIVES)
    for name in OBJECTIVES:
        assert parse(train_extractor.Options, ["--item", "x", "--objective", name]).objective == name


@pytest.mark.parametrize("given, batch_size, epochs", [((), 4, 45), ((), 2, 23), (("--epochs_extractor", 3), 4, 3)])
def test_few_images_are_seen_more_often_unless_the_length_is_given(given, batch_size, epochs, trained, tiny_flags,
                                                                  monkeypatch):
    """9 images to train on: to see 100 batches of 4 takes 45 epochs."""
    plans = []
    monkeypatch.setattr(loop, "fit", lambda *given, **others: plans.append(given[3]))
    monkeypatch.setattr("dbad.families.ddim.adaptation.outcome", lambda *args: "")
    flags = tiny_flags("train_extractor.py")
    place = flags.index("--epochs_extractor")
    words = [*flags[:place], *flags[place + 2:], "--batch_size", batch_size, "--preset", "demo", *given]
    train_extractor.run(parse(train_extractor.Options, words))
    assert plans[0].num_steps == epochs * plans[0].steps_per_epoch
