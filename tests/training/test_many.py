"""Many prompts in one step: each as if alone, whatever the others do."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsp import distributions
from jaxsp.data.packing import Packing
from jaxsp.data.examples import make_rows
from jaxsp.evaluation.metrics import mean_kl_function
from jaxsp.losses import OBJECTIVES
from jaxsp.training.loop import LoopSettings, Watcher, train
from jaxsp.training.many import Trainee, train_many
from jaxsp.training.optimizers import OptimizerSettings, make_optimizer, make_pace
from jaxsp.training.drivers import JitDriver
from jaxsp.training.state import initial_state
from jaxsp.training.update import Frozen, UpdateSettings

PACKING = Packing(2, 24)
OPTIMIZER = OptimizerSettings(learning_rate=0.3)


@pytest.fixture(scope="module")
def school(tiny_model):
    """What all share, and a function that makes a trainee."""
    params, config = tiny_model.params, tiny_model.config
    before = distributions.context_prefix(params, config, np.array([[4, 5, 6]]))
    frozen = Frozen(params, before)

    def trainee(seed, *, questions=9, context=30, steps=12, rate=0.3, patience=0):
        random = np.random.RandomState(seed)

        def ids(n):
            return random.randint(3, config.vocab_size, n).tolist()

        prefix = distributions.context_prefix(params, config, np.array([ids(context)]), before)
        sizes = [(2 + i % 4, 1 + i % 5) for i in range(questions)]
        rows = make_rows([ids(z) for z, _ in sizes], [ids(a) for _, a in sizes])
        hidden = distributions.answer_hidden(params, config, prefix, rows)
        rows = dataclasses.replace(rows, teacher_hidden=np.asarray(hidden))
        sigma = {"embeddings": tiny_model.embed(np.array(ids(4))).astype(jnp.float32)}
        pace = make_pace(dataclasses.replace(OPTIMIZER, learning_rate=rate), steps, 0.1)
        state = initial_state(sigma, settings.optimizer, key=jax.random.key(seed), pace=pace)
        cut = questions - questions // 3
        return Trainee(
            state, rows.take(range(cut)), rows.take(range(cut, questions)), patience=patience
        )

    settings = UpdateSettings(config, "embedding", OBJECTIVES["kl"], make_optimizer(OPTIMIZER))
    evaluate = mean_kl_function(tiny_model, before, "embedding")

    def alone(trainee, every=5):
        batches = [
            jax.tree.map(lambda leaf: leaf[None], PACKING.pack(trainee.held_out, index))
            for index in PACKING.in_order(trainee.held_out)
        ]
        return train(
            JitDriver(frozen, settings),
            trainee.state,
            trainee.train,
            LoopSettings(
                int(trainee.state.pace.steps), PACKING, evaluate_every=every, checkpoint_every=5,
                patience=trainee.patience,
            ),
            evaluate=lambda sigma: evaluate({k: v[None] for k, v in sigma.items()}, batches)[0],
            watcher=Watcher(),
        )  # fmt: skip

    def together(trainees, slots, every=5, **options):
        results = train_many(
            trainees, frozen, settings, PACKING, evaluate, slots=slots, evaluate_every=every,
            **options,
        )  # fmt: skip
        return sorted(results, key=lambda trained: trained.index)

    return trainee, alone, together


def assert_same(trained, alone):
    state, lines = alone
    assert trained.error is None
    assert int(trained.state.step) == int(state.step)
    assert int(trained.state.cursor) == int(state.cursor)
    for name in ("sigma", "best_sigma"):
        ours, theirs = (getattr(s, name)["embeddings"] for s in (trained.state, state))
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert [line["step"] for line in trained.lines] == [line["step"] for line in lines]
    for ours, theirs in zip(trained.lines, lines, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"seconds"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


def test_each_is_what_it_would_be_alone(school):
    """Uneven questions, contexts, steps and rates; more prompts than slots."""
    trainee, alone, together = school
    trainees = [
        trainee(0),
        trainee(1, questions=21, context=9),
        trainee(2, steps=17, rate=0.1),
        trainee(3, questions=6),
        trainee(4, steps=3),
    ]
    results = together(trainees, slots=2)
    assert [r.index for r in results] == list(range(5))
    for trained, one in zip(results, trainees, strict=True):
        assert_same(trained, alone(one))
    starts = [trained.state.best_sigma["embeddings"] for trained in results]
    assert not np.allclose(starts[0], starts[1])


def test_a_slot_is_refilled_between_two_evaluations(school):
    trainee, _, together = school
    asked, rounds = [], []

    def queue():
        for i, steps in enumerate([20, 5, 5, 5, 5]):
            asked.append((i, len(rounds)))
            yield trainee(i, steps=steps)

    results = together(queue(), slots=2, on_round=rounds.append)
    assert [int(r.state.step) for r in results] == [20, 5, 5, 5, 5]
    assert asked == [(0, 0), (1, 0), (2, 1), (3, 2), (4, 3)]
    assert len(rounds) == 4  # 40 steps in 20


def test_one_that_fails_leaves_the_others_alone(school):
    trainee, alone, together = school
    bad = trainee(1, questions=30)
    hidden = bad.train.teacher_hidden.copy()
    hidden[-1] = np.nan  # drawn at some step of the first two rounds
    bad = dataclasses.replace(bad, train=dataclasses.replace(bad.train, teacher_hidden=hidden))
    trainees = [trainee(0), bad, trainee(2)]
    results = together(trainees, slots=3)
    assert "is not finite" in results[1].error
    assert np.isfinite(results[1].state.best_sigma["embeddings"]).all()
    assert all(
        np.isfinite(line["held_out_kl"]) for line in results[1].lines if "held_out_kl" in line
    )
    for i in (0, 2):
        assert_same(results[i], alone(trainees[i]))


def test_each_stops_when_its_own_patience_ends(school):
    trainee, alone, together = school
    # The first soon gets worse and stops before its steps have amplified any rounding.
    trainees = [trainee(2, questions=6, patience=2), trainee(1, steps=7)]
    results = together(trainees, slots=2, every=1)
    assert [int(r.state.step) for r in results] == [4, 7]
    for trained, one in zip(results, trainees, strict=True):
        assert_same(trained, alone(one, every=1))


def test_the_update_is_compiled_once_whatever_arrives(school):
    from jax._src import test_util  # the only counter jax has

    trainee, _, together = school
    together([trainee(0), trainee(1)], slots=2)
    trainees = [trainee(i, questions=6 + 3 * i, context=10 + i, steps=5 * i) for i in range(5)]
    with test_util.count_jit_and_pmap_lowerings() as count:
        together(trainees, slots=2)
    lowered = count() if callable(count) else count[0]
    assert lowered <= 3  # the update itself, which belongs to a call; nothing per prompt
