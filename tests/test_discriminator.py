"""The discriminator: what it is told of a patch, that it learns, and that it is the same every time."""

import pytest
import torch
from torch.nn import functional as F

from dbad import metrics
from dbad.families.lafite.discriminator import LEAST, USUAL, Discriminator, evidence, train_discriminator

CHANNELS = (2, 3)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------ what it is told

def test_evidence_is_the_logarithm_of_every_distance():
    features, edited = normal(2, 5, 4, 4), normal(2, 5, 4, 4, seed=1)
    nearest, error = normal(2, 1, 4, 4, seed=2).exp(), normal(2, 1, 4, 4, seed=3).exp()
    found = evidence(features, edited, nearest, [error], CHANNELS).exp()
    squares = (features - edited).square()
    torch.testing.assert_close(found[:, :1], nearest)
    torch.testing.assert_close(found[:, 2:3] + found[:, 3:4], found[:, 1:2])        # the layers make up the whole
    torch.testing.assert_close(found[:, 3:4], squares[:, 2:].sum(dim=1, keepdim=True))
    torch.testing.assert_close(found[:, 4:], error)


def test_a_patch_of_the_bank_is_at_a_finite_distance():
    same = normal(1, 5, 2, 2)
    found = evidence(same, same, torch.zeros(1, 1, 2, 2), [torch.zeros(1, 1, 2, 2)], CHANNELS)
    assert found.shape == (1, 5, 2, 2) and torch.allclose(found.exp(), torch.tensor(LEAST))


def test_surprise_follows_the_log_odds_and_is_positive():
    torch.manual_seed(0)
    net, known = Discriminator(3), normal(2, 3, 6, 6)
    odds = net(known).mean(dim=1, keepdim=True)
    assert net(known).shape == (2, 2, 6, 6) and net.surprise(known).min() > 0
    assert torch.equal(net.surprise(known).flatten().argsort(), odds.flatten().argsort())
    net.usual.fill_(-30.0)
    torch.testing.assert_close(net.surprise(known), odds + 30)              # far above the usual ones: the difference


def test_one_branch_sees_the_patch_alone_and_one_its_neighbours():
    torch.manual_seed(0)
    net, known = Discriminator(3), normal(1, 3, 9, 9)
    changed = known.clone()
    changed[..., 4, 4] += 1
    alone, around = (net(known) != net(changed))[0].unbind()
    assert alone.nonzero().tolist() == [[4, 4]] and around.sum() == 25      # two convolutions of 3x3


# ------------------------------------------------------------------------------------------ what it learns

def drawn(count, seed):
    """Evidence of three planes: one tells damage, one is large where damage is told falsely, one is noise."""
    known, masks = normal(count, 3, 8, 8, seed=seed), torch.zeros(count, 1, 32, 32)
    for index in range(count):
        row, column = index % 6, index // 6 % 6
        masks[index, :, 4 * row:4 * row + 8, 4 * column:4 * column + 8] = 1
    rough = (normal(count, 1, 8, 8, seed=seed + 50) > 1).float()
    known[:, :1] += 4 * F.max_pool2d(masks, 4) + 4 * rough
    known[:, 1:2] = 0.3 * known[:, 1:2] + rough
    return known, masks


@pytest.fixture(scope="module")
def judged():
    good, (damaged, masks) = drawn(12, 1)[0] * 0, drawn(36, 2)
    good = drawn(12, 1)[0] - 4 * F.max_pool2d(drawn(12, 1)[1], 4) * torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
    return good, damaged, masks, train_discriminator(good, damaged, masks, 0, steps=150)


def test_it_learns_which_plane_tells_and_which_one_explains_it_away(judged):
    net, (known, masks) = judged[-1], drawn(36, 3)
    labels = F.max_pool2d(masks, 4).numpy()
    scores = [metrics.auroc(labels.ravel(), maps.numpy().ravel()) for maps in (net.surprise(known), known[:, :1])]
    assert scores[0] > 0.98 and scores[0] > scores[1] + 0.05


def test_evidence_is_standardised_by_that_of_good_images(judged):
    good, damaged, _, net = judged
    torch.testing.assert_close(net.mean, good.mean(dim=(0, 2, 3)))
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    shifted = train_discriminator(good + 5, damaged + 5, judged[2], 0, steps=5)
    plain = train_discriminator(good, damaged, judged[2], 0, steps=5)
    torch.testing.assert_close(shifted.surprise(damaged + 5), plain.surprise(damaged), rtol=1e-3, atol=1e-4)


def test_almost_all_good_patches_are_usual(judged):
    good, *_, net = judged
    assert float((net.log_odds(good) < net.usual).float().mean()) == pytest.approx(USUAL, abs=0.002)


def test_the_same_seed_gives_the_same_weights_and_leaves_other_random_numbers_alone(judged):
    good, damaged, masks, _ = judged
    torch.manual_seed(7)
    one = train_discriminator(good, damaged, masks, 0, steps=3)
    drawn_after = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(1), drawn_after)
    two, other = (train_discriminator(good, damaged, masks, seed, steps=3) for seed in (0, 1))
    assert torch.equal(one.surprise(damaged), two.surprise(damaged))
    assert not torch.equal(one.surprise(damaged), other.surprise(damaged))


def test_masks_coarser_than_the_patches_are_enough():
    known = normal(4, 2, 16, 16)
    net = train_discriminator(known, known + 1, torch.ones(4, 1, 8, 8), 0, steps=2)
    assert net.surprise(known).isfinite().all()


def test_a_plane_that_never_changes_does_no_harm():
    known = torch.cat([normal(4, 1, 8, 8), torch.zeros(4, 1, 8, 8)], dim=1)
    assert train_discriminator(known, known, torch.ones(4, 1, 8, 8), 0, steps=2).surprise(known).isfinite().all()
