"""The update: the right gradient, no retrace, one device equals eight, frozen weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsp
from jaxsp import distributions, prompts
from jaxsp.data.examples import make_rows
from jaxsp.data.packing import Packing
from jaxsp.evaluation.metrics import at_positions
from jaxsp.losses import OBJECTIVES, masked_mean
from jaxsp.models import decoder
from jaxsp.models.sharding import as_mesh
from jaxsp.settings import TrainingSettings
from jaxsp.training.drivers import DRIVERS, JitDriver, MeshDriver
from jaxsp.training.optimizers import make_optimizer, warmup_cosine
from jaxsp.training.state import initial_state, stack, unstack
from jaxsp.training.update import Frozen, UpdateSettings, loss_totals, update
from jaxsp.typing import UserError
from tests import programs, tiny
from tests.conftest import slow_beside

SGD = optax.sgd(1.0)  # one object: tests with equal settings share a program
TRAINABLE = [name for name, entry in OBJECTIVES.items() if entry.differentiable]
# They read what another one does, and their cost is formed alike.
LIKE_OTHERS = (
    "reverse_kl",
    "js",
    "cosine_similarity",
    "entropy",
    "skewed_kl",
    "alpha",
    "renyi",
    "total_variation",
    "topk_reverse_kl",
    "topk_js",
    "truncated_kl",
    "renormalised_topk_kl",
    "distribution_cosine_similarity",
    "hidden_mse",
)


def problem_of(model):
    """A teacher that reads 12 tokens, rows of uneven length, and σ of 4 vectors."""
    params, config = model.params, model.config
    random = np.random.RandomState(0)

    def ids(n):
        return random.randint(3, config.vocab_size, n).tolist()

    preamble = distributions.context_prefix(params, config, np.array([ids(3)]))
    context = np.array([ids(12)])
    teacher = distributions.context_prefix(params, config, context, preamble)
    rows = make_rows([ids(2 + i % 4) for i in range(16)], [ids(1 + i % 5) for i in range(16)])
    hidden = distributions.answer_hidden(params, config, teacher, rows)
    rows = rows.with_targets(hidden=np.asarray(hidden))
    sigma = {"embeddings": decoder.embed(params, config, context[:, :4])[0]}
    return Frozen(params, preamble), config, rows, sigma, context


@pytest.fixture(scope="module")
def problem(tiny_model):
    return problem_of(tiny_model)


@pytest.fixture(scope="module")
def calm_problem(calm_model):
    """For sums in another order: rounding doesn't grow from layer to layer."""
    return problem_of(calm_model)


def settings_for(config, objective="kl", optimizer=None):
    optimizer = optimizer or make_optimizer(TrainingSettings(optimizer="muon"))
    return UpdateSettings(config, "embedding", OBJECTIVES[objective], optimizer)


def state_for(sigma, settings, schedule=None):
    """The stacked state of one prompt."""
    key = jax.random.key(0)
    return stack([initial_state(sigma, settings.optimizer, key=key, schedule=schedule)])


def add_prompt_axis(tree):
    """A batch of one prompt, as several are stacked."""
    return jax.tree.map(lambda leaf: leaf[None], tree)


def loss_of(sigma, frozen, rows, settings):
    total, count = loss_totals(add_prompt_axis(sigma), frozen, add_prompt_axis(rows), settings)
    return total[0], count[0]


def step(driver, states, rows):
    """A step of one prompt, and its metrics as numbers."""
    states, metrics = driver.step(states, add_prompt_axis(rows))
    return states, {name: float(value[0]) for name, value in metrics.items()}


SCHEDULE = warmup_cosine(0.01, 10, 0.05)


def test_the_contexts_own_embeddings_give_kl_zero(problem):
    frozen, config, rows, _, context = problem
    sigma = {"embeddings": decoder.embed(frozen.params, config, context)[0]}
    total, count = loss_of(sigma, frozen, rows, settings_for(config))
    assert count == rows.mask.sum()
    assert abs(total / count) < 1e-6


