"""Attention matching against plain NumPy, and in a whole model."""

from __future__ import annotations

import itertools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import threadpoolctl
from scipy.optimize import lsq_linear

import jaxsp
from jaxsp import distributions
from jaxsp.data.packing import Packing
from jaxsp.evaluation.metrics import at_positions
from jaxsp.models import decoder
from jaxsp.prompts.initializers import ABSENT, match
from jaxsp.teacher import targets
from tests import tiny
from tests.conftest import slow_beside
from tests.prompts.test_prompts import CONTEXT, ROWS

# One program each, as in a start: by themselves each operation would be one.
choose = jax.jit(match.choose, static_argnames="count")
weights = jax.jit(match.weights, static_argnames="steps")
fit = jax.jit(match.fit, static_argnames="size")
errors = jax.jit(match.errors, static_argnames="levels")


@pytest.fixture(scope="module")
def columns():
    return jnp.asarray(np.random.RandomState(0).gamma(0.3, size=(60, 24)), jnp.float32)


def pursued(columns, count):
    """Orthogonal matching pursuit, plainly, with SciPy's bounded least squares."""
    columns = np.asarray(columns, np.float64)
    target, chosen, weights = columns.sum(axis=1), [], np.zeros(0)
    for _ in range(count):
        missing = target - columns[:, chosen] @ weights
        gain = missing @ columns / np.linalg.norm(columns, axis=0)
        gain[chosen] = -np.inf
        chosen.append(int(gain.argmax()))
        weights = lsq_linear(columns[:, chosen], target, bounds=match.MASS).x
    return chosen, weights


def chosen_and_mass(columns, count):
    chosen, products = choose(columns, columns.sum(axis=1), count)
    return chosen, weights(products, jnp.ones(count, bool), 400)


@pytest.mark.parametrize("count", [1, 4, 9])
def test_slots_are_those_of_the_plain_pursuit(columns, count):
    chosen, mass = chosen_and_mass(columns, count)
    expected, weights = pursued(columns, count)
    assert chosen.tolist() == expected
    np.testing.assert_allclose(mass, weights, rtol=2e-3)


def test_the_order_of_the_slots_is_nested(columns):
    few, many = (choose(columns, columns.sum(axis=1), n)[0].tolist() for n in (3, 8))
    assert many[:3] == few


def test_all_slots_stand_for_themselves(columns):
    chosen, mass = chosen_and_mass(columns, columns.shape[1])
    assert sorted(chosen.tolist()) == list(range(columns.shape[1]))
    np.testing.assert_allclose(mass, 1, atol=1e-2)


def test_values_give_what_the_whole_gave():
    """As near as least squares come, and nearer than with the slots' own values."""
    random = np.random.RandomState(1)
    scores, values = random.standard_normal((200, 30)), random.standard_normal((30, 8))
    weight = random.uniform(size=200)
    scores, values, weight = (jnp.asarray(x, jnp.float32) for x in (scores, values, weight))
    chosen, bias, fitted = fit(scores, weight, values, jnp.int32(6), size=6)

    def off(values_KF):
        own = jax.nn.softmax(scores[:, chosen] + bias, axis=-1)
        missing = jax.nn.softmax(scores, axis=-1) @ values - own @ values_KF
        return float(jnp.sum((weight[:, None] * missing) ** 2))

    own = np.asarray(jax.nn.softmax(scores[:, chosen] + bias, axis=-1), np.float64)
    target = np.asarray(jax.nn.softmax(scores, axis=-1) @ values, np.float64)
    root = np.asarray(weight, np.float64)[:, None]
    best = np.linalg.lstsq(root * own, root * target, rcond=None)[0]
    assert off(fitted) < 1.2 * off(jnp.asarray(best, jnp.float32))
    assert off(fitted) < 0.7 * off(values[chosen])


def some_head(seed=0, queries=200, slots=30) -> tuple[jax.Array, jax.Array, jax.Array]:
    random = np.random.RandomState(seed)
    scores, values = 2 * random.standard_normal((queries, slots)), random.standard_normal((slots, 8))
    scores, weight, values = (np.float32(x) for x in (scores, random.uniform(size=queries), values))
    return jnp.asarray(scores), jnp.asarray(weight), jnp.asarray(values)


