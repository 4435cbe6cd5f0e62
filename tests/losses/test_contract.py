"""The contract of the losses, over the whole table: a new entry is covered by its line there."""

from __future__ import annotations

import dataclasses
import inspect
import math
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxsp.losses import OBJECTIVES, parse
from tests.conftest import slow_beside
from tests.losses import oracle
from tests.losses.problem import (
    INPUTS,
    LIKE_OTHERS,
    MASK,
    OPTIONS,
    VARIANTS,
    B,
    T,
    V,
    make_inputs,
    option_names,
    top_entries,
    x64,
)

GOLDENS = Path(__file__).parents[1] / "goldens" / "losses.npz"
DIFFERENTIABLE = [name for name, entry in OBJECTIVES.items() if entry.differentiable]
PAIRS = [name for name, entry in OBJECTIVES.items() if entry.inputs[0].startswith("teacher_l")
         and len(entry.inputs) == 2]  # fmt: skip

names = pytest.mark.parametrize("name", slow_beside(OBJECTIVES, *LIKE_OTHERS))
differentiable = pytest.mark.parametrize("name", DIFFERENTIABLE)


def student_of(entry):
    return next(name for name in entry.inputs if name.startswith("student"))


def value(name, inputs=INPUTS, mask=None, entry=None):
    arrays = {key: jnp.asarray(array) for key, array in inputs.items()}
    return (entry or OBJECTIVES[name])(mask=None if mask is None else jnp.asarray(mask), **arrays)


def gradient(name, inputs=INPUTS, mask=None, entry=None, wrt=None):
    """The gradient of the sum, with respect to the student's side unless said otherwise."""
    wrt = wrt or student_of(entry or OBJECTIVES[name])

    def total(array):
        return value(name, {**inputs, wrt: array}, mask, entry).sum()

    return np.asarray(jax.grad(total)(jnp.asarray(inputs[wrt])))


def value_and_gradient(name, inputs, mask=None, entry=None):
    """Both in one program: for shapes and types that no other test has, compiling is all of the time."""
    wrt = student_of(entry or OBJECTIVES[name])

    def total(array, inputs):
        values = value(name, {**inputs, wrt: array}, mask, entry)
        return values.sum(), values

    slope, values = jax.jit(jax.grad(total, has_aux=True))(inputs[wrt], inputs)
    return values, slope


def hold_against_oracle(name, entry=None, **options):
    out = value(name, entry=entry)
    assert out.shape == (B, T)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, oracle.ORACLES[name](INPUTS, **options), rtol=2e-6, atol=1e-6)
    expected = oracle.gradient(name, INPUTS, student_of(OBJECTIVES[name]), **options)
    wrt = student_of(OBJECTIVES[name])
    np.testing.assert_allclose(gradient(name, entry=entry, wrt=wrt), expected, atol=2e-6)


def test_every_objective_has_an_oracle_and_a_reference():
    assert set(oracle.ORACLES) == set(OBJECTIVES)
    assert all(entry.reference for entry in OBJECTIVES.values())


@names
def test_an_objective_and_its_oracle_have_the_same_options(name):
    _, *options = inspect.signature(oracle.ORACLES[name]).parameters
    assert [option for option in options if option in OPTIONS] == option_names(OBJECTIVES[name])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_equal_the_float64_oracle(name):
    hold_against_oracle(name)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_each_option_in_text_equals_the_float64_oracle(name, options):
    ((option, number),) = options.items()
    hold_against_oracle(name, parse(f" {name} ( {option} = {number} ) "), **options)


@names
def test_text_and_back(name):
    """Each entry prints its key; with an option, a text that is another and reads back the same."""
    assert str(OBJECTIVES[name]) == name
    assert parse(name) is OBJECTIVES[name]
    for other, options in VARIANTS:
        if other == name:
            entry = dataclasses.replace(OBJECTIVES[name], options=options)
            ((option, number),) = options.items()
            assert str(entry) == f"{name}({option}={number})"
            assert parse(str(entry)) == entry != OBJECTIVES[name]
            assert hash(parse(str(entry))) == hash(entry)


