"""Servers for the tests of a file."""

from __future__ import annotations

import time

import pytest

from jaxsp.models.generation import Live
from tests.serve.running import running


@pytest.fixture(scope="module")
def service():
    with running() as found:
        yield found


@pytest.fixture
def slowly(monkeypatch):
    """Each look at the batch takes a twentieth of a second: an answer of 64 tokens three seconds."""
    advance = Live.advance

    def slow(self, steps):
        time.sleep(0.05)
        return advance(self, 1)

    monkeypatch.setattr(Live, "advance", slow)
