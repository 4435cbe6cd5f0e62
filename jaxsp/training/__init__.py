"""Training σ: the pure update of M prompts, its drivers, checkpoints and the loop.

A training loop of your own. The teacher reads the context, answers the queries, and gives its last hidden
states at the answers (``jaxsp.distributions``):

>>> import jax, jaxsp, numpy as np, optax
>>> from jaxsp import distributions as d
>>> from jaxsp.models.generation import Sampling, generate
>>> from jaxsp.training import Frozen, JitDriver, UpdateSettings, initial_state, stack
>>> model = jaxsp.load_model("smollm2-135m-instruct")
>>> params, config = model.params, model.config
>>> context_ids = model.encode_context("The tank of the machine holds 1.2 litres.")
>>> queries = [model.encode_query(z) for z in ("How much does the tank hold?", "What holds it?")]
>>> preamble = d.context_prefix(params, config, model.preamble_ids[None])
>>> context = d.context_prefix(params, config, context_ids[None], preamble)
>>> sampling = Sampling(stop_ids=model.stop_ids, max_tokens=8)
>>> rows = jaxsp.make_rows(queries, generate(params, config, context, queries, sampling))  # z and ŷ
>>> rows = rows.with_targets(hidden=np.asarray(d.answer_hidden(params, config, context, rows)))

The student reads σ in place of the context; ``PmapDriver`` and ``MeshDriver`` do the same on many devices:

>>> optimizer, key = optax.adam(0.01), jax.random.key(0)
>>> settings = UpdateSettings(config, "per_head", jaxsp.losses.OBJECTIVES["kl"], optimizer)
>>> driver = JitDriver(Frozen(params, preamble), settings)
>>> sigma = d.initial_prompt(params, config, context_ids, preamble, key=key, prompt_length=4, rows=rows)
>>> states = driver.place(stack([initial_state(sigma, optimizer, key=key)]))  # M = 1 prompt
>>> batch = jax.tree.map(lambda leaf: leaf[None], rows)
>>> losses = []
>>> for step in range(4):
...     states, metrics = driver.step(states, batch)
...     losses.append(float(metrics["loss"][0]))
>>> losses[-1] < losses[0]
True
"""

from __future__ import annotations

from jaxsp.training.drivers import (
    DRIVERS as DRIVERS,
    JitDriver as JitDriver,
    MeshDriver as MeshDriver,
    PmapDriver as PmapDriver,
)
from jaxsp.training.state import (
    TrainState as TrainState,
    initial_state as initial_state,
    stack as stack,
    unstack as unstack,
)
from jaxsp.training.update import Frozen as Frozen, UpdateSettings as UpdateSettings, update as update
