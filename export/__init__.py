"""Catalog in, bundle out."""
