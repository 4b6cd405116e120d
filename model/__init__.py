"""The network and its training (torch)."""

import core  # noqa: F401 - before ONNX Runtime: it says what that may not do