@names
def test_value_and_gradient_equal_the_stored_goldens(name):
    goldens = np.load(GOLDENS)
    np.testing.assert_allclose(value(name), goldens[name], rtol=2e-6, atol=1e-6)
    if name in DIFFERENTIABLE:
        np.testing.assert_allclose(gradient(name), goldens[f"{name}/gradient"], atol=2e-6)


@pytest.mark.parametrize("name", [name for name in PAIRS if name in DIFFERENTIABLE])
def test_swapped_teacher_and_student_are_caught(name):
    """Where the value is symmetric, the gradient would go to the wrong side."""
    entry = OBJECTIVES[name]
    with pytest.raises(AssertionError):
        hold_against_oracle(name, dataclasses.replace(entry, inputs=entry.inputs[::-1]))


@names
def test_no_gradient_to_the_teacher(name):
    for wrt in OBJECTIVES[name].inputs:
        if wrt.startswith("teacher") and wrt != "teacher_ids":
            assert (gradient(name, wrt=wrt) == 0).all()


@names
def test_differentiable_entries_have_a_gradient_and_others_none(name):
    largest = np.abs(gradient(name)).max()
    assert largest > 1e-3 if name in DIFFERENTIABLE else largest == 0


@names
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_masked_positions_are_exactly_zero_even_over_nan(name, poison):
    inputs = {key: array.copy() for key, array in INPUTS.items()}
    for array in inputs.values():
        array[~MASK] = -100 if array.dtype == np.int32 else poison
    out = np.asarray(value(name, inputs, MASK))
    assert (out[~MASK] == 0).all()
    np.testing.assert_array_equal(out[MASK], np.asarray(value(name))[MASK])
    to_student = gradient(name, inputs, MASK)
    assert (to_student[~MASK] == 0).all()
    np.testing.assert_allclose(to_student[MASK], gradient(name)[MASK], atol=1e-7)
    nothing = np.zeros((B, T), bool)
    assert (np.asarray(value(name, inputs, nothing)) == 0).all()
    assert (gradient(name, inputs, nothing) == 0).all()


@names
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_nan_where_it_counts_stays_nan(name, side):
    """A broken model must not pass for a perfect one."""
    inputs = {key: array.copy() for key, array in INPUTS.items()}
    read = [key for key in OBJECTIVES[name].inputs if key.startswith(side) and key != "teacher_ids"]
    for key in read:
        inputs[key][1, 2] = np.nan
    if read:
        out = np.asarray(value(name, inputs))
        assert np.isnan(out[1, 2])
        assert np.isnan(out).sum() == 1


@names
def test_banned_tokens_are_legal(name):
    """With token 2 banned by both, all is as if the vocabulary didn't have it."""
    inputs = {key: array.copy() for key, array in INPUTS.items()}
    inputs["teacher_logits"][..., 2] = inputs["student_logits"][..., 2] = -np.inf
    inputs["targets"][inputs["targets"] == 2] = 3
    inputs.update(top_entries(inputs["teacher_logits"]))
    keep = [0, 1, 3, 4, 5, 6]
    without = {**inputs}
    for side in ("teacher_logits", "student_logits"):
        without[side] = inputs[side][..., keep]
    for ids in ("targets", "teacher_ids"):
        without[ids] = inputs[ids] - (inputs[ids] > 2)
    expected = oracle.ORACLES[name](without)
    np.testing.assert_allclose(value(name, inputs), expected, rtol=2e-6, atol=1e-6)
    to_student = gradient(name, inputs)
    assert np.isfinite(to_student).all()
    if student_of(OBJECTIVES[name]) == "student_logits" and name in DIFFERENTIABLE:
        expected = oracle.gradient(name, without, "student_logits")
        np.testing.assert_allclose(to_student[..., keep], expected, atol=2e-6)
        assert (to_student[..., 2] == 0).all()


@names
def test_extreme_logits_stay_exact(name):
    inputs = {
        key: array if array.dtype == np.int32 else (np.sign(array) * 1e4).astype(np.float32)
        for key, array in INPUTS.items()
    }
    inputs.update(top_entries(inputs["teacher_logits"]))
    expected = oracle.ORACLES[name](inputs)
    np.testing.assert_allclose(value(name, inputs), expected, rtol=1e-5, atol=1e-5)
    assert np.isfinite(gradient(name, inputs)).all()


