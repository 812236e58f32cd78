"""Not-a-number is never good: whoever meets it says which image it is of, and goes no further."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import CPU, MACHINE, SETTINGS, one_line, random_images, rows_of, save_drawn, tiny_detector

from dbad.calibration.thresholds import Calibration, calibrate
from dbad.errors import UserError
from dbad.families.ddim.search import DdimSearch
from dbad.families.detector import Detector
from dbad.families.registry import FAMILIES
from dbad.families.search import combined, pseudo_validation
from dbad.finite import NotFinite, check_finite, naming
from dbad.inspection.loop import inspect_samples
from dbad.inspection.new_images import inspect_new
from dbad.networks.extractors import build_extractor
from dbad.networks.unet import build_unet
from dbad.records import Sample


@pytest.fixture(scope="module")
def extractor():
    return build_extractor("efficientnet_lite0", (1,), 32)


def spoilt(extractor):
    """A detector with a not-a-number among its weights."""
    detector = tiny_detector(extractor)
    detector.denoiser.unet.conv_out.bias.data[0] = math.nan
    return detector


class OneBad(Detector):
    """A detector that knows the brightness of an image, but not of one that is black in a corner."""

    family, size = "ddim", 16

    def __init__(self):
        super().__init__(settings=SETTINGS, machine=MACHINE._replace(batch_size=2),
                         calibration=Calibration({"pixel": 1.0}, 1.0, 1.0))

    def parts(self, images):
        maps = (images.mean(1, keepdim=True) + 1) / 2
        maps[images[:, 0, 0, 0] == -1] = math.nan
        return {"pixel": maps}, None

    def combine(self, parts, scales):
        return parts["pixel"], parts["pixel"].amax(dim=(1, 2, 3))


class Combining(Detector):
    """A detector of which only the way from maps to a score matters."""

    family, size = "ddim", 16

    def __init__(self, settings=SETTINGS):
        super().__init__(settings=settings, machine=MACHINE)

    def parts(self, images):
        return {}, None


def pictures(folder: Path, bad: int, count: int = 4) -> list[Path]:
    """Images of which one is black in a corner."""
    from PIL import Image
    paths = []
    for number in range(count):
        path = save_drawn(folder / f"{number}.png", 0)
        image = Image.open(path)
        image.putpixel((0, 0), (0, 0, 0) if number == bad else (9, 9, 9))
        image.save(path)
        paths.append(path)
    return paths


# The place that all families pass

@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_detectors_of_every_family_refuse_a_map_that_is_not_finite(family, bad):
    detector = Combining(FAMILIES[family].settings.of(None))
    parts = {part: torch.rand(3, 1, 16, 16) for part in detector.settings.contributions}
    scales, name = dict.fromkeys(parts, 1.0), next(iter(parts))
    assert detector.combine(parts, scales)[1].isfinite().all()
    parts[name][1, 0, 3, 3] = bad
    with pytest.raises(NotFinite, match=f"image 2: its {name} map has values that are not finite") as error:
        detector.combine(parts, scales)
    assert error.value.number == 1 and one_line(error)


def test_a_map_that_overflows_on_the_way_is_refused_as_well():
    parts = {"pixel": torch.full((2, 1, 4, 4), 1e30), "feature": torch.ones(2, 1, 4, 4)}
    with pytest.raises(NotFinite, match="image 1: its anomaly map"):
        Combining().combine(parts, {"pixel": 1e-30, "feature": 1.0})


def test_a_part_that_does_not_count_may_be_anything():
    parts = {"pixel": torch.full((1, 1, 4, 4), math.nan), "feature": torch.ones(1, 1, 4, 4)}
    detector = Combining(replace(SETTINGS, pl_contrib=0.0))
    assert detector.combine(parts, {"pixel": 1.0, "feature": 1.0})[1].isfinite().all()


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_nothing_is_decided_by_a_score_that_is_not_finite(score):
    """The last line: whatever made the score."""
    with pytest.raises(NotFinite):
        Calibration({"pixel": 1.0}, 1.0, 1.0).decide(score)


def test_an_image_is_named_where_its_name_is_known():
    maps = {"map": torch.tensor([[1.0], [math.inf]])}
    for names, first, shown in ((["a.png", "b.png"], 0, "b.png: "), (["a", "b", "c.png"], 1, "c.png: "),
                                ([], 3, "image 5: ")):
        with pytest.raises(NotFinite, match=f"^{shown}"), naming(names, first):
            check_finite(maps)


# Who passes it

def inspected(detector, samples: list[Sample], root: Path) -> list:
    """Test images, to the last one."""
    with ThreadPoolExecutor(1) as pool:
        return list(inspect_samples(detector, samples, root, pool))


def test_test_images(extractor, tmp_path):
    path = save_drawn(tmp_path / "test" / "good" / "000.png")
    sample = Sample(path, "bolt", "good")
    detector = spoilt(extractor)
    with pytest.raises(UserError, match="test/good/000.png: its ") as error:
        inspected(detector, [sample], tmp_path)
    one_line(error)


def test_test_images_of_a_detector_of_another_kind(tmp_path):
    paths = pictures(tmp_path, bad=2)
    samples = [Sample(path, "bolt", "good") for path in paths]
    with pytest.raises(UserError, match="2.png: its score"):
        inspected(OneBad(), samples, tmp_path)


def test_new_images_end_the_run_and_the_scores_so_far_are_kept(tmp_path):
    paths = pictures(tmp_path / "in", bad=2)
    with pytest.raises(UserError, match="in/2.png: its score") as error:
        inspect_new(OneBad(), paths, tmp_path / "out", 0)
    one_line(error)
    assert [Path(row["path"]).name for row in rows_of(tmp_path / "out")] == ["0.png", "1.png"]


def test_images_from_python_by_their_files_or_their_numbers(extractor, tmp_path):
    detector, path = spoilt(extractor), save_drawn(tmp_path / "part.png")
    with pytest.raises(UserError, match="part.png: its "):
        detector(path)
    with pytest.raises(UserError, match="image 1: its "):
        detector(random_images(2))


@pytest.mark.parametrize("names, shown", [((), "image 3: "), (["a", "b", "c"], "c: ")])
def test_calibration_images(names, shown):
    parts = [{"pixel": torch.rand(1, 1, 8, 8)} for _ in range(4)]
    parts[2]["pixel"][0, 0, 0, 0] = math.nan
    with pytest.raises(UserError, match=f"^{shown}its pixel map"):
        calibrate(lambda p, scales: (p["pixel"], p["pixel"].amax(dim=(1, 2, 3))), parts, 0.9, 0.5, names=names)


@pytest.mark.parametrize("kind", ["good", "pseudo"])
def test_images_that_settings_are_chosen_with(kind):
    """The one function of both searches."""
    parts = {name: {"pixel": torch.rand(3, 1, 8, 8), "feature": torch.rand(3, 1, 8, 8)} for name in ("good", "pseudo")}
    parts[kind]["feature"][1] = math.nan
    with pytest.raises(UserError, match=f"{kind} image 2 of the tuning: its feature map"):
        combined(Combining(), parts, (..., slice(0, 8), slice(0, 8)))


def test_the_search_for_settings_ends_too(extractor):
    images = random_images(2)
    with pytest.raises(UserError, match="of the tuning"):
        DdimSearch(spoilt(extractor), pseudo_validation(images, ["a.png", "b.png"], images, 0, 2)).run()


def test_a_network_that_is_sound_passes():
    torch.manual_seed(0)
    net = build_unet(16, (32, 32), 1, ()).to(CPU)
    check_finite({"output": net(random_images(1), 5).sample.detach()})
