"""The one loop of calibration, test images and new images: order, batches, one decode, nothing kept."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import MACHINE, SETTINGS, json_of, make_category, one_line, rows_of, save_drawn, save_mask, stamps
from PIL.PngImagePlugin import PngImageFile

import inference_ddim
from benchmarks import memory
from dbad.calibration.thresholds import Calibration
from dbad.data.categories import find_category
from dbad.data.splits import files_of
from dbad.errors import UserError
from dbad.families.detector import Detector
from dbad.inspection import category as category_module
from dbad.inspection.category import inspect_category
from dbad.inspection.loop import Jobs, Timed, inspect_samples, walk
from dbad.metrics import pixels
from dbad.options.resolve import resolve
from dbad.records import Sample

BRIGHT = replace(SETTINGS, intensity="full")


class Brightness(Detector):
    """A detector whose anomaly map is the brightness of the image in [0, 1]; it remembers how many images came at once.

    Half of the score is the mean, so that few images have the same one.
    """

    family = "ddim"

    def __init__(self, size: int = 16, patching: bool = False, batch_size: int = 3):
        super().__init__(settings=replace(BRIGHT, patching=patching), machine=MACHINE._replace(batch_size=batch_size),
                         calibration=Calibration({"pixel": 1.0}, 0.5, 0.75, (0.1, 0.2, 0.3), false_alarm_rate=0.25,
                                                 settings=BRIGHT.record()))
        object.__setattr__(self, "side", size)
        object.__setattr__(self, "batches", [])

    @property
    def size(self):
        """See `Detector`."""
        return self.side

    def parts(self, images):
        self.batches.append(len(images))
        return {"pixel": (images.mean(1, keepdim=True) + 1) / 2}, -images

    def combine(self, parts, scales):
        maps = parts["pixel"]
        return maps, (maps.amax(dim=(1, 2, 3)) + maps.mean(dim=(1, 2, 3))) / 2


def samples_in(folder: Path, count: int) -> list[Sample]:
    """Good images and, at every third place, defective ones with masks."""
    found = []
    for index in range(count):
        defect = "crack" if index % 3 == 0 else "good"
        mask = save_mask(folder / "bolt/ground_truth/crack" / f"{index:03}_mask.png") if defect == "crack" else None
        found.append(Sample(save_drawn(folder / "bolt/test" / defect / f"{index:03}.png", index), "bolt", defect, mask))
    return found


def inspected(detector, samples, root, **options) -> list:
    with ThreadPoolExecutor(2) as pool:
        return list(inspect_samples(detector, samples, root, pool, **options))


@pytest.fixture
def reads(monkeypatch) -> list[str | None]:
    """Every PNG file that is decoded from now on, images and masks."""
    decoded, lock, load_end = [], threading.Lock(), PngImageFile.load_end

    def counted(image):
        with lock:
            decoded.append(getattr(image.fp, "name", None))     # None: from memory
        load_end(image)
    monkeypatch.setattr(PngImageFile, "load_end", counted)
    return decoded


# ------------------------------------------------------------------------------------------ the loop

@pytest.mark.parametrize("batch_size, batches", [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (50, [7])])
def test_images_come_in_their_order_whatever_the_batch(batch_size, batches, tmp_path):
    samples, detector = samples_in(tmp_path, 7), Brightness(batch_size=batch_size)
    found = inspected(detector, samples, tmp_path)
    assert [tmp_path / image.row.path for image in found] == [sample.path for sample in samples]
    assert detector.batches == batches
    assert [image.row.score for image in found] == [
        prediction.score for prediction in detector([sample.path for sample in samples])]
    for image, sample in zip(found, samples, strict=True):
        assert (image.row.defect, image.row.label, image.row.category) == (sample.defect, sample.label, "bolt")
        assert image.prediction.score.shape == (1,) and image.prediction.maps["pixel"].shape == (1, 1, 16, 16)
        assert image.decoded.mask.sum() == (64 if sample.label else 0) and image.decoded.own_mask is None


def test_a_row_says_what_the_calibration_says(tmp_path):
    for image in inspected(detector := Brightness(), samples_in(tmp_path, 7), tmp_path):
        calibration, score = detector.calibration, image.row.score
        assert image.row[5:] == (calibration.p_value(score), calibration.normalised(score), calibration.decide(score))


def test_calibration_sees_the_same_parts_in_the_same_batches(tmp_path):
    samples = samples_in(tmp_path, 7)
    walked, detector = list(walk(Brightness(), samples, 0, "calibrating")), Brightness()
    for (path, parts), image in zip(walked, inspected(detector, samples, tmp_path), strict=True):
        assert path == image.decoded.path and torch.equal(parts["pixel"], image.prediction.maps["pixel"])


def test_tiled_images_of_any_size_go_through_one_by_one(tmp_path):
    samples = [Sample(save_drawn(tmp_path / f"{k}.png", k, (10 + k, 20)), "bolt", "good") for k in range(3)]
    detector = Brightness(patching=True)
    found = inspected(detector, samples, tmp_path, own_masks=True)
    assert [image.decoded.size for image in found] == [(10, 20), (11, 20), (12, 20)] and detector.batches == [1, 1, 1]
    assert all(image.decoded.own_mask.shape == image.decoded.size for image in found)


def test_nothing_of_an_image_stays_when_it_is_let_go(tmp_path):
    """Three batches at most are alive at any time."""
    alive, samples, most = weakref.WeakSet(), samples_in(tmp_path, 24), 0

    class Counted(Brightness):
        def parts(self, images):
            alive.add(images)
            return super().parts(images)

    with ThreadPoolExecutor(1) as pool:
        for image in inspect_samples(Counted(batch_size=2), samples, tmp_path, pool):
            del image
            gc.collect()
            most = max(most, len(alive))
    assert most <= 3


def test_a_broken_test_image_ends_the_run_and_is_named(tmp_path):
    samples = samples_in(tmp_path, 5)
    samples[3].path.write_text("no image")
    with pytest.raises(UserError, match=r"003.png: not an image") as error:
        inspected(Brightness(), samples, tmp_path)
    one_line(error)


def test_few_jobs_wait_and_their_results_come_in_order():
    """However slow they are: what waits holds arrays."""
    running, most, results, lock = 0, 0, [], threading.Lock()

    def job(number):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.002)
        with lock:
            running -= 1
        return number

    with ThreadPoolExecutor(8) as pool:
        jobs = Jobs(pool, 3, results.append)
        for number in range(20):
            jobs.add(job, number)
            assert len(jobs.waiting) <= 3
        jobs.finish()
    assert results == list(range(20)) and most <= 3


def test_what_a_job_failed_with_is_raised():
    with ThreadPoolExecutor(1) as pool:
        jobs = Jobs(pool, 1)
        jobs.add(int, "no number")
        with pytest.raises(ValueError):
            jobs.finish()


def test_time_is_that_of_the_things_and_not_of_what_is_done_with_them():
    def slow():
        for number in range(3):
            threading.Event().wait(0.02)
            yield number

    things, seen = Timed(slow()), []
    for thing in things:
        seen.append(thing)
        threading.Event().wait(0.1)
    assert seen == [0, 1, 2] and 0.06 <= things.seconds < 0.2


# ------------------------------------------------------------------------------------------ the results of test images

def options(folder: Path, **changes):
    return resolve(inference_ddim.Options(item="bolt", dataset_path=folder, **changes))


def results(folder: Path, out: Path, detector=None, **changes):
    """Inspect the test images of a category."""
    detector, category = detector or Brightness(), find_category(folder, "bolt")
    return inspect_category(detector, detector.calibration, category, options(folder, **changes), out)


@pytest.fixture
def category(tmp_path) -> Path:
    """A category of 14 test images, 5 of them defective."""
    make_category(tmp_path / "data")
    samples_in(tmp_path / "data", 12)
    return tmp_path / "data"


@pytest.mark.parametrize("resolution", ["network", "original"])
def test_every_image_and_mask_is_decoded_once(resolution, category, tmp_path, reads):
    """With metrics at the size of the files and with exported maps too."""
    results(category, tmp_path / "out", eval_resolution=resolution, export_maps="mvtec")
    test = find_category(category, "bolt").test
    assert len(test) == 14
    files = [path for sample in test for path in files_of(sample)]
    assert sorted(path for path in reads if path) == sorted(map(str, files)) and len(files) == 14 + 5


def test_every_image_gets_its_files(category, tmp_path):
    metrics, panels = results(category, tmp_path / "out", export_maps="mvtec")
    test = find_category(category, "bolt").test
    assert [row["path"] for row in rows_of(tmp_path / "out")] == [
        sample.path.relative_to(category).as_posix() for sample in test]
    assert len(panels) == 14 and all(path.is_file() for path in panels)
    assert len(list((tmp_path / "out").rglob("*.tiff"))) == 14
    assert metrics["num_images"] == 14 and json_of(tmp_path / "out/metrics.json")["image"] == metrics["image"]


def test_results_do_not_depend_on_batches_and_threads(category, tmp_path):
    def files(name, batch_size, num_workers):
        results(category, tmp_path / name, Brightness(batch_size=batch_size), num_workers=num_workers)
        metrics = json_of(tmp_path / name / "metrics.json") | {"seconds_per_image": 0}
        return metrics, {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*")
                         if path.is_file() and path.suffix in (".png", ".csv") and path.stem != "metrics"}
    assert files("a", 1, 0) == files("b", 4, 3) == files("c", 50, 2)


@pytest.mark.parametrize("limit", [0, 5 * 256])
def test_maps_that_do_not_fit_change_pixel_metrics_by_their_rounding_only(limit, category, tmp_path, monkeypatch):
    kept, _ = results(category, tmp_path / "kept")
    monkeypatch.setattr(pixels, "MAX_FLOAT32_PIXELS", limit)
    counted, _ = results(category, tmp_path / "counted")
    assert (kept["pixel"].pop("method"), counted["pixel"].pop("method")) == ("exact", "exact, maps rounded to float16")
    assert counted["pixel"] == pytest.approx(kept["pixel"], abs=2e-3)
    assert {name: counted[name] for name in ("image", "image_rates", "pixel_rates", "masks")} == {
        name: kept[name] for name in ("image", "image_rates", "pixel_rates", "masks")}
    assert "rounded to float16" in (tmp_path / "counted/report.html").read_text("utf-8")


def test_arrays_are_let_go_when_they_are_drawn(category, tmp_path, monkeypatch):
    """Pictures of at most two batches are alive, and none at the end but as files."""
    known, most, lock = [], [0], threading.Lock()
    draw = category_module.write_panel

    def counted(path, row, pictures, *words):
        with lock:
            known.append(weakref.ref(pictures))
            gc.collect()
            most[0] = max(most[0], sum(one() is not None for one in known))
        draw(path, row, pictures, *words)
    monkeypatch.setattr(category_module, "write_panel", counted)
    results(category, tmp_path / "out", Brightness(batch_size=1), num_workers=1)
    gc.collect()
    assert len(known) == 14 and most[0] <= 3 and not any(one() for one in known)


def test_results_that_are_there_stay_until_an_image_has_been_inspected(category, tmp_path):
    class Broken(Brightness):
        def combine(self, parts, scales):
            raise UserError("nothing works")

    results(category, tmp_path / "out")
    before = stamps(tmp_path)
    for changes in ({}, {"eval_resolution": "original"}):
        with pytest.raises(UserError, match="nothing works"):
            results(category, tmp_path / "out", Broken(), **changes)
    assert stamps(tmp_path) == before


@pytest.mark.parametrize("failure", [UserError("a broken image"), KeyboardInterrupt()])
def test_an_inspection_that_ends_midway_leaves_the_results_before_as_they_were(failure, category, tmp_path):
    class Ending(Brightness):
        def combine(self, parts, scales):
            calls.append(parts)
            if len(calls) > 2:
                raise failure
            return super().combine(parts, scales)

    results(category, tmp_path / "out", export_maps="mvtec")
    before = stamps(tmp_path)
    for changes in ({"export_maps": "mvtec"}, {"eval_resolution": "original"}):
        calls: list = []
        with pytest.raises(type(failure)):
            results(category, tmp_path / "out", Ending(batch_size=2), **changes)
        assert len(calls) == 3 and stamps(tmp_path) == before
    assert not list(tmp_path.glob(".*"))


def test_results_that_are_written_again_hold_no_panel_of_an_image_that_is_gone(category, tmp_path):
    results(category, tmp_path / "out", export_maps="mvtec")
    (tmp_path / "out" / "remarks.txt").write_text("mine")
    gone = find_category(category, "bolt").test[-1].path
    gone.unlink()
    _, panels = results(category, tmp_path / "out", export_maps="mvtec")
    assert sorted((tmp_path / "out" / "images").iterdir()) == sorted(panels) and len(panels) == 13
    assert len(rows_of(tmp_path / "out")) == len(list((tmp_path / "out").rglob("*.tiff"))) == 13
    assert (tmp_path / "out" / "remarks.txt").read_text() == "mine"


def test_what_a_family_writes_besides_is_asked_for_every_image(category, tmp_path):
    seen, detector, out, found = [], Brightness(), tmp_path / "out", find_category(category, "bolt")
    _, panels = inspect_category(detector, detector.calibration, found, options(category), out,
                                 lambda folder, name, found: seen.append((folder, name, found.image.shape)))
    assert [entry[1:] for entry in seen] == [(path.name, (16, 16, 3)) for path in panels] and len(seen) == 14
    assert {folder.parent for folder, *_ in seen} == {out.parent}


def test_the_memory_benchmark_inspects_what_it_draws(tmp_path):
    memory.draw_test(tmp_path, 6, 16)
    peak, before, seconds, method = memory.inspect(tmp_path, 16)
    assert method == "exact" and peak >= before > 10 and seconds > 0
    metrics = json_of(tmp_path / "results/metrics.json")
    assert metrics["num_images"] == 6 and metrics["masks"]["num_found"] == 3 and metrics["pixel"]["auroc"] > 0.6
