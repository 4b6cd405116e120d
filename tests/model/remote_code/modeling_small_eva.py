"""Code as a repository on the Hub carries it: a tower of EVA-CLIP's form, with its norms, few channels and one layer.

Loaded by transformers from the folder of a model, never by us.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


class SmallEvaConfig(PreTrainedConfig):  # type: ignore[misc]
    model_type = "small_eva"

    def __init__(self, vision_config: dict[str, Any] | None = None, projection_dim: int = 20, **kwargs: Any) -> None:
        self.vision_config = vision_config or {"image_size": 32, "patch_size": 8, "hidden_size": 24}
        self.projection_dim = projection_dim
        super().__init__(**kwargs)


class Vision(nn.Module):
    def __init__(self, config: SmallEvaConfig) -> None:
        super().__init__()
        size, patch, width = (config.vision_config[name] for name in ("image_size", "patch_size", "hidden_size"))
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.class_token = nn.Parameter(torch.randn(width))
        self.position = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True)
        self.post_layernorm = nn.RMSNorm(width)

    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        patches = self.patches(pixel_values).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(patches.shape[0], 1, -1), patches], dim=1)
        hidden = self.layer(tokens + self.position)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=self.post_layernorm(hidden[:, 0]))


class EvaCLIPModel(PreTrainedModel):  # type: ignore[misc]
    config_class = SmallEvaConfig

    def __init__(self, config: SmallEvaConfig) -> None:
        super().__init__(config)
        self.vision_model = Vision(config)
        self.visual_projection = nn.Linear(config.vision_config["hidden_size"], config.projection_dim)
        self.post_init()
