"""Entity records and the readers of the formats they come in."""

from catalog.readers import read_catalog
from catalog.records import EntityRecord, is_url

__all__ = ["EntityRecord", "is_url", "read_catalog"]
