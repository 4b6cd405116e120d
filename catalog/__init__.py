"""Entity records, and reading them from catalog files."""

from catalog.formats import read_catalog
from catalog.records import EntityRecord, is_url

__all__ = ["EntityRecord", "is_url", "read_catalog"]
