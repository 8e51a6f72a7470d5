"""Weights files from the model hub: one revision, cached, and every refusal explained in one line."""

from pathlib import Path

from g2l_core.encoder_spec import EncoderSpec
from g2l_core.errors import EncoderError

FILE_NAMES = ("model.safetensors", "pytorch_model.bin")


def hub_file(spec: EncoderSpec, where: str) -> Path:
    """The local copy of REPOSITORY[@REVISION][#FILE], downloaded if it is not in the hub's cache.

    HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean to `huggingface_hub`.

    Raises:
        EncoderError: It cannot be had; says why and what to do.
    """
    from huggingface_hub import errors, hf_hub_download

    address, _, file_name = where.partition("#")
    repository, _, revision = address.partition("@")
    # The client lets errors of its transport through (a connection that breaks); its own share their base.
    refusals: tuple[type[Exception], ...] = (*errors.HfHubHTTPError.__bases__, OSError, ValueError)
    names = (file_name,) if file_name else FILE_NAMES
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, revision=revision or None))
        except errors.LocalEntryNotFoundError as error:
            raise EncoderError(
                f"{spec.name}: the hub cannot be reached and {repository} is not in the cache"
                + (f" at revision {revision}" if revision else "")
                + ". Connect once, or give --weights FILE"
            ) from error
        except errors.EntryNotFoundError:
            continue
        except refusals as error:
            raise EncoderError(f"{spec.name}: {_refusal(error, repository, revision)}") from error
    lacking = f"no {file_name}" if file_name else f"neither {' nor '.join(FILE_NAMES)}"
    raise EncoderError(f"{spec.name}: {repository} has {lacking}")


def _refusal(error: Exception, repository: str, revision: str) -> str:
    """In one line, why the hub does not give a file, and what to do."""
    from huggingface_hub import constants, errors

    match error:
        case errors.GatedRepoError():
            return (
                f"access to {repository} is gated. Accept its licence at {constants.ENDPOINT}/{repository}, "
                "then set HF_TOKEN (or run `hf auth login`)"
            )
        case errors.RepositoryNotFoundError():
            return f"the hub has no {repository}, or it is private: then set HF_TOKEN (or run `hf auth login`)"
        case errors.RevisionNotFoundError():
            return f"the hub's {repository} has no revision {revision!r}"
        case _:
            return f"cannot download {repository}: {str(error).partition(chr(10))[0] or type(error).__name__}"
