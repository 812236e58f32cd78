"""Memory and time of the diad family: build, save, load and score one image, on one device.

    python -m benchmarks.diad_size --size sd15 --out diad_size        (2.8 GB of random bf16 weights)
    python -m benchmarks.diad_size --size tiny --out diad_size

Building and scoring run in a process each, so that their peaks are their own. An image is reconstructed in ten steps
and scored with the features of a ResNet-50. The published code guides between two predictions whose inputs are the
same, one after the other; "guided" is the time with that second pass, which changes nothing. "published" is the time
of the same weights as the published code uses them: guided, the image's hint embedded again for every prediction, the
weights as they were loaded. The seconds of the noise predictions are told apart from those of the auto-encoder and the
features.
"""

import argparse
import copy
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dbad.diffusion.noise import image_stream
from dbad.families.diad.model import SIZES, Diad, random_diad
from dbad.families.diad.reconstruction import anomaly_map, image_score, reconstruct
from dbad.families.diad.storage import load_diad, save_diad
from dbad.files.names import MODEL_CONFIG
from dbad.networks.extractors import build_extractor
from dbad.networks.packing import ready
from dbad.runtime.device import pick_device

FORMATS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build(options: argparse.Namespace, results) -> None:
    """Build and save the model; puts seconds of both and the peak of memory."""
    begun = time.monotonic()
    torch.manual_seed(0)
    model = random_diad(SIZES[options.size], FORMATS[options.weights])
    built = time.monotonic()
    save_diad(model, options.out)
    results.put((built - begun, time.monotonic() - built, peak_gb()))


def score(options: argparse.Namespace, results) -> None:
    """Load the model and score an image, plainly and guided; puts seconds of each, and the peak of memory."""
    begun = time.monotonic()
    device = pick_device(options.device)
    model = ready(load_diad(options.out, FORMATS[options.weights]), device, options.weights)
    loaded = time.monotonic() - begun
    image, extractor = subject(model, device)
    plain = seconds(model, image, extractor, options.repeats)
    results.put((loaded, *plain, *seconds(guided(model), image, extractor, options.repeats), peak_gb()))


def score_published(options: argparse.Namespace, results) -> None:
    """Score an image as the published code does; puts seconds."""
    device = pick_device(options.device)
    model = load_diad(options.out, FORMATS[options.weights]).to(device)
    image, extractor = subject(model, device)
    results.put(seconds(guided(model, image), image, extractor, options.repeats))


def subject(model: Diad, device: torch.device) -> tuple[torch.Tensor, torch.nn.Module]:
    """An image and the backbone that compares it."""
    image = torch.rand(1, 3, model.resolution, model.resolution).to(device) * 2 - 1
    return image, build_extractor("resnet50", pretrained=False).to(device)


def guided(model: Diad, image: torch.Tensor | None = None, scale: float = 9.0) -> Diad:
    """The same model, predicting every noise twice, as classifier-free guidance does; each time with a new hint of
    `image`, if one is given.
    """
    @torch.no_grad()
    def predict(z_t, t, hint):
        return model.predict_noise(z_t, t, hint if image is None else model.hint(image))

    def predict_noise(z_t, t, hint):
        one, other = predict(z_t, t, hint), predict(z_t, t, hint)
        return one + scale * (other - one)
    twice = copy.copy(model)
    twice.predict_noise = predict_noise
    return twice


def seconds(model: Diad, image: torch.Tensor, extractor: torch.nn.Module, repeats: int) -> tuple[float, float]:
    """Least seconds of a reconstruction with its score, after one that is not counted, and of its noise predictions."""
    timed, predicting, found = copy.copy(model), [], []

    def predict_noise(z_t, t, hint):
        begun = time.monotonic()
        eps = model.predict_noise(z_t, t, hint).cpu()       # waits for a GPU
        predicting[-1] += time.monotonic() - begun
        return eps.to(z_t.device)
    timed.predict_noise = predict_noise
    for _ in range(repeats + 1):
        predicting.append(0.0)
        begun = time.monotonic()
        rebuilt = reconstruct(timed, image, [image_stream(0, image[0])])
        float(image_score(anomaly_map(extractor, image, rebuilt)))
        found.append(time.monotonic() - begun)
    return min(zip(found[1:], predicting[1:], strict=True))


def peak_gb() -> float:
    """Largest resident memory of this process so far; pages of mapped files count in it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def alone(work: Callable, options: argparse.Namespace) -> tuple[float, ...]:
    """What `work` puts, from a process of its own."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=work, args=(options, results))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{work.__name__} failed with status {process.exitcode}")
    return results.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights; a model there is used again")
    parser.add_argument("--size", choices=SIZES, default="sd15")
    parser.add_argument("--weights", choices=FORMATS, default="bf16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=2, help="timed images, after one that is not")
    options = parser.parse_args()
    options.out = options.out / f"{options.size}_{options.weights}"
    print(f"{options.size}, {options.weights}, {pick_device(options.device)}, {torch.get_num_threads()} threads")
    if not (options.out / MODEL_CONFIG).is_file():
        built, saved, peak = alone(build, options)
        print(f"build {built:.1f} s, save {saved:.1f} s, peak {peak:.2f} GB")
    loaded, plain, predicting, twice, predicting_twice, peak = alone(score, options)
    print(f"load {loaded:.1f} s, {plain:.2f} s per image ({predicting:.2f} s noise predictions), guided {twice:.2f} s "
          f"({predicting_twice:.2f} s), peak {peak:.2f} GB", flush=True)
    published, predicting = alone(score_published, options)
    print(f"published {published:.2f} s ({predicting:.2f} s)")


if __name__ == "__main__":
    main()
