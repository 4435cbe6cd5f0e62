"""The update as a driver runs it, compiled from shapes alone."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxsp.data.examples import Rows
from jaxsp.data.packing import Packing
from jaxsp.losses import Objective
from jaxsp.models import decoder, sharding
from jaxsp.models.config import DecoderConfig
from jaxsp.models.output_head import OutputHead
from jaxsp.models.sharding import along, row_axes, row_parts
from jaxsp.prompts import PROMPT_KINDS, with_defaults
from jaxsp.prompts.initializers import Source, Start
from jaxsp.settings import Settings
from jaxsp.teacher.signals import SIGNALS, Wanted
from jaxsp.training.drivers import cut_axis, sharded_update
from jaxsp.training.optimizers import make_optimizer
from jaxsp.training.state import TrainState, initial_state
from jaxsp.training.update import Frozen, UpdateSettings
from jaxsp.typing import Array, KeyValues, PyTree

PREAMBLE_TOKENS = 32
"""Tokens of a chat's text before the context, about."""


def compiled(
    config: DecoderConfig,
    settings: Settings,
    packing: Packing,
    mesh: Mesh | None,
    prompts: int = 1,
    teacher_head: OutputHead | None = None,
) -> jax.stages.Compiled:
    """``traced``, compiled: for the device that programs are for, or those of the mesh."""
    return traced(config, settings, packing, mesh, prompts, teacher_head).lower().compile()


def traced(
    config: DecoderConfig,
    settings: Settings,
    packing: Packing,
    mesh: Mesh | None,
    prompts: int = 1,
    teacher_head: OutputHead | None = None,
) -> jax.stages.Traced:
    """The update of so many prompts with batches of this shape, as a driver runs it, from shapes alone."""
    chosen = UpdateSettings.of(config, settings)
    preamble = prefix_shapes(config, PREAMBLE_TOKENS)
    params = decoder.parameter_shapes(config)
    teacher_head = jax.eval_shape(lambda: teacher_head)
    states, batches = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((prompts, *leaf.shape), leaf.dtype),
        (state_shapes(config, settings), batch_shapes(config, packing, chosen.objective, teacher_head)),
    )
    cut = 0
    if mesh is not None:
        cut = cut_axis(prompts, row_parts(mesh))

        def lie(axis: int | None, tree: PyTree) -> PyTree:
            where = NamedSharding(mesh, along(row_axes(mesh), axis))
            return jax.tree.map(lambda leaf: leaf.update(sharding=where), tree)

        layout = sharding.layout(params, config, mesh)
        params = jax.tree.map(lambda leaf, where: leaf.update(sharding=where), params, layout)
        layout = sharding.head_layout(teacher_head, mesh)
        teacher_head = jax.tree.map(lambda leaf, where: leaf.update(sharding=where), teacher_head, layout)
        preamble, batches = lie(None, preamble), lie(cut, batches)
        states = lie(None if cut else 0, states)
    frozen = Frozen(params, preamble, teacher_head)
    return sharded_update.trace(states, batches, frozen=frozen, settings=chosen, mesh=mesh, cut=cut)


def prefix_shapes(config: DecoderConfig, slots: int) -> KeyValues:
    """The shapes of a prefix of so many slots."""
    return jax.eval_shape(lambda: decoder.empty_prefix(config, slots))


def state_shapes(config: DecoderConfig, settings: Settings) -> TrainState:
    """The shapes of the state of one prompt."""
    optimizer = make_optimizer(with_defaults(settings).training)

    def start() -> TrainState:  # of any start: its shapes are the same
        kind, count = PROMPT_KINDS[settings.prompt.kind], settings.prompt.prompt_length

        def nothing(*_: Any) -> KeyValues:
            return decoder.empty_prefix(config, count)

        def zeros(ids: Any) -> Array:
            return jnp.zeros((len(ids), config.width))

        ids, key = np.zeros(count, np.int32), jax.random.key(0)
        source = Source(
            key,
            ids,
            count,
            (config.layers, config.kv_heads),
            zeros,
            config.vocab_size,
            read=nothing,
            context=nothing,
            written=lambda _: ids,
        )
        sigma = kind.initial(Start("first", source, settings.prompt.rank))
        rates = kind.rates(sigma, {})
        return initial_state(sigma, optimizer, key=jax.random.key(0), rates=rates)

    return jax.eval_shape(start)


def batch_shapes(
    config: DecoderConfig, packing: Packing, objective: Objective, teacher_head: OutputHead | None = None
) -> Rows:
    """The shapes of a packed batch with what the objective needs of the teacher."""
    shape = packing.rows, packing.length
    of: Any = jax.ShapeDtypeStruct  # stands for an array
    ids, live = of(shape, jnp.int32), of(shape, jnp.bool_)
    width, dtype = config.width, config.dtype
    if teacher_head is not None:
        width, dtype = teacher_head.unembedding.shape[1], teacher_head.unembedding.dtype
    rows = Rows(ids, ids, ids, live, {"tokens": ids}, ids)
    tokens = config.vocab_size if teacher_head is None else teacher_head.unembedding.shape[0]
    wanted = Wanted.by(objective, tokens)
    if wanted.train == "hidden":
        return rows.with_targets(hidden=of((*shape, width), dtype))
    say = functools.partial(SIGNALS[wanted.train].at_positions, **dict(wanted.options))
    given = decoder.parameter_shapes(config), prefix_shapes(config, 0), rows
    said = jax.eval_shape(lambda params, prefix, rows: say(params, config, prefix, rows), *given)
    return rows.with_targets(**{wanted.train: said})
