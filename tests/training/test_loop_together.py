"""Many prompts in one step: each as if alone, whatever the others do."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsp import distributions
from jaxsp.data.examples import make_rows
from jaxsp.data.packing import Packing
from jaxsp.evaluation.metrics import mean_kl_function
from jaxsp.losses import OBJECTIVES
from jaxsp.settings import TrainingSettings
from jaxsp.training.drivers import JitDriver
from jaxsp.training.loop import Block
from jaxsp.training.optimizers import make_optimizer, warmup_cosine
from jaxsp.training.slots import TrainingJob
from jaxsp.training.state import initial_state
from jaxsp.training.update import Frozen, UpdateSettings


@pytest.fixture(scope="module")
def school(calm_model):
    """Makes jobs, and trains some of them side by side."""
    params, config = calm_model.params, calm_model.config
    preamble = distributions.context_prefix(params, config, np.array([[4, 5, 6]]))
    frozen = Frozen(params, preamble)
    settings = UpdateSettings(
        config, "embedding", OBJECTIVES["kl"], make_optimizer(TrainingSettings(optimizer="muon"))
    )

    def job(seed, *, questions=9, context=30, steps=12, rate=0.3, patience=0, batch_size=4):
        random = np.random.RandomState(seed)

        def ids(n):
            return random.randint(3, config.vocab_size, n).tolist()

        prefix = distributions.context_prefix(params, config, np.array([ids(context)]), preamble)
        sizes = [(2 + i % 4, 1 + i % 5) for i in range(questions)]
        rows = make_rows([ids(z) for z, _ in sizes], [ids(a) for _, a in sizes])
        hidden = distributions.answer_hidden(params, config, prefix, rows)
        rows = rows.with_targets(hidden=np.asarray(hidden))
        sigma = {"embeddings": calm_model.embed(np.array(ids(4))).astype(jnp.float32)}
        schedule = warmup_cosine(0.1 * rate, steps, 0.05)
        key = jax.random.key(seed)
        state = initial_state(sigma, settings.optimizer, key=key, schedule=schedule)
        cut = questions - questions // 3
        train, held_out = rows.take(range(cut)), rows.take(range(cut, questions))
        packing = Packing.of(rows.lengths, batch_size)
        return TrainingJob(str(seed), state, train, held_out, packing, patience)

    def together(jobs, slots, every=5, **options):
        block = Block(
            iter(jobs),
            lambda slots: JitDriver(frozen, settings, slots=slots),
            mean_kl_function(calm_model, preamble, "embedding"),
            slots=slots,
            evaluate_every=every,
            **options,
        )
        return sorted(block.run(), key=lambda result: result.id)

    return job, together


def assert_same(ours, theirs):
    assert ours.error is theirs.error is None
    assert int(ours.state.step) == int(theirs.state.step)
    assert int(ours.state.cursor) == int(theirs.state.cursor)
    for name in ("sigma", "best_sigma"):
        a, b = (getattr(result.state, name)["embeddings"] for result in (ours, theirs))
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert [line["step"] for line in ours.lines] == [line["step"] for line in theirs.lines]
    for a, b in zip(ours.lines, theirs.lines, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name


@pytest.mark.slow
def test_each_is_what_it_would_be_alone(school):
    """Uneven questions, contexts, steps, rates and batches; more prompts than slots."""
    job, together = school
    jobs = [
        job(0),
        job(1, questions=21, context=9),
        job(2, steps=17, rate=0.1),
        job(3, questions=6, batch_size=7),
        job(4, steps=3),
    ]
    assert len({j.packing for j in jobs}) > 1
    results = together(jobs, slots=2)
    assert [r.id for r in results] == ["0", "1", "2", "3", "4"]
    for ours, own in zip(results, jobs, strict=True):
        (alone,) = together([own], slots=1)
        assert_same(ours, alone)
    starts = [result.state.best_sigma["embeddings"] for result in results]
    assert not np.allclose(starts[0], starts[1])


@pytest.mark.slow
def test_one_that_fails_leaves_the_others_alone(school):
    job, together = school
    bad = job(1, questions=30)
    hidden = np.asarray(bad.train.targets["hidden"])
    hidden[-1] = np.nan  # drawn at some step of the first two rounds
    bad = dataclasses.replace(bad, train=bad.train.with_targets(hidden=hidden))
    jobs = [job(0), bad, job(2)]
    results = together(jobs, slots=3)
    assert "is not finite" in results[1].error
    assert np.isfinite(results[1].state.best_sigma["embeddings"]).all()
    assert all(np.isfinite(line.get("held_out_kl", 0)) for line in results[1].lines)
    for i in (0, 2):
        assert_same(results[i], together([jobs[i]], slots=1)[0])


@pytest.mark.slow
def test_each_stops_when_its_own_patience_ends(school):
    job, together = school
    # The first soon gets worse and stops before its steps have amplified any rounding.
    jobs = [job(2, questions=6, patience=2), job(1, steps=7)]
    alone = [together([own], slots=1, every=1)[0] for own in jobs]
    assert int(alone[0].state.step) < 12
    results = together(jobs, slots=2, every=1)
    for ours, theirs in zip(reversed(results), alone, strict=True):
        assert_same(ours, theirs)


@pytest.mark.slow
def test_the_update_is_compiled_once_whatever_arrives(school):
    from jax._src import test_util  # the only counter jax has

    job, together = school
    together([job(0), job(1)], slots=2)
    jobs = [job(i, questions=9, context=10 + i, steps=5 * i) for i in range(5)]
    with test_util.count_jit_and_pmap_lowerings() as count:
        together(jobs, slots=2)
    lowered = count() if callable(count) else count[0]
    assert lowered <= 3  # nothing per prompt
