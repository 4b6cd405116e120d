"""Download the images of a catalog into tar shards, within rate limits per host."""
