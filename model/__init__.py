"""The network and its training (torch)."""

import core  # noqa: F401 - before ONNX Runtime and faiss: it says what they may and may not do
