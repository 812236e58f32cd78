"""The families of defaults that `--preset` chooses from.

`demo` trains in minutes on two CPU cores, `small` in about an hour there; `base` is the network and training of
github.com/NilsB98/Diffusion-Based-AD (256 px, 1000 epochs) and wants a GPU. A length is given in epochs or in
optimiser steps; the other one is None. `max_timestep` limits training to the timesteps that inference visits, which is
what makes short trainings possible; base trains on all of them (0), so that any start can be chosen later.

Of the diad family, base is the published model and training (arXiv:2312.06607): Stable Diffusion's U-Net, noise up to
the last timestep, a constant rate; steps are 1000 passes over MVTec AD. The others train small U-Nets from random
weights, on the timesteps up to `latent_max_timestep`, and begin inference there: what a network learns in minutes does
not reach from pure noise back to an image.
"""

from pathlib import Path
from typing import Any

_COMMON: dict[str, Any] = {
    "holdout": 0.1, "patching": False, "intensity": "auto", "seed": 0,
    "conditioning": "ddad", "eta": 0.0, "sampler": "ddim",
    "num_samples": 1, "pixel_difference": "max_square", "layer_weights": (1.0,), "map_norm": "none", "top_share": 0.0,
    "feature_smoothing_kernel": 3, "blur_sigma": 4.0, "tile_overlap": 0.25, "center_crop": 0, "pl_contrib": 0.7,
    "fl_contrib": 0.7,
    "grid": 32, "bank_mb": 8.0, "components": 64, "prediction": "x0", "neighbours": 3, "editing": True,
    "feature_start": 600, "feature_steps_back": 1, "context_power": 0.0, "discriminator_contrib": 1.0,
    "knn_contrib": 0.0, "edit_contrib": 0.0, "denoise_contrib": 0.0, "inversion_contrib": 0.0,
    "paper_exact": False, "map_sigma": 5.0,
}

PRESETS: dict[str, dict[str, Any]] = {
    "demo": _COMMON | {
        "resolution": 64, "channels": (32, 32, 64, 128), "layers_per_block": 1, "attention_levels": (),
        "batch_size": 4, "epochs_diffusion": None, "steps_diffusion": 900, "learning_rate": 3e-3,
        "adam_betas": (0.9, 0.99), "warmup_steps": 50, "max_timestep": 250, "save_n_epochs": 4,
        "epochs_extractor": 1, "feature_resolution": 128, "feature_channels": (64, 128, 192), "steps_features": 600,
        "feature_batch_size": 8, "feature_learning_rate": 1e-3,
        "recon_weight": 2.0, "start_at_timestep": 250, "steps_to_regenerate": 3,
        "size": "tiny", "autoencoder_steps": 500, "steps_latent": 600, "latent_batch_size": 8, "latent_accumulate": 1,
        "latent_learning_rate": 1e-3, "latent_schedule": "cosine", "latent_max_timestep": 200, "latent_start": 200,
        "latent_steps_back": 5,
    },
    "small": _COMMON | {
        "resolution": 128, "channels": (32, 32, 64, 128, 128), "layers_per_block": 1, "attention_levels": (),
        "batch_size": 4, "epochs_diffusion": None, "steps_diffusion": 3000, "learning_rate": 2e-3,
        "adam_betas": (0.9, 0.99), "warmup_steps": 100, "max_timestep": 250, "save_n_epochs": 10,
        "epochs_extractor": 1, "feature_resolution": 256, "feature_channels": (64, 128, 192), "steps_features": 1500,
        "feature_batch_size": 8, "feature_learning_rate": 1e-3,
        "recon_weight": 2.0, "start_at_timestep": 250, "steps_to_regenerate": 3,
        "size": "middle", "autoencoder_steps": 4000, "steps_latent": 10_000, "latent_batch_size": 8,
        "latent_accumulate": 1, "latent_learning_rate": 3e-4, "latent_schedule": "cosine", "latent_max_timestep": 400,
        "latent_start": 400, "latent_steps_back": 10,
    },
    "base": _COMMON | {
        "resolution": 256, "channels": (128, 128, 256, 256, 512, 512), "layers_per_block": 2, "attention_levels": (4,),
        "batch_size": 8, "epochs_diffusion": 1000, "steps_diffusion": None, "learning_rate": 1e-4,
        "adam_betas": (0.95, 0.999), "warmup_steps": 500, "max_timestep": 0, "save_n_epochs": 50,
        "epochs_extractor": 30, "feature_resolution": 256, "feature_channels": (128, 256, 384, 512),
        "steps_features": 20000, "feature_batch_size": 64, "feature_learning_rate": 1e-4,
        "recon_weight": 2.0, "start_at_timestep": 250, "steps_to_regenerate": 25,
        "size": "sd15", "autoencoder_steps": 100_000, "steps_latent": 75_000, "latent_batch_size": 12,
        "latent_accumulate": 4, "latent_learning_rate": 1e-5, "latent_schedule": "constant",
        "latent_max_timestep": 1000, "latent_start": 1000, "latent_steps_back": 10,
    },
}


def default_preset(dataset_path: Path | None, device: str, method: str = "ddim") -> str:
    """The preset where none is given and none was trained with: demo for the demo data, else as the machine is.

    Real data take small on a CPU, where a step of base takes minutes, and base on CUDA; lafite and knn take small
    everywhere. `device` is what --device says.
    """
    from dbad.runtime.device import pick_device  # it loads torch, which reading a command line does without
    if dataset_path is None:
        return "demo"
    return "base" if method in ("ddim", "diad") and pick_device(device).type == "cuda" else "small"
