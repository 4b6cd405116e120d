"""Download the images of a catalog into tar shards, and ask for their credits, within rate limits per host."""
