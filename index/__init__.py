"""The bundle on disk, the entity store and the search index. No torch."""
