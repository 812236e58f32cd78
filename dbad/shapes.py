"""Anti-aliased shapes, smooth noise and light, for drawing the demo data (`dbad.data.demo`) and damage.

Lengths are in scene units: the frame is [-1, 1] across, x to the right, y down. Shapes are signed distances at the
pixel centres, negative inside; coordinates and distances are (S, S) float32 arrays unless said otherwise.
"""
import numpy as np


def grid(size):
    """Coordinates x, y of the pixel centres and the width of a pixel, in scene units."""
    axis = ((np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1).astype(np.float32)
    return *np.meshgrid(axis, axis), 2 / size


def turned(x, y, centre, angle):
    """Coordinates in a frame with its origin at `centre`, turned by `angle` radians."""
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    dx, dy = x - np.float32(centre[0]), y - np.float32(centre[1])
    return cos * dx + sin * dy, cos * dy - sin * dx


def window(size, centre, reach):
    """The index of the rows and columns within `reach` of a point."""
    middle, reach = (np.asarray(centre) + 1) * size / 2, reach * size / 2
    left, top = np.floor(middle - reach).clip(0, size).astype(int)
    right, bottom = np.ceil(middle + reach).clip(0, size).astype(int)
    return slice(top, bottom), slice(left, right)


def coverage(distance, pixel):
    """The share of a pixel that lies inside an edge, from its signed distance to the edge (negative inside)."""
    return np.clip(0.5 - distance / pixel, 0, 1)


def smoothstep(low, high, value):
    """A smooth step: 0 below `low`, 1 above `high`, a cubic between."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def blend(image, colour, alpha):
    """Paint `colour`, (3,) or (S, S, 3), over `image` in place, with opacity `alpha`, (S, S)."""
    image += alpha[..., None] * (np.asarray(colour, np.float32) - image)


def rounded_box(x, y, half_width, half_height, radius=0.0):
    """Signed distance to a box around the origin with rounded corners."""
    dx, dy = np.abs(x) - (half_width - radius), np.abs(y) - (half_height - radius)
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0) - radius


def polyline(x, y, points, half_widths):
    """Signed distance to a line through `points`, (n, 2), whose half width changes from point to point, (n,)."""
    nearest = np.full_like(x, np.inf)
    for (px, py), (qx, qy), start, end in zip(points[:-1], points[1:], half_widths[:-1], half_widths[1:], strict=True):
        ex, ey = qx - px, qy - py
        along = np.clip(((x - px) * ex + (y - py) * ey) / (ex * ex + ey * ey), 0, 1)
        distance = np.hypot(x - px - along * ex, y - py - along * ey)
        nearest = np.minimum(nearest, distance - (start + along * (end - start)))
    return nearest


def blob(x, y, radius, rng, roughness=0.12):
    """Approximate signed distance to a disc around the origin with a wavy outline."""
    angle, wave = np.arctan2(y, x), 1.0
    for order in (2, 3, 5):
        wave = wave + roughness * rng.uniform(0.3, 1) * np.cos(order * angle + rng.uniform(0, 6.28)) / order ** 0.5
    return np.hypot(x, y) - radius * wave


def waves(x, y, rng, length, terms=4):
    """Smooth noise of about unit variance: a sum of plane waves of about the given wave length."""
    total = np.zeros_like(x)
    for _ in range(terms):
        angle, phase, k = rng.uniform(0, 6.28), rng.uniform(0, 6.28), 6.28 / length * rng.uniform(0.6, 1.4)
        total += np.cos(np.float32(k * np.cos(angle)) * x + np.float32(k * np.sin(angle)) * y + np.float32(phase))
    return total * np.float32((2 / terms) ** 0.5)


def mixed(rng, first, second):
    """A random colour between two, (3,) float32."""
    return np.float32(first) + rng.uniform() * (np.float32(second) - np.float32(first))


def exposed(image, rng, x, y, gain, slope):
    """The picture with random lighting and sensor noise: overall brightness, a gradient across, warmth."""
    angle = rng.uniform(0, 6.28)
    light = rng.uniform(*gain) * (1 + rng.uniform(0, slope) * (np.cos(angle) * x + np.sin(angle) * y))
    warmth = rng.uniform(-0.04, 0.04)
    image = image * light[..., None].astype(np.float32) * np.array([1 + warmth, 1, 1 - warmth], np.float32)
    return image + np.float32(0.006) * rng.standard_normal(image.shape, dtype=np.float32)
