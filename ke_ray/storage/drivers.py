"""Errors of fsspec's drivers and their clients, translated for users."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ke_ray.errors import StorageError
from ke_ray.secrets import redact

_MODULES = ("aiohttp", "azure", "botocore", "gcsfs", "google", "httpx", "requests", "s3fs")
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")


def is_remote(uri: str) -> bool:
    """Whether ``uri`` is on a store, and not on this machine's own file system."""
    return "://" in uri and not uri.startswith(("file://", "local://"))


def explain_driver_error(error: BaseException) -> str | None:
    """The reason, without a final stop, where a driver raised ``error``; None for others."""
    if type(error).__module__.split(".")[0] not in _MODULES:
        return None
    reason = " ".join((str(error) or type(error).__name__).split()).rstrip(".")
    if type(error).__name__ in _NO_CREDENTIALS:
        reason += (
            ". Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and "
            "AWS_ENDPOINT_URL for another store than Amazon's); FSSPEC_S3_ANON=true reads public "
            "buckets"
        )
    return reason


@contextmanager
def driver_errors(uri: str) -> Iterator[None]:
    """Turn what a driver raises about ``uri`` into a StorageError; other errors pass."""
    try:
        yield
    except Exception as error:
        reason = explain_driver_error(error)
        if reason is None:
            raise
        raise StorageError(f"Cannot reach '{redact(uri)}': {reason}.") from error
