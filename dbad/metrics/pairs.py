"""Labels and scores, or masks and maps, as checked pairs of arrays: the input of every metric."""

import numpy as np


def flat_pairs(labels, scores):
    """Labels and scores as a list of (bool, number) array pairs of equal shape, after checking them.

    Both are arrays (or nested lists) of one shape, or two sequences of arrays, such as images of different sizes.
    Raises ValueError for shapes that differ, labels other than 0 and 1, and scores that are not finite real numbers.
    """
    if not (_holds_arrays(scores) or _holds_arrays(labels)):
        labels, scores = [labels], [scores]
    return _checked_pairs(labels, scores, "labels", "scores", np.asarray)


def image_pairs(masks, maps):
    """Masks and maps as a list of ((H, W) bool, (H, W) number) array pairs, after checking them.

    Both are arrays (N, H, W) or (N, 1, H, W), or sequences of (H, W) or (1, H, W) arrays, whose sizes may differ from
    image to image. Raises ValueError as `flat_pairs` does, and for images that are not two-dimensional.
    """
    return _checked_pairs(masks, maps, "mask", "map", _plane)


def _holds_arrays(value):
    return isinstance(value, (list, tuple)) and len(value) > 0 and np.ndim(value[0]) > 0


def _plane(image):
    image = np.asarray(image)
    plane = image[0] if image.ndim == 3 and len(image) == 1 else image
    if plane.ndim != 2:
        raise ValueError(f"masks and maps must be (H, W) or (1, H, W) for each image, found {image.shape}")
    return plane


def _checked_pairs(labels, scores, label_name, score_name, as_array):
    """The checked pairs. Masks of type bool or uint8, and scores of a type that can be sorted, are not copied."""
    if len(labels) != len(scores):
        raise ValueError(f"{len(labels)} images have a {label_name}, {len(scores)} a {score_name}: each needs both")
    if len(labels) == 0:
        raise ValueError(f"there is no image: neither {label_name} nor {score_name}")
    pairs = []
    for index in range(len(labels)):
        label, score = as_array(labels[index]), as_array(scores[index])
        place = f" of image {index}" if len(labels) > 1 else ""
        if label.shape != score.shape or not label.size:
            found = f"{label_name} {label.shape}, {score_name} {score.shape}"
            raise ValueError(f"shapes must be equal and not empty, found{place}: {found}")
        pairs.append((_as_bool(label, label_name + place), _as_finite(score, score_name + place)))
    return pairs


def _as_bool(label, name):
    if label.dtype.kind == "b":
        return label
    if label.dtype.kind not in "iuf":
        raise ValueError(f"{name} must be bool or 0 and 1, found type {label.dtype}")
    wrong = (label != 0) & (label != 1)
    if wrong.any():
        raise ValueError(f"{name} must be binary, 0 or 1 only, found {label[wrong][0]}")
    return label.view(bool) if label.dtype == np.uint8 else label.astype(bool)


def _as_finite(score, name):
    if score.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be real numbers, found type {score.dtype}")
    if score.dtype.kind == "f":
        lowest, highest = score.min(), score.max()                  # both are NaN as soon as one score is
        if not (np.isfinite(lowest) and np.isfinite(highest)):
            raise ValueError(f"{name} must be finite, found {highest if np.isfinite(lowest) else lowest}")
    return score.astype({"bool": np.uint8, "float16": np.float32}.get(score.dtype.name, score.dtype), copy=False)
