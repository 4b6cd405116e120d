"""What every stage shares: the error tree, JSONL with rejects, durable files. Imports nothing heavy."""

import os

from core.blas import choose_kernels

# From 1.32 on ONNX Runtime reports its use to its maker as soon as it is imported, unless it is told not to before.
# Whoever wants that sets ORT_DISABLE_TELEMETRY=0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

choose_kernels()
