"""Which software a result was made with."""

import platform
from importlib import metadata


def software_versions() -> dict[str, str]:
    """The versions that a result depends on."""
    packages = ("tombola", "torch", "torchvision", "timm", "accelerate", "numpy")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
