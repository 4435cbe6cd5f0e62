"""A student distilled from its teacher online, from stored hidden states, and from stored best tokens."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.offline_distillation import pairs
from experiments.offline_distillation.pairs import Pair, Pieces
from experiments.offline_distillation.recipe import Model, read, say_hidden, say_topk, store, train_step
from experiments.suite import Experiment, KeptRows, Results, Run, markdown
from jaxsp import losses
from jaxsp.typing import Array, PyTree

MIB = 2**20
K = 20
"""Tokens of a position that are stored: as many as most interfaces of servers give."""
ONLINE = "online"


class Signal(NamedTuple):
    """The way in which a student hears of its teacher: the objective, and the names of what is stored."""

    objective: str
    stored: tuple[str, ...] = ()


_BEST = ("teacher_log_probs", "teacher_ids")
SIGNALS = {
    ONLINE: Signal("kl"),
    "stored hidden states": Signal("kl", ("teacher_hidden",)),
    f"stored top {K}, with tail": Signal("topk_kl", (*_BEST, "teacher_tail")),
    f"stored top {K}, renormalised": Signal("renormalised_topk_kl", _BEST),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Rows of a batch, tokens of a row, updates, seeds of the rows' order, and the peak learning rate."""

    rows: int
    length: int
    steps: int
    seeds: tuple[int, ...]
    learning_rate: float


FULL = Sizes(rows=2, length=128, steps=20, seeds=(0, 1), learning_rate=5e-4)
SMALL = Sizes(rows=2, length=16, steps=3, seeds=(0, 1), learning_rate=1e-2)
MOST = 12
"""Rows of training and of held-out texts in a small run."""


def measure(_: str, run: Run) -> dict[str, Any]:
    """A row for each seed and signal; a full run that was stopped goes on with the seed that it was at."""
    sizes, most = (FULL, None) if run.full else (SMALL, MOST)
    kept = KeptRows("offline_distillation", "default", run)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pair = pairs.smollm2() if run.full else pairs.random_llamas(folder)
        train, held_out = (Pieces(pair.model, texts, sizes.length, most) for texts in pairs.texts())
        try:
            _measure_seeds(pair, train, held_out, sizes, folder, kept)
        except KeyboardInterrupt:
            if not kept.rows:
                raise
    return {
        "pair": pair.name, "dtype": pair.model.config.dtype, "k": K, **dataclasses.asdict(sizes),
        "parameters": {
            "teacher": _count(pair.teacher_weights), "student": _count(pair.student_weights),
        },
        "train_tokens": int(train.mask.sum()), "held_out_tokens": int(held_out.mask.sum()),
        "logits_bytes_a_token": pair.vocabulary * jnp.dtype(pair.model.config.dtype).itemsize,
        "rows": list(_rows(kept).values()),
    }  # fmt: skip


def _rows(kept: KeptRows) -> dict[tuple[int, str], dict[str, Any]]:
    """The rows by seed and signal, the newest of each: one may be committed and kept, too."""
    return {(row["seed"], row["signal"]): row for row in kept.rows}


def _measure_seeds(
    pair: Pair, train: Pieces, held_out: Pieces, sizes: Sizes, folder: Path, kept: KeptRows
) -> None:
    there = _rows(kept)
    left = [seed for seed in sizes.seeds if not all((seed, signal) in there for signal in SIGNALS)]
    if not left:
        return
    seconds, on_disk = fill(pair, train, sizes, folder)
    bench = Bench(pair, train, held_out, sizes, folder)
    for seed in left:
        for row in bench.run(seed):
            signal = row["signal"]
            stored = {"bytes_a_token": on_disk.get(signal, 0) / train.ids.size}
            kept.add({**row, **stored, "store_seconds": seconds.get(signal)})


def _count(weights: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(weights))


def file_of(folder: Path, signal: str) -> Path:
    return folder / f"{list(SIGNALS).index(signal)}.safetensors"


