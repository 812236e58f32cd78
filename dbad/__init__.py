"""Visual anomaly detection with diffusion models: the parts that the scripts share.

    from dbad import load_detector
    prediction = load_detector("checkpoints/hazelnut")("part.png")
"""

import sys
from importlib.metadata import PackageNotFoundError, version


def __getattr__(name: str):
    """`load_detector`, imported on first use: `from dbad.metrics import aupro` shall not wait for torch."""
    if name == "load_detector":
        from dbad.families.detector import load_detector
        return load_detector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def mismatched_torch() -> str | None:
    """What is wrong, and the command that mends it, where torchvision does not fit torch; else None.

    A CPU-only torch beside a torchvision built for CUDA has the right version number and passes `pip check`, yet
    importing torchvision fails, and diffusers reports that as a missing class of transformers. Only such pairs are
    tried here, since importing them takes seconds.
    """
    try:
        torch, torchvision = version("torch"), version("torchvision")
    except PackageNotFoundError:
        return None         # importing it says so
    if "+cpu" not in torch or "+cpu" in torchvision:
        return None
    try:
        import torchvision as _  # noqa: F401
    except (ImportError, RuntimeError) as error:
        return (f"torch {torch} and torchvision {torchvision} do not fit each other ({str(error).splitlines()[0]}); "
                "run: pip install --force-reinstall torch torchvision")
    return None


if _problem := mismatched_torch():
    print(_problem, file=sys.stderr)
    raise SystemExit(2)
