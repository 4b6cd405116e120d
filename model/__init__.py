"""The network and its training (torch)."""
