"""The best tokens straight from hidden states: a float64 oracle's, in chunks, with the tail summed itself."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from jaxsp.losses import OBJECTIVES, fused_objective, fused_topk, kl_divergence, parse, topk_kl_divergence
from tests import programs

random = np.random.RandomState(0)
B, T, D, V = 3, 7, 5, 24
HIDDEN, STUDENT = (random.standard_normal((B, T, D)).astype(np.float32) for _ in range(2))
HEAD = random.standard_normal((V, D)).astype(np.float32)
MASK = random.uniform(size=(B, T)) < 0.6


def expected(k, softcap=None):
    """Log-probabilities, ids and tail, in float64."""
    logits = HIDDEN.astype(np.float64) @ HEAD.T.astype(np.float64)
    log_p = log_softmax(softcap * np.tanh(logits / softcap) if softcap else logits, axis=-1)
    ids = np.argsort(-log_p, axis=-1, kind="stable")
    ordered = np.take_along_axis(log_p, ids, axis=-1)
    return ordered[..., :k], ids[..., :k], np.exp(ordered[..., k:]).sum(axis=-1)


@pytest.mark.parametrize(
    ("k", "mask", "chunk", "softcap"),
    [(4, None, None, None), (4, MASK, 4, 2.0), (99, MASK, 5, None), (1, np.zeros_like(MASK), 4, None)],
)
def test_equals_the_float64_oracle(k, mask, chunk, softcap):
    log_probs, ids, tail = fused_topk(HIDDEN, HEAD, mask, k=k, softcap=softcap, chunk_size=chunk)
    theirs, live = expected(k, softcap), np.ones_like(MASK) if mask is None else mask
    assert (log_probs.dtype, ids.dtype, tail.dtype) == (jnp.float32, jnp.int32, jnp.float32)
    assert log_probs.shape == ids.shape == (B, T, min(k, V))
    np.testing.assert_allclose(np.asarray(log_probs)[live], theirs[0][live], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(ids)[live], theirs[1][live])
    np.testing.assert_allclose(np.asarray(tail)[live], theirs[2][live], rtol=1e-5)
    for array in (log_probs, ids, tail):
        assert not np.asarray(array)[~live].any()


def test_no_number_under_the_mask_is_read():
    hidden = np.where(MASK[..., None], HIDDEN, np.nan)
    for a, b in zip(fused_topk(hidden, HEAD, MASK), fused_topk(HIDDEN, HEAD, MASK), strict=True):
        np.testing.assert_array_equal(a, b)


def test_ties_go_to_the_lowest_id():
    _, ids, tail = fused_topk(jnp.ones((1, 1)), jnp.ones((4, 1)), k=2)
    assert ids.tolist() == [[0, 1]]
    assert float(tail[0]) == 0.5


def test_logits_are_there_for_a_chunk_of_positions_alone():
    """Its memory is far below that of the logits of all positions."""
    positions, tokens, chunk = 2048, 4096, 16
    shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((positions, 8), (tokens, 8)))
    function = functools.partial(fused_topk, k=4, chunk_size=chunk)
    program = jax.jit(lambda hidden, head: function(hidden, head)).lower(*shapes).compile()
    assert programs.memory(program).temp_size_in_bytes < 4 * positions * tokens / 4


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be a whole number of at least 1, not 0"),
        ({"softcap": -1.0}, "softcap must be positive, not -1.0"),
        ({"chunk_size": 0}, "chunk_size must be a whole number of at least 1, not 0"),
        ({"mask": MASK[:1]}, r"mask must have shape \[3, 7\], not \[1, 7\]"),
        ({"unembedding": HEAD[:, :3]}, "hidden has vectors of 5 and unembedding rows of 3"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        fused_topk(**{"hidden": HIDDEN, "unembedding": HEAD, **arguments})


def test_the_tail_counts_beside_the_entries_taken():
    """Those that k leaves out are added to it; it gets no gradient, and none under the mask is read."""
    student = STUDENT @ HEAD.T
    log_probs, ids, tail = fused_topk(HIDDEN, HEAD, k=6)
    for k in (2, 6, None):
        value = topk_kl_divergence(log_probs, ids, student, MASK, k=k, teacher_tail=tail)
        np.testing.assert_allclose(value, topk_kl_divergence(log_probs, ids, student, MASK, k=k), atol=2e-6)
    none = jnp.where(jnp.asarray(MASK), tail, jnp.nan)
    assert np.isfinite(topk_kl_divergence(log_probs, ids, student, MASK, teacher_tail=none)).all()

    def total(tail):
        return topk_kl_divergence(log_probs, ids, student, teacher_tail=tail).sum()

    assert not np.asarray(jax.grad(total)(tail)).any()


def test_a_small_tail_is_that_of_the_others():
    """The rest of the listed mass up to 1 is lost to rounding; the student finds it far less likely."""
    teacher, student = (jnp.log(jnp.array([[0.7, 0.3, rest]], jnp.float32)) for rest in (1e-7, 1e-30))
    log_probs, ids, tail = fused_topk(teacher, jnp.eye(3), k=2)
    assert float(tail[0]) == pytest.approx(1e-7, rel=1e-4)
    value = float(topk_kl_divergence(log_probs, ids, student, teacher_tail=tail)[0])
    assert value == pytest.approx(float(kl_divergence(teacher, student)[0]), abs=2e-7)
    assert value > 5e-6
    assert float(topk_kl_divergence(log_probs, ids, student)[0]) < 1e-6


def test_stored_entries_train_as_those_taken_from_hidden_states():
    """Value and gradient, of one objective and of a mixture in which each takes as many as alone."""
    for text in ("topk_kl(k=5)", "truncated_kl(k=3)", "topk_kl(k=3)=2,truncated_kl(k=5),nll"):
        entry = parse(text)
        best = fused_topk(HIDDEN, HEAD, MASK, k=entry.entries)
        targets = jnp.zeros((B, T), jnp.int32)
        given = dict(zip(("teacher_log_probs", "teacher_ids", "teacher_tail"), best, strict=True))

        def loss(student, entry=entry, targets=targets, **given: Any):
            values, _ = fused_objective(entry, student, HEAD, MASK, targets=targets, chunk_size=4, **given)
            return values.sum()

        ours = jax.value_and_grad(functools.partial(loss, **given))(jnp.asarray(STUDENT))
        theirs = jax.value_and_grad(functools.partial(loss, teacher_hidden=HIDDEN))(jnp.asarray(STUDENT))
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_all_tokens_are_the_full_divergence():
    best = fused_topk(HIDDEN, HEAD, MASK, k=V)
    assert not np.asarray(best.tail).any()
    given = dict(zip(("teacher_log_probs", "teacher_ids", "teacher_tail"), best, strict=True))

    def loss(student, objective, **given: Any):
        return fused_objective(objective, student, HEAD, MASK, **given)[0].sum()

    student = jnp.asarray(STUDENT)
    ours = jax.value_and_grad(loss)(student, "topk_kl", **given)
    theirs = jax.value_and_grad(loss)(student, "kl", teacher_hidden=HIDDEN)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


def test_an_objective_says_how_many_entries_it_compares():
    assert OBJECTIVES["topk_kl"].entries == 64
    assert parse("topk_kl(k=20)").entries == 20
    assert parse("topk_kl(k=20)=0.5,truncated_kl(k=30)=0.5,nll").entries == 30
    # One that names none takes 64, whatever is there for another one.
    mixed = parse("topk_kl=0.5,truncated_kl(k=128)=0.5")
    assert str(mixed) == "topk_kl(k=64)=0.5,truncated_kl(k=128)=0.5"
    assert parse(str(mixed)) == mixed
    assert mixed.entries == 128


@pytest.mark.usefixtures("unchecked")
def test_a_tail_goes_with_its_entries():
    best = fused_topk(HIDDEN, HEAD, k=3)
    entries = {"teacher_log_probs": best.log_probs, "teacher_ids": best.ids}
    wrong: list[dict[str, Any]] = [{**entries, "teacher_tail": best.tail[:1]}, {"teacher_tail": best.tail}]
    for given in wrong:
        with pytest.raises(ValueError, match=r"teacher_tail must have shape \[3, 7\] and stand beside"):
            fused_objective("topk_kl", STUDENT, HEAD, teacher_hidden=HIDDEN, **given)
    with pytest.raises(ValueError, match=r"teacher_tail must have shape \[3, 7\], not \[1, 7\]"):
        topk_kl_divergence(best.log_probs, best.ids, STUDENT @ HEAD.T, teacher_tail=best.tail[:1])
