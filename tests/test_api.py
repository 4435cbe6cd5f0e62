"""Things that users bring along: an objective, an optimizer, a callback and a prompt kind of their own."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsp
from jaxsp.losses import OBJECTIVES
from jaxsp.models import load
from jaxsp.prompts import PROMPT_KINDS
from jaxsp.prompts.initializers import ABSENT
from jaxsp.settings import Options, plain
from tests.conftest import CONTEXT, QUERIES, assert_same_sigma

OPTIONS = {"prompt_length": 4, "steps": 4, "batch_size": 4, "max_answer_tokens": 6, "progress": False}


def compress(model, **options):
    return jaxsp.compress(model, CONTEXT, QUERIES, **{**OPTIONS, **options})


def alpha_divergence(teacher_logits, student_logits, mask, *, alpha=0.5):
    """Amari's α-divergence in ten lines, outside of the package."""
    del mask
    log_p, log_q = jax.nn.log_softmax(teacher_logits), jax.nn.log_softmax(student_logits)
    mixed = jnp.exp(alpha * log_p + (1 - alpha) * log_q).sum(-1)
    return (1 - mixed) / (alpha * (1 - alpha))


@pytest.mark.slow
def test_an_objective_of_ones_own_is_trained_on(calm_model, tmp_path):
    own = jaxsp.Objective(alpha_divergence, options=(("alpha", 0.3),))
    result = compress(calm_model, objective=own, out=tmp_path / "out", steps=8)
    losses = [line["loss"] for line in result.lines[1:]]
    assert losses[-1] < losses[0]
    assert result.report["objective"] == "tests.test_api.alpha_divergence(alpha=0.3)"
    other = jaxsp.Objective(alpha_divergence, options=(("alpha", 0.6),))
    with pytest.raises(jaxsp.UserError, match=r"objective was .*alpha=0.3.* and is now .*alpha=0.6"):
        compress(calm_model, objective=other, out=tmp_path / "out", steps=8, resume=True)


@pytest.mark.slow
def test_options_of_an_objective_in_text(calm_model):
    text, table = (
        compress(calm_model, objective=objective, steps=2).lines[-1]["loss"]
        for objective in ("js(beta=0.5)", OBJECTIVES["js"])
    )
    assert text == table
    other = compress(calm_model, objective="js(beta=0.1)", steps=2).lines[-1]["loss"]
    assert other != pytest.approx(text, rel=1e-3)
    with pytest.raises(jaxsp.UserError, match="gamma"):
        compress(calm_model, objective="js(gamma=1)")


@pytest.mark.slow
def test_an_optimizer_of_ones_own_moves_by_its_own_rate(calm_model):
    start = compress(calm_model, steps=0).prompt.sigma
    moved = compress(calm_model, optimizer=optax.sign_sgd(1e-3), steps=3, keep="last")
    assert moved.prompt.sigma["context_length"] == start["context_length"]  # no parameter: it stays
    change = {part: moved.prompt.sigma[part] - start[part] for part in ("keys", "values", "bias")}
    there = start["bias"] > ABSENT
    assert not change["bias"][~there].any()  # slots that a head does not have
    changes = [np.ravel(change["keys"]), np.ravel(change["values"]), change["bias"][there]]
    steps = np.abs(np.concatenate(changes)) / 1e-3
    np.testing.assert_allclose(steps, steps.round(), atol=1e-2)
    assert set(steps.round().astype(int).ravel()) <= {1, 3}
    assert {line["learning_rate"] for line in moved.lines[1:]} == {1.0}


def test_a_callback_hears_of_every_step_and_can_stop(calm_model):
    heard = []

    def callback(step: jaxsp.Step) -> bool:
        heard.append((step.number, step.metrics, np.asarray(step.sigma()["values"])))
        return step.number == 2

    result = compress(calm_model, callbacks=[callback], evaluate_every=3, steps=9, keep="last")
    assert [number for number, *_ in heard] == [0, 1, 2, 3]
    assert [{"step": n, **metrics} for n, metrics, _ in heard] == result.lines
    np.testing.assert_array_equal(heard[-1][2], result.prompt.sigma["values"])
    assert result.report["steps"] == 3


