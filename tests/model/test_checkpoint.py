from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import CheckpointError, EncoderSpecError
from core.files import sha256_file
from model.adaptor import Adaptor, AdaptorConfig
from model.checkpoint import Checkpoint, save_checkpoint
from model.encoders import open_image_encoder, open_text_encoder

CONFIG = AdaptorConfig(patch_dim=24, text_dim=16, embedding_dim=24, width=16, heads=2, start="image")


def save(out: Path, image_spec: str, text_spec: str, *, half: bool = True) -> Adaptor:
    torch.manual_seed(0)
    adaptor = Adaptor(CONFIG).eval()
    torch.nn.init.normal_(adaptor.out.weight, std=0.1)
    save_checkpoint(
        out,
        adaptor=adaptor,
        logit_scale=12.5,
        image_encoder=open_image_encoder(image_spec),
        text_encoder=open_text_encoder(text_spec, max_tokens=16, layer=1),
        training={"seed": 7},
        half=half,
    )
    return adaptor


def arguments() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    image, text = torch.ones(3, dtype=torch.bool), torch.ones(3, 5, dtype=torch.bool)
    return torch.randn(3, 4, 24), image, torch.randn(3, 5, 16), text, torch.randn(3, 24)


@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-7), (True, 2e-3)])
def test_save_and_load(tmp_path: Path, tiny_spec: str, text_spec: str, half: bool, tolerance: float) -> None:
    adaptor = save(tmp_path / "c", tiny_spec, text_spec, half=half)
    loaded = Checkpoint.load(tmp_path / "c", text_encoder_spec=text_spec)
    with torch.no_grad():
        torch.testing.assert_close(loaded.adaptor(*arguments()), adaptor(*arguments()), atol=tolerance, rtol=0)
    assert not loaded.adaptor.training
    assert loaded.adaptor.config == CONFIG
    assert (loaded.text_encoder.max_tokens, loaded.text_encoder.layer) == (16, 1)
    assert loaded.logit_scale == 12.5
    assert loaded.sha256 == sha256_file(tmp_path / "c" / "checkpoint.json")
    assert loaded.values["training"] == {"seed": 7}


def test_a_tiny_encoder_is_saved_with_it(tmp_path: Path, tiny_spec: str, text_spec: str) -> None:
    tiny = tmp_path / "elsewhere.safetensors"
    shutil.copy(tiny_spec.removeprefix("tiny:"), tiny)
    save(tmp_path / "c", f"tiny:{tiny}", text_spec)
    tiny.unlink()
    moved = (tmp_path / "c").rename(tmp_path / "moved")
    loaded = Checkpoint.load(moved, text_encoder_spec=text_spec)
    assert loaded.image_encoder.content_hash == open_image_encoder(tiny_spec).content_hash


def test_saving_can_replace_the_checkpoint_of_its_own_encoder(tmp_path: Path, tiny_spec: str, text_spec: str) -> None:
    save(tmp_path / "c", tiny_spec, text_spec)
    (tmp_path / "c" / "NOTES.md").write_text("kept")
    save(tmp_path / "c", f"tiny:{tmp_path / 'c' / 'image_encoder.safetensors'}", text_spec)
    Checkpoint.load(tmp_path / "c", text_encoder_spec=text_spec)
    assert sorted(file.name for file in (tmp_path / "c").iterdir()) == [
        "NOTES.md",
        "adaptor.safetensors",
        "checkpoint.json",
        "image_encoder.safetensors",
    ]
    assert len({file.stat().st_mode for file in (tmp_path / "c").iterdir()}) == 1  # the default permissions


def test_no_file_names_a_folder_of_this_machine(tmp_path: Path, tiny_spec: str, onnx_spec: str, text_spec: str) -> None:
    for name, spec in {"t": tiny_spec, "o": onnx_spec}.items():
        save(tmp_path / name, spec, text_spec)
        for file in (path for path in (tmp_path / name).rglob("*") if path.is_file()):
            assert str(tmp_path.parent).encode() not in file.read_bytes()


def test_an_onnx_encoder_is_saved_with_it_and_local_models_must_be_named(
    tmp_path: Path, text_spec: str, save_onnx: Callable[..., Path]
) -> None:
    path = save_onnx(tmp_path)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=1000)
    spec = f"onnx:{path}"
    save(tmp_path / "c", spec, text_spec)
    content_hash = open_image_encoder(spec).content_hash
    for file in (path, path.with_suffix(".json"), tmp_path / "weights.bin"):
        file.unlink()
    moved = (tmp_path / "c").rename(tmp_path / "moved")
    loaded = Checkpoint.load(moved, text_encoder_spec=text_spec)
    assert loaded.image_encoder.content_hash == content_hash
    assert loaded.values["image_encoder"]["spec"] == "onnx:small.onnx"
    with pytest.raises(CheckpointError, match=r"--text-encoder hf:PATH"):
        Checkpoint.load(moved)
    save(moved, loaded.image_encoder.spec, text_spec)  # over itself
    data = moved / "image_encoder" / "weights.bin"
    data.write_bytes(data.read_bytes()[:-4] + b"\0\0\x80\x3f")
    with pytest.raises(CheckpointError, match="another image encoder"):
        Checkpoint.load(moved, text_encoder_spec=text_spec)