@pytest.mark.parametrize("layout", slow_beside(["jit", "parts", "mesh"], "parts", "mesh"))
def test_a_step_trains_the_prompt_that_its_key_draws(problem, layout):
    """With plain gradient descent no other prompt's biases move, nor slots that it doesn't have."""
    frozen, config, rows, _, context = problem
    start = distributions.initial_prompt(
        frozen.params, config, context[0], frozen.preamble, key=jax.random.key(1), prompt_length=4,
        initial="first", kind="nested",
    )  # fmt: skip
    settings = UpdateSettings(config, "nested", OBJECTIVES["kl"], optax.sgd(1.0), 1 + (layout == "parts"))
    driver = (
        MeshDriver(frozen, settings, mesh=as_mesh("data=8"))
        if layout == "mesh"
        else JitDriver(frozen, settings)
    )
    states, seen, lengths = driver.place(state_for(start, settings)), set(), [1, 2, 4]
    for number in range(12):
        before = driver.fetch(states).sigma
        states, _ = step(driver, states, rows)
        after = driver.fetch(states).sigma
        moved = np.abs(np.asarray(after["bias"]) - before["bias"])[0].max(axis=(0, 2, 3)) > 0
        key = jax.random.fold_in(jax.random.key(0), number)
        index = int(prompts.drawn("nested", start, key)["drawn"])
        assert moved.tolist() == [i == index for i in range(3)]
        slots = np.abs(np.asarray(after["values"]) - before["values"])[0].max(axis=(0, 2, 3)) > 0
        assert slots.tolist() == [slot < lengths[index] for slot in range(4)]
        assert after["context_length"] == start["context_length"]
        seen.add(index)
    assert seen == {0, 1, 2}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_the_loss_of_other_families(tmp_path, family):
    """Soft caps, scaled embeddings, learned positions: KL 0 for the context's own, else the logits'."""
    tiny.write(tmp_path, with_tokenizer=False, model_type=family)
    model = jaxsp.load_model(tmp_path, dtype="float32", tokenizer=None)
    params, config = model.params, model.config
    random = np.random.RandomState(0)
    context, other = random.randint(3, config.vocab_size, (2, 1, 20))
    preamble = distributions.context_prefix(params, config, np.array([[5, 6]]))
    teacher = distributions.context_prefix(params, config, context, preamble)
    rows = make_rows([[4, 8], [15]], [[16, 23, 42], [7]])
    hidden = distributions.answer_hidden(params, config, teacher, rows)
    rows = rows.with_targets(hidden=np.asarray(hidden))
    expected = distributions.log_probs(params, config, teacher, rows)
    for ids, zero in ((context, True), (other, False)):
        sigma = {"embeddings": model.embed(ids)[0]}
        total, count = loss_of(sigma, Frozen(params, preamble), rows, settings_for(config))
        prefix = distributions.prompt_prefix(params, config, sigma, preamble, "embedding")
        log_q = distributions.log_probs(params, config, prefix, rows)
        kl = jnp.sum(jnp.exp(expected) * (expected - log_q), axis=-1)
        np.testing.assert_allclose(total, kl[rows.mask].sum(), rtol=1e-4, atol=1e-5)
        assert (abs(total / count) < 1e-6) == zero
        np.testing.assert_allclose(
            at_positions(model, prefix, rows, Packing(1, 20), ["kl"])["kl"].sum(), total, rtol=1e-4, atol=1e-5
        )


@pytest.fixture(scope="module")
def student(problem):
    """The student's last hidden states as a function of σ, and what takes their gradient back to σ."""
    frozen, config, rows, _, _ = problem

    def states(vectors):
        prefix = distributions.prompt_prefix(
            frozen.params, config, {"embeddings": vectors}, frozen.preamble, "embedding"
        )
        return distributions.answer_hidden(frozen.params, config, prefix, rows)

    return jax.jit(states), jax.jit(lambda vectors, gradient: jax.vjp(states, vectors)[1](gradient)[0])