@pytest.fixture
def own_kind(monkeypatch):
    """A prompt kind of arrays of four axes, in nested dicts: keys and values of every layer."""

    def initial(start):
        found = start.key_values()
        sigma = {"keys": found.keys[:, 0], "values": found.values[:, 0]}
        return {"layers": jax.tree.map(lambda leaf: leaf.astype(jnp.float32), sigma)}

    def prefix(sigma, preamble, prefill):
        keys, values = (sigma["layers"][name][:, None] for name in ("keys", "values"))
        positions = preamble.next_position[:, None] + jnp.arange(keys.shape[2])[None]
        return preamble.append(jaxsp.typing.KeyValues(keys, values, positions))

    kind = types.SimpleNamespace(
        DEFAULTS={"initial": "first", "optimizer": "adam", "learning_rate": 0.05, "steps": 20},
        IS_READ=False,
        initial=initial,
        prefix=prefix,
        prompt_length=lambda sigma: sigma["layers"]["keys"].shape[1],
        rates=lambda sigma, factors: jax.tree.map(lambda leaf: jnp.std(leaf), sigma),
    )
    monkeypatch.setitem(PROMPT_KINDS, "own", kind)


@pytest.mark.slow
@pytest.mark.usefixtures("own_kind")
def test_a_prompt_kind_of_ones_own_is_trained_saved_and_asked(calm_model, tmp_path):
    result = compress(calm_model, kind="own", out=tmp_path / "out")
    losses = [line["loss"] for line in result.lines[1:]]
    assert losses[-1] < losses[0]
    again = jaxsp.SoftPrompt.load(tmp_path / "out")
    assert_same_sigma(again.sigma, result.prompt.sigma)
    assert jaxsp.ask(calm_model, again, "What now?", max_tokens=3) == jaxsp.ask(
        calm_model, result.prompt, "What now?", max_tokens=3
    )
    rows = [{"id": f"{i}", "context": CONTEXT, "queries": QUERIES, "seed": i} for i in range(2)]
    many = jaxsp.compress_many(calm_model, rows, kind="own", **OPTIONS)
    assert all(r.report["held_out"]["brackets"]["full_context"]["kl"] < 1e-6 for r in many)


def test_the_public_settings_are_what_compress_takes():
    assert set(Options.__annotations__) == set(plain(jaxsp.Settings()))
    assert issubclass(jaxsp.NonFiniteLoss, jaxsp.UserError)
    assert issubclass(jaxsp.Interrupted, jaxsp.UserError)


def test_what_one_types_first(tiny_directory, tmp_path, monkeypatch):
    """Names in place of objects; a model is loaded once, and one that the user holds is not loaded again."""
    name, folder = str(tiny_directory), str(tmp_path / "out")
    result = jaxsp.compress(name, CONTEXT, QUERIES, out=folder, **OPTIONS)

    def not_again(*_, **__):
        raise AssertionError("loaded again")

    monkeypatch.setattr(load, "load_model", not_again)
    question: dict[str, Any] = {"max_tokens": 4}
    answer = result.ask("What now?", **question)
    assert answer == result.prompt.ask("What now?", **question)
    assert answer == jaxsp.ask(folder, "What now?", **question)
    assert answer == jaxsp.ask(name, result.prompt, "What now?", **question)
    assert jaxsp.evaluate(name, folder, QUERIES[:2], progress=False)["held_out"]["queries"] == 2
    with pytest.raises(jaxsp.UserError, match="no context"):
        list(jaxsp.compress_many(name, [], **OPTIONS))
    with pytest.raises(AssertionError, match="loaded again"):
        result.ask("What now?", model=str(tmp_path / "elsewhere"))


def test_what_is_shown_of_things(calm_model, tmp_path):
    result = compress(calm_model)
    assert repr(result.prompt) == f"SoftPrompt(per_head, 4 slots for 87 tokens, {calm_model.name})"
    assert repr(result).startswith(f"Result({result.prompt!r}, ")
    assert "\n" not in repr(result)
    shown = result._repr_html_()
    for name, found in result.report["held_out"]["brackets"].items():
        assert f"<td>{name.replace('_', ' ')}</td><td>{found['kl']:.3f}</td>" in shown
    failed = dataclasses.replace(result, report={**result.report, "error": "The loss <is> not finite."})
    assert "The loss &lt;is&gt; not finite." in failed._repr_html_()
    with pytest.raises(AttributeError, match="no attribute 'compres'; did you mean 'compress'"):
        _ = jaxsp.compres
    with pytest.raises(AttributeError, match=r"no attribute 'xyz'$"):
        _ = jaxsp.xyz


HALF = "How long\ud800?"
"""Half a character, as a file name or a broken program may give it."""

