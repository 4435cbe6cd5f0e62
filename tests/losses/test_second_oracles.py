"""Other libraries' functions where they are defined: optax everywhere, torch where it is installed."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsp import losses
from tests.losses.problem import INPUTS, V

ARRAYS = {name: jnp.asarray(array) for name, array in INPUTS.items()}
TEACHER, STUDENT, TARGETS = (ARRAYS[n] for n in ("teacher_logits", "student_logits", "targets"))


def same(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_optax():
    log_p, log_q = jax.nn.log_softmax(TEACHER), jax.nn.log_softmax(STUDENT)
    same(losses.kl_divergence(TEACHER, STUDENT), optax.losses.kl_divergence_with_log_targets(log_q, log_p))
    same(
        losses.negative_log_likelihood(STUDENT, TARGETS),
        optax.losses.softmax_cross_entropy_with_integer_labels(STUDENT, TARGETS),
    )
    smooth = optax.losses.smooth_labels(jax.nn.one_hot(TARGETS, V), 0.2)
    same(
        losses.negative_log_likelihood(STUDENT, TARGETS, label_smoothing=0.2),
        optax.losses.softmax_cross_entropy(STUDENT, smooth),
    )
    x, y = ARRAYS["teacher_hidden"], ARRAYS["student_hidden"]
    same(losses.cosine_similarity(x, y), optax.losses.cosine_similarity(y, x))
    same(losses.hidden_mse(x, y), optax.losses.squared_error(y, x).mean(axis=-1))


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is optional")
@pytest.mark.torch
def test_torch():
    import torch
    import torch.nn.functional as F

    t, x, y = (torch.tensor(INPUTS[n]) for n in ("teacher_logits", "teacher_hidden", "student_hidden"))
    s = torch.tensor(INPUTS["student_logits"], requires_grad=True)
    log_p, log_q = t.log_softmax(-1), s.log_softmax(-1)
    targets = torch.tensor(INPUTS["targets"]).long().flatten()

    def kl(a, b):
        return F.kl_div(a, b, reduction="none", log_target=True).sum(-1)

    log_m = torch.logsumexp(torch.stack([log_p, log_q]), 0) - np.log(2)
    shape = TARGETS.shape
    for ours, theirs in {
        lambda x: losses.kl_divergence(TEACHER, x): kl(log_q, log_p),
        lambda x: losses.reverse_kl_divergence(TEACHER, x): kl(log_p, log_q),
        lambda x: losses.js_divergence(TEACHER, x): (kl(log_m, log_p) + kl(log_m, log_q)) / 2,
        lambda x: losses.negative_log_likelihood(x, TARGETS, label_smoothing=0.2): F.cross_entropy(
            s.flatten(0, 1), targets, reduction="none", label_smoothing=0.2
        ).reshape(shape),
        lambda x: losses.entropy(x): torch.distributions.Categorical(logits=s).entropy(),
    }.items():
        same(ours(STUDENT), theirs.detach())
        (gradient,) = torch.autograd.grad(theirs.sum(), s, retain_graph=True)
        same(jax.grad(lambda x, ours=ours: ours(x).sum())(STUDENT), gradient)
    same(
        losses.cosine_similarity(ARRAYS["teacher_hidden"], ARRAYS["student_hidden"]),
        F.cosine_similarity(x, y, dim=-1),
    )
