"""The loop: what is kept, written, saved, and what happens when things go wrong."""

from __future__ import annotations

import dataclasses
import errno
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsp.data.examples import make_rows
from jaxsp.data.packing import Packing
from jaxsp.training import checkpoint
from jaxsp.training.checkpoint import Checkpoints
from jaxsp.training.loop import Block
from jaxsp.training.optimizers import constant
from jaxsp.training.slots import OnPolicy, TrainingJob, lines_checksum, past_lines
from jaxsp.training.state import initial_state, stack, unstack
from jaxsp.typing import Interrupted, UserError

ROWS = make_rows([[3, 4]] * 5, [[5, 2]] * 5)


class CountingDriver:
    """Each σ counts its steps; the losses are scripted, by prompt and step."""

    multiple = 1

    def __init__(self, losses=None):
        self.losses = losses or {}

    def place(self, states):
        return states

    def fetch(self, states):
        return states

    def step(self, states, batches):
        losses = []
        for place, step in enumerate(states.step.tolist()):
            loss = self.losses.get(step + 1, 1.0) if place == 0 else 1.0
            if isinstance(loss, BaseException):
                raise loss
            losses.append(loss)
        going = states.step < states.schedule.steps
        states = dataclasses.replace(
            states,
            sigma={"x": states.sigma["x"] + going},
            step=states.step + going,
            cursor=states.cursor + jax.vmap(lambda rows: rows.sequences)(batches),
        )
        return states, {"loss": jnp.array(losses, jnp.float32)}


def job(steps, name="only", *, state=None, **more):
    start = initial_state(
        {"x": jnp.zeros(())}, optax.sgd(1.0), key=jax.random.key(0), schedule=constant(steps)
    )
    return TrainingJob(name, state or start, ROWS, ROWS, Packing.of(ROWS.lengths, 2), **more)


def block(jobs, driver=None, *, slots=1, kl=lambda x: 1.0, every=1, **more):
    return Block(
        iter(jobs),
        lambda slots: driver or CountingDriver(),
        lambda sigmas, batches: np.array([kl(float(x)) for x in sigmas["x"]]),
        slots=slots,
        evaluate_every=every,
        checkpoint_every=2,
        **more,
    )


def run(steps, driver=None, **options):
    own = {name: options.pop(name) for name in ("patience", "metrics", "state") if name in options}
    (result,) = block([job(steps, **own)], driver, **options).run()
    return result


def test_the_best_prompt_is_kept_not_the_last():
    result = run(6, kl=lambda x: abs(x - 4))
    assert float(result.state.best_sigma["x"]) == 4.0
    assert float(result.state.best_kl) == 0.0
    assert float(result.state.sigma["x"]) == 6.0
    assert [line["held_out_kl"] for line in result.lines] == [4, 3, 2, 1, 0, 1, 2]
    worse = run(3, kl=lambda x: x)
    assert float(worse.state.best_sigma["x"]) == 0.0  # never worse than where it started


def test_evaluations_come_before_the_first_step_every_n_and_after_the_last():
    lines = run(7, every=3).lines
    assert [line["step"] for line in lines if "held_out_kl" in line] == [0, 3, 6, 7]


def test_the_next_batch_is_read_while_the_device_works(monkeypatch):
    """It is there before the figures of the step are waited for."""
    events, pack = list[str](), Packing.pack

    class Figure:
        def __init__(self, value):
            self.value = value

        def __array__(self, *args, **kwargs):
            events.append("waited")
            return np.asarray(self.value)

    counting = CountingDriver()
    step = counting.step

    def begun(states, batches):
        events.append("begun")
        states, metrics = step(states, batches)
        return states, {name: Figure(value) for name, value in metrics.items()}

    monkeypatch.setattr(counting, "step", begun)
    monkeypatch.setattr(Packing, "pack", lambda *own: events.append("read") or pack(*own))
    run(4, counting)
    assert events[events.index("begun") :] == ["begun", "read", "waited"] * 3 + ["begun", "waited"]


