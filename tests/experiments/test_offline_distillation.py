"""experiments.offline_distillation: its step, what it stores, and the small setting as it is run."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import suite
from experiments.offline_distillation import experiment, pairs, recipe
from experiments.offline_distillation.experiment import ONLINE, SIGNALS, K
from experiments.suite import Run
from jaxsp import losses

HIDDEN, TAIL, RENORMALISED = [name for name in SIGNALS if name != ONLINE]
V, D, E = 13, 4, 6  # of the student and of the teacher


def normal(seed: int, *shape: int):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture
def toy() -> Any:
    """A student with a head of its own, a batch, and a teacher that is wider."""
    student = recipe.Model(lambda w, ids: jnp.tanh(w["table"][ids]), lambda w: w["head"])
    weights = {"table": normal(0, V, D), "head": normal(1, V, D)}
    said, head = normal(2, 2, 5, E), normal(3, V, E)
    batch = {"ids": jnp.arange(10).reshape(2, 5), "mask": jnp.arange(10).reshape(2, 5) < 8}
    return SimpleNamespace(student=student, weights=weights, said=said, head=head, batch=batch)


@pytest.mark.parametrize("objective", [signal.objective for signal in SIGNALS.values()][1:])
def test_the_step_follows_the_gradient_of_the_plain_loss(toy, objective):
    """Gradient descent at a rate of 1 takes the gradient from the weights, from the head's as well."""
    best = recipe.say_topk(toy.said, toy.head, k=3)
    teacher = {"teacher_hidden": toy.said} if objective == "kl" else best

    def plain(weights):
        logits = toy.student.hidden(weights, toy.batch["ids"]) @ weights["head"].T
        stored = {"teacher_logits": toy.said @ toy.head.T, **best}
        values = losses.parse(objective)(student_logits=logits, mask=toy.batch["mask"], **stored)
        return losses.masked_mean(values, toy.batch["mask"])

    optimizer = optax.sgd(1.0)
    (weights, _), loss = recipe.train_step(
        toy.student, optimizer, objective, (toy.weights, optimizer.init(toy.weights)),
        {**toy.batch, "teacher": teacher}, toy.head if objective == "kl" else None,
    )  # fmt: skip
    value, gradient = jax.value_and_grad(plain)(toy.weights)
    np.testing.assert_allclose(loss, value, rtol=1e-5)
    for name, slope in gradient.items():
        assert jnp.abs(slope).max() > 1e-2
        np.testing.assert_allclose(toy.weights[name] - weights[name], slope, atol=1e-5)


