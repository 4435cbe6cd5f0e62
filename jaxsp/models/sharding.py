"""The layout of batches and weights on a mesh of devices: one table.

Batches, or whole prompts, go over the axes ``data`` and ``fsdp``; the layers' matrices and the vocabulary
over ``model``. XLA splits the products and adds the sums between devices where the table makes them partial.
Over ``fsdp`` the matrices are stored in parts, cut along the width: devices put a layer together when they
read it, and forget it again.

References: Shoeybi et al. 2019, Megatron-LM (arXiv:1909.08053), for ``model``; Rajbhandari et al. 2020, ZeRO
(arXiv:1910.02054), for ``fsdp``.
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
from jaxsp.typing import Array, Params, PyTree, UserError

DATA, FSDP, MODEL = "data", "fsdp", "model"

OUTPUTS, INPUTS = -1, -2
SPLIT = {
    r"(embed_tokens|lm_head)/embedding|unembedding": (
        INPUTS,
        OUTPUTS,
    ),  # a part of the vocabulary; of the width
    r"([qkv]|gate|up)_proj/kernel": (OUTPUTS, INPUTS),  # whole heads, a part of the MLP
    r"([qkv]|gate|up)_proj/(bias|scale)": (OUTPUTS, None),
    r"(o|down)_proj/kernel": (INPUTS, OUTPUTS),  # of these; a sum over devices follows
}
"""Which axis of a parameter goes over ``model``, and which, the width, over ``fsdp``, by the end of its path;
all others are on every device."""

_ENDS = next(iter(SPLIT))  # the vocabulary's matrices: not of a layer


def as_mesh(mesh: Mesh | str) -> Mesh:
    """The mesh that ``data=2,model=4`` asks for; of an empty text, all devices over ``data``.

    Raises:
      UserError: it can't be read, or the devices can't be laid out so.

    Example:
      >>> dict(as_mesh("data=1").shape)
      {'data': 1, 'model': 1}
    """
    if isinstance(mesh, Mesh):
        if {*mesh.axis_names} - {FSDP} != {DATA, MODEL}:
            axes = f"{DATA} and {MODEL}, and it may have {FSDP}"
            raise UserError(f"A mesh must have the axes {axes}; it has {', '.join(mesh.axis_names)}.")
        return mesh
    devices = len(device.every())
    sizes = {DATA: 1 if mesh else devices, FSDP: 1, MODEL: 1}
    for part in filter(None, mesh.split(",")):
        name, _, size = part.partition("=")
        if name not in sizes or not re.fullmatch(r"[1-9]\d{0,5}", size):
            raise UserError(
                f"--mesh must be like data=2,model=4, axes {DATA}, {MODEL} and {FSDP}; got {mesh!r}."
            )
        sizes[name] = int(size)
    if sizes[FSDP] == 1:
        del sizes[FSDP]
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
        auto, some = (AxisType.Auto,) * len(sizes), device.every()[:wanted]
        return jax.make_mesh(shape, names, axis_types=auto, devices=some)
    if wanted < devices or sizes[DATA] % processes:
        most = math.gcd(sizes[MODEL], devices // processes)
        raise UserError(
            f"The mesh must take all {devices} devices of the {processes} processes, and {MODEL} those of one"
            f" process at most; {mesh or 'this'} doesn't, {DATA}={devices // most},{MODEL}={most} does."
        )
    every = sorted(device.every(), key=lambda one: (one.process_index, one.id))
    return Mesh(np.reshape(np.array(every), tuple(sizes.values())), tuple(sizes))


def row_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes of a mesh over which rows, or prompts, go."""
    return tuple(name for name in (DATA, FSDP) if name in mesh.shape)


def row_parts(mesh: Mesh | AbstractMesh) -> int:
    """The parts that the rows of a batch, or the prompts, are cut in."""
    return math.prod(mesh.shape[name] for name in row_axes(mesh))


def local(mesh: Mesh) -> Mesh:
    """The part of a mesh that this process has."""
    own = [row for row in mesh.devices if row.flat[0].process_index == jax.process_index()]
    return mesh if len(own) == len(mesh.devices) else Mesh(np.array(own), mesh.axis_names)


