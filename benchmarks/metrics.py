"""Time, memory and error of the pixel metrics on drawn maps, on one processor core.

    python -m benchmarks.metrics            # 200 maps of 256x256, 120 of them with one to three defects
    python -m benchmarks.metrics --large    # and 100 maps of 1000x1000, a hundred million pixels

Prints, for each function, the median time of several runs and the memory that it needs at its peak beside the maps
and masks, then the largest difference between a metric of the histogram and the exact one.
"""

import argparse
import os
import statistics
import time
import tracemalloc

import numpy as np
from scipy import ndimage

from dbad.metrics import aupro, pixel_metrics

FUNCTIONS = {
    "aupro, limit 0.3": lambda masks, maps: aupro(masks, maps, limit=0.3),
    "aupro, limit 0.05": lambda masks, maps: aupro(masks, maps, limit=0.05),
    "pixel_metrics, exact": lambda masks, maps: pixel_metrics(masks, maps, method="exact"),
    "pixel_metrics, histogram": lambda masks, maps: pixel_metrics(masks, maps, method="histogram"),
}


def draw_maps(num_maps, num_defective, size, seed=0):
    """Smooth noise (num_maps, size, size) float32, raised on one to three discs in the first maps; masks are bool."""
    random = np.random.default_rng(seed)
    y, x = np.ogrid[:size, :size]
    masks = np.zeros((num_maps, size, size), bool)
    maps = np.empty(masks.shape, np.float32)
    for index in range(num_maps):
        for _ in range(random.integers(1, 4) if index < num_defective else 0):
            centre_y, centre_x = random.integers(0, size, 2)
            radius = random.integers(size // 64, size // 10)
            masks[index] |= (y - centre_y) ** 2 + (x - centre_x) ** 2 < radius ** 2
        noise = random.standard_normal((size, size), np.float32) + np.float32(0.35) * masks[index]
        maps[index] = ndimage.gaussian_filter(noise, 4)
    return masks, maps


def measure(function, masks, maps, repeats):
    """Median seconds of `repeats` runs, and the peak of memory in MB of one more."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function(masks, maps)
        seconds.append(time.perf_counter() - start)
    tracemalloc.start()
    function(masks, maps)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return statistics.median(seconds), peak / 1e6


def largest_error(masks, maps):
    """The largest absolute difference between the metrics of the histogram and the exact ones, and its name."""
    exact, histogram = (pixel_metrics(masks, maps, method) for method in ("exact", "histogram"))
    names = ["auroc", "ap", "f1_max", "aupro_0.3", "aupro_0.05"]
    return max((abs(histogram[name] - exact[name]), name) for name in names)


def report(num_maps, num_defective, size, repeats):
    """Print the table for one size of data set."""
    masks, maps = draw_maps(num_maps, num_defective, size)
    print(f"{num_maps} maps of {size}x{size}, {maps.size:,} pixels, {masks.mean():.1%} of them defective;")
    print(f"maps {maps.nbytes / 1e6:.0f} MB, masks {masks.nbytes / 1e6:.0f} MB, median of {repeats} runs on one core\n")
    print(f"    {'function':<26}{'seconds':>8}{'peak MB':>10}")
    for name, function in FUNCTIONS.items():
        seconds, peak_mb = measure(function, masks, maps, repeats)
        print(f"    {name:<26}{seconds:>8.2f}{peak_mb:>10.0f}", flush=True)
    error, name = largest_error(masks, maps)
    print(f"\n    largest error of the histogram: {error:.1e} ({name})\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="also measure a hundred million pixels; needs 4 GB")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each function")
    options = parser.parse_args(argv)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    report(num_maps=200, num_defective=120, size=256, repeats=options.repeats)
    if options.large:
        report(num_maps=100, num_defective=60, size=1000, repeats=options.repeats)


if __name__ == "__main__":
    main()
