"""The pictures of the built-in demo data: hazelnuts, carpet and circuit boards, with and without a defect.

Every picture is a scene in units of half the frame (x to the right, y down, both in [-1, 1]), sampled at the pixel
centres. Edges are anti-aliased (`dbad.shapes`), so the same scene can be drawn at any size.
A picture function takes `(size, rng, flaw)` and returns

    image   the picture                                  (S, S, 3) float32, about [0, 1]
    cover   share of each pixel that the defect covers   (S, S) float32 in [0, 1]; all 0 without a defect

The good scene depends on `rng` alone and the defect on `flaw.rng` alone. So the same scene can be drawn with and
without its defect; the two pictures are the same wherever `cover` is 0.
"""
from dbad.data.demo.carpet import carpet
from dbad.data.demo.hazelnut import hazelnut
from dbad.data.demo.pcb import pcb

CATEGORIES = {
    "hazelnut": ("crack", "hole", "print"),
    "carpet": ("color", "cut", "thread"),
    "pcb": ("loose_part", "missing_part", "solder"),
}
PICTURES = {"hazelnut": hazelnut, "carpet": carpet, "pcb": pcb}
