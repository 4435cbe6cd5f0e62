"""The layout of batches and weights on a mesh of devices: one table.

Batches, or whole prompts, go over the axis ``data``; the layers' matrices and the vocabulary over ``model``.
XLA splits the products and adds the sums between devices where the table makes them partial.

Reference: Shoeybi et al. 2019, Megatron-LM (arXiv:1909.08053).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxsp import device
from jaxsp.models.config import DecoderConfig
from jaxsp.typing import Params, PyTree, UserError

DATA, MODEL = "data", "model"

OUTPUTS, INPUTS = -1, -2
SPLIT = {
    r"(embed_tokens|lm_head)/embedding": INPUTS,  # rows: a part of the vocabulary
    r"([qkv]|gate|up)_proj/(kernel|bias|scale)": OUTPUTS,  # whole heads, a part of the MLP
    r"(o|down)_proj/kernel": INPUTS,  # of these; a sum over devices follows
}
"""Which axis of a parameter goes over ``model``, by the end of its path; all others are on every device."""


def as_mesh(mesh: Mesh | str) -> Mesh:
    """The mesh that ``data=2,model=4`` asks for; of an empty text, all devices over ``data``.

    Raises:
      UserError: it can't be read, or the devices can't be laid out so.

    Example:
      >>> dict(as_mesh("data=1").shape)
      {'data': 1, 'model': 1}
    """
    if isinstance(mesh, Mesh):
        if set(mesh.axis_names) != {DATA, MODEL}:
            raise UserError(f"A mesh must have the axes {DATA} and {MODEL}, not {mesh.axis_names}.")
        return mesh
    devices = len(device.every())
    sizes = {DATA: 1 if mesh else devices, MODEL: 1}
    for part in filter(None, mesh.split(",")):
        name, _, size = part.partition("=")
        if name not in sizes or not re.fullmatch(r"[1-9]\d{0,5}", size):
            raise UserError(f"--mesh must be like data=2,model=4, axes {DATA} and {MODEL}; got {mesh!r}.")
        sizes[name] = int(size)
    wanted = math.prod(sizes.values())
    if devices % wanted:
        layout = " × ".join(f"{name}={size}" for name, size in sizes.items())
        raise UserError(
            f"The mesh {layout} takes {wanted} devices, which doesn't divide the {devices} there are;"
            " choose sizes whose product does."
        )
    processes = device.processes()
    if processes == 1:
        shape, names = tuple(sizes.values()), tuple(sizes)
        auto, some = (AxisType.Auto,) * 2, device.every()[:wanted]
        return jax.make_mesh(shape, names, axis_types=auto, devices=some)
    if wanted < devices or sizes[DATA] % processes:
        most = math.gcd(sizes[MODEL], devices // processes)
        raise UserError(
            f"The mesh must take all {devices} devices of the {processes} processes, and {MODEL} those of one"
            f" process at most; {mesh or 'this'} doesn't, {DATA}={devices // most},{MODEL}={most} does."
        )
    every = sorted(device.every(), key=lambda one: (one.process_index, one.id))
    return Mesh(np.reshape(np.array(every), tuple(sizes.values())), (DATA, MODEL))


def local(mesh: Mesh) -> Mesh:
    """The part of a mesh that this process has."""
    own = [row for row in mesh.devices if row[0].process_index == jax.process_index()]
    return mesh if len(own) == len(mesh.devices) else Mesh(np.array(own), mesh.axis_names)


def check(config: DecoderConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raises ``UserError`` if the model can't be cut in so many parts."""
    parts = mesh.shape[MODEL]
    counts = {"heads": config.heads, "key/value heads": config.kv_heads, "MLP units": config.mlp_width}
    for name, count in counts.items():
        if count % parts:
            fitting = math.gcd(*counts.values())
            fits = ", ".join(str(n) for n in range(1, fitting + 1) if fitting % n == 0)
            raise UserError(
                f"--mesh {MODEL}={parts} doesn't divide the model's {count} {name}; choose one of {fits}."
            )


def shardings(
    config: DecoderConfig, mesh: Mesh | AbstractMesh
) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """For ``load_model``: where the parameter with this path and shape goes.

    Raises:
      UserError: as ``check``.
    """
    check(config, mesh)
    return functools.partial(_sharding, mesh)


def _sharding(mesh: Mesh | AbstractMesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    spec: list[str | None] = [None] * len(shape)
    for pattern, axis in SPLIT.items():
        # A vocabulary that doesn't divide stays whole.
        if re.search(f"{pattern}$", path) and shape[axis] % mesh.shape[MODEL] == 0:
            spec[axis] = MODEL
    return NamedSharding(mesh, PartitionSpec(*spec))


def head_layout(head: PyTree, mesh: Mesh) -> PyTree:
    """The place of another model's output head, or of its shapes: over ``model`` as the model's own."""
    return jax.tree.map(lambda leaf: _sharding(mesh, "lm_head/embedding", leaf.shape), head)


def layout(params: Params, config: DecoderConfig, mesh: Mesh | AbstractMesh) -> PyTree:
    """Where each of the weights, or of their shapes, goes: a tree of shardings."""
    of = shardings(config, mesh)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: of(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape), params
    )


def place(params: Params, config: DecoderConfig, mesh: Mesh) -> Params:
    """The weights on the mesh; those that lie there already stay."""
    return jax.device_put(params, layout(params, config, mesh))


def joined(tree: PyTree, mesh: Mesh) -> PyTree:
    """Arrays on ``local(mesh)``, of which every process has the same, as arrays on the whole mesh."""

    def join(leaf: jax.Array) -> jax.Array:
        assert isinstance(leaf.sharding, NamedSharding)
        sharding = NamedSharding(mesh, leaf.sharding.spec)
        shards = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)

    return tree if local(mesh) is mesh else jax.tree.map(join, tree)


def put(tree: PyTree, mesh: Mesh, spec: PartitionSpec) -> PyTree:
    """Host arrays, of which every process has the same, on the mesh; each takes only its share."""
    sharding = NamedSharding(mesh, spec)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def one(leaf: jax.Array | np.ndarray) -> jax.Array:
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(one, tree)


def over_data(
    function: Callable[..., Any], mesh: Mesh | None, axes: tuple[int | None, ...], *, out: int | None
) -> Callable[..., Any]:
    """``function`` run by each part of ``data`` on its own share; over ``model`` XLA splits the work.

    Args:
      function: function of arrays, or trees of them.
      mesh: the devices; without one ``function`` itself is given back.
      axes: for each argument the axis that is cut, or ``None`` if it is whole everywhere.
      out: likewise of the results; whole ones must be the same everywhere.
    """
    if mesh is None:
        return function
    *inputs, outputs = (along(DATA, axis) for axis in (*axes, out))
    return jax.shard_map(
        function, mesh=mesh, in_specs=tuple(inputs), out_specs=outputs, axis_names={DATA}, check_vma=False
    )


def along(name: str, axis: int | None) -> PartitionSpec:
    """The layout that cuts one axis of an array over the mesh's axis of this name; ``None``: whole."""
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, name)
