"""The software and the device of a run, as its report states them."""

import platform
from importlib import metadata
from typing import Final

import securetune
from securetune.report.summary import Environment

_LIBRARIES: Final = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "dp-accounting",
    "cryptography",
    "safetensors",
)


def library_versions() -> dict[str, str]:
    """Look up the versions of the libraries whose behaviour a result depends on.

    Returns:
        Distribution name to version, for those installed.
    """
    versions: dict[str, str] = {}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def describe_environment(device: str, dtype: str) -> Environment:
    """Collect the versions for a report.

    Args:
        device: The device that did the work, in words.
        dtype: The element type of the base weights.

    Returns:
        The environment of this process.
    """
    return Environment(
        securetune=securetune.__version__,
        python=platform.python_version(),
        libraries=library_versions(),
        device=device,
        dtype=dtype,
    )
