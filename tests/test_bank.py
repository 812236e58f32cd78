"""The memory bank: the core-set and its guarantee, exact neighbours, feature editing, budget and balance."""

from itertools import combinations

import numpy as np
import pytest
import torch
from helpers import CPU, one_line

from dbad.checkpoints.weights import save_pickle
from dbad.errors import UserError
from dbad.families.lafite import bank as bank_module
from dbad.families.lafite.bank import Bank, build_bank, coreset, load_bank, save_bank, shares, standardised_patches
from dbad.networks.features import Standardisation, to_patches

ABOUT = {"backbone": "resnet18", "weights": "0123", "layers": [1, 2], "grid": 2}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_greedy(vectors, count, first):
    """Greedy k-centre as it is written down, in float64."""
    chosen = [first]
    while len(chosen) < count:
        nearest = torch.cdist(vectors.double(), vectors[chosen].double()).amin(dim=1)
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    return chosen


def radius(vectors, chosen):
    return float(torch.cdist(vectors.double(), vectors[chosen].double()).amin(dim=1).max())


# ------------------------------------------------------------------------------------------ core-set

@pytest.mark.parametrize("candidates", [1, 2, 16, 100, 2048])
def test_choices_that_share_a_pass_are_those_of_the_plain_algorithm(monkeypatch, candidates):
    monkeypatch.setattr(bank_module, "_CANDIDATES", candidates)
    vectors = normal(300, 6) * torch.tensor([5, 3, 1, 1, 0.3, 0.1])
    chosen = coreset(vectors, 120, seed=0).tolist()
    assert chosen == plain_greedy(vectors, 120, chosen[0])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_covering_radius_is_at_most_twice_the_best_possible(seed, count):
    vectors = normal(10, 2, seed=seed)
    best = min(radius(vectors, list(chosen)) for chosen in combinations(range(10), count))
    assert radius(vectors, coreset(vectors, count, seed)) <= 2 * best * (1 + 1e-6)


@pytest.mark.parametrize("candidates", [4, 2048])
def test_of_equals_the_first_is_chosen(monkeypatch, candidates):
    """Ten times the same two vectors: after one of each, all others are as near as can be."""
    monkeypatch.setattr(bank_module, "_CANDIDATES", candidates)
    vectors = torch.tensor([[1.0, 2.0], [-1.0, -2.0]]).repeat(10, 1)
    first, second, *others = coreset(vectors, 20, seed=0).tolist()
    assert second == 1 - first % 2
    assert others == sorted(set(range(20)) - {first, second})


def test_as_many_as_there_are_is_every_vector_once():
    assert sorted(coreset(normal(50, 3), 50, seed=0).tolist()) == list(range(50))


def test_every_cluster_is_found_in_spite_of_the_projection():
    centres = 100 * normal(30, 500)
    vectors = (centres.repeat(20, 1) + normal(600, 500, seed=1))
    assert sorted(i % 30 for i in coreset(vectors, 30, seed=0, projected_dim=16).tolist()) == list(range(30))


