"""The HTTP service and the recogniser behind it. Never imports torch."""
