"""Files of tensors with checksums, which show damage.

    .pt             an archive in which torch.save has put a CRC-32 beside every part; torch.load does not check it
    .safetensors    has no checksum of its own: the CRC-32 of all tensors is written into its metadata

Without a check, a single wrong bit in a weight or in the state of an optimiser is read without an error.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dbad.errors import UserError
from dbad.files.atomic import atomic_write
from dbad.files.special import check_no_special

AGAIN = "copy it again, or create it again"
_KEY = "crc32"


def check_archive(path: Path, advice: str = AGAIN) -> None:
    """Raise `UserError` for an archive of torch.save with a damaged part; `advice` ends the message.

    A file that is not, or no longer, an archive passes here; reading it fails.
    """
    check_no_special(path)
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except OSError:
        return
    except Exception as error:      # a broken archive fails in many ways
        raise _damaged(path, str(error) or type(error).__name__, advice) from None
    if part is not None:
        raise _damaged(path, f"its part {part} does not match its checksum", advice)


def write_tensors(state: Mapping[str, Tensor], path: Path, about: Mapping[str, str] | None = None) -> None:
    """Write a state dict as safetensors, with its checksum and the entries of `about` as metadata.

    The tensors are written directly from memory, without a second copy.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with atomic_write(path) as temporary:
        try:
            save_file(state, temporary, {**(about or {}), _KEY: _checksum(state)})
        except SafetensorError as error:
            raise OSError(str(error)) from None     # a full disk, which `atomic_write` reports


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict in a safetensors file, and its metadata.

    A missing or broken file is a `UserError`. So is a file whose contents do not match its checksum, if it has one.
    """
    check_no_special(path)
    try:
        with safe_open(path, "pt") as file:
            about = dict(file.metadata() or {})
            state = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a safetensors file, or a truncated one ({error})") from None
    known = about.pop(_KEY, None)
    if known is not None and known != _checksum(state):
        raise _damaged(path, "its tensors do not match their checksum", AGAIN)
    return state, about


def _checksum(state: Mapping[str, Tensor]) -> str:
    """The CRC-32 of names, types, shapes and values, whatever the order of the tensors."""
    value = 0
    for name in sorted(state):
        tensor = state[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy(), value)
    return f"{value:08x}"


def _damaged(path: Path, reason: str, advice: str) -> UserError:
    return UserError(f"{path}: damaged ({reason}); {advice}")
