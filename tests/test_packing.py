"""Models made ready to infer give what they gave before."""

import pytest
import torch
from helpers import CPU
from torch import nn

from dbad.networks.packing import PackedConv2d, ready
from dbad.runtime.device import packs_weights

HOWS = [dict(padding=1), dict(stride=2), dict(padding=(0, 1), kernel_size=(1, 3)), dict(groups=4), dict(dilation=2),
        dict(bias=False)]


class Doubled(nn.Conv2d):
    """A convolution of another kind, which has to stay what it is."""

    def forward(self, x):
        return 2 * super().forward(x)


def net_of(**how) -> nn.Sequential:
    torch.manual_seed(0)
    how = {"kernel_size": 3} | how
    return nn.Sequential(nn.Conv2d(8, 16, **how), nn.SiLU(), nn.Sequential(nn.Conv2d(16, 4, 1)))


@pytest.mark.skipif(not packs_weights(CPU), reason="this processor does not compute in bf16")
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_packed_convolutions_give_what_they_gave(how):
    shapes = (2, 8, 12, 12), (1, 8, 20, 16)         # the second after the weights were packed for the first
    images = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in shapes]
    plain = net_of(**how).bfloat16()
    expected = [plain(image.bfloat16()) for image in images]
    packed = ready(net_of(**how), CPU, "bf16")
    assert isinstance(packed[0], PackedConv2d) and isinstance(packed[2][0], PackedConv2d)
    for image, wanted in zip(images, expected, strict=True):
        found = packed(image)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(not packs_weights(CPU), reason="this processor does not compute in bf16")
def test_packed_weights_are_there_once():
    packed = ready(net_of(), CPU, "bf16")
    packed(torch.zeros(1, 8, 8, 8))
    assert not any(name.endswith("weight") for name in packed.state_dict())
    assert all(parameter is None or not parameter.requires_grad for parameter in packed.parameters())


def test_convolutions_of_another_kind_stay_what_they_are():
    net = nn.Sequential(Doubled(3, 3, 1), nn.Conv2d(3, 3, 3, padding="same"),
                        nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"))
    assert [type(part) for part in ready(net, CPU, "bf16")] == [Doubled, nn.Conv2d, nn.Conv2d]


def test_in_float32_nothing_changes_but_the_order_in_memory():
    plain, x = net_of(), torch.randn(1, 8, 9, 9)
    expected = plain(x)
    same = ready(plain, CPU, "fp32")
    assert same is plain and type(same[0]) is nn.Conv2d
    torch.testing.assert_close(same(x), expected)
