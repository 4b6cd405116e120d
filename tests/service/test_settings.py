"""Sources of settings and their validation."""

from __future__ import annotations

import hashlib

import pytest
from click.testing import CliRunner

from core.errors import UserError
from service.cli import serve
from service.settings import Settings, load_settings


def test_arguments_override_the_environment_and_the_environment_overrides_defaults(monkeypatch):
    assert load_settings().port == 8000
    monkeypatch.setenv("WIKICLIP_PORT", "9000")
    assert load_settings().port == 9000
    assert load_settings(port=9001).port == 9001
    assert load_settings(port="9002").port == 9002


def test_lists_are_separated_by_commas(monkeypatch):
    monkeypatch.setenv("WIKICLIP_CORS_ORIGINS", "https://a.example, https://b.example")
    assert load_settings().cors_origins == ("https://a.example", "https://b.example")
    monkeypatch.setenv("WIKICLIP_CORS_ORIGINS", "")
    assert load_settings().cors_origins == ()


@pytest.mark.parametrize(
    ("arguments", "device", "limit"),
    [
        ({"threads": 1}, "cpu", 8),
        ({"threads": 3}, "cpu", 24),
        ({"threads": 64}, "cpu", 32),
        ({"threads": 1}, "cuda", 32),
        ({"threads": 1, "max_batch": 100}, "cpu", 100),
        ({"threads": 1, "max_batch": 4}, "cuda", 4),
    ],
)
def test_batch_limit(arguments, device, limit):
    assert Settings(**arguments).batch_limit(device) == limit


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("PORT", "high", "port (WIKICLIP_PORT) is 'high'"),
        ("DEVICE", "tpu", "device"),
        ("DEADLINE_MS", "0", "deadline_ms"),
        ("REDIS_URL", "localhost:6379", "redis://"),
        ("QUEUE_LIMIT", "8", "max_batch_images"),
        ("ADMIN_TOKENS", "secret", "WIKICLIP_ADMIN_TOKENS"),
        ("ADMIN_TOKEN", "sha256:secret", "64 hex digits"),
        ("API_KEYS", "sha256:secret", "64 hex digits"),
        ("REDIS_URL", "redi://:secret@host", "redis://"),
    ],
)
def test_invalid_values_raise_a_one_line_error(monkeypatch, name, value, said):
    monkeypatch.setenv(f"WIKICLIP_{name}", value)
    with pytest.raises(UserError) as refused:
        load_settings()
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "secret" not in str(refused.value)


def test_empty_variables_count_as_unset(monkeypatch):
    for name in ("PORT", "REDIS_URL", "API_KEYS", "NO_SUCH_SETTING"):
        monkeypatch.setenv(f"WIKICLIP_{name}", "")
    settings = load_settings()
    assert (settings.port, settings.redis_url, settings.api_keys) == (8000, None, ())


def test_keys_are_stored_as_digests(monkeypatch):
    digest = "sha256:" + hashlib.sha256(b"other").hexdigest()
    monkeypatch.setenv("WIKICLIP_API_KEYS", f"plain, {digest.upper().replace('SHA256', 'sha256')}")
    settings = load_settings()
    assert settings.api_keys == ("sha256:" + hashlib.sha256(b"plain").hexdigest(), digest)
    assert digest[7:] not in repr(settings)


def test_passwords_in_urls_are_not_shown():
    settings = load_settings(redis_url="redis://:hunter2@localhost/0", index="milvus:http://root:hunter2@localhost:1")
    assert "hunter2" not in repr(settings)


def test_every_setting_is_a_flag_with_help_and_its_default():
    output = CliRunner().invoke(serve, ["--help"]).output
    words, letters = " ".join(output.split()), "".join(output.split())  # lines break at hyphens as well
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in words
        assert f"WIKICLIP_{name.upper()}; default:" in words
        assert field.description is not None
        assert "".join(field.description.split()) in letters
