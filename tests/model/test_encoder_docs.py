"""The exporters of docs/encoders.md, run with small models in place of timm's and torchvision's; `wikiclip inspect`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from core.errors import BadParameter, EncoderSpecError
from export.config import ExportConfig
from export.onnx import quiet
from export.pipeline import export_bundle
from index.bundle import Bundle
from model.encoders import open_image_encoder
from service.recognizer import Recognizer
from service.settings import Settings
from wikiclip.answers import Recognition, RecognizeOptions
from wikiclip.commands import inspect

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "encoders.md").read_text(encoding="utf-8")
BLOCKS = {"timm": 0, "torchvision": 1}


class Network(nn.Module):
    """What the exporters use of a network of timm and of torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, stride=8)
        self.fc: nn.Module = nn.Linear(8, 5)

    def forward_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.patches(pixel_values)  # type: ignore[no-any-return]

    def forward_head(self, features: torch.Tensor, *, pre_logits: bool) -> torch.Tensor:
        assert pre_logits
        return features.mean((2, 3))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.fc(self.patches(pixel_values).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files that the exporters of the page write."""
    config = {"input_size": (3, 16, 16), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.2,) * 3}
    config["crop_pct"] = 0.875
    transforms = SimpleNamespace(
        crop_size=[16], resize_size=[18], mean=[0.5] * 3, std=[0.2] * 3, interpolation=SimpleNamespace(value="bilinear")
    )
    weights = SimpleNamespace(DEFAULT=SimpleNamespace(transforms=lambda: transforms))
    modules: dict[str, Any] = {
        "timm": SimpleNamespace(
            create_model=lambda name, pretrained: Network(),
            data=SimpleNamespace(resolve_model_data_config=lambda model: config),
        ),
        "torchvision": SimpleNamespace(
            models=SimpleNamespace(ResNet50_Weights=weights, resnet50=lambda weights: Network())
        ),
    }
    files = {}
    blocks = re.findall(r"```python\n(.+?)```", PAGE, flags=re.DOTALL)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        for name, number in BLOCKS.items():
            folder = tmp_path_factory.mktemp(name)
            patch.chdir(folder)
            patch.setitem(sys.modules, name, modules[name])
            with quiet():
                exec(blocks[number], {"__name__": name})
            files[name] = folder / "encoder.onnx"
    return files


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(inspect, list(map(str, arguments)))


def test_the_exporters_write_encoders(exported: dict[str, Path]) -> None:
    assert len(re.findall(r"```python", PAGE)) == len(BLOCKS)
    result = run(exported["timm"])
    assert result.exit_code == 0, result.output
    assert "images of 16 px, embeddings of width 8, 4 patch tokens\n" in result.output
    report = json.loads(run(exported["torchvision"], "--json").output)
    assert (report["problems"], report["embedding_dim"], report["patches"]) == ([], 8, 0)
    preprocessing = [open_image_encoder(f"onnx:{path}").preprocessing for path in exported.values()]
    assert [each.resize_px for each in preprocessing] == [18, 18]


def test_inspect_names_everything_that_is_wrong(tmp_path: Path, save_onnx: Callable[..., Path]) -> None:
    path = save_onnx(tmp_path, batch=2, outputs=("patch_tokens", "pooled"))
    path.with_suffix(".json").write_text("[")
    result = run(path)
    assert result.exit_code == 2
    for problem in ("is not JSON", "batch size is fixed at 2", "its outputs are patch_tokens, pooled"):
        assert problem in result.output
    with pytest.raises(EncoderSpecError, match=r"not JSON.* \(2 more: see `wikiclip inspect "):
        open_image_encoder(f"onnx:{path}")
    assert run(tmp_path / "none.onnx").exit_code == 2


def test_an_encoder_without_patch_tokens_is_served_without_heat_maps(
    exported: dict[str, Path], dataset: Any, tmp_path: Path
) -> None:
    spec = f"onnx:{exported['torchvision']}"
    export_bundle(ExportConfig(catalog=dataset.catalog, image_encoder=spec, out=tmp_path / "b", device="cpu"))
    manifest = Bundle.open(tmp_path / "b").manifest
    assert (manifest.schema_version, manifest.patches) == (2, 0)
    assert manifest.image_encoder.outputs == (None, "image_embedding")
    row = json.loads(dataset.pairs.read_text().splitlines()[0])
    image = (dataset.folder / row["image"]).read_bytes()
    with Recognizer(Bundle.open(tmp_path / "b"), Settings(device="cpu", cache="off")) as recognizer:
        answered, explained = (
            recognizer.recognize_many([image], RecognizeOptions(explain=explain))[0] for explain in (False, True)
        )
    assert isinstance(answered, Recognition)
    assert answered.predictions
    assert isinstance(explained, BadParameter)
    assert "no patch tokens" in explained.detail