def test_a_head_with_fewer_slots_than_there_is_room_for():
    """The same slots at the end, and nothing of the others is read."""
    chosen, bias, values = fit(*some_head(), jnp.int32(4), size=10)
    own_chosen, own_bias, own_values = fit(*some_head(), jnp.int32(4), size=4)
    assert chosen[6:].tolist() == own_chosen.tolist()
    assert (bias[:6] == ABSENT).all()
    np.testing.assert_allclose(bias[6:], own_bias, atol=1e-3)
    np.testing.assert_allclose(values[6:], own_values, atol=1e-3)


def test_errors_are_those_of_fits_to_the_other_queries():
    """At the queries left out, as computed plainly for each number of slots."""
    scores, weight, values = some_head(1)
    levels, found = (1, 4, 12), errors(*some_head(1), levels=(1, 4, 12))
    decides = np.arange(len(weight)) % match.HELD_OUT == 0
    for count, error in zip(levels, found, strict=True):
        chosen, bias, _ = fit(*some_head(1), jnp.int32(count), size=count)
        own = np.asarray(jax.nn.softmax(scores[:, chosen] + bias, axis=-1), np.float64)
        near, w = np.asarray(values[chosen], np.float64), np.asarray(weight, np.float64)[:, None]
        left = np.asarray(jax.nn.softmax(scores, axis=-1) @ values, np.float64) - own @ near
        used = (w * own)[~decides]
        gram = used.T @ used
        gram += match.CURVE_RIDGE * np.trace(gram) / count * np.eye(count)
        off = left - own @ np.linalg.solve(gram, used.T @ (w * left)[~decides])
        assert error == pytest.approx(np.sum((w * off)[decides] ** 2), rel=1e-2)
    assert found[0] > found[1] > found[2]


def test_slots_are_shared_so_that_the_error_is_smallest():
    """Against all ways to share, where errors fall ever more slowly; and within what a head can have."""
    random, levels = np.random.RandomState(0), (1, 2, 3, 4, 5, 6)
    for _ in range(20):
        gains = -np.sort(-random.exponential(size=(3, 5)), axis=1)
        errors = 20 - np.cumsum(np.pad(gains, [(0, 0), (1, 0)]), axis=1)
        counts = match.share(levels, errors.reshape(3, 1, -1), 3, 5).ravel()
        ways = [w for w in itertools.product(range(1, 6), repeat=3) if sum(w) == 9]
        best = min(ways, key=lambda way: sum(errors[i, n - 1] for i, n in enumerate(way)))
        assert tuple(counts) == best
    # A long flat stretch before a gain is worth the wait.
    errors = np.array([[9.0, 9.0, 9.0, 0.0, 0.0, 0.0], [3.0, 2.0, 1.5, 1.2, 1.0, 0.9]])
    assert match.share(levels, errors[:, None], 3, 6).ravel().tolist() == [4, 2]
    nothing = np.zeros((2, 2, 6))  # no slot gains anything: there is room for all the same
    assert match.share(levels, nothing, 4, 4).tolist() == [[4, 4], [4, 4]]


def kl(model, preamble, rows, length, name, kind="key_value"):
    sigma = distributions.initial_prompt(
        model.params, model.config, CONTEXT, preamble, key=jax.random.key(0), prompt_length=length,
        initial=name, kind=kind, rows=rows,
    )  # fmt: skip
    prompt = distributions.prompt_prefix(model.params, model.config, sigma, preamble, kind)
    return float(at_positions(model, prompt, rows, Packing(2, 12), ["kl"])["kl"].sum())


MATCHED = ["llama-per_head", "llama-key_value", "gemma2-per_head", "gpt2-per_head"]


