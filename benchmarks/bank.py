"""Time and quality of the memory bank on drawn features of 192 channels, on one processor core.

    python -m benchmarks.bank               # core-set and search; faiss and scikit-learn take part where installed
    python -m benchmarks.bank --memory      # peak of memory for 15 categories of 250 images; draws 1.5 GB of features

Seconds are processor time, medians of several runs, so that other work on the machine counts little. The covering
radius is the largest distance of a vector to the nearest chosen one, among the vectors themselves (not projected).
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors

from dbad.families.lafite.bank import Bank, build_bank, coreset
from dbad.networks.features import Standardisation

CHANNELS, QUERIES, NEIGHBOURS = 192, 1024, 3


def draw(num_vectors, seed=0):
    """(num_vectors, 192) float32, standardised: a curved surface of 12 dimensions in clusters, with some noise."""
    random = torch.Generator().manual_seed(0)
    clusters, into = torch.randn(40, 12, generator=random) * 2, torch.randn(12, CHANNELS, generator=random)
    random.manual_seed(seed)
    latent = clusters[torch.randint(40, (num_vectors,), generator=random)]
    latent = latent + torch.randn(num_vectors, 12, generator=random)
    vectors = torch.tanh(latent @ into / 6) + 0.1 * torch.randn(num_vectors, CHANNELS, generator=random)
    return (vectors - vectors.mean(0)) / vectors.std(0)


def seconds(function, repeats):
    """Median processor seconds of a call, after one that is not counted where there are several, and its result."""
    times = []
    for _ in range(repeats + (repeats > 1)):
        begun = time.process_time()
        result = function()
        times.append(time.process_time() - begun)
    return statistics.median(times[-repeats:]), result


def plain_greedy(vectors, count, seed):
    """Greedy k-centre as it is written down: one pass over all vectors for each choice."""
    points = coreset_points(vectors, seed)
    chosen = [int(coreset(vectors, 1, seed))]
    nearest = torch.full((len(points),), torch.inf)
    while len(chosen) < count:
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
        chosen.append(int(nearest.argmax()))
    return torch.tensor(chosen)


def coreset_points(vectors, seed, dim=128):
    """A random projection as `coreset` makes one, of its own random numbers."""
    return vectors @ torch.randn(vectors.shape[1], dim, generator=torch.Generator().manual_seed(seed)) / dim ** 0.5


def radius(vectors, chosen):
    """Covering radius of the vectors `chosen`."""
    return float(Bank(vectors[chosen], {}, {}).nearest(vectors, 1)[0].max())


def report_coreset(repeats):
    """Print time and covering radius of the core-set, the plain algorithm and a random choice."""
    print("core-set\n\n| vectors | chosen | by | seconds | radius |\n|---|---|---|---|---|")
    vectors = draw(20_000)
    choices = {"coreset": lambda: coreset(vectors, 2000, 0),
               "one pass per choice": lambda: plain_greedy(vectors, 2000, 0),
               "at random": lambda: torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:2000]}
    for name, choose in choices.items():
        taken, chosen = seconds(choose, repeats)
        print(f"| 20 000 | 2000 | {name} | {taken:.1f} | {radius(vectors, chosen):.2f} |", flush=True)
    vectors = draw(200_000)
    taken, _ = seconds(lambda: coreset(vectors, 16_000, 0), 1)
    print(f"| 200 000 | 16 000 | coreset | {taken:.1f} | |\n", flush=True)


def searches(vectors):
    """Ways to find the nearest of `vectors`, each a function of queries -> indices."""
    half, full = Bank(vectors.half(), {}, {}), Bank(vectors, {}, {})
    brute = NearestNeighbors(algorithm="brute").fit(vectors.numpy())
    found = {
        "Bank, float16": lambda q: half.nearest(q, NEIGHBOURS)[1],
        "Bank, float32": lambda q: full.nearest(q, NEIGHBOURS)[1],
        "scikit-learn": lambda q: torch.from_numpy(brute.kneighbors(q.numpy(), NEIGHBOURS)[1]),
        "bfloat16 product": lambda q: (vectors.square().sum(1) - 2 * (q.bfloat16() @ vectors.bfloat16().T)).topk(
            NEIGHBOURS, largest=False).indices}
    try:
        import faiss
    except ImportError:
        return found
    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatL2(CHANNELS)
    index.add(vectors.numpy())
    return found | {"faiss-cpu": lambda q: torch.from_numpy(index.search(q.numpy(), NEIGHBOURS)[1])}


def report_search(repeats):
    """Print time of the search, and how often and by how much its first neighbour is not the nearest."""
    print(f"{NEIGHBOURS} nearest of {QUERIES} queries\n")
    print("| vectors | by | seconds | not the nearest | farther by at most |\n|---|---|---|---|---|")
    for num_vectors in (16_000, 64_000):
        vectors, queries = draw(num_vectors, seed=1), draw(QUERIES, seed=2)
        exact = torch.cdist(queries.double(), vectors.double())
        for name, search in searches(vectors).items():
            taken, found = seconds(lambda search=search, queries=queries: search(queries), repeats)
            excess = exact.gather(1, found[:, :1])[:, 0] / exact.amin(1) - 1
            print(f"| {num_vectors} | {name} | {taken:.3f} | {float((excess > 0).double().mean()):.2%} | "
                  f"{float(excess.max()):.1e} |", flush=True)


def report_memory(bank_mb, num_categories=15, num_images=250, grid=32):
    """Print the peak of memory of standardising and building a bank from features on the disk."""
    import resource
    with tempfile.TemporaryDirectory() as folder:
        shape = (num_images, CHANNELS, grid, grid)
        random = np.random.default_rng(0)
        for index in range(num_categories):
            with open(Path(folder) / f"{index}.npy", "wb") as file:
                np.lib.format.write_array_header_1_0(
                    file, {"descr": "<f2", "fortran_order": False, "shape": shape})
                for _ in range(num_images):
                    file.write(random.standard_normal(shape[1:], np.float32).astype("<f2").tobytes())
        features = {str(i): np.load(Path(folder) / f"{i}.npy", mmap_mode="r") for i in range(num_categories)}
        begun = time.process_time()
        standardisation = Standardisation.fit(features.values())
        bank = build_bank(features, standardisation, bank_mb, 0, {}, torch.device("cpu"))
    taken, peak = time.process_time() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{num_categories} categories of {num_images} images, {num_categories * np.prod(shape) * 2 / 1e9:.2f} GB of "
          f"features; bank of {len(bank.vectors)} vectors, {bank_mb:g} MB: {taken:.0f} s, peak {peak / 1e6:.2f} GB, "
          "mapped files included")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--bank_mb", type=float, default=8.0, help="budget of the bank in the measurement of memory")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each function")
    options = parser.parse_args(argv)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    if options.memory:
        report_memory(options.bank_mb)
    else:
        report_search(options.repeats)
        print()
        report_coreset(options.repeats)


if __name__ == "__main__":
    main()
