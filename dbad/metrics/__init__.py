"""Metrics of how well scores find defects: plain functions of numpy arrays, see `dbad.metrics.areas`."""

from dbad.metrics.areas import (
    MAX_EXACT_PIXELS,
    aupro,
    auroc,
    average_precision,
    f1_max,
    image_metrics,
    pixel_metrics,
    pro_curve,
    roc_curve,
)
from dbad.metrics.confusion import Rates, rates
from dbad.metrics.formulas import AUPRO_LIMITS
from dbad.metrics.histogram import PixelHistogram

__all__ = ["AUPRO_LIMITS", "MAX_EXACT_PIXELS", "PixelHistogram", "Rates", "aupro", "auroc", "average_precision",
           "f1_max", "image_metrics", "pixel_metrics", "pro_curve", "rates", "roc_curve"]
