"""Logits against Hugging Face: live where torch is installed, against stored goldens elsewhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import jaxsp
from tests import tiny
from tests.goldens.make_logits import CASES, IDS, SMOLLM2_TEXT, SMOLLM2_VOCABULARY, torch_logits

GOLDENS = Path(__file__).parents[1] / "goldens" / "logits.npz"
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is in the optional group `torch`"
)


def ours(directory: Path, ids: np.ndarray) -> np.ndarray:
    return np.asarray(jaxsp.load_model(directory, dtype="float32", tokenizer=None).logits(ids))


@pytest.mark.parametrize("case", CASES)
def test_stored_goldens(case, tmp_path):
    tiny.write(tmp_path, with_tokenizer=False, **CASES[case])
    np.testing.assert_allclose(ours(tmp_path, IDS), np.load(GOLDENS)[case], atol=1e-4, rtol=0)


def test_embedded_model_stored_goldens(smollm2):
    ids = smollm2.tokenizer(SMOLLM2_TEXT).input_ids
    logits = np.asarray(smollm2.logits(ids))[:, SMOLLM2_VOCABULARY]
    np.testing.assert_allclose(logits, np.load(GOLDENS)["smollm2"], atol=1e-4, rtol=0)


@needs_torch
@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_live(case, tmp_path):
    tiny.write(tmp_path, with_tokenizer=False, **CASES[case])
    np.testing.assert_allclose(ours(tmp_path, IDS), torch_logits(tmp_path, IDS), atol=1e-4, rtol=0)


@needs_torch
@pytest.mark.torch
def test_embedded_model_live(smollm2):
    ids = np.array([smollm2.tokenizer(SMOLLM2_TEXT).input_ids])
    theirs = torch_logits(smollm2.directory, ids)
    np.testing.assert_allclose(smollm2.logits(ids), theirs, atol=1e-4, rtol=0)