def test_the_step_in_the_readme_is_that_of_the_recipe(toy):
    """On a flax module; and it is short."""
    text = (suite.HERE / "offline_distillation" / "README.md").read_text("utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    step = code[code.index("@jax.jit") :].strip().splitlines()
    assert len(step) <= 20

    class Student(nn.Module):
        @nn.compact
        def __call__(self, ids):
            self.param("head", lambda key: toy.weights["head"])
            return jnp.tanh(nn.Embed(V, D, name="table")(ids))

    student, optimizer = Student(), optax.adam(1e-2)
    given: dict[str, Any] = {"student": student, "optimizer": optimizer}
    exec(code, given)
    params = {"head": toy.weights["head"], "table": {"embedding": toy.weights["table"]}}
    batch = {**toy.batch, "teacher_hidden": toy.said}
    ours, _, loss = given["train_step"](params, optimizer.init(params), batch, toy.head)
    (wanted, _), value = recipe.train_step(
        toy.student, optimizer, "kl", (toy.weights, optimizer.init(toy.weights)),
        {**toy.batch, "teacher": {"teacher_hidden": toy.said}}, toy.head,
    )  # fmt: skip
    np.testing.assert_allclose(loss, value, rtol=1e-6)
    np.testing.assert_allclose(ours["head"], wanted["head"], atol=1e-6)
    np.testing.assert_allclose(ours["table"]["embedding"], wanted["table"], atol=1e-6)
    assert jnp.abs(ours["head"] - params["head"]).max() > 1e-3


@pytest.mark.parametrize(("vocabulary", "bytes_each"), [(1 << 16, 2), ((1 << 16) + 1, 4)])
def test_rows_are_read_as_they_were_stored(tmp_path, vocabulary, bytes_each):
    said = {
        "teacher_hidden": normal(0, 5, 3, 4).astype(jnp.bfloat16),
        "teacher_ids": jnp.full((5, 3, 2), vocabulary - 1).at[1].set(7),
    }
    recipe.store(said, vocabulary, tmp_path / "said")
    rows = recipe.read(tmp_path / "said", [4, 1])
    assert (rows["teacher_hidden"].dtype, rows["teacher_ids"].dtype) == (jnp.bfloat16, jnp.int32)
    for name, array in said.items():
        np.testing.assert_array_equal(rows[name], array[np.array([4, 1])])
    recipe.store({"teacher_ids": said["teacher_ids"]}, vocabulary, tmp_path / "ids")
    assert 0 <= (tmp_path / "ids").stat().st_size - bytes_each * 5 * 3 * 2 < 200


def test_no_held_out_text_is_trained_on():
    train, held_out = pairs.texts()
    assert len(held_out) == len(pairs.HELD_OUT)
    assert len(train) == 6
    lines = {line for text in train for line in text.splitlines() if len(line) > 40}
    assert lines
    assert not lines & {line for text in held_out for line in text.splitlines()}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict[str, Any]:
    return experiment.measure("default", Run(full=False, out=tmp_path_factory.mktemp("offline")))


def test_stored_hidden_states_train_as_the_teacher_online_does(small):
    """On two models of other widths: the same losses in each step, the same student in the end."""
    rows = {(row["seed"], row["signal"]): row for row in small["rows"]}
    assert set(rows) == {(seed, signal) for seed in experiment.SMALL.seeds for signal in SIGNALS}
    for seed in experiment.SMALL.seeds:
        online, stored, tail, renormalised = (rows[seed, signal] for signal in SIGNALS)
        np.testing.assert_allclose(stored["losses"], online["losses"], rtol=1e-5)
        np.testing.assert_allclose(stored["held_out_kl"], online["held_out_kl"], rtol=1e-5)
        assert stored["held_out_kl"] < tail["held_out_kl"] < renormalised["held_out_kl"]
        assert renormalised["held_out_kl"] < online["initial_kl"]
        assert tail["losses"][0] < online["losses"][0]  # a divergence of coarser distributions
    first, second = (rows[seed, ONLINE]["losses"] for seed in experiment.SMALL.seeds)
    assert first != second


def test_each_form_takes_what_its_arrays_take(small):
    rows = {row["signal"]: row for row in small["rows"]}
    wanted = {ONLINE: 0, HIDDEN: 4 * 48, TAIL: K * (4 + 2) + 4, RENORMALISED: K * (4 + 2)}
    for name, count in wanted.items():
        assert count <= rows[name]["bytes_a_token"] < 1.02 * count + 1  # the file's head
        assert (rows[name]["store_seconds"] is None) == (name == ONLINE)
    assert rows[ONLINE]["step_mib"] > rows[HIDDEN]["step_mib"] > rows[TAIL]["step_mib"] > 0


def test_the_table_says_which_seed_gave_what(small):
    lines = experiment.table({"default": small}).splitlines()
    assert len(lines) == 3 + len(SIGNALS)
    first, second = (row["held_out_kl"] for row in small["rows"] if row["signal"] == TAIL)
    shown = f"| {(first + second) / 2:.3f} ({first:.3f}, {second:.3f}) |"
    assert any(line.startswith(f"| {TAIL} | 125 |") and shown in line for line in lines)
    assert f"{TAIL} {(first + second) / 2:.3f} in 125 bytes a token" in experiment.result({"default": small})


def test_it_goes_on_after_a_stop(tmp_path, monkeypatch):
    asked = []

    class Bench:
        def __init__(self, *given):
            pass

        def run(self, seed: int) -> list[dict[str, Any]]:
            asked.append(seed)
            if len(asked) == 2:
                raise KeyboardInterrupt
            return [{"seed": seed, "signal": signal} for signal in experiment.SIGNALS]

    def fill(*given) -> Any:
        return {HIDDEN: 3.0}, {HIDDEN: 1000}

    pair = pairs.random_llamas(Path(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pairs, "smollm2", lambda: pair)
    results: dict[str, Any] = {}
    monkeypatch.setattr(suite, "committed", lambda name: results)
    monkeypatch.setattr(experiment, "Bench", Bench)
    monkeypatch.setattr(experiment, "fill", fill)
    run = Run(full=True, out=tmp_path)
    count = len(experiment.SIGNALS)
    results["default"] = experiment.measure("default", run)
    seconds = [(row["seed"], row["store_seconds"]) for row in results["default"]["rows"]]
    assert seconds == [(0, 3.0 if signal == HIDDEN else None) for signal in experiment.SIGNALS]
    rows = experiment.measure("default", run)["rows"]  # what is committed is kept, too
    assert [row["seed"] for row in rows] == [0] * count + [1] * count
    assert asked == [0, 1, 1]
    kept = Path("offline_distillation-out/default.jsonl")
    lines = kept.read_text("utf-8").splitlines()
    kept.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")  # killed between two rows of a seed
    assert len(experiment.measure("default", run)["rows"]) == 2 * count
    assert asked == [0, 1, 1, 1]
