"""Errors of this machine's own disk."""

from __future__ import annotations

import errno
import ssl
import urllib.error

_DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EMFILE),
)


def is_disk_error(error: BaseException) -> bool:
    """Whether the local disk refused, not the network; trying again would not help."""
    if not isinstance(error, OSError) or isinstance(error, urllib.error.URLError | ssl.SSLError):
        return False
    return error.errno in _DISK_ERRORS