@pytest.mark.parametrize("objective", slow_beside(TRAINABLE, *LIKE_OTHERS, "topk_kl", "nll"))
def test_gradient_is_that_of_the_mean_over_all_positions_and_improves_it(problem, student, objective):
    """Against the loss written out with whole logits; and that, where smooth, against its slope."""
    frozen, config, rows, sigma, _ = problem
    entry, (states_of, taken_back) = OBJECTIVES[objective], student
    mask, teacher = jnp.asarray(rows.mask), jnp.asarray(rows.targets["hidden"])

    @jax.jit
    @jax.value_and_grad
    def loss(student):
        values = entry(
            teacher_hidden=teacher,
            student_hidden=student,
            teacher_logits=decoder.unembed(frozen.params, config, teacher),
            student_logits=decoder.unembed(frozen.params, config, student),
            targets=jnp.asarray(rows.targets["tokens"]),
            mask=mask,
        )
        return masked_mean(entry.cost(values), mask)

    settings = settings_for(config, objective, optax.adam(0.02))
    driver = DRIVERS["jit"](frozen, settings)
    state, metrics = step(driver, state_for(sigma, settings), rows)
    gradient = 10 * state.optimizer_state[0].mu["embeddings"][0]  # a tenth is Adam's moment
    vectors = sigma["embeddings"]
    value, slope = loss(states_of(vectors))
    expected = taken_back(vectors, slope)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, expected, atol=1e-4 * np.abs(expected).max())
    if objective in ("kl", "nll"):
        direction = jax.random.normal(jax.random.key(1), gradient.shape)
        up, down = (loss(states_of(vectors + step * direction))[0] for step in (2e-3, -2e-3))
        np.testing.assert_allclose(jnp.vdot(gradient, direction), (up - down) / 4e-3, rtol=2e-2)

    for _ in range(29):
        state, metrics = step(driver, state, rows)
    assert metrics["loss"] < value - 0.02 * max(abs(value), 0.1)
    if objective == "cosine_similarity":  # the cost is the similarity turned round
        assert -loss(states_of(state.sigma["embeddings"][0]))[0] > 0.1 - value


def test_no_update_on_what_has_no_gradient(problem):
    with pytest.raises(UserError, match=r"can't train on zero_one: .* Train on one of kl, "):
        settings_for(problem[1], "zero_one")


def test_pmap_on_eight_devices_equals_jit_on_one(problem):
    frozen, config, rows, sigma, _ = problem
    assert jax.local_device_count() == 8
    # A blank row on one device, and rows of uneven length: a mean of local means would differ.
    rows = rows.take([*range(15), 99])
    results = {}
    for name in ("jit", "pmap"):
        settings = settings_for(config)
        driver = DRIVERS[name](frozen, settings)
        state, metrics = driver.place(state_for(sigma, settings, SCHEDULE)), {}
        for _ in range(5):
            state, metrics = step(driver, state, rows)
        results[name] = (unstack(driver.fetch(state), 0), metrics)
    one, eight = results["jit"], results["pmap"]
    # Adam divides by the gradient's size, so rounding in tiny gradients shows: 1e-5 all the same.
    np.testing.assert_allclose(one[0].sigma["embeddings"], eight[0].sigma["embeddings"], atol=1e-5)
    assert one[1] == pytest.approx(eight[1], abs=1e-5)
    assert int(one[0].cursor) == int(eight[0].cursor) == 5 * 15
    assert int(one[0].step) == int(eight[0].step) == 5


@pytest.mark.parametrize(
    ("shape", "devices"),
    [
        ((3, 40), 1),
        pytest.param((1, 100), 1, marks=pytest.mark.slow),
        pytest.param((3, 40), 8, marks=pytest.mark.slow),
    ],
)
def test_a_packed_batch_gives_the_update_of_its_sequences(problem, shape, devices):
    frozen, config, rows, sigma, _ = problem
    settings = settings_for(config, optimizer=SGD)
    packing = Packing(*shape).over(devices, int(rows.lengths.max()))
    packed = packing.pack(rows, np.arange(15, -1, -1))
    assert len(packed) % devices == 0
    states = []
    for name, batch in (("jit", rows), ("pmap" if devices > 1 else "jit", packed)):
        driver = DRIVERS[name](frozen, settings)
        state, metrics = step(driver, driver.place(state_for(sigma, settings)), batch)
        states.append((unstack(driver.fetch(state), 0), metrics))
    (one, metrics), (two, packed_metrics) = states
    np.testing.assert_allclose(packed_metrics["loss"], metrics["loss"], rtol=1e-5)
    gradient = one.sigma["embeddings"] - sigma["embeddings"]
    np.testing.assert_allclose(
        two.sigma["embeddings"] - sigma["embeddings"], gradient, atol=1e-5 * np.abs(gradient).max()
    )
    assert int(one.cursor) == int(two.cursor) == 16
    assert float(packed_metrics["answer_tokens"]) == float(metrics["answer_tokens"])


