"""Where a training step spends its time: the share outside the network's forward, backward and optimiser.

    python -m benchmarks.training_loop

Draws batches as training does (augmentation on, both noise kinds) and sets their median time against that of the
network's step, for the networks of the presets demo and small, on the CPU.
"""

import statistics
import time

import torch

import train_ddim
from dbad.diffusion.batches import NoisedImages, denoising_loss
from dbad.diffusion.ddim import schedule
from dbad.families.ddim.training import new_network
from dbad.options.resolve import resolve
from dbad.runtime.device import pick_precision

REPEATS = 7


def seconds(function) -> float:
    """Median time of a call, after one that is not counted."""
    times = []
    for _ in range(REPEATS + 1):
        begun = time.perf_counter()
        function()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def main() -> None:
    precision = pick_precision("auto", torch.device("cpu"))
    print(f"{torch.get_num_threads()} threads, {precision}\n\n| preset | noise | batch, ms | network, ms | share |")
    print("|---|---|---|---|---|")
    for name in ("demo", "small"):
        options = resolve(train_ddim.Options(item="bench", preset=name))
        size, batch_size = options.resolution, options.batch_size
        unet = new_network(options)
        optimizer = torch.optim.AdamW(unet.parameters())
        images = list(torch.randint(0, 256, (16, 3, size, size), dtype=torch.uint8))
        abar = schedule(1000, "linear")
        for kind in ("gaussian", "simplex"):
            data = NoisedImages(images, 0, "train", batch_size, kind, options.max_timestep, flip=True, rotate=10.0,
                                color_jitter=0.1)
            wanted = [(0, slot, slot) for slot in range(batch_size)]
            batch = data.__getitems__(wanted)

            def step(batch=batch, unet=unet, optimizer=optimizer, abar=abar):
                denoising_loss(unet, batch, abar, precision).backward()
                optimizer.step()
                optimizer.zero_grad()

            drawing, network = seconds(lambda data=data, wanted=wanted: data.__getitems__(wanted)), seconds(step)
            share = drawing / (drawing + network)
            print(f"| {name} | {kind} | {drawing * 1e3:.1f} | {network * 1e3:.0f} | {share:.1%} |", flush=True)


if __name__ == "__main__":
    main()
