"""The protocol of pixel metrics: the resolution, the part of the image and the number of images they are measured on.

The same maps give different numbers at another mask resolution, so every result states its protocol.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from dbad.maps import central_window


@dataclass(frozen=True)
class Protocol:
    """The resolution and the part of the image at which maps are compared with masks.

        resolution    "network": both at the detector's resolution; "original": the mask as in its file, the map
                      resized to it bilinearly
        center_crop   side of the central part that counts, in px of a 256 px image; 0 for the full frame
    """

    resolution: str = "network"
    center_crop: int = 0

    def describe(self, num_masked: int, num_images: int) -> dict[str, str]:
        """The protocol in words, for the results.

        `num_masked` counts the images that are good or have a mask; it is 0 if no defective image has a mask.
        """
        where = {"network": "the detector's resolution", "original": "the files' own size, maps upsampled bilinearly"}
        crop = f"central {self.center_crop} of 256 px, images scored there too" if self.center_crop else "full frame"
        images = {num_images: "all", 0: "none"}.get(
            num_masked, f"{num_masked} of {num_images}, without the defective ones that have no mask")
        return {"resolution": where[self.resolution], "crop": crop, "masks": "binary, resized with nearest neighbour"
                if self.resolution == "network" else "binary, as in their files", "images": images}

    def pair(self, anomaly_map: np.ndarray, mask: np.ndarray, own_mask: np.ndarray | None = None
             ) -> tuple[np.ndarray, np.ndarray]:
        """The mask (bool) and the map (float32) of an image as they are compared, of one shape (H, W).

            anomaly_map, mask    at the detector's resolution
            own_mask             the mask as in its file; needed for resolution "original"
        """
        if self.resolution == "original":
            assert own_mask is not None
            mask, anomaly_map = own_mask, resized_map(anomaly_map, own_mask.shape)
        window = central_window(mask.shape, self.center_crop)
        return mask[window], anomaly_map[window]


def resized_map(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map (h, w) resized bilinearly to `size` = (H, W), float32."""
    if values.shape == size:
        return values
    maps = torch.from_numpy(values)[None, None]
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)[0, 0].numpy()