@pytest.fixture(scope="module")
def undivided(calm_problem):
    """A step on all rows in one go."""
    frozen, config, rows, sigma, _ = calm_problem
    settings = settings_for(config, optimizer=SGD)
    states, metrics = step(DRIVERS["jit"](frozen, settings), state_for(sigma, settings), rows)
    return unstack(states, 0), metrics


@pytest.mark.parametrize(
    ("parallel", "mesh", "parts", "packing"),
    [
        ("jit", None, 3, None),  # the last part lacks two rows
        pytest.param("jit", None, 99, None, marks=pytest.mark.slow),  # more than there are rows
        ("jit", None, 4, Packing(3, 60)),
        pytest.param("pmap", None, 2, Packing(3, 60), marks=pytest.mark.slow),
        pytest.param("mesh", "data=4,model=2", 3, Packing(3, 60), marks=pytest.mark.slow),
    ],
)
def test_a_batch_in_parts_gives_the_update_of_the_whole(
    calm_problem, undivided, parallel, mesh, parts, packing
):
    frozen, config, batch, sigma, _ = calm_problem
    settings = settings_for(config, optimizer=SGD)
    settings = dataclasses.replace(settings, grad_accumulation=parts)
    driver = DRIVERS[parallel](frozen, settings, mesh=mesh and as_mesh(mesh))
    if packing:
        packing = packing.over(driver.multiple, int(batch.lengths.max()))
        assert packing.rows % parts == 0
        batch = packing.pack(batch, np.arange(16))
    state, metrics = step(driver, driver.place(state_for(sigma, settings)), batch)
    state, (whole, whole_metrics) = unstack(driver.fetch(state), 0), undivided
    moved = whole.sigma["embeddings"] - sigma["embeddings"]
    np.testing.assert_allclose(
        state.sigma["embeddings"] - sigma["embeddings"], moved, atol=1e-5 * np.abs(moved).max()
    )
    for name, value in whole_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5)
    assert int(state.cursor) == int(whole.cursor) == 16


@pytest.mark.slow
def test_many_prompts_in_parts(calm_problem):
    frozen, config, rows, sigma, _ = calm_problem
    whole = settings_for(config, optimizer=SGD)
    states = stack([unstack(state_for(sigma, whole), 0)] * 2)
    packing = Packing(3, 60)
    batches = [packing.pack(rows, index) for index in (np.arange(16), np.arange(5))]
    batches = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    (one, metrics), (two, in_parts) = (
        jax.jit(update, static_argnames="settings")(
            states, batches, frozen=frozen, settings=dataclasses.replace(whole, grad_accumulation=parts)
        )
        for parts in (1, 2)
    )
    moved, again = (s.sigma["embeddings"] - sigma["embeddings"] for s in (one, two))
    assert np.abs(moved[0] - moved[1]).max() > 0.01 * np.abs(moved).max()
    np.testing.assert_allclose(again, moved, atol=1e-5 * np.abs(moved).max())
    for name, value in metrics.items():
        np.testing.assert_allclose(in_parts[name], value, rtol=1e-5)
    assert two.cursor.tolist() == [16, 5]