def test_it_stops_when_evaluations_no_longer_improve(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    script = dict(enumerate([9, 8, 9, 7, 8, 7, 9, 1, 0]))
    options = {"kl": lambda x: script[int(x)], "patience": 3, "metrics": tmp_path / "m.jsonl"}
    result = run(8, checkpoints=checkpoints, **options)
    assert int(result.state.step) == result.lines[-1]["step"] == checkpoints.latest == 6
    assert float(result.state.best_kl) == 7.0
    again = run(8, state=result.state, **options)  # resumed: nothing more to do
    assert int(again.state.step) == again.lines[-1]["step"] == 6
    checkpoints.close()


def test_prompts_of_all_lengths_share_the_slots():
    """Each has its own evaluations and end, and a slot is filled again at the others' evaluation."""
    asked, block_ = [], block([], slots=2, every=4, kl=lambda x: 20 - x)

    def queue():
        for name, steps in (("a", 7), ("b", 3), ("c", 9), ("d", 0), ("e", 1)):
            asked.append((name, block_.tick))
            yield job(steps, name)

    block_.queue = queue()
    results = list(block_.run())
    assert sorted(result.id for result in results) == ["a", "b", "c", "d", "e"]
    steps = {"a": [0, 4, 7], "b": [0, 3], "c": [0, 4, 8, 9], "d": [0], "e": [0, 1]}
    for result in results:
        last = steps[result.id][-1]
        assert float(result.state.sigma["x"]) == int(result.state.step) == last
        assert [line["step"] for line in result.lines] == list(range(last + 1))
        evaluated = [line["step"] for line in result.lines if "held_out_kl" in line]
        assert evaluated == steps[result.id]
        assert float(result.state.best_kl) == 20 - last
    assert asked == [("a", 0), ("b", 0), ("c", 4), ("d", 8), ("e", 8)]


def test_callbacks_hear_of_every_step_and_may_stop_a_prompt():
    heard = []

    def callback(step):
        heard.append((step.job, step.number, step.steps, float(step.sigma()["x"])))
        return step.job == "a" and step.number == 2

    jobs = [job(6, "a"), job(3, "b")]
    results = list(block(jobs, slots=2, every=4, callbacks=[callback]).run())
    assert [(r.id, int(r.state.step)) for r in results] == [("b", 3), ("a", 4)]
    for name, steps, last in (("a", 6, 4), ("b", 3, 3)):
        own = [step for step in heard if step[0] == name]
        assert own == [(name, i, steps, float(i)) for i in range(last + 1)]


def test_an_error_in_between_leaves_a_checkpoint_and_whole_lines(tmp_path):
    checkpoints, metrics = Checkpoints(tmp_path / "checkpoints"), tmp_path / "metrics.jsonl"
    options = {"metrics": metrics, "checkpoints": checkpoints}
    with pytest.raises(Interrupted, match="after step 4 of 9"):
        run(9, CountingDriver({5: KeyboardInterrupt()}), **options)
    assert checkpoints.latest == 4
    # A line that was cut off, and one of a step beyond the checkpoint.
    with metrics.open("a") as file:
        file.write('{"step": 5, "loss": 9}\n{"step": 6, "lo')
    saved = checkpoints.block()
    assert saved is not None
    lines = lines_checksum(past_lines(metrics, 4))
    assert saved == {"jobs": ["only"], "tick": 4, "packing": [1, 8], "lines": [lines]}
    states = checkpoints.restore(stack([job(9).state]))
    state = unstack(states, 0)
    assert (float(state.sigma["x"]), int(state.cursor)) == (4.0, 8)
    resumed = block([], checkpoints=checkpoints)
    resumed.resume([job(9, state=state, metrics=metrics)], 4, Packing(*saved["packing"]))
    (result,) = resumed.run()
    assert [line["step"] for line in result.lines] == list(range(10))
    stored = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in stored] == list(range(10))
    assert stored[5]["loss"] == 1.0
    assert checkpoints.latest == 9
    checkpoints.close()