def test_an_encoder_without_patch_tokens_is_refused(
    tmp_path: Path, text_spec: str, save_onnx: Callable[..., Path]
) -> None:
    with pytest.raises(EncoderSpecError, match="no patch tokens, which the adaptor needs"):
        save(tmp_path / "c", f"onnx:{save_onnx(tmp_path, patch_tokens=False)}", text_spec)


def test_another_encoder_is_rejected(
    tmp_path: Path, onnx_spec: str, text_spec: str, save_onnx: Callable[..., Path]
) -> None:
    save(tmp_path / "c", onnx_spec, text_spec)
    other = save_onnx(tmp_path, offset=0.5)
    with pytest.raises(CheckpointError, match="another image encoder"):
        Checkpoint.load(tmp_path / "c", image_encoder_spec=f"onnx:{other}", text_encoder_spec=text_spec)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def flip(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)

    return damage


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        values = json.loads((folder / "checkpoint.json").read_text())
        change(values)
        (folder / "checkpoint.json").write_text(json.dumps(values))

    return damage


def drop_tensor(folder: Path) -> None:
    weights = load_file(folder / "adaptor.safetensors")
    del weights["out.bias"]
    save_file(weights, folder / "adaptor.safetensors")
    rehash(folder)


def other_shape(folder: Path) -> None:
    save_file(Adaptor(AdaptorConfig(**{**CONFIG.to_dict(), "width": 32})).state_dict(), folder / "adaptor.safetensors")
    rehash(folder)


def rehash(folder: Path) -> None:
    digest = sha256_file(folder / "adaptor.safetensors")
    edit(lambda values: values["files"].update({"adaptor.safetensors": digest}))(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("checkpoint.json"), r"checkpoint\.json is missing"),
        (remove("adaptor.safetensors"), r"adaptor\.safetensors is missing"),
        (remove("image_encoder.safetensors"), r"image_encoder\.safetensors is missing"),
        (flip("adaptor.safetensors"), r"adaptor\.safetensors is altered"),
        (flip("image_encoder.safetensors"), r"image_encoder\.safetensors is altered"),
        (lambda folder: (folder / "checkpoint.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "checkpoint.json").write_text("[]"), "format version"),
        (edit(lambda values: values.update(format_version=9)), "format version 9"),
        (edit(lambda values: values.pop("text_encoder")), "`text_encoder`"),
        (edit(lambda values: values["text_encoder"].pop("layer")), r"`text_encoder\.layer`"),
        (edit(lambda values: values["adaptor"].update(depth=3)), "depth"),
        (edit(lambda values: values["adaptor"].update(width=32)), r"shapes.*size mismatch"),
        (edit(lambda values: values["adaptor"].update(width="wide")), "not all arguments"),
        (edit(lambda values: values["adaptor"].update(heads=0)), "modulo by zero"),
        (edit(lambda values: values["adaptor"].update(width=-16)), "negative dimension"),
        (edit(lambda values: values["adaptor"].update(dropout=2)), "dropout probability"),
        (drop_tensor, r"Missing key.*out\.bias"),
        (other_shape, "size mismatch"),
    ],
)
def test_errors_name_the_damage(
    tmp_path: Path, tiny_spec: str, text_spec: str, *, damage: Callable[[Path], None], message: str
) -> None:
    save(tmp_path / "c", tiny_spec, text_spec)
    damage(tmp_path / "c")
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.load(tmp_path / "c", text_encoder_spec=text_spec)
    assert "\n" not in str(caught.value)


def test_an_adaptor_of_other_widths_is_not_saved(tmp_path: Path, tiny_spec: str) -> None:
    with pytest.raises(CheckpointError, match="text_dim is 16, the encoder's 384"):
        save_checkpoint(
            tmp_path / "c",
            adaptor=Adaptor(CONFIG),
            logit_scale=1.0,
            image_encoder=open_image_encoder(tiny_spec),
            text_encoder=open_text_encoder("minilm"),
            training={},
        )
    assert not (tmp_path / "c").exists()


def test_a_file_at_the_path_is_rejected(tmp_path: Path, tiny_spec: str, text_spec: str) -> None:
    (tmp_path / "c").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        save(tmp_path / "c", tiny_spec, text_spec)
    with pytest.raises(CheckpointError, match="is missing"):
        Checkpoint.load(tmp_path / "c")
