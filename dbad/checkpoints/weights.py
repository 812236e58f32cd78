"""Run folders: weights and settings that are written whole, and read without running code from the files.

    <diffusion_checkpoint_dir>/<run_id>/
        <diffusion_checkpoint_name>    EMA weights of the U-Net, a state dict (.pt or .safetensors)
        model_config.json              the arguments that build the U-Net
        train_arg_config.json          the options of the training
        extractor.pt                   the adapted feature extractor
        calibration.json               scales, thresholds, and the settings they belong to
        last.pt                        everything that resuming needs
        log.jsonl                      one line per epoch

All names: `dbad.files.names`.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from diffusers.models import UNet2DModel
from torch import Tensor, nn

from dbad.checkpoints.blueprints import N, Network, network_of, planned
from dbad.errors import UserError
from dbad.files.atomic import atomic_write, cannot_be_written, parse_json, read_json, write_text
from dbad.files.checksums import AGAIN, check_archive, read_tensors, write_tensors
from dbad.files.names import LOG, MODEL_CONFIG, TRAIN_OPTIONS


def model_config(network: Network) -> dict[str, Any]:
    """The configuration from which `load_network` builds the network again, as plain values."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in network.config.items() if not key.startswith("_")}


def check_trained(folder: Path) -> None:
    """Raise `UserError` for a run folder in which no training of a U-Net has begun."""
    if not any((folder / name).is_file() for name in (MODEL_CONFIG, TRAIN_OPTIONS)):
        raise UserError(f"{folder}: no such run folder, or an empty one; train it first: python train_ddim.py "
                        f"--item ... --run_id {folder.name}")


def load_unet(folder: Path, name: str) -> UNet2DModel:
    """The trained U-Net of a run folder, in eval mode."""
    check_trained(folder)
    return load_network(UNet2DModel, folder, name)


def load_network(cls: type[N], folder: Path, name: str) -> N:
    """The network that model_config.json of a folder describes, with the weights in the file `name`, in eval mode.

    The weights are checked against the description before memory for the network is taken, so that no network larger
    than the file is made.
    """
    path = folder / MODEL_CONFIG
    config = read_json(path)
    plan, state = planned(cls, config, path), _read_state(folder / name)
    _check_fits(plan, state, folder / name, path)
    network = network_of(cls, config)
    network.load_state_dict(state)
    return network.eval()


def save_weights(state_dict: dict[str, Tensor], path: Path) -> None:
    """Write a state dict: `.safetensors` in that format, all other endings with torch.save."""
    if path.suffix == ".safetensors":
        write_tensors(state_dict, path)
    else:
        save_pickle({key: value.detach().cpu().contiguous() for key, value in state_dict.items()}, path)


def save_pickle(value: Any, path: Path) -> None:
    """Write tensors and plain values with torch.save, atomically; equal values give equal bytes.

    The archive is made in memory. Written directly to a file, it would contain the file's (temporary) name, and a full
    disk would end in an error of torch's own.
    """
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_weights(model: nn.Module, path: Path, description: object = None) -> None:
    """Load a state dict into `model`; a missing, broken or foreign file is a `UserError` that names it.

    `description` names the source of the model for that error (model_config.json beside the file).
    """
    state = _read_state(path)
    _check_fits(model, state, path, description or path.parent / MODEL_CONFIG)
    model.load_state_dict(state)


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors" and path.is_file():
        state, _ = read_tensors(path)
    else:
        state = load_pickle(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: expected a state dict (names and tensors), found something else")
    return state


def _check_fits(model: nn.Module, state: dict[str, Tensor], path: Path, description: object) -> None:
    own = model.state_dict()
    missing, unknown = own.keys() - state.keys(), state.keys() - own.keys()
    wrong = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if missing or unknown or wrong:
        example = sorted(missing or unknown or wrong)[0]
        raise UserError(f"{path}: weights of another architecture than {description} describes ({len(missing)} "
                        f"missing, {len(unknown)} unknown, {len(wrong)} of another shape, such as {example})")


def load_pickle(path: Path, if_damaged: str = AGAIN, peek: bool = False) -> Any:
    """Read tensors and plain values with torch.load; a file that would execute code is refused, never run.

    A damaged file is also refused; `if_damaged` is the advice for that error. With `peek`, only the plain values are
    read, which is fast: tensors are neither read nor checked.
    """
    if not peek:
        check_archive(path, if_damaged)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=peek)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint{_instead(path)}") from None
    except pickle.UnpicklingError:
        with_code = zipfile.is_zipfile(path)
        raise UserError(f"{path}: " + ("holds more than tensors and plain values; refused, since loading it could run "
                                       "code" if with_code else "not a checkpoint, or a truncated one")) from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, struct.error) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not a checkpoint, or a truncated one ({reason})") from None


def _instead(path: Path) -> str:
    """The checkpoints in the folder, for the error about a missing one."""
    there = sorted(p.name for ending in ("*.pt", "*.safetensors") for p in path.parent.glob(ending))
    return f"; {path.parent} has {', '.join(there)}" if there else ""


def trim_log(folder: Path, phase: str, step: int) -> None:
    """Drop the lines of `phase` after `step` from the run's log: they belong to work that is done again."""
    path = folder / LOG
    if path.is_file():
        kept = []
        for content in path.read_bytes().splitlines():
            try:
                text = content.decode("utf-8")
                line = parse_json(text)
                if line["phase"] != phase or line["step"] <= step:
                    kept.append(text + "\n")
            except (ValueError, TypeError, LookupError):
                continue        # the last line, cut off by a power cut, or an unreadable one
        write_text(path, "".join(kept))


def log_line(folder: Path, line: str) -> None:
    """Append one line to the run's log."""
    with cannot_be_written(folder / LOG), open(folder / LOG, "a", encoding="utf-8") as file:
        file.write(line + "\n")
