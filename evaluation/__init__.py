"""Accuracy of a bundle on labelled queries: `wikiclip evaluate`."""
