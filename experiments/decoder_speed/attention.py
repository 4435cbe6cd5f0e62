"""Attention in chunks against full attention: time at 2k tokens, memory at 8k; and after a shared prefix."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp

from experiments.suite import in_turns
from jaxsp.models.attention import AttentionInputs, Slots, attention

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of queries after a shared prefix, in so many layers."""

    rows: int
    tokens: int
    prefix: int
    heads: int
    kv_heads: int
    dtype: str
    layers: int = 1
    width: int = 64


CASES = (
    Case(rows=1, tokens=2048, prefix=0, heads=8, kv_heads=8, dtype="float32"),
    Case(rows=1, tokens=8192, prefix=0, heads=8, kv_heads=8, dtype="float32"),
    Case(rows=8, tokens=48, prefix=30, heads=9, kv_heads=3, dtype="bfloat16", layers=30),
    Case(rows=8, tokens=48, prefix=320, heads=9, kv_heads=3, dtype="bfloat16", layers=30),
)


def full(inputs: AttentionInputs):
    """As one would write it: all slots in one row, the prefix copied to each, all scores at once."""
    q, where, slots = inputs.q_BTHF, inputs.positions_BT, inputs.slots
    scale, precision, rows = inputs.scale, inputs.precision, q.shape[0]
    k, v, at = (
        jnp.concatenate([jnp.broadcast_to(x, (rows, *x.shape[1:])) for x in parts], axis=1)
        for parts in zip(*(s[:3] for s in slots), strict=True)
    )
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    scores = scale * product("bthf,bshf->bhts", q, k)
    scores = jnp.where((at[:, None, :] <= where[:, :, None])[:, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return product("bhts,bshf->bthf", weights, v).astype(q.dtype)


def program(form: Any, case: Case) -> Any:
    precision = jax.lax.Precision.HIGHEST if case.dtype == "float32" else None
    where = jnp.broadcast_to(case.prefix + jnp.arange(case.tokens), (case.rows, case.tokens))
    before = jnp.arange(case.prefix)[None]

    def loss(arrays):
        def layer(q, own):
            k, v, *prefix = own
            slots = [Slots(k, v, where)]
            if case.prefix:
                slots.insert(0, Slots(prefix[0], prefix[1], before))
            precise = precision or jax.lax.Precision.DEFAULT
            inputs = AttentionInputs(q, where, tuple(slots), scale=case.width**-0.5, precision=precise)
            return form(inputs), None

        q, *stacked = arrays
        return jnp.sum(jax.lax.scan(layer, q, stacked)[0].astype(jnp.float32) ** 2)

    def shape(rows, tokens, heads, *layers):
        return jax.ShapeDtypeStruct((*layers, rows, tokens, heads, case.width), case.dtype)

    arrays = [
        shape(case.rows, case.tokens, case.heads),
        *[shape(case.rows, case.tokens, case.kv_heads, case.layers)] * 2,
        *[shape(1, case.prefix, case.kv_heads, case.layers)] * 2,
    ]
    compiled = jax.jit(jax.value_and_grad(loss)).lower(arrays).compile()
    given = [jax.random.normal(jax.random.key(i), a.shape).astype(a.dtype) for i, a in enumerate(arrays)]
    return compiled, given


def measure_one(case: Case, repeats: int) -> dict[str, Any]:
    row: dict[str, Any] = dataclasses.asdict(case)
    calls = {}
    for name, form in (("full", full), ("chunked", functools.partial(attention, backend="chunked"))):
        compiled, given = program(form, case)
        memory = compiled.memory_analysis().temp_size_in_bytes / MIB
        row[name] = {"temp_mib": round(memory, 1)}
        if memory < 4096:
            calls[name] = functools.partial(compiled, given)
    for name, times in in_turns(calls, repeats)[0].items():
        row[name]["seconds"] = round(statistics.median(times), 4)
    return row


def measure(full: bool) -> dict[str, Any]:
    """Value and gradient to q, k, v and the prefix."""
    return {"rows": [measure_one(case, 7 if full else 1) for case in (CASES if full else CASES[2:3])]}


HEAD = ("attention: rows × tokens, prefix, layers", "full", "chunked")


def cells(row: dict[str, Any]) -> list[str]:
    """The values of a case, as the table shows them."""
    shown = [f"{row['rows']} × {row['tokens']:,}, {row['prefix']}, {row['layers']} ({row['dtype']})"]
    for name in ("full", "chunked"):
        seconds = row[name].get("seconds")
        took = "not run" if seconds is None else f"{seconds:.3f} s"
        shown.append(f"{took}, {row[name]['temp_mib']:,.0f} MiB")
    return shown
