"""The cache of conversions is looked into: compiled programs, which jax would keep there too, stay out."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_compile_cache(monkeypatch):
    monkeypatch.setenv("JAXSP_COMPILE_CACHE", "off")
