"""The images of a catalog, downloaded politely into tar shards."""
