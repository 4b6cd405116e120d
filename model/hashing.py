"""One fingerprint for a frozen encoder: whatever changes what it computes changes its hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def hash_module(module: nn.Module, settings: Mapping[str, Any]) -> str:
    """The SHA-256 of a module's weights and buffers, and of the settings that its output depends on, in hexadecimal.

    Taken from the tensors and not from files, so that it does not depend on how they are laid out on disk. Hash before
    casting to a device's precision, or one model gets two hashes.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        # Viewed as bytes, since numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def defining(saved_config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's saved config without what only says where it lay and which version wrote it."""
    passing = {"_name_or_path", "name_or_path", "transformers_version"}
    return {key: value for key, value in saved_config.items() if key not in passing}
