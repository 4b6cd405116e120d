"""Where settings come from, and what is refused."""

from __future__ import annotations

import hashlib

import pytest
from click.testing import CliRunner

from core.errors import UserError
from service.cli import serve
from service.settings import Settings, load_settings


def test_the_environment_wins_over_the_default_and_an_argument_over_both(monkeypatch):
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
    ("given", "device", "limit"),
    [
        ({"threads": 1}, "cpu", 8),
        ({"threads": 3}, "cpu", 24),
        ({"threads": 64}, "cpu", 32),
        ({"threads": 1}, "cuda", 32),
        ({"threads": 1, "max_batch": 100}, "cpu", 100),
        ({"threads": 1, "max_batch": 4}, "cuda", 4),
    ],
)
def test_how_many_images_are_encoded_at_once(given, device, limit):
    assert Settings(**given).batch_limit(device) == limit


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
def test_what_does_not_fit_is_told_in_one_line(monkeypatch, name, value, said):
    monkeypatch.setenv(f"WIKICLIP_{name}", value)
    with pytest.raises(UserError) as refused:
        load_settings()
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "secret" not in str(refused.value)


def test_an_empty_variable_counts_as_unset_whatever_its_name(monkeypatch):
    for name in ("PORT", "REDIS_URL", "API_KEYS", "NO_SUCH_SETTING"):
        monkeypatch.setenv(f"WIKICLIP_{name}", "")
    settings = load_settings()
    assert (settings.port, settings.redis_url, settings.api_keys) == (8000, None, ())


def test_keys_are_held_as_digests_only(monkeypatch):
    digest = "sha256:" + hashlib.sha256(b"other").hexdigest()
    monkeypatch.setenv("WIKICLIP_API_KEYS", f"plain, {digest.upper().replace('SHA256', 'sha256')}")
    settings = load_settings()
    assert settings.api_keys == ("sha256:" + hashlib.sha256(b"plain").hexdigest(), digest)
    assert digest[7:] not in repr(settings)


def test_every_setting_is_a_flag_with_help_and_its_default():
    shown = " ".join(CliRunner().invoke(serve, ["--help"]).output.split())
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in shown
        assert f"WIKICLIP_{name.upper()}; default:" in shown
        assert field.description is not None
        assert field.description in shown