@pytest.mark.slow
@pytest.mark.parametrize("matched", MATCHED)
def test_a_model_is_matched(tmp_path, matched):
    """With all slots it is the context; with three it is nearer to it than the first three tokens."""
    family, kind = matched.split("-")
    model = jaxsp.load_model(
        tiny.write(tmp_path, with_tokenizer=False, model_type=family, gain=1.0),
        tokenizer=None,
        dtype="float32",
    )
    preamble = distributions.context_prefix(model.params, model.config, np.array([[1, 50]]))
    context = distributions.context_prefix(model.params, model.config, CONTEXT[None], preamble)
    rows = ROWS.with_targets(hidden=targets.compute(model, context, ROWS, Packing(2, 12), "hidden"))
    none = float(at_positions(model, preamble, rows, Packing(2, 12), ["kl"])["kl"].sum())
    assert kl(model, preamble, rows, len(CONTEXT), "match", kind) < 1e-3 * none
    assert kl(model, preamble, rows, 3, "match", kind) < 0.7 * kl(model, preamble, rows, 3, "first")


def test_a_second_start_compiles_nothing(calm_model):
    preamble = distributions.context_prefix(calm_model.params, calm_model.config, np.array([[1, 50]]))
    programs: Any = distributions._compacted
    sizes = []
    for seed in (0, 1):
        distributions.initial_prompt(
            calm_model.params, calm_model.config, CONTEXT, preamble, key=jax.random.key(seed),
            prompt_length=3, initial="match", kind="key_value", rows=ROWS,
        )  # fmt: skip
        sizes.append(programs._cache_size())
    assert sizes[0] == sizes[1]


def test_without_a_preamble_and_with_little_room(calm_model, monkeypatch):
    """As where there is no chat template; of the rows only some are read."""
    nothing = decoder.empty_prefix(calm_model.config)
    shape = calm_model.config.heads, len(CONTEXT)
    monkeypatch.setattr(distributions, "MATCHED_BYTES", 4 * shape[0] * shape[1] * 12)
    read, few = [], distributions._few
    monkeypatch.setattr(
        distributions, "_few", lambda rows, tokens, key: read.append(few(rows, tokens, key)) or read[-1]
    )
    context = distributions.context_prefix(calm_model.params, calm_model.config, CONTEXT[None], nothing)
    rows = ROWS.with_targets(hidden=targets.compute(calm_model, context, ROWS, Packing(2, 12), "hidden"))
    assert np.isfinite(kl(calm_model, nothing, rows, 3, "match"))
    assert 0 < (read[0].offsets >= 0).sum() < rows.lengths.sum()


# Contexts in parts

PARTS, PART_OF = [4, 3], np.array([1, 0, 1])


@pytest.fixture(scope="module")
def parted(calm_model):
    """The start from a context of two parts, and rows that were taught by one part each."""
    preamble = distributions.context_prefix(calm_model.params, calm_model.config, np.array([[1, 50]]))
    parts = np.split(CONTEXT, [PARTS[0]])
    arguments = calm_model.params, calm_model.config, preamble
    source = distributions._Context(*arguments, parts, ROWS, PART_OF, jax.random.key(0), 3)
    read = [distributions.context_prefix(*arguments[:2], ids[None], preamble) for ids in parts]
    hidden = [targets.compute(calm_model, prefix, ROWS, Packing(2, 12), "hidden") for prefix in read]
    own = np.where((PART_OF == 0)[:, None, None], *hidden)
    return source, preamble, ROWS.with_targets(hidden=own)


def test_the_parts_end_at_one_place_and_do_not_see_each_other(calm_model, parted):
    source, preamble, _ = parted
    found = source.at(np.arange(7))
    assert found.positions.tolist() == [[2, 3, 4, 5, 3, 4, 5]]
    long = distributions.context_prefix(
        calm_model.params, calm_model.config, CONTEXT[None, : PARTS[0]], preamble
    )
    np.testing.assert_allclose(found.keys[:, :, : PARTS[0]], long.keys[:, :, 2:], atol=1e-5)
    np.testing.assert_array_equal(source.at(np.array([1, 5])).keys, found.keys[:, :, np.array([1, 5])])


