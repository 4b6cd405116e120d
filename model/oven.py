"""Where the images of OVEN's own annotation files lie.

Their rows name an image by id only. `ovenid2impath.csv` has a line `image_id,path` for each, without a header. The
path is that of the source data set; in the released snapshot the same image is `oven_images/<dd>/<image_id><suffix>`,
`dd` being the first two digits of the id and the suffix that of the path. Both are found.
"""

from __future__ import annotations

import csv
from functools import cached_property
from pathlib import Path, PurePosixPath

from core.errors import CatalogError

TABLE = "ovenid2impath.csv"


def find_table(*folders: Path) -> Path | None:
    """The table in the first of the folders that has one."""
    return next((folder / TABLE for folder in folders if (folder / TABLE).is_file()), None)


class OvenImages:
    """Image files by OVEN's ids, all of them inside `image_root`. The table is read when the first one is looked up."""

    def __init__(self, image_root: Path, table: Path | None) -> None:
        self._root = image_root
        self._table = table

    def find(self, image_id: str) -> Path | None:
        """The image's file; None if the table lacks the id, or neither place has the file.

        Raises `CatalogError` if there is no table, or it cannot be read.
        """
        listed = self._paths.get(image_id)
        if listed is None:
            return None
        path = PurePosixPath(listed.lstrip("/"))
        name = image_id + path.suffix
        shard = PurePosixPath(image_id.rpartition("_")[2][:2])
        for candidate in (path, PurePosixPath("oven_images") / shard / name, shard / name):
            file = self._root / candidate
            if ".." not in candidate.parts and file.is_file():
                return file
        return None

    @cached_property
    def _paths(self) -> dict[str, str]:
        if self._table is None:
            raise CatalogError(
                f"the pairs name images by OVEN's ids, and {TABLE} is neither beside them nor in the image root; name "
                "it with --ovenid2impath"
            )
        paths = {}
        try:
            with self._table.open(encoding="utf-8", newline="") as file:
                for line, row in enumerate(csv.reader(file), start=1):
                    if len(row) != 2:
                        raise CatalogError(
                            f"{self._table}, line {line}: an image id and a path are wanted, there are {len(row)} "
                            "columns; name OVEN's own table with --ovenid2impath"
                        )
                    paths[row[0]] = row[1]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise CatalogError(f"{self._table} cannot be read: {error}; check the path") from error
        return paths
