"""Packages that only some sources need."""

import importlib
from types import ModuleType


def require(package: str, extra: str) -> ModuleType:
    """Import a package.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"reading this requires the package {package} ({error}); install it: "
            f"pip install 'nvae_lightning[{extra}]'"
        ) from error