def test_rows_are_probed_after_their_own_part(calm_model, parted):
    """In every layer: what the layers below read of the other part would show in those above."""
    source, preamble, _ = parted

    def weight_of(scores_NS, weight_N, values_SF, own_NS=None):
        return weight_N

    context, few, own_BS = source._some_rows(512)
    both = distributions._probed(*_model(calm_model), preamble, context, few, weight_of, own_BS)
    assert len(few) == 2
    for part in range(2):
        (here,) = np.flatnonzero(np.unique(PART_OF) == part)
        rows = jax.tree.map(lambda leaf, here=here: leaf[here : here + 1], few)
        alone = distributions._probed(*_model(calm_model), preamble, source.part(part), rows, weight_of)
        ours = np.split(np.asarray(both), 2, axis=-1)[here]
        np.testing.assert_allclose(ours, alone, atol=1e-5)
        assert np.asarray(alone).max() > 0.01


def _model(model):
    return model.params, model.config


def test_slots_of_other_parts_count_where_they_are_seen():
    """Hidden from a query they are as if not there; loud ones, which would drown its own, are not taken."""
    scores, weight, values = some_head()
    own = jnp.asarray((np.arange(200) < 100)[:, None] == (np.arange(30) < 15))
    hidden = jnp.where(own, scores, -1e30)
    alike = [fit(hidden, weight, values, jnp.int32(6), *more, size=6) for more in ((), (own,))]
    assert alike[0][0].tolist() == alike[1][0].tolist()
    for plain, owned in zip(alike[0], alike[1], strict=True):
        np.testing.assert_allclose(plain, owned, atol=1e-5)
    loud = int(alike[0][0][0])
    louder = jnp.where(own, scores, scores + 9 * (jnp.arange(30) == loud))
    assert loud not in fit(louder, weight, values, jnp.int32(6), own, size=6)[0]
    found = [errors(hidden, weight, values, *more, levels=(2, 6)) for more in ((), (own,))]
    np.testing.assert_allclose(*found, rtol=1e-5)


@pytest.mark.parametrize("kind", slow_beside(["key_value", "per_head"], "per_head"))
def test_parts_are_matched_together(calm_model, parted, kind, monkeypatch):
    """The start is nearer to what each row was taught than tokens of the context, thinned or not."""
    _, preamble, rows = parted

    def kl(name, length=3):
        sigma = distributions.initial_prompt(
            *_model(calm_model), CONTEXT, preamble, key=jax.random.key(0), prompt_length=length,
            initial=name, kind=kind, rows=rows, part_lengths=PARTS, part_of=PART_OF,
        )  # fmt: skip
        assert sigma["context_length"] == 4
        prompt = distributions.prompt_prefix(*_model(calm_model), sigma, preamble, kind)
        return float(at_positions(calm_model, prompt, rows, Packing(2, 12), ["kl"])["kl"].sum())

    matched, first, spread = kl("match"), kl("first"), kl("spread")
    assert matched < 0.8 * min(first, spread)
    monkeypatch.setattr(distributions, "THINNED", 3)
    assert kl("match", 1) < 0.9 * kl("first", 1)


def test_more_slots_than_the_queries_tell_apart():
    """If no factor is found, the masses stay finite, and within their bounds."""
    scores, weight, values = some_head(queries=2, slots=30)
    scores = jnp.broadcast_to(scores[:1], scores.shape)
    _, bias, values = fit(scores, weight, values, jnp.int32(24), size=24)
    assert np.isfinite(bias).all()
    assert np.isfinite(values).all()
    nothing = match.Products(jnp.full((4, 4), jnp.nan), jnp.ones(4))
    assert weights(nothing, jnp.ones(4, bool), 0).tolist() == [1.0] * 4


@pytest.mark.parametrize("start", [match.key_values, lambda source: match.uneven(source, 4)])
def test_a_start_is_found_in_one_blas_thread(start):
    # Each system of a head is small: BLAS's own threads would only wait for XLA's.
    def threads():
        return [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]

    seen: list[list[int]] = []

    def probed(probe):
        seen.append(threads())
        return np.zeros((1, 1, 3))

    def compacted(fit, counts):
        seen.append(threads())
        return jnp.zeros(1)

    source: Any = types.SimpleNamespace(
        prompt_length=2, heads=(1, 1), context_ids=[1, 2, 3, 4], probed=probed, compacted=compacted
    )
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = threads()
        start(source)
        assert threads() == before
    assert before
    assert {count for found in seen for count in found} == {1}
