"""Code that a file names runs only if the user trusts its module.

A name MODULE:FUNCTION that a user types is the user's own. The same name in a store, a run folder, a spec file or a
recipe may be somebody else's, so `EncoderSpec.named_in` keeps which file it came from until the module is trusted.
"""

import logging
from collections.abc import Collection
from dataclasses import replace

from g2l_core.encoders.spec import EncoderSpec
from g2l_core.errors import EncoderError

_log = logging.getLogger(__name__)


def code_of(spec: EncoderSpec) -> str:
    """The MODULE:FUNCTION that building the encoder would import and call; empty for an architecture of timm."""
    return spec.architecture if ":" in spec.architecture else ""


def with_trusted_code(spec: EncoderSpec, trusted: Collection[str] | None) -> EncoderSpec:
    """The spec, ready to be built. If a file names its code and that is trusted, it is said before it is imported.

    Args:
        spec: The encoder.
        trusted: Modules, and packages whose modules, may be imported. None leaves the question to whoever builds it.

    Raises:
        EncoderError: A file names its code, and the module is not trusted.
    """
    if trusted is None or not spec.named_in:
        return spec
    require_trusted(code_of(spec), spec.named_in, trusted)
    return replace(spec, named_in="")


def require_trusted(code: str, named_in: str, trusted: Collection[str] = ()) -> None:
    """Refuse MODULE:FUNCTION that a file names, unless the module or its package is trusted.

    Raises:
        EncoderError: It is not.
    """
    if not code or not named_in:
        return
    module = code.partition(":")[0]
    if not any(module == name or module.startswith(f"{name}.") for name in trusted):
        raise EncoderError(
            f"{named_in} names the code {code}, which would be imported and run. If you trust it, give "
            f"--trust-code {module}"
        )
    _log.warning("%s names the code %s: it is imported now, as --trust-code allows", named_in, code)
