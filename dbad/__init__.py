"""Visual anomaly detection with diffusion models: the modules that the scripts share.

    from dbad import load_detector
    detector = load_detector("checkpoints/hazelnut")
    prediction = detector("part.png")
    prediction.score, prediction.decision, prediction.anomaly_map
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dbad.families.detector import load_detector

__all__ = ["load_detector"]


def __dir__() -> list[str]:
    """The names of the module, for help(dbad), with the one that is imported on first use."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str):
    """Import `load_detector` on first use, so that `from dbad.metrics import aupro` does not load torch."""
    if name == "load_detector":
        from dbad.families.detector import load_detector
        return load_detector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def mismatched_torch() -> str | None:
    """A message with the problem and the command that repairs it if torchvision does not fit torch; else None.

    A torchvision built for CUDA beside a CPU-only torch has the right version number and passes `pip check`. Still,
    importing torchvision fails, and diffusers reports the failure as a missing class of transformers. Only such pairs
    are imported here, since importing takes seconds.
    """
    try:
        torch, torchvision = version("torch"), version("torchvision")
    except PackageNotFoundError:
        return None         # the import that follows reports the missing package
    if "+cpu" not in torch or "+cpu" in torchvision:
        return None
    try:
        import torchvision as _  # noqa: F401
    except (ImportError, RuntimeError) as error:
        return (f"torch {torch} and torchvision {torchvision} are not compatible ({str(error).splitlines()[0]}); run: "
                "pip install --force-reinstall torch torchvision")
    return None


if _problem := mismatched_torch():
    print(_problem, file=sys.stderr)
    raise SystemExit(2)
