"""Bytes to pixels: sniffing, limits, decoding, resizing, normalising. No torch."""