def test_the_choice_follows_from_the_seed():
    vectors = normal(200, 150)
    first, again, other = (coreset(vectors, 20, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_vectors_are_not_changed():
    vectors = normal(20, 4) + 7
    before = vectors.clone()
    coreset(vectors, 5, seed=0)
    assert torch.equal(vectors, before)


def test_progress_is_shown_on_request(capsys):
    coreset(normal(20, 4), 5, seed=0)
    assert capsys.readouterr().err == ""
    coreset(normal(20, 4), 5, seed=0, progress="memory bank, bolt")
    shown = capsys.readouterr().err
    assert "memory bank, bolt" in shown and "5/5" in shown


@pytest.mark.parametrize("count", [0, 21])
def test_more_vectors_than_there_are_or_none_are_refused(count):
    with pytest.raises(ValueError, match=f"count {count}"):
        coreset(normal(20, 4), count, seed=0)


# ------------------------------------------------------------------------------------------ neighbours

def made(vectors):
    return Bank(vectors, {"bolt": len(vectors)}, ABOUT)


@pytest.mark.parametrize("blocks", [(128, 1024), (7, 13), (64, 1)])
@pytest.mark.parametrize("group", [16, 7, 1])
@pytest.mark.parametrize("k", [1, 4, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_neighbours_are_those_of_an_exhaustive_search_in_float64(monkeypatch, blocks, group, k, dtype):
    monkeypatch.setitem(bank_module._SEARCHED, "cpu", blocks)
    monkeypatch.setattr(bank_module, "_GROUP", group)
    vectors, queries = normal(150, 9).to(dtype), normal(30, 9, seed=1)
    distances, indices = made(vectors).nearest(queries, k)
    expected, order = torch.cdist(queries.double(), vectors.double()).sort(dim=1)
    assert distances.shape == indices.shape == (30, k) and distances.dtype == torch.float32
    assert torch.equal(indices, order[:, :k])
    torch.testing.assert_close(distances.double(), expected[:, :k], rtol=1e-6, atol=1e-6)


def test_far_from_the_origin_a_vector_is_still_its_own_neighbour_at_distance_zero():
    """|a|^2 + |b|^2 - 2 a b alone would lose it in rounding."""
    vectors = normal(40, 16) + 100
    distances, indices = made(vectors).nearest(vectors, 2)
    assert torch.equal(indices[:, 0], torch.arange(40)) and (distances[:, 0] == 0).all() and (distances[:, 1] > 0).all()


def test_of_equally_near_ones_the_lower_index_comes_first():
    vectors = normal(4, 5).repeat(3, 1)
    distances, indices = made(vectors).nearest(vectors[:4] * 1.01, 3)
    assert torch.equal(indices, torch.arange(4).unsqueeze(1) + torch.tensor([0, 4, 8]))
    assert (distances == distances[:, :1]).all()


def test_neighbours_do_not_depend_on_the_other_queries():
    bank, queries = made(normal(300, 20)), normal(40, 20, seed=1)
    distances, indices = bank.nearest(queries, 3)
    for i in (0, 17, 39):
        alone, found = bank.nearest(queries[i:i + 1], 3)
        assert torch.equal(found[0], indices[i]) and torch.equal(alone[0], distances[i])


def test_autocast_does_not_make_the_search_coarse():
    bank, queries = made(normal(300, 20)), normal(40, 20, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        distances, indices = bank.nearest(queries, 3)
        chosen = coreset(bank.vectors, 50, seed=0)
    expected = bank.nearest(queries, 3)
    assert torch.equal(indices, expected[1]) and torch.equal(distances, expected[0])
    assert torch.equal(chosen, coreset(bank.vectors, 50, seed=0))


@pytest.mark.parametrize("k", [0, 6])
def test_more_neighbours_than_the_bank_has_are_refused(k):
    with pytest.raises(UserError) as error:
        made(normal(5, 3)).nearest(normal(2, 3), k)
    assert f"{k} neighbours" in one_line(error) and "1 to 5" in one_line(error) and "--bank_mb" in one_line(error)


def test_features_of_another_width_are_refused():
    with pytest.raises(UserError) as error:
        made(normal(5, 3)).edit(normal(2, 4), 1, 1.0)
    assert "(2, 4)" in one_line(error) and "3 channels" in one_line(error)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu_it_is_the_same():
    vectors, queries = normal(5000, 200), normal(100, 200, seed=1)
    assert torch.equal(coreset(vectors.cuda(), 500, seed=0), coreset(vectors, 500, seed=0))
    bank = made(vectors.half())
    (distances, indices), (there, found) = bank.nearest(queries, 3), bank.to("cuda").nearest(queries.cuda(), 3)
    assert torch.equal(found.cpu(), indices)
    torch.testing.assert_close(there.cpu(), distances)


# ------------------------------------------------------------------------------------------ feature editing

def test_an_edited_patch_is_the_weighted_mean_of_its_neighbours():
    """Two neighbours at distances 1 and 2, tau 3: weights e^(-1/3) and e^(-4/3)."""
    bank = made(torch.tensor([[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]))
    weight = 1 / (1 + np.exp(-1))
    torch.testing.assert_close(bank.edit(torch.zeros(1, 2), 2, 3.0), torch.tensor([[weight, 2 * (1 - weight)]]).float())


def test_small_tau_gives_the_nearest_and_large_tau_the_plain_mean():
    vectors, queries = normal(30, 5), normal(8, 5, seed=1)
    bank = made(vectors)
    indices = bank.nearest(queries, 4)[1]
    torch.testing.assert_close(bank.edit(queries, 4, 1e-30), vectors[indices[:, 0]])
    torch.testing.assert_close(bank.edit(queries, 4, 1e30), vectors[indices].mean(dim=1))


@pytest.mark.parametrize("queries_at_once", [3, 512])
def test_a_patch_of_the_bank_stays_as_it_is_with_one_neighbour(monkeypatch, queries_at_once):
    monkeypatch.setattr(bank_module, "_QUERIES", queries_at_once)
    vectors = normal(30, 5)
    assert torch.equal(made(vectors).edit(vectors, 1, 1.0), vectors)


def test_the_edit_does_not_depend_on_the_scale_of_the_features():
    vectors, queries, held_out = normal(30, 5), normal(8, 5, seed=1), normal(20, 5, seed=2)
    bank, scaled = made(vectors), made(vectors * 8)
    edited = scaled.edit(queries * 8, 3, scaled.temperature(held_out * 8))
    torch.testing.assert_close(edited, 8 * bank.edit(queries, 3, bank.temperature(held_out)))


def test_the_temperature_is_the_median_squared_distance_to_the_nearest():
    bank = made(torch.tensor([[0.0, 0.0], [100.0, 0.0]]))
    assert bank.temperature(torch.tensor([[1.0, 0.0], [98.0, 0.0], [0.0, 7.0]])) == 4
    assert bank.edit(bank.vectors, 2, bank.temperature(bank.vectors)).equal(bank.vectors)      # 0 would divide by 0


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(tau):
    with pytest.raises(ValueError, match="tau"):
        made(normal(5, 3)).edit(normal(2, 3), 1, tau)


# ------------------------------------------------------------------------------------------ budget and balance

def good(*counts, channels=6):
    """Features by category: `counts` images of 2x2 patches each."""
    return {f"part{i}": normal(count, channels, 2, 2, seed=i).half().numpy() + i for i, count in enumerate(counts)}


def build(features, bank_mb, seed=0):
    return build_bank(features, Standardisation.fit(features.values()), bank_mb, seed, ABOUT, CPU, show_progress=False)


def mb(num_vectors, channels=6):
    return num_vectors * channels * 2 / 1e6


@pytest.mark.parametrize("available, capacity, expected", [
    ([100, 100, 100], 30, [10, 10, 10]), ([100, 100, 100], 31, [11, 10, 10]), ([100, 4, 100], 30, [13, 4, 13]),
    ([5, 4, 3], 100, [5, 4, 3]), ([1, 100, 2], 6, [1, 3, 2]), ([7], 3, [3])])
def test_every_category_gets_its_share(available, capacity, expected):
    names = [f"part{i}" for i in range(len(available))]
    assert shares(dict(zip(names, available, strict=True)), capacity) == dict(zip(names, expected, strict=True))


@pytest.mark.parametrize("num_vectors", [3, 10, 40, 1000])
def test_the_bank_stays_within_its_budget_and_uses_it(num_vectors):
    features = good(10, 20, 15)
    bank = build(features, mb(num_vectors) + 1e-6)
    assert len(bank.vectors) == sum(bank.counts.values()) == min(num_vectors, 4 * 45)
    assert bank.vectors.nbytes <= 1e6 * mb(num_vectors) and bank.vectors.dtype == torch.float16
    assert bank.features == ABOUT


def test_each_vector_is_a_standardised_patch_of_its_category_and_none_comes_twice():
    features = good(10, 2, 15)
    fitted = Standardisation.fit(features.values())
    bank = build(features, mb(40))
    assert list(bank.counts) == list(features) and bank.counts == {"part0": 16, "part1": 8, "part2": 16}
    for part, vectors in zip(features.values(), bank.vectors.split(list(bank.counts.values())), strict=True):
        patches = to_patches(fitted.apply(torch.from_numpy(part))).half()
        same = (vectors.unsqueeze(1) == patches.unsqueeze(0)).all(dim=2)
        assert (same.sum(dim=1) == 1).all() and (same.sum(dim=0) <= 1).all()


def test_a_category_that_fits_is_kept_whole_in_its_order():
    features = good(40)
    patches = standardised_patches(features["part0"], Standardisation.fit(features.values()), CPU)
    assert len(patches) == 160 and torch.equal(build(features, 1.0).vectors, patches)


def test_the_bank_follows_from_the_seed():
    first, again, other = (build(good(10, 20), mb(12), seed).vectors for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_budget_too_small_for_one_vector_per_category_is_refused():
    with pytest.raises(UserError) as error:
        build(good(2, 2, 2, 2), mb(3))
    assert "--bank_mb 3.6e-05" in one_line(error) and "room for 3 vectors of 6 channels" in one_line(error)
    assert "4 categories" in one_line(error) and "4.8e-05 MB" in one_line(error)
    assert build(good(2, 2, 2, 2), 4.8e-05).counts == dict.fromkeys(good(2, 2, 2, 2), 1)


# ------------------------------------------------------------------------------------------ on the disk

def test_a_saved_bank_gives_the_same_neighbours(tmp_path):
    bank = build(good(10, 20), mb(12))
    save_bank(bank, tmp_path / "bank.pt")
    loaded = load_bank(tmp_path / "bank.pt", ABOUT)
    assert torch.equal(loaded.vectors, bank.vectors)
    assert (loaded.counts, loaded.features) == (bank.counts, bank.features)


@pytest.mark.parametrize("changed", [{"backbone": "resnet34"}, {"weights": "4567"}, {"layers": [1]}, {"smoothing": 3}])
def test_a_bank_of_other_features_is_refused(tmp_path, changed):
    save_bank(made(normal(5, 3)), tmp_path / "bank.pt")
    with pytest.raises(UserError) as error:
        load_bank(tmp_path / "bank.pt", ABOUT | changed)
    (name, value), = changed.items()
    assert all(text in one_line(error) for text in (str(tmp_path / "bank.pt"), name, str(value), str(ABOUT.get(name))))


def test_a_file_that_is_no_bank_is_told(tmp_path):
    save_pickle({"vectors": normal(5, 3)}, tmp_path / "bank.pt")
    with pytest.raises(UserError) as error:
        load_bank(tmp_path / "bank.pt", ABOUT)
    assert f"{tmp_path / 'bank.pt'}: not a memory bank" in one_line(error)
