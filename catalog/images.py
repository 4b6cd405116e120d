"""The bytes of a record's images. `ImageReader` is the seam: files of this machine here, other places implement it."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from typing import Protocol

from catalog.records import is_url
from core.errors import CatalogError

# Not the fault of one record: a disk or a mount that fails would make every image after it look missing.
_MACHINE_ERRORS = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class UnusableImage(Exception):
    """An image of a record that cannot even be read; its message says why."""


class ImageReader(Protocol):
    """Where the images of a catalog are read from. It is pickled and sent to worker processes."""

    def read(self, image: str) -> bytes:
        """The bytes of one of `EntityRecord.images`. Raises `UnusableImage`, `CatalogError` where none can be read."""


@dataclass(frozen=True)
class LocalImages:
    """Images that are files of this machine. Nothing is ever fetched."""

    def read(self, image: str) -> bytes:
        """The bytes of a file. Raises `UnusableImage`, `CatalogError` where the machine is at fault."""
        if is_url(image):
            raise UnusableImage("images by URL are not fetched; see `wikiclip fetch-images`")
        try:
            # Opened so that a named pipe does not block, and looked at before it is read: a device never ends.
            with open(os.open(image, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise UnusableImage("cannot be read: it is no file")
                return file.read()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = getattr(error, "strerror", None) or error
            if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS:
                raise CatalogError(f"image {image} cannot be read: {reason}; repair that, then --resume") from error
            raise UnusableImage(f"cannot be read: {reason}") from error