def fill(pair: Pair, pieces: Pieces, sizes: Sizes, folder: Path) -> tuple[dict[str, float], dict[str, int]]:
    """Stores each signal of all rows; gives the seconds that it took, and the bytes on the disk.

    The best tokens come from the hidden states: the teacher reads the texts once, and that counts for both.
    """
    head, count = pair.teacher.head(pair.teacher_weights), len(pieces.ids)
    say = jax.jit(functools.partial(say_hidden, pair.teacher))
    best = jax.jit(functools.partial(say_topk, k=K))
    batches = _batches(pieces.ids, sizes.rows)
    first = say(pair.teacher_weights, batches[0])["teacher_hidden"]
    jax.block_until_ready(best(first, head))  # both compile
    started = time.perf_counter()
    said = jax.block_until_ready([say(pair.teacher_weights, ids) for ids in batches])
    reading = time.perf_counter() - started
    chosen = jax.block_until_ready([best(one["teacher_hidden"], head) for one in said])
    choosing = time.perf_counter() - started
    seconds, on_disk = {}, {}
    for name, signal in SIGNALS.items():
        if not signal.stored:
            continue
        found, before = (said, reading) if "teacher_hidden" in signal.stored else (chosen, choosing)
        started = time.perf_counter()
        whole = {n: jnp.concatenate([one[n] for one in found])[:count] for n in signal.stored}
        store(whole, pair.vocabulary, file_of(folder, name))
        seconds[name] = before + time.perf_counter() - started
        on_disk[name] = file_of(folder, name).stat().st_size
    return seconds, on_disk


def _batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """The rows in batches of one size; the last is filled with zeros."""
    filled = np.pad(rows, ((0, -len(rows) % size), (0, 0)))
    return list(filled.reshape(-1, size, rows.shape[1]))