def check(config: DecoderConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raises ``UserError`` if the model can't be cut in so many parts."""
    if config.width % (parts := mesh.shape.get(FSDP, 1)):
        raise UserError(f"--mesh {FSDP}={parts} doesn't divide the model's width of {config.width}.")
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
    for name, axis in zip((MODEL, FSDP), _axes(path), strict=True):
        # A vocabulary that doesn't divide stays whole.
        if axis is not None and name in mesh.shape and shape[axis] % mesh.shape[name] == 0:
            spec[axis] = name
    return NamedSharding(mesh, PartitionSpec(*spec))


def _axes(path: str) -> tuple[int | None, int | None]:
    """The axes of a parameter that go over ``model`` and ``fsdp``."""
    return next((axes for pattern, axes in SPLIT.items() if re.search(f"({pattern})$", path)), (None, None))


def _by_path(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    def of(path: Any, leaf: Any) -> Any:
        return function(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)

    return jax.tree_util.tree_map_with_path(of, tree)


def head_layout(head: PyTree, mesh: Mesh) -> PyTree:
    """The place of another model's output head, or of its shapes: as the model's own."""
    return _by_path(lambda path, leaf: _sharding(mesh, path, leaf.shape), head)


def layout(params: Params, config: DecoderConfig, mesh: Mesh | AbstractMesh) -> PyTree:
    """Where each of the weights, or of their shapes, goes: a tree of shardings."""
    of = shardings(config, mesh)
    return _by_path(lambda path, leaf: of(path, leaf.shape), params)


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
    """``function`` run by each part of the rows on its own share; over ``model`` XLA splits the work.

    Args:
      function: function of arrays, or trees of them.
      mesh: the devices; without one ``function`` itself is given back.
      axes: for each argument the axis that is cut, or ``None`` if it is whole everywhere. Weights in it that
        are stored in parts are put together: the vocabulary's at once, a layer's by the layer.
      out: likewise of the results; whole ones must be the same everywhere.
    """
    if mesh is None:
        return function
    names = row_axes(mesh)
    *inputs, outputs = (along(names, axis) for axis in (*axes, out))
    options: dict[str, Any] = {"mesh": mesh, "axis_names": {*names}, "out_specs": outputs, "check_vma": False}
    if FSDP not in names:
        return jax.shard_map(function, in_specs=tuple(inputs), **options)

    def cut(path: str, leaf: Any) -> PartitionSpec:
        axis = _axes(path)[1]
        return PartitionSpec() if axis is None else along(FSDP, leaf.ndim + axis)

    def with_ends(*arguments: Any) -> Any:
        return function(*(_by_path(lambda path, x: _gathered(_ENDS, path, x), tree) for tree in arguments))

    def over_parts(*arguments: Any) -> Any:
        each = zip(arguments, axes, inputs, strict=True)
        specs = tuple(_by_path(cut, tree) if axis is None else spec for tree, axis, spec in each)
        return jax.shard_map(with_ends, in_specs=specs, **options)(*arguments)

    return over_parts


def weights_are_cut() -> bool:
    """Whether the program that is traced has its layers' weights in parts, over ``fsdp``."""
    return FSDP in jax.sharding.get_abstract_mesh().manual_axes


def whole(weights: PyTree) -> PyTree:
    """A layer's weights put together from all parts."""
    return _by_path(lambda path, leaf: _gathered("kernel", path, leaf), weights)


def _gathered(pattern: str, path: str, leaf: Array) -> Array:
    """A parameter from all parts of ``fsdp``, if its path ends like the pattern; else as it is."""
    over_model, axis = _axes(path)
    if axis is None or over_model is None or not re.search(f"({pattern})$", path):
        return leaf
    gather = functools.partial(jax.lax.all_gather, axis_name=FSDP, axis=leaf.ndim + axis, tiled=True)
    divides = leaf.shape[over_model] % jax.sharding.get_abstract_mesh().shape[MODEL] == 0
    own = along(MODEL, leaf.ndim + over_model if divides else None)
    # By hand over ``model``, too: XLA would gather what is cut there as well.
    return jax.shard_map(gather, in_specs=own, out_specs=own, axis_names={MODEL}, check_vma=False)(leaf)


def along(names: str | tuple[str, ...], axis: int | None) -> PartitionSpec:
    """The layout that cuts one axis of an array over axes of the mesh; ``None``: whole."""
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, names)
