"""The table's lookups, mixtures, and the textbook cases."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsp import losses
from jaxsp.losses import OBJECTIVES, Objective, as_objective, mixture, parse
from jaxsp.typing import UserError
from tests.losses.problem import INPUTS, MASK

ARRAYS = {name: jnp.asarray(array) for name, array in INPUTS.items()}


def with_options(name, **options):
    return dataclasses.replace(OBJECTIVES[name], options=options)


@pytest.mark.parametrize(
    ("text", "expected", "written"),
    [
        ("kl=0.7,nll=0.3", mixture(kl=0.7, nll=0.3), "kl=0.7,nll=0.3"),
        (" kl = 1, temperature=2", mixture(kl=1, temperature=2), "kl(temperature=2)"),
        ("kl=1", OBJECTIVES["kl"], "kl"),
        ("kl, nll", mixture(kl=1, nll=1), "kl=1,nll=1"),
        ("kl=2e-3", mixture(kl=0.002), "kl=0.002"),
        ("cosine_similarity=1", mixture(cosine_similarity=1), "cosine_similarity=1"),
        ("kl(temperature=1.0)", OBJECTIVES["kl"], "kl"),
        (
            "js( temperature=2 ,beta = 0.3)",
            with_options("js", beta=0.3, temperature=2),
            "js(beta=0.3,temperature=2)",
        ),
        (
            "kl(temperature=2)=0.7,nll=0.3",
            mixture(kl=0.175, nll=0.3, temperature=2),
            "kl(temperature=2)=0.7,nll=0.3",
        ),
        (
            "kl(temperature=1)=1,js=1,temperature=3",
            parse("kl,js(temperature=3)=9"),
            "kl=1,js(temperature=3)=9",
        ),
    ],
)
def test_text_means_and_is_written(text, expected, written):
    objective = parse(text)
    assert objective == expected
    assert hash(objective) == hash(expected)
    assert str(objective) == written
    assert repr(objective) == f"Objective({written})"
    assert parse(written) == objective


def test_counts_are_whole_numbers():
    assert dict(parse("topk_kl(k=20)").options) == {"k": 20}
    assert type(dict(parse("topk_kl(k=20)").options)["k"]) is int


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kll", "Unknown objective 'kll'; choose one of kl, .*, hidden_mse; did you mean kl?"),
        ("", "Unknown objective ''; choose one of kl, "),
        ("kl=0.7,", "Unknown objective ''; choose one of kl, "),
        ("kl=a", r"'kl=a' can't be read; it should read like kl=0.7 or kl\(OPTION=NUMBER"),
        ("kl=", "'kl=' can't be read"),
        ("0.7*kl", r"Unknown objective '0.7\*kl'"),
        ("nll,js(0.3)", r"'js\(0.3\)' can't be read; .* js\(OPTION=NUMBER,...\), with beta, temp"),
        ("js(beta=0.3,beta=0.4)", "can't be read"),
        ("js(beta=0.3", r"'js\(beta=0.3' can't be read"),
        ("js(beta=0.3)x", "can't be read"),
        ("zero_one(k=1)", "zero_one has no option 'k'; it has none"),
        ("js(betta=0.3)=1,nll=1", "js_.* has no option 'betta'; it has beta, temperature; did you me"),
        ("js(beta=2)", r"Objective js\(beta=2\): beta must lie between 0 and 1, not 2"),
        ("js(beta=nan)", "beta must lie between 0 and 1, not nan"),
        ("topk_kl(k=0)", r"topk_kl\(k=0\): k must be a whole number of at least 1, not 0"),
        ("topk_kl(k=2.5)", "k must be a whole number of at least 1, not 2.5"),
        ("nll(label_smoothing=1.5)", "label_smoothing must lie between 0 and 1, not 1.5"),
        ("kl(temperature=-1)=1,nll", "temperature must be positive, not -1"),
        (f"kl(temperature=1{400 * '0'})", "int too large"),
        ("kl,zero_one=1", "piecewise constant"),
        ("kl=0.7,kll=1", "Unknown objective 'kll'"),
        ("kl(temperature=2)=0.3,kl(temperature=2.0)=0.3", r"has kl\(temperature=2\) twice"),
        ("kl,temperature", "'temperature' can't be read; it should read like temperature=0.7"),
        ("kl,temperature=2,temperature=3", "has temperature twice"),
        ("kl=-1", "The weight of kl must be positive, not -1"),
        ("kl=inf", "The weight of kl must be positive, not inf"),
        ("kl=1,temperature=0", "temperature must be positive, not 0"),
        ("nll=1,temperature=2", "None of nll has a temperature"),
        ("temperature=2", "needs at least one objective"),
        ("kl=0.7,kl=0.3", "has kl twice"),
        ("kl=1,temperature=inf", "temperature must be positive, not inf"),
    ],
)
def test_text_that_makes_no_sense(text, message):
    with pytest.raises(UserError, match=message):
        as_objective(text)


def test_text_is_read_without_a_device(python):
    """Before the processes of a cluster have met, none of them may start its backend."""
    code = (
        "from jax._src import xla_bridge; from jaxsp.losses import parse;"
        "parse('js(beta=0.3)=0.5,topk_kl(k=3),nll(label_smoothing=0.1)');"
        "print(xla_bridge.backends_are_initialized())"
    )
    assert python("-c", code).stdout.strip() == "False"


def test_as_objective():
    assert as_objective("kl") is OBJECTIVES["kl"]
    mine = Objective(losses.kl_divergence, options={"temperature": np.float64(2)})
    assert as_objective(mine) is mine
    assert mine == parse("kl(temperature=2)")
    for wrong in ("zero_one", OBJECTIVES["zero_one"]):
        with pytest.raises(UserError, match=r"piecewise constant.* Train on one of kl, "):
            as_objective(wrong)
    function: Any = losses.kl_divergence
    with pytest.raises(UserError, match=r"must be a text such as 'kl' or a jaxsp.losses.Objective"):
        as_objective(function)
    with pytest.raises(UserError, match=r"own has no option 'alfa'; it has alpha; did you mean alpha"):
        Objective(own, options={"alfa": 1.0})
    with pytest.raises(ValueError, match="alpha must be a number that is known when"):
        jax.jit(lambda x: Objective(own, options={"alpha": x})(**ARRAYS))(2.0)


def own(teacher_logits, student_logits, mask, alpha=0.5):
    return alpha * losses.kl_divergence(teacher_logits, student_logits, mask)


def anything(teacher_logits, student_logits, mask, **options):
    return losses.kl_divergence(teacher_logits, student_logits, mask, **options)


@dataclasses.dataclass(frozen=True)
class Scaled:
    factor: float

    def __call__(self, *arrays):
        return self.factor * losses.kl_divergence(*arrays)


def scaled(factor):
    return lambda *arrays: factor * losses.kl_divergence(*arrays)


def test_objectives_of_ones_own_are_told_apart_by_their_text():
    here = __name__
    expected = {
        f"{here}.own": Objective(own),
        f"{here}.own(alpha=0.3)": Objective(own, options={"alpha": 0.3}),
        f"{here}.own[sense=maximise](alpha=0.3)": Objective(own, sense="maximise", options={"alpha": 0.3}),
        f"{here}.own[inputs=('student_logits', 'teacher_logits')]": Objective(
            own, ("student_logits", "teacher_logits")
        ),
        f"{here}.anything(temperature=2)": Objective(anything, options={"temperature": 2}),
        f"{here}.own(alpha=0.1)[differentiable=False]": Objective(
            functools.partial(own, alpha=0.1), differentiable=False
        ),
        f"{here}.Scaled(factor=2.0)": Objective(Scaled(2.0)),
    }
    for text, objective in expected.items():
        assert str(objective) == text
    nameless = [Objective(scaled(2.0)), Objective(scaled(3.0))]
    nameless += [Objective(lambda *a: 2 * own(*a)), Objective(lambda *a: 3 * own(*a))]
    texts = [str(objective) for objective in nameless]
    assert all(text.startswith(here) for text in texts)
    assert len(set(texts)) == len(texts)
    assert str(Objective(scaled(2.0))) == texts[0]
    value = expected[f"{here}.anything(temperature=2)"](**ARRAYS)
    np.testing.assert_allclose(value, parse("kl(temperature=2)")(**ARRAYS))


def test_a_mixture_is_the_weighted_sum_of_its_parts_turned_one_way():
    mixed = mixture(kl=0.7, nll=0.3, cosine_similarity=2.0, confidence_shift=0.5, temperature=3.0)
    assert mixed.needs == ("hidden", "tokens")
    assert mixed.sense == "minimise"
    mask = jnp.asarray(MASK)
    kl = losses.kl_divergence(ARRAYS["teacher_logits"], ARRAYS["student_logits"], mask, temperature=3.0)
    others = {
        name: OBJECTIVES[name](mask=mask, **ARRAYS)
        for name in ("nll", "cosine_similarity", "confidence_shift")
    }
    expected = 9 * 0.7 * kl + 0.3 * others["nll"] - 2 * others["cosine_similarity"]
    expected += 0.5 * jnp.abs(others["confidence_shift"])
    np.testing.assert_allclose(mixed(mask=mask, **ARRAYS), expected, rtol=1e-5, atol=1e-6)


def test_a_mixture_of_one_is_its_entry():
    """So that it is as cheap."""
    assert mixture(kl=1).function is losses.kl_divergence
    assert dict(mixture(kl=1, temperature=2).options) == {"temperature": 2.0}
    assert mixture(cosine_similarity=1).sense == "minimise"


def test_a_strangers_function_keeps_the_promises():
    """Nothing under the mask reaches its value or gradient, though it does not look at the mask."""

    def careless(teacher_logits, student_logits, mask):
        return jnp.sum((teacher_logits - student_logits) ** 2, axis=-1) + 1.0

    mask, entry = jnp.asarray(MASK), Objective(careless)
    student = jnp.where(mask[..., None], ARRAYS["student_logits"], jnp.nan)

    def total(student):
        values = entry(mask=mask, **{**ARRAYS, "student_logits": student})
        return jnp.sum(values), values

    (_, values), slope = jax.value_and_grad(total, has_aux=True)(student)
    assert not np.asarray(values)[~MASK].any()
    assert not np.asarray(slope)[~MASK].any()
    expected = careless(ARRAYS["teacher_logits"], ARRAYS["student_logits"], None)
    np.testing.assert_allclose(values[mask], expected[mask])
    assert np.isfinite(slope).all()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda p, q, mask: jnp.mean(p),
            r"must give an array of shape \[3, 4\], a value for each position, not one",
        ),
        (lambda p, q, mask: 0.5, r"must give an array of shape \[3, 4\], .* not a float"),
        (lambda p, q, mask: jnp.argmax(p, -1), "must give float32 values, computed in float32, not int32"),
        (lambda p, q, mask: p[..., 0].astype(jnp.bfloat16), "must give float32 values.* not bfloat16"),
    ],
)
def test_what_a_strangers_function_must_give(function, message):
    for mask in (None, jnp.asarray(MASK)):
        with pytest.raises(UserError, match=message):
            Objective(function)(mask=mask, **ARRAYS)


def test_how_a_strangers_function_is_called():
    for wrong in (lambda p, q: p, lambda p, q, mask, *, needed: p, lambda p, q, mask, more: p):
        with pytest.raises(
            UserError, match="it is called with teacher_logits, student_logits, the mask and its"
        ):
            Objective(wrong)
    anything: Any = "minimize"
    with pytest.raises(UserError, match=r"is one of minimise, maximise, zero, not .minimize"):
        Objective(own, sense=anything)
    with pytest.raises(UserError, match=r"own has no option .alfa.; it has alpha"):
        Objective(own).with_options(alfa=1.0)
    assert Objective(own).with_options(alpha=0.3).options == (("alpha", 0.3),)
    both = parse("kl=0.7,js=0.3").with_options(beta=0.2, temperature=2.0)
    assert str(both) == "kl(temperature=2)=2.8,js(beta=0.2,temperature=2)=1.2"
    with pytest.raises(UserError, match=r"has no option .k.; it has temperature, beta"):
        both.with_options(k=3)


def test_the_table_can_be_read():
    lines = str(OBJECTIVES).splitlines()
    assert len(lines) == len(OBJECTIVES) + 1
    assert lines[0].split() == ["name", "better", "needs", "of", "the", "teacher", "options", "reference"]
    (line,) = (line for line in lines if line.startswith("js "))
    assert line.split() == ["js", "less", "hidden", "beta=0.5,", "temperature=1", "arXiv:2306.13649"]
    assert "(no gradient)" in str(OBJECTIVES).split("zero_one")[1].splitlines()[0]
    assert max(map(len, lines)) <= 140


def test_a_former_name_is_read():
    assert parse("top_k_mismatch(k=3)") == parse("topk_mismatch(k=3)")


def test_half_a_top_k_is_refused():
    with pytest.raises(ValueError, match="needs teacher_ids"):
        OBJECTIVES["topk_kl"](**{k: a for k, a in ARRAYS.items() if k != "teacher_ids"})


def test_needs_and_senses():
    needs = {name: entry.needs for name, entry in OBJECTIVES.items()}
    assert {("hidden",), ("top_k",), ("tokens",), ()} == set(needs.values())
    assert (needs["kl"], needs["topk_kl"], needs["nll"]) == (("hidden",), ("top_k",), ("tokens",))
    assert needs["entropy"] == ()
    assert parse("nll,topk_kl,hidden_mse").needs == ("hidden", "top_k", "tokens")
    values = jnp.array([-1.0, 2.0])
    turned: dict[Any, list[int]] = {"minimise": [-1, 2], "maximise": [1, -2], "zero": [1, 2]}
    for sense, cost in turned.items():
        entry = losses.Objective(losses.kl_divergence, sense=sense)
        np.testing.assert_array_equal(entry.cost(values), cost)


TEACHER = jnp.log(jnp.array([[0.6, 0.3, 0.1]]))


def descend(loss, steps=300):
    """The student's distribution after gradient descent on its logits."""
    logits, optimizer = jnp.zeros((1, 3)), optax.adam(0.1)

    def step(carry: Any, _) -> tuple[Any, None]:
        logits, state = carry
        updates, state = optimizer.update(jax.grad(lambda x: loss(x).sum())(logits), state)
        return (optax.apply_updates(logits, updates), state), None

    (logits, _), _ = jax.lax.scan(step, (logits, optimizer.init(logits)), length=steps)
    return jax.nn.softmax(logits)[0]


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "js", "topk_kl"])
def test_textbook_divergences_end_at_the_teachers_distribution(name):
    entry = OBJECTIVES[name]
    best = losses.topk(TEACHER, 2)
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
