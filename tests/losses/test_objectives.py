"""The table's lookups, mixtures, and the textbook cases."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsp import losses
from jaxsp.losses import OBJECTIVES, mixture, trainable
from jaxsp.typing import UserError
from tests.losses.problem import INPUTS, MASK

ARRAYS = {name: jnp.asarray(array) for name, array in INPUTS.items()}


def test_trainable():
    assert trainable("kl") is OBJECTIVES["kl"]
    with pytest.raises(UserError, match="Unknown objective 'kll'; choose one of kl, "):
        trainable("kll")
    with pytest.raises(UserError, match=r"piecewise constant.* Train on one of kl, "):
        trainable("zero_one")
    for text, mixed in {
        "kl=0.7,nll=0.3": mixture(kl=0.7, nll=0.3),
        " kl = 1, temperature=2": mixture(kl=1, temperature=2),
    }.items():
        assert trainable(text) == mixed
        assert hash(trainable(text)) == hash(mixed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kl=0.7,nll", "'nll' should read like kl=0.7"),
        ("kl=a", "'kl=a' should read like kl=0.7"),
        ("kl=0.7,zero_one=1", "piecewise constant"),
        ("kl=0.7,kll=1", "Unknown objective 'kll'"),
        ("kl=-1", "The weight of kl must be positive, not -1"),
        ("kl=inf", "The weight of kl must be positive, not inf"),
        ("kl=1,temperature=0", "The temperature must be positive, not 0"),
        ("nll=1,temperature=2", "None of nll has a temperature"),
        ("temperature=2", "needs at least one objective"),
        ("kl=0.7,kl=0.3", "has kl twice"),
        ("kl=1,temperature=inf", "The temperature must be positive, not inf"),
    ],
)
def test_mixtures_that_make_no_sense(text, message):
    with pytest.raises(UserError, match=message):
        trainable(text)


def test_a_mixture_is_the_weighted_sum_of_its_parts_turned_one_way():
    mixed = mixture(kl=0.7, nll=0.3, cosine_similarity=2.0, confidence_shift=0.5, temperature=3.0)
    assert mixed.needs == "hidden + tokens"
    assert mixed.sense == "minimise"
    mask = jnp.asarray(MASK)
    kl = losses.kl_divergence(
        ARRAYS["teacher_logits"], ARRAYS["student_logits"], mask, temperature=3.0
    )
    others = {
        name: OBJECTIVES[name](mask=mask, **ARRAYS)
        for name in ("nll", "cosine_similarity", "confidence_shift")
    }
    expected = 0.7 * kl + 0.3 * others["nll"] - 2 * others["cosine_similarity"]
    expected += 0.5 * jnp.abs(others["confidence_shift"])
    np.testing.assert_allclose(mixed(mask=mask, **ARRAYS), expected, rtol=1e-5, atol=1e-6)


def test_a_mixture_of_one_is_its_entry():
    """So that it is as cheap."""
    assert mixture(kl=1).function is losses.kl_divergence
    assert dict(mixture(kl=1, temperature=2).options) == {"temperature": 2.0}
    assert mixture(cosine_similarity=1).sense == "minimise"


def test_half_a_top_k_is_refused():
    with pytest.raises(ValueError, match="needs teacher_ids"):
        OBJECTIVES["topk_kl"](**{k: a for k, a in ARRAYS.items() if k != "teacher_ids"})


def test_needs_and_senses():
    needs = {name: entry.needs for name, entry in OBJECTIVES.items()}
    assert {"hidden", "top-k", "tokens", "nothing"} == set(needs.values())
    assert (needs["kl"], needs["topk_kl"], needs["nll"]) == ("hidden", "top-k", "tokens")
    assert needs["entropy"] == "nothing"
    values = jnp.array([-1.0, 2.0])
    for sense, cost in (("minimise", [-1, 2]), ("maximise", [1, -2]), ("zero", [1, 2])):
        entry = losses.Objective(losses.kl_divergence, sense=sense)
        np.testing.assert_array_equal(entry.cost(values), cost)


TEACHER = jnp.log(jnp.array([[0.6, 0.3, 0.1]]))


def descend(loss, steps=300):
    """The student's distribution after gradient descent on its logits."""
    logits, optimizer = jnp.zeros((1, 3)), optax.adam(0.1)

    def step(carry, _):
        logits, state = carry
        updates, state = optimizer.update(jax.grad(lambda x: loss(x).sum())(logits), state)
        return (optax.apply_updates(logits, updates), state), None

    (logits, _), _ = jax.lax.scan(step, (logits, optimizer.init(logits)), length=steps)
    return jax.nn.softmax(logits)[0]


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "js", "topk_kl"])
def test_textbook_divergences_end_at_the_teachers_distribution(name):
    entry = OBJECTIVES[name]
    best = losses.top_k(TEACHER, 2)
    end = descend(
        lambda x: entry(
            teacher_logits=TEACHER, student_logits=x,
            teacher_log_probs=best.log_probs, teacher_ids=best.ids,
        )
    )  # fmt: skip
    np.testing.assert_allclose(end, [0.6, 0.3, 0.1], atol=5e-3)


def test_textbook_likelihood_ends_at_certainty():
    end = descend(lambda x: losses.negative_log_likelihood(x, jnp.array([0])))
    assert end[0] > 0.95


def test_textbook_same_first_token_different_distributions():
    near, far = jnp.log(jnp.array([[[0.58, 0.31, 0.11]], [[0.98, 0.01, 0.01]]]))
    assert losses.zero_one(TEACHER, near) == losses.zero_one(TEACHER, far) == 0
    assert losses.kl_divergence(TEACHER, near) < 0.01
    assert losses.kl_divergence(TEACHER, far) > 0.5


def test_textbook_zero_one_has_no_gradient():
    def total(student):
        return OBJECTIVES["zero_one"](**{**ARRAYS, "student_logits": student}).sum()

    gradient = jax.grad(total)(ARRAYS["student_logits"])
    assert gradient.shape == ARRAYS["student_logits"].shape
    assert (np.asarray(gradient) == 0).all()
    nudged = ARRAYS["student_logits"] + 1e-4
    assert total(nudged) == total(ARRAYS["student_logits"])