@names
def test_at_equality_the_objective_is_at_its_best(name):
    entry = OBJECTIVES[name]
    inputs = {
        **INPUTS,
        "student_logits": INPUTS["teacher_logits"] + 5.0,
        "student_hidden": INPUTS["teacher_hidden"],
    }
    if entry.needs in (("hidden",), ("top_k",)) and name != "truncated_kl":
        best = 1.0 if entry.sense == "maximise" else 0.0
        np.testing.assert_allclose(value(name, inputs), best, atol=1e-6)
        if name in DIFFERENTIABLE and name not in ("confidence_shift", "total_variation"):
            np.testing.assert_allclose(gradient(name, inputs), 0, atol=2e-6)  # and it is flat there


@names
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(name, dtype):
    inputs = {
        key: array if array.dtype == np.int32 else np.asarray(jnp.asarray(array, dtype))
        for key, array in INPUTS.items()
    }
    kept = np.exp(inputs["teacher_log_probs"].astype(np.float64)).sum(axis=-1)
    inputs["teacher_tail"] = (1 - kept).astype(np.float32)
    out = value(name, inputs)
    assert out.dtype == jnp.float32
    exact = oracle.ORACLES[name](
        {k: a if a.dtype == np.int32 else a.astype(np.float64) for k, a in inputs.items()}
    )
    np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-5)
    assert gradient(name, inputs).dtype == dtype


@names
def test_vmap_is_the_batch(name):
    entry = OBJECTIVES[name]
    mapped = jax.vmap(lambda inputs, mask: entry(mask=mask, **inputs))(INPUTS, MASK)
    np.testing.assert_allclose(mapped, value(name, mask=MASK), atol=1e-6)


class Variants(chex.TestCase):
    """With and without jit, with and without device arrays, and under pmap."""

    @chex.all_variants(with_pmap=True)  # pyright: ignore[reportCallIssue]  # toolz's curry is untyped
    @parameterized.parameters(*OBJECTIVES)
    def test_all_variants(self, name):
        entry = OBJECTIVES[name]
        out = self.variant(lambda inputs, mask: entry(mask=mask, **inputs))(INPUTS, MASK)
        np.testing.assert_allclose(out, value(name, mask=MASK), rtol=1e-6, atol=1e-6)


@names
def test_nothing_retraces(name):
    entry = OBJECTIVES[name]
    chex.clear_trace_counter()
    once = jax.jit(chex.assert_max_traces(lambda i, m: entry(mask=m, **i), n=1))
    for seed in range(3):
        once(make_inputs(seed), MASK)


@names
@pytest.mark.parametrize("shape", [(1, 1), (2, 0), (0, 3), (5,)])
@pytest.mark.parametrize("vocabulary", [1, V])
def test_edge_shapes(name, shape, vocabulary):
    inputs = make_inputs(2, shape, vocabulary)
    out, slope = value_and_gradient(name, inputs)
    assert out.shape == shape
    if math.prod(shape):
        np.testing.assert_allclose(out, oracle.ORACLES[name](inputs), rtol=2e-6, atol=1e-6)
    assert np.isfinite(slope).all()


@pytest.mark.usefixtures("unchecked")
@names
def test_bad_arguments_are_named(name):
    entry = OBJECTIVES[name]
    with pytest.raises(ValueError, match="mask must have shape"):
        value(name, mask=np.ones((T,), bool))
    with pytest.raises(ValueError, match="mask must be boolean"):
        value(name, mask=np.ones((B, T), np.float32))
    for key in entry.inputs:
        shown = key.removesuffix("_hidden") if entry.function.__name__.startswith("cosine") else key
        # a top-k would be taken from the teacher's logits
        missing = {key, "teacher_logits"} if key.startswith("teacher") else {key}
        with pytest.raises(ValueError, match=f"needs {key}"):
            value(name, {k: a for k, a in INPUTS.items() if k not in missing})
        if INPUTS[key].dtype == np.int32:
            with pytest.raises(ValueError, match=f"{key} must be integer"):
                value(name, {**INPUTS, key: INPUTS[key].astype(np.float32)})
            with pytest.raises(ValueError, match=f"{key} must have shape"):
                value(name, {**INPUTS, key: INPUTS[key][0]})
            for wrong in (-1, V):
                with pytest.raises(ValueError, match=rf"{key} must lie in \[0, 7\); got {wrong}"):
                    value(name, {**INPUTS, key: np.full_like(INPUTS[key], wrong)})
        elif key != "logits":
            shown = "logits" if name == "entropy" else shown
            with pytest.raises(ValueError, match=f"{shown} must be floating"):
                value(name, {**INPUTS, key: INPUTS[key].astype(np.int32)})
            with pytest.raises(ValueError, match=r"must have shape|must have one shape"):
                value(name, {**INPUTS, key: INPUTS[key][0, 0, 0]})
    if name in PAIRS:
        with pytest.raises(ValueError, match=r"one shape; got .* and "):
            value(name, {**INPUTS, "teacher_logits": INPUTS["teacher_logits"][..., :-1]})