NO_TEXTS = [None, b"bytes", 3, 2.5, [], Path("c.txt"), "", " ", HALF, object]
NO_LISTS = [None, 3, "text", b"bytes", Path("q.txt"), {"query": "a"}, [[]], [{}], [None]]
NO_PATHS = [None, b"bytes", 3, "", "a\0b", ["a"], object]


@pytest.mark.parametrize("value", NO_TEXTS, ids=ascii)
def test_what_is_no_text_is_a_sentence_wherever_a_text_belongs(tiny_model, value):
    artifact = jaxsp.SoftPrompt({}, {"model": {"name": "m"}, "context_tokens": 1}, CONTEXT)
    calls = {
        "compress": lambda: compress_text(tiny_model, value, QUERIES),
        "compress a query": lambda: compress_text(tiny_model, CONTEXT, [value, *QUERIES]),
        "compress a Query": lambda: compress_text(tiny_model, CONTEXT, [jaxsp.Query(value), *QUERIES]),
        "compress an answer": lambda: compress_text(
            tiny_model, CONTEXT, [{"query": "a", "answer": value or 3}]
        ),
        "compress held out": lambda: compress_text(tiny_model, CONTEXT, QUERIES, held_out=[value]),
        "many": lambda: jaxsp.compress_many(tiny_model, [{"id": "a", "context": value}], progress=False),
        "questions": lambda: jaxsp.questions(tiny_model, value, progress=False),
        "ask": lambda: artifact.ask(value, model=tiny_model),
        "encode": lambda: tiny_model.encode_context(HALF),
    }
    for name, call in calls.items():
        with pytest.raises(jaxsp.UserError) as caught:
            call()
        assert "\n" not in str(caught.value), name


def compress_text(model, context, queries, **more):
    options: dict[str, Any] = {**OPTIONS, **more}
    return jaxsp.compress(model, context, queries, **options)


@pytest.mark.parametrize(
    "value", [None, 3, "text", b"bytes", Path("q.txt"), {"query": "a"}, [[]], [{}], [None]], ids=repr
)
def test_what_is_no_list_of_queries_is_a_sentence(tiny_model, value):
    for given in ({"queries": value}, {"queries": QUERIES, "held_out": value}):
        if given.get("held_out") != 3:  # a fraction, and none
            with pytest.raises(jaxsp.UserError, match=r"quer|held_out"):
                jaxsp.compress(tiny_model, CONTEXT, **OPTIONS, **given)


@pytest.mark.parametrize("value", NO_PATHS, ids=ascii)
def test_what_is_no_path_is_a_sentence_wherever_a_path_belongs(tiny_model, value):
    calls = [
        lambda: jaxsp.load_model(value),
        lambda: jaxsp.compress(value, CONTEXT, QUERIES),
        lambda: jaxsp.SoftPrompt.load(value),
        lambda: jaxsp.ask(value, "Who?"),
        lambda: jaxsp.evaluate(tiny_model, value, QUERIES),
    ]
    if value is not None:
        calls += [
            lambda: jaxsp.compress(tiny_model, CONTEXT, QUERIES, out=value),
            lambda: jaxsp.compress(tiny_model, CONTEXT, QUERIES, teacher=value),
        ]
    for call in calls:
        with pytest.raises(jaxsp.UserError, match="must be a path, not "):
            call()


def test_a_manifest_that_does_not_fit_the_model(calm_model, unchecked):
    """Its weights are those, and yet the prompt is none of its own."""
    prompt = compress(calm_model, steps=0).prompt
    slots = prompt.manifest["slots"]
    for odd in (calm_model.config.vocab_size, -1, 2.5, None):
        manifest = {**prompt.manifest, "slots": {**slots, "before_ids": [*slots["before_ids"], odd]}}
        with pytest.raises(jaxsp.UserError, match=f"the id {odd!r} is outside the model's vocabulary"):
            dataclasses.replace(prompt, manifest=manifest).prefix(calm_model)
    wide = {**prompt.sigma, "keys": np.zeros((*prompt.sigma["keys"].shape[:-1], 3), np.float32)}
    with pytest.raises(jaxsp.UserError, match="The prompt's arrays don't fit its model"):
        dataclasses.replace(prompt, sigma=wide).prefix(calm_model)


@pytest.mark.parametrize("tokens", [0, -1, "x", None, True])
def test_a_longest_answer_that_is_none(tiny_model, tokens):
    with pytest.raises(jaxsp.UserError, match=r"--max-tokens must be (at least 1|a number), not "):
        list(tiny_model.stream_answer(None, "Who?", max_tokens=tokens))