@pytest.mark.parametrize(
    ("name", "slots"),
    [
        ("jit", 3),
        pytest.param("pmap", 8, marks=pytest.mark.slow),
        ("mesh", 3),
        pytest.param("pmap", 3, marks=pytest.mark.slow),
        pytest.param("mesh", 8, marks=pytest.mark.slow),
    ],
)
def test_prompts_or_rows_are_shared_by_the_devices(problem, name, slots):
    """Every driver gives each of many prompts what it gives the one; one at its last step stays."""
    frozen, config, rows, sigma, _ = problem
    settings = settings_for(config, optimizer=SGD)
    starts = [unstack(state_for(sigma, settings, SCHEDULE), 0) for _ in range(slots)]
    done = dataclasses.replace(starts[0], step=jnp.int32(10))
    driver = DRIVERS[name](frozen, settings, slots=slots)
    assert driver.multiple == (8 if name != "jit" and slots == 3 else 1)
    own = [rows.take([*range(i, 16), *range(i)]) for i in range(slots - 1)]
    own = [dataclasses.replace(r, mask=r.mask & (np.arange(16) > i)[:, None]) for i, r in enumerate(own)]
    batches = jax.tree.map(lambda *leaves: np.stack(leaves), *own, rows)
    states, metrics = driver.step(driver.place(stack([*starts[1:], done])), batches)
    states = driver.fetch(states)
    assert states.step.tolist() == [1] * (slots - 1) + [10]
    np.testing.assert_array_equal(states.sigma["embeddings"][-1], sigma["embeddings"])
    alone = DRIVERS["jit"](frozen, settings)
    for i in (0, slots - 2):
        expected, numbers = step(alone, stack([starts[1]]), own[i])
        np.testing.assert_allclose(states.sigma["embeddings"][i], expected.sigma["embeddings"][0], atol=1e-6)
        for key, value in numbers.items():
            np.testing.assert_allclose(np.asarray(metrics[key])[i], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_batch_in_parts_needs_less_memory(problem):
    frozen, config, rows, sigma, _ = problem
    batch = Packing(32, 96).pack(rows, np.arange(16))

    def temporary(parts):
        settings = settings_for(config, optimizer=SGD)
        settings = dataclasses.replace(settings, grad_accumulation=parts)
        program = jax.jit(update, static_argnames="settings")
        state = state_for(sigma, settings)
        lowered = program.lower(state, add_prompt_axis(batch), frozen=frozen, settings=settings)
        compiled = lowered.compile()
        return programs.memory(compiled).temp_size_in_bytes

    assert temporary(8) < 0.25 * temporary(1)


def test_pmap_refuses_a_batch_it_cannot_divide(problem):
    frozen, config, rows, sigma, _ = problem
    settings = settings_for(config)
    driver = DRIVERS["pmap"](frozen, settings)
    with pytest.raises(UserError, match="batch size 6 can't be divided over 8 devices"):
        step(driver, driver.place(state_for(sigma, settings)), rows.take(range(6)))


@pytest.mark.parametrize("name", list(DRIVERS))
def test_weights_stay_bit_identical_and_nothing_retraces(problem, name):
    frozen, config, rows, sigma, _ = problem
    copy = jax.tree.map(lambda a: np.array(a), frozen.params)
    settings = settings_for(config)
    driver = DRIVERS[name](frozen, settings)
    state = driver.place(state_for(sigma, settings, SCHEDULE))
    state, _ = step(driver, state, rows)
    driver.fetch(state)
    with _no_compilation():
        for i in range(3):
            state, _ = step(driver, state, rows.take([*range(i, 16), *range(i)]))
            driver.fetch(state)
    same = jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), frozen.params, copy)
    assert all(jax.tree.leaves(same))
    changed = np.abs(driver.fetch(state).sigma["embeddings"][0] - sigma["embeddings"])
    assert (changed > 0).all()


class _no_compilation:
    """Fails if anything is traced to a program inside."""

    def __enter__(self):
        from jax._src import test_util  # the only counter jax has

        self._count = test_util.count_jit_and_pmap_lowerings()
        self._calls = self._count.__enter__()
        return self

    def __exit__(self, *exception):
        self._count.__exit__(*exception)
        calls = self._calls() if callable(self._calls) else self._calls[0]
        assert calls == 0, f"{calls} programs were traced after the first step"
