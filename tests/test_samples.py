"""Sample pictures of a training."""

import numpy as np
import pytest
import torch

from dbad.data.images import to_pixels
from dbad.training.samples import GAP, LABEL, labelled_rows


@pytest.mark.parametrize(("size", "side"), [(16, 128), (64, 128), (100, 200), (256, 256)])
def test_sample_pictures_are_large_enough_to_see_and_stand_under_the_name_of_their_row(size, side):
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sheet = labelled_rows({"image": images, "reconstruction": -images})
    step = side + GAP
    assert sheet.shape == (2 * (step + LABEL), 3 * step + GAP, 3)
    second = sheet[LABEL:LABEL + side, GAP + step:GAP + step + side]
    np.testing.assert_array_equal(second[::side // size, ::side // size], to_pixels(images[1]))
    for top in (0, step + LABEL):
        assert (sheet[top:top + LABEL] < 100).any(), "the name of the row"