def test_own_answers_are_made_every_n_steps_and_saved_with_the_states(tmp_path):
    """Those in use when it was saved come back with it; the next are made when they are due."""
    asked, read = [], []

    def refreshed(sigma, step):
        asked.append((step, float(sigma["x"])))
        return [[step + 7], *[None] * 4], rows([[step + 7]])

    def rows(answers):
        read.append(answers[0])
        return make_rows([[3, 4]] * 5, [answers[0]] * 5)

    policy = OnPolicy(every=3, longest=12, refreshed=refreshed, rows=rows)
    driver, seen = CountingDriver(), []
    step = driver.step
    driver.step = lambda states, batches: (
        seen.append(int(batches.targets["tokens"].max())) or step(states, batches)
    )
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    (result,) = block([job(8, on_policy=policy)], driver, every=4, checkpoints=checkpoints).run()
    assert asked == [(0, 0.0), (3, 3.0), (6, 6.0)]  # none after the last step
    assert seen == [7, 7, 7, 10, 10, 10, 13, 13]
    saved = checkpoints.block()
    assert saved is not None
    assert saved["answers"] == [[[13], None, None, None, None]]
    assert saved["packing"][1] >= 12  # room for the longest that may come
    checkpoints.close()

    state = dataclasses.replace(result.state, step=jnp.int32(4))
    read.clear()
    seen.clear()
    resumed = block([], driver, every=4)
    resumed.resume([job(8, state=state, on_policy=policy)], 4, Packing(*saved["packing"]), [[[9], None]])
    list(resumed.run())
    assert read[0] == [9]
    assert seen == [9, 9, 13, 13]
    assert asked[3:] == [(6, 10.0)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_one_prompt_at_the_state_that_was_good(bad):
    jobs = [job(9, "bad"), job(9, "good")]
    results = {r.id: r for r in block(jobs, CountingDriver({4: bad}), slots=2).run()}
    assert "step 4 is not finite" in (results["bad"].error or "")
    # σ after step 3 gave the bad loss; the one before it gave a good one.
    assert int(results["bad"].state.step) == 2
    assert results["bad"].lines[-1]["step"] == 3
    assert results["good"].error is None
    assert int(results["good"].state.step) == 9


def test_a_held_out_kl_that_is_not_finite_ends_it_with_the_best_until_then():
    result = run(9, kl=lambda x: 5 - x if x < 4 else float("nan"))
    assert "step 4 is not finite (held-out KL nan)" in (result.error or "")
    assert float(result.state.best_sigma["x"]) == 3.0
    assert float(result.state.best_kl) == 2.0


def test_checkpoints_of_another_shape_or_damaged_are_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")

    def states(size, optimizer):
        return stack([initial_state({"x": jnp.zeros((size,))}, optimizer, key=jax.random.key(0))])

    assert checkpoints.latest is None
    checkpoints.save(0, states(3, optax.adam(1.0)), {})
    other = "of another model, optimizer or prompt length: its"
    with pytest.raises(UserError, match=rf"{other} .*/x has the shape \(1, 3\), this run's \(1, 4\)"):
        checkpoints.restore(states(4, optax.adam(1.0)))
    with pytest.raises(UserError, match=rf"{other} optimizer_state.* \(1,.*\), this run's None"):
        checkpoints.restore(states(3, optax.sgd(1.0)))
    (file,) = (tmp_path / "checkpoints").glob("0/*/*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    for read in (checkpoints.block, lambda: checkpoints.restore(states(3, optax.adam(1.0)))):
        with pytest.raises(UserError, match=r"can't be read .* start anew with --overwrite"):
            read()
    checkpoints.close()


def test_a_checkpoint_keeps_every_bit(tmp_path):
    key = jax.random.key(7)
    optimizer = optax.adam(1.0, mu_dtype=jnp.bfloat16)
    state = initial_state({"x": jax.random.normal(key, (3, 5))}, optimizer, key=key)
    state = dataclasses.replace(state, step=jnp.int32(11), best_kl=jnp.float32(0.3))
    states = stack([state, state])
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(11, states, {"jobs": ["a", None]})
    assert checkpoints.block() == {"jobs": ["a", None]}
    back = checkpoints.restore(jax.tree.map(jnp.zeros_like, states))
    for a, b in zip(jax.tree.leaves(states), jax.tree.leaves(back), strict=True):
        assert a.dtype == b.dtype
        assert (a == b).all()
    checkpoints.close()


def test_the_next_batch_is_packed_while_the_device_works(monkeypatch):
    """Before the figures of a step are waited for; after the last step there is none."""
    order, pack, get = [], Packing.pack, jax.device_get

    class Watched(CountingDriver):
        def step(self, states, batches):
            order.append("step")
            return super().step(states, batches)

    def packed(self, rows, index):
        order.append("pack")
        return pack(self, rows, index)

    def fetched(values):
        order.append("wait")
        return get(values)

    driver = Watched()
    made = block([job(3)], driver, every=9)
    made._fill()
    monkeypatch.setattr(Packing, "pack", packed)
    monkeypatch.setattr(jax, "device_get", fetched)
    (result,) = made.run()
    assert result.error is None
    assert order == ["pack", "step", "pack", "wait", "step", "pack", "wait", "step", "wait"]


def test_the_checkpoint_before_is_used_where_the_newest_can_not_be_read(tmp_path):
    """That is said; from then on that one is the newest, and later ones are saved as ever."""
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", said.append)
    start = initial_state({"x": jnp.zeros(3)}, optax.sgd(1.0), key=jax.random.key(0))
    for number in (2, 4):
        states = stack([dataclasses.replace(start, step=jnp.int32(number))])
        checkpoints.save(number, states, {"tick": number})
    (file,) = (tmp_path / "checkpoints").glob("4/*/*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # of an array: nothing but the checksum tells
    file.write_bytes(bytes(data))
    assert checkpoints.block() == {"tick": 2}
    (line,) = said
    assert "The checkpoint of step 4 in" in line
    assert "SHA-256" in line
    assert line.endswith("going on from the one before it, of step 2.")
    assert int(checkpoints.restore(stack([start])).step[0]) == 2
    assert checkpoints.latest == 2
    checkpoints.save(4, states, {"tick": 4})
    assert (checkpoints.latest, checkpoints.block()) == (4, {"tick": 4})
    assert len(said) == 1
    checkpoints.close()


def test_what_can_not_be_read_just_now_is_kept(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    states = stack([initial_state({"x": jnp.zeros(3)}, optax.sgd(1.0), key=jax.random.key(0))])
    checkpoints.save(2, states, {"tick": 2})
    read = checkpoint.read_whole

    def too_many_files(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(checkpoint, "read_whole", too_many_files)
    with pytest.raises(OSError, match="Too many open files"):
        checkpoints.block()
    monkeypatch.setattr(checkpoint, "read_whole", read)
    assert checkpoints.block() == {"tick": 2}
    checkpoints.close()


def test_an_interrupt_while_the_device_works_leaves_no_states_without_lines(tmp_path, monkeypatch):
    """A second Ctrl-C comes at once, wherever the host is: it waits most of the time."""
    metrics, get, waits = tmp_path / "metrics.jsonl", jax.device_get, []
    checkpoints = Checkpoints(tmp_path / "checkpoints")

    def interrupted(values):
        waits.append(1)
        if len(waits) == 4:
            raise KeyboardInterrupt
        return get(values)

    monkeypatch.setattr(jax, "device_get", interrupted)
    with pytest.raises(Interrupted):
        run(9, metrics=metrics, checkpoints=checkpoints, every=3)
    states = checkpoints.restore(stack([job(9).state]))
    assert int(states.step[0]) == len(past_lines(metrics, int(states.step[0]))) - 1 == 3
    checkpoints.close()


def test_lines_are_on_the_disk_before_the_checkpoint_that_needs_them(tmp_path, monkeypatch):
    """A run killed right after a checkpoint has all lines of its steps."""
    metrics, missing = tmp_path / "metrics.jsonl", []
    checkpoints, save = Checkpoints(tmp_path / "checkpoints"), Checkpoints.save

    def watched(self, number, states, block):
        written = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
        missing.extend(set(range(int(states.step[0]) + 1)) - {*written})
        save(self, number, states, block)

    monkeypatch.setattr(Checkpoints, "save", watched)
    run(7, metrics=metrics, checkpoints=checkpoints, every=3)
    assert missing == []
    checkpoints.close()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"step": 0}\n{"step": 2}\n{"step": 3}\n', "line 2 is that of step 2, not 1: lines are missing"),
        ('{"step": 0}\n{"step": 1, "lo\n{"step": 2}\n', "line 2: not valid JSON"),
        ('{"step": 0}\n{"step": 1}\n', "lacks the line of step 2"),
        ('{"step": 1}\n{"step": 2}\n', "line 1 is that of step 1, not 0"),
        ('{"step": 0}\n[1]\n{"step": 2}\n', "line 2: not valid JSON"),
        ("", "lacks the line of step 0"),
    ],
)
def test_a_prompt_does_not_go_on_without_its_lines(tmp_path, text, words):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(text)
    state = dataclasses.replace(job(9).state, step=jnp.int32(2))
    with pytest.raises(UserError, match=words):
        block([]).resume([job(9, state=state, metrics=metrics)], 2, Packing(1, 8))
    assert metrics.read_text() == text


def test_a_prompt_whose_training_failed_is_not_gone_on_with(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    jobs = [job(4, "bad"), job(9, "good")]
    made = block(jobs, CountingDriver({4: float("nan")}), slots=2, checkpoints=checkpoints)
    next(results := made.run())
    saved = checkpoints.block()
    assert saved is not None
    assert saved["jobs"] == [None, "good"]
    list(results)
    checkpoints.close()
