"""The built-in demo domain, Symbols."""