class Bench:
    """All signals' students, trained side by side from one start on the same batches."""

    def __init__(self, pair: Pair, train: Pieces, held_out: Pieces, sizes: Sizes, folder: Path) -> None:
        self._pair, self._train, self._sizes, self._folder = pair, train, sizes, folder
        peak = sizes.learning_rate
        rate = optax.warmup_cosine_decay_schedule(peak / 4, peak, sizes.steps // 5, sizes.steps)
        self._optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
        self._start = jax.jit(lambda x: (jax.tree.map(jnp.copy, x), self._optimizer.init(x)))  # steps donate
        self._head = jax.jit(pair.teacher.head)(pair.teacher_weights)
        self._steps = {name: self._compiled(name) for name in SIGNALS}
        self._measure = jax.jit(functools.partial(held_out_kl, pair.student))
        say = jax.jit(functools.partial(say_hidden, pair.teacher))
        pieces = zip(*(_batches(x, sizes.rows) for x in (held_out.ids, held_out.mask)), strict=True)
        self._held_out = [(ids, mask, say(pair.teacher_weights, ids)) for ids, mask in pieces]
        self._initial = self._measured(pair.student_weights)

    def run(self, seed: int) -> list[dict[str, Any]]:
        """A row for each signal."""
        states = {name: self._start(self._pair.student_weights) for name in SIGNALS}
        rows = {name: {"seed": seed, "signal": name, "losses": [], "seconds": []} for name in SIGNALS}
        for number, index in enumerate(self._order(seed)):
            for name, row in rows.items():  # in turns, so that what else the machine does falls on all
                started = time.perf_counter()
                states[name], loss = self._steps[name](
                    states[name], self._batch(name, index), self._of_teacher(name)
                )
                row["losses"].append(round(float(loss), 6))
                row["seconds"].append(time.perf_counter() - started)
            summary = ", ".join(f"{row['losses'][-1]:.4f}" for row in rows.values())
            print(f"seed {seed}, step {number + 1}: {summary}", flush=True)
        for name, row in rows.items():
            kl, zero_one = self._measured(states[name][0])
            taken = row.pop("seconds")
            row |= {
                "initial_kl": self._initial[0], "held_out_kl": kl,
                "initial_zero_one": self._initial[1], "held_out_zero_one": zero_one,
                "step_seconds": statistics.median(taken), "step_mib": memory(self._steps[name]) / MIB,
                "loss_difference": max(
                    abs(a - b) for a, b in zip(row["losses"], rows[ONLINE]["losses"], strict=True)
                ),
            }  # fmt: skip
        return list(rows.values())

    def _order(self, seed: int) -> np.ndarray:
        """Numbers of the rows of each batch: all rows in a new order, again and again."""
        random, count = np.random.default_rng(seed), self._sizes.steps * self._sizes.rows
        rounds = -(-count // len(self._train.ids))
        order = np.concatenate([random.permutation(len(self._train.ids)) for _ in range(rounds)])
        return order[:count].reshape(self._sizes.steps, -1)

    def _batch(self, name: str, index: np.ndarray) -> dict[str, Any]:
        batch: dict[str, Any] = {"ids": self._train.ids[index], "mask": self._train.mask[index]}
        if SIGNALS[name].stored:
            batch["teacher"] = read(file_of(self._folder, name), index.tolist())
        return batch

    def _of_teacher(self, name: str) -> PyTree:
        """The part of the teacher that a step needs: all of it, its head, or nothing."""
        if name == ONLINE:
            return self._pair.teacher_weights
        return self._head if "teacher_hidden" in SIGNALS[name].stored else None

    def _compiled(self, name: str) -> Any:
        step = functools.partial(stored_step, self._pair, self._optimizer, SIGNALS[name].objective)
        if name == ONLINE:
            step = functools.partial(online_step, self._pair, self._optimizer)
        state = jax.eval_shape(self._start, self._pair.student_weights)
        given = state, self._batch(name, np.arange(self._sizes.rows)), self._of_teacher(name)
        lowered = jax.jit(step, donate_argnums=0).lower(*given)
        return lowered.compile()

    def _measured(self, weights: PyTree) -> tuple[float, ...]:
        """Exact KL from the teacher on the held-out rows, and the share of other first tokens."""
        found = [self._measure(weights, *batch, self._head) for batch in self._held_out]
        return tuple(float(losses.masked_mean(losses.merge(*totals))) for totals in zip(*found, strict=True))


def online_step(
    pair: Pair, optimizer: Any, state: Any, batch: dict[str, Any], weights: PyTree
) -> tuple[Any, Array]:
    """The recipe's step, the teacher being read in it."""
    said = say_hidden(pair.teacher, weights, batch["ids"])
    head = pair.teacher.head(weights)
    return train_step(pair.student, optimizer, "kl", state, {**batch, "teacher": said}, head)


def stored_step(
    pair: Pair, optimizer: Any, objective: str, state: Any, batch: dict[str, Any], head: Array | None
) -> tuple[Any, Array]:
    return train_step(pair.student, optimizer, objective, state, batch, head)


def held_out_kl(
    student: Model, weights: PyTree, ids: Array, mask: Array, said: dict[str, Any], head: Array
) -> tuple[losses.Total, losses.Total]:
    values, measured = losses.fused_objective(
        "kl", student.hidden(weights, ids), student.head(weights), mask,
        metrics=("zero_one",), teacher_unembedding=head, **said,
    )  # fmt: skip
    return losses.masked_sum(values, mask), losses.masked_sum(measured["zero_one"], mask)


def memory(program: Any) -> int:
    """Bytes of a compiled step: what goes in and stays, and its temporary arrays."""
    found = program.memory_analysis()
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + found.temp_size_in_bytes + results


def table(results: Results) -> str:
    if not results:
        return "None yet."
    found = results["default"]
    head = ["signal", "bytes a token", "to store (s)", "a step (s)", "memory of a step", "held-out KL",
            "other first token", "loss: furthest from online"]  # fmt: skip
    start = next(iter(found["rows"]))
    lines = [["student at its start", *["–"] * 4, f"{start['initial_kl']:.3f}",
              f"{start['initial_zero_one']:.3f}", "–"]]  # fmt: skip
    for name, rows in by_signal(found["rows"]).items():
        first = rows[0]
        lines.append([
            name, f"{first['bytes_a_token']:,.0f}" if first["bytes_a_token"] else "–",
            f"{first['store_seconds']:.0f}" if first["store_seconds"] else "–",
            f"{statistics.median(row['step_seconds'] for row in rows):.2f}",
            f"{first['step_mib']:,.0f} MiB", seeds(row["held_out_kl"] for row in rows),
            seeds(row["held_out_zero_one"] for row in rows),
            f"{max(row['loss_difference'] for row in rows):.2g}" if SIGNALS[name].objective == "kl" else "–",
        ])  # fmt: skip
    return markdown(head, lines)


def seeds(values: Any) -> str:
    """The mean over seeds, and the values where there are several."""
    values = list(values)
    each = f" ({', '.join(f'{value:.3f}' for value in values)})" if values[1:] else ""
    return f"{statistics.mean(values):.3f}{each}"


def by_signal(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [row for row in rows if row["signal"] == name] for name in SIGNALS}


def result(results: Results) -> str:
    found = results["default"]
    parts = []
    for name, rows in by_signal(found["rows"]).items():
        kl = statistics.mean(row["held_out_kl"] for row in rows)
        on_disk = f" in {rows[0]['bytes_a_token']:,.0f} bytes a token" * bool(rows[0]["bytes_a_token"])
        parts.append(f"{name} {kl:.3f}{on_disk}")
    return f"held-out KL after {found['steps']} steps: {', '.join(parts)}"


EXPERIMENT = Experiment(
    question="A student distilled from what its teacher's last hidden states were, stored on disk: is that"
    " the same training as with the teacher online, and what do stored top-k tokens save and lose beside it?",
    cost="6 minutes on two cores, under 6 GiB",
    run=measure,
    table=table,
    result=result,
)
