"""The HTTP service and the recogniser behind it. Never imports torch."""

import core  # noqa: F401 - before ONNX Runtime: it says what that may not do
