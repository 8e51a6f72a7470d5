"""Packages that only some of the interface needs."""

from importlib import import_module
from typing import Any

from g2l_core.errors import UsageError


def require(package: str, extra: str, what: str) -> Any:
    """Import a package that the base install does not bring.

    Args:
        package: Its name.
        extra: G2L's extra that brings it.
        what: What needs it, for the message.

    Raises:
        UsageError: It is not installed. The message has the command that installs it.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise UsageError(f'{what} needs {package}: pip install "g2l[{extra}]"') from error
