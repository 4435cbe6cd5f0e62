"""The loop: what is kept, written, saved, and what happens when things go wrong."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxsp.data.packing import Packing
from jaxsp.data.examples import make_rows
from jaxsp.training.checkpoint import Checkpoints
from jaxsp.training.loop import LoopSettings, NonFiniteLoss, Watcher, train
from jaxsp.training.state import initial_state
from jaxsp.typing import Interrupted, UserError

ROWS = make_rows([[3, 4]] * 5, [[5, 2]] * 5)


class CountingDriver:
    """σ counts the steps; the loss is scripted."""

    multiple = 1

    def __init__(self, losses=None):
        self.losses = losses or {}

    def place(self, state):
        return state

    def fetch(self, state):
        return state

    def step(self, state, batch):
        step = int(state.step) + 1
        loss = self.losses.get(step, 1.0)
        if isinstance(loss, BaseException):
            raise loss
        state = dataclasses.replace(
            state,
            sigma={"x": state.sigma["x"] + 1},
            step=state.step + 1,
            cursor=state.cursor + batch.sequences,
        )
        return state, {"loss": jnp.float32(loss)}


def run(driver, steps, *, state=None, kl=lambda x: 1.0, watcher=None, every=1, patience=0):
    state = state or initial_state({"x": jnp.zeros(())}, optax.sgd(1.0), key=jax.random.key(0))
    return train(
        driver,
        state,
        ROWS,
        LoopSettings(
            steps,
            Packing.of(ROWS.lengths, 2),
            evaluate_every=every,
            checkpoint_every=2,
            patience=patience,
        ),
        evaluate=lambda sigma: kl(float(sigma["x"])),
        watcher=watcher or Watcher(),
    )


def test_the_best_prompt_is_kept_not_the_last():
    state, lines = run(CountingDriver(), 6, kl=lambda x: abs(x - 4))
    assert float(state.best_sigma["x"]) == 4.0
    assert float(state.best_kl) == 0.0
    assert float(state.sigma["x"]) == 6.0
    assert [line["held_out_kl"] for line in lines] == [4, 3, 2, 1, 0, 1, 2]
    worse, _ = run(CountingDriver(), 3, kl=lambda x: x)
    assert float(worse.best_sigma["x"]) == 0.0  # never worse than where it started


def test_evaluations_come_before_the_first_step_every_n_and_after_the_last():
    _, lines = run(CountingDriver(), 7, every=3)
    assert [line["step"] for line in lines if "held_out_kl" in line] == [0, 3, 6, 7]


def test_it_stops_when_evaluations_no_longer_improve(tmp_path):
    watcher = Watcher(tmp_path / "metrics.jsonl", Checkpoints(tmp_path / "checkpoints"))
    script = dict(enumerate([9, 8, 9, 7, 8, 7, 9, 1, 0]))
    options = {"kl": lambda x: script[int(x)], "watcher": watcher, "patience": 3}
    state, lines = run(CountingDriver(), 8, **options)
    assert int(state.step) == lines[-1]["step"] == watcher.checkpoints.latest_step == 6
    assert float(state.best_kl) == 7.0
    again, lines = run(CountingDriver(), 8, state=state, **options)  # resumed: nothing more to do
    assert int(again.step) == lines[-1]["step"] == 6
    watcher.checkpoints.close()


def test_an_error_in_between_leaves_a_checkpoint_and_whole_lines(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    watcher = Watcher(tmp_path / "metrics.jsonl", checkpoints)
    with pytest.raises(Interrupted, match="after step 4 of 9"):
        run(CountingDriver({5: KeyboardInterrupt()}), 9, watcher=watcher)
    assert checkpoints.latest_step == 4
    # A line that was cut off, and one of a step beyond the checkpoint.
    with watcher.metrics.open("a") as file:
        file.write('{"step": 5, "loss": 9}\n{"step": 6, "lo')
    template = initial_state({"x": jnp.zeros(())}, optax.sgd(1.0), key=jax.random.key(3))
    state = checkpoints.restore(template)
    assert (float(state.sigma["x"]), int(state.cursor)) == (4.0, 8)
    state, lines = run(CountingDriver(), 9, state=state, watcher=watcher)
    assert [line["step"] for line in lines] == list(range(10))
    stored = [json.loads(line) for line in watcher.metrics.read_text().splitlines()]
    assert [line["step"] for line in stored] == list(range(10))
    assert stored[5]["loss"] == 1.0
    checkpoints.close()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_at_the_state_that_was_good(bad):
    with pytest.raises(NonFiniteLoss, match="step 4 is not finite") as caught:
        run(CountingDriver({4: bad}), 9)
    # σ after step 3 gave the bad loss; the one before it gave a good one.
    assert int(caught.value.state.step) == 2


def test_checkpoints_of_another_shape_or_none_are_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state = initial_state({"x": jnp.zeros((3,))}, optax.adam(1.0), key=jax.random.key(0))
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoints.restore(state)
    checkpoints.save(state)
    other = initial_state({"x": jnp.zeros((4,))}, optax.adam(1.0), key=jax.random.key(0))
    shapes = r"another model or prompt length.* \{'x': \(3,\)\}, this run's \{'x': \(4,\)\}"
    with pytest.raises(UserError, match=shapes):
        checkpoints.restore(other)
    other = initial_state({"x": jnp.zeros((3,))}, optax.sgd(1.0), key=jax.random.key(0))
    with pytest.raises(UserError, match="can't be read"):
        checkpoints.restore(other)
    checkpoints.close()


def test_a_checkpoint_keeps_every_bit(tmp_path):
    key = jax.random.key(7)
    state = initial_state({"x": jax.random.normal(key, (3, 5))}, optax.adam(1.0), key=key)
    state = dataclasses.replace(state, step=jnp.int32(11), best_kl=jnp.float32(0.3))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(state)
    back = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True):
        assert a.dtype == b.dtype
        assert (a == b).all()
    checkpoints.close()
