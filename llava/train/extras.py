"""Packages that come with the extra `train` and are imported where a flag asks for them."""

from __future__ import annotations

from importlib.util import find_spec


def require(package: str, flag: str) -> None:
    """Checks that a package of the extra `train` is there.

    Raises:
        ImportError: it is not installed; the message says which flag needs it and how to install it.
    """
    if find_spec(package) is None:
        raise ImportError(f"{flag} needs the package {package}. Install it with: pip install -e '.[train]'")