@pytest.mark.usefixtures("unchecked")
@names
def test_a_mask_for_the_wrong_axis_is_refused_when_all_sizes_are_equal(name):
    """The B = T = V trap: ``[t]`` would broadcast silently."""
    inputs = make_inputs(0, (4, 4), 4)
    with pytest.raises(ValueError, match="mask must have shape"):
        value(name, inputs, np.ones(4, bool))


WITH_TEMPERATURE = [name for name, options in VARIANTS if "temperature" in options]


@pytest.mark.parametrize("temperature", [0.5, 3.0])
@pytest.mark.parametrize("name", WITH_TEMPERATURE)
def test_temperature(name, temperature):
    entry = dataclasses.replace(OBJECTIVES[name], options=(("temperature", temperature),))
    expected = oracle.ORACLES[name](INPUTS, temperature=temperature)
    np.testing.assert_allclose(value(name, entry=entry), expected, rtol=2e-6, atol=1e-6)
    expected = oracle.gradient(name, INPUTS, "student_logits", temperature=temperature)
    np.testing.assert_allclose(gradient(name, entry=entry), expected, atol=2e-6)
    for wrong in (0, -1.0, float("nan")):
        bad = dataclasses.replace(entry, options=(("temperature", wrong),))
        with pytest.raises(ValueError, match=f"temperature must be positive, not {wrong}"):
            value(name, entry=bad)


@pytest.mark.usefixtures("unchecked")
@names
def test_values_are_float32_whatever_the_precision_of_jax(name):
    """Under x64 too, with float64 inputs and options."""
    entry = OBJECTIVES[name]
    numbers = {option: OPTIONS[option] for option in option_names(entry)}
    options = {
        o: np.float64(number) if isinstance(number, float) else number for o, number in numbers.items()
    }
    entry = dataclasses.replace(entry, options=tuple(options.items()))
    wide = {k: a if a.dtype == np.int32 else a.astype(np.float64) for k, a in INPUTS.items()}
    with x64():
        out, slope = value_and_gradient(name, wide, MASK, entry)
        assert (out.dtype, slope.dtype) == (jnp.float32, jnp.float64)
    lists = {key: array.tolist() for key, array in INPUTS.items()}
    with pytest.raises(ValueError, match="must be an array, not a list"):
        entry(**lists)


@names
def test_one_position_alone(name):
    """``[v]``, as a function is seen by ``jax.vmap``."""
    inputs = {key: jnp.asarray(array[1, 2]) for key, array in INPUTS.items()}
    entry = OBJECTIVES[name]
    np.testing.assert_allclose(entry(**inputs), value(name)[1, 2], rtol=1e-6, atol=1e-7)
    mapped = jax.vmap(jax.vmap(lambda inputs: entry(**inputs)))(INPUTS)
    np.testing.assert_allclose(mapped, value(name), rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("unchecked")
@names
def test_a_mask_of_zeros_and_ones(name):
    for dtype in (np.int32, np.int8, np.uint8):
        np.testing.assert_array_equal(value(name, mask=MASK.astype(dtype)), value(name, mask=MASK))
    with pytest.raises(ValueError, match="mask must be boolean, or integers 0 and 1; it goes up to 2"):
        value(name, mask=2 * MASK.astype(np.int32))
