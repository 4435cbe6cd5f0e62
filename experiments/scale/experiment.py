"""The work of a v5e-256: arithmetic, held against the compiled programs of eight fake devices."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections import defaultdict
from typing import Any

import jax

from experiments.scale import host
from experiments.scale.arithmetic import (
    ANSWER,
    CHIPS,
    CONTEXT,
    HBM,
    HELD_OUT,
    HOST,
    MODELS,
    PACKING,
    PREAMBLE_TOKENS,
    QUERIES,
    QUERY,
    ROW,
    SETTINGS,
    Exchange,
    expected,
    head_chunks,
    rates,
    spread_seconds,
    step_seconds,
    works,
)
from experiments.suite import Experiment, Results, Run, markdown
from jaxsp import plan
from jaxsp.models import decoder
from jaxsp.models.config import DecoderConfig
from jaxsp.models.sharding import DATA, as_mesh
from jaxsp.plan import UTILISATION
from jaxsp.runs.runner import ACCELERATOR_STEP_TOKENS

LAYOUTS = {
    "SmolLM2-135M": [("data=1", 0), ("data=2", 0), ("data=4", 0), ("data=8", 0), ("data=8", 8)],
    "Llama-3.2-1B": [("data=1", 0), ("data=8", 0), ("data=8", 8), ("model=4", 0)],
    "Llama-3.1-8B": [
        ("model=1", 0), ("model=2", 0), ("model=4", 0), ("model=8", 0), ("data=2,model=4", 0),
        ("data=2,model=4", 4),
    ],
}  # fmt: skip
"""The programs compiled: a mesh, and how many prompts side by side (0: one, its rows over ``data``)."""


def exchanged(text: str, loops: int) -> Exchange:
    """Counts the all-reduces of a compiled program, those in a loop as often as it runs.

    Args:
      text: of the program.
      loops: how often a loop runs of which XLA does not know it: the head's, over chunks of answers.
    """
    bodies: dict[str, list[str]] = {}
    body: list[str] = []
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            body = bodies.setdefault("ENTRY" if line.startswith("ENTRY") else start[1], [])
        elif line.startswith(" "):
            body.append(line)

    @functools.cache
    def count(name: str) -> tuple[int, int]:
        messages = size = 0
        for line in bodies[name]:
            if found := re.search(r"= (.*?) all-reduce(?:-start)?\(", line):
                messages += 1
                size += _bytes(found[1], halved="_promoted" in line)
            elif re.search(r" (all-gather|all-to-all|collective-permute|reduce-scatter)", line):
                raise ValueError(f"Something other than an all-reduce: {line.strip()[:120]}")
            known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            times = int(known[1]) if known else loops if " while(" in line else 1
            for called in re.findall(r"(?:body|calls|to_apply)=%?([\w.-]+)", line):
                inner = count(called)
                messages, size = messages + times * inner[0], size + times * inner[1]
        return messages, size

    return Exchange(*count("ENTRY"))


def _bytes(shapes: str, *, halved: bool) -> int:
    # The CPU adds up bfloat16 as float32, and says so in the name of the sum; a TPU has no need to.
    sizes = {"f32": 2 if halved else 4, "bf16": 2, "s32": 4}
    found = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    return sum(sizes[kind] * math.prod(map(int, filter(None, of.split(",")))) for kind, of in found)


def checked(name: str, layout: str, prompts: int) -> dict[str, Any]:
    """A layout's arithmetic and its compiled program, side by side."""
    config, mesh = MODELS[name], as_mesh(layout)
    packing = PACKING if prompts else PACKING.over(mesh.shape[DATA], ROW)
    answers = SETTINGS.training.batch_size * ANSWER
    share = max(prompts, 1) / mesh.shape[DATA]
    tokens = int(packing.rows * packing.length * share)
    program = plan.compiled(config, SETTINGS, packing, mesh, max(prompts, 1))
    memory: Any = program.memory_analysis()
    cost: Any = program.cost_analysis()
    text = program.as_text()
    assert text is not None
    loops = head_chunks(config, tokens, answers * share)[1]
    return {
        "model": name, "mesh": layout, "prompts": prompts, "tokens": tokens,
        "expected": dataclasses.asdict(expected(config, packing, mesh.shape, prompts, answers)),
        "compiled": dataclasses.asdict(exchanged(text, loops)),
        "flops_loops_once": cost["flops"],
        "arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
    }  # fmt: skip


def most_prompts(name: str, model: int) -> dict[str, Any]:
    """The prompts that jaxsp trains side by side on such chips, and what that and its wish would take."""
    mesh = as_mesh(f"data=1,model={model}")
    wish = ACCELERATOR_STEP_TOKENS // (PACKING.rows * PACKING.length)
    config = MODELS[name]
    most = plan.prompts_at_once(config, SETTINGS, PACKING, mesh, most=wish, memory_limit=HBM)
    found = {"chips": model, "most": most, "wish": wish}
    for what, prompts in (("one", 1), ("most", most), ("wish", wish)):
        memory: Any = plan.compiled(config, SETTINGS, PACKING, mesh, prompts).memory_analysis()
        found[f"{what}_bytes"] = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return found


def measure(_: str, run: Run) -> dict[str, Any]:
    flag = "--xla_force_host_platform_device_count=8"  # works until jax is asked for its devices
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    jax.config.update("jax_platforms", "cpu")
    names = list(MODELS)[: None if run.full else 1]
    layouts = [checked(name, *one) for name in names for one in LAYOUTS[name][: None if run.full else 2]]
    chips = {name: HOST if name == "Llama-3.1-8B" else 1 for name in names}
    fitting = {name: most_prompts(name, chips[name]) for name in names}
    hourly = [
        rates(name, fitting[name]["most"], chips[name], part * UTILISATION, repeats)
        for name in names
        for part in (1, 0.5)
        for repeats in {1, HOST // chips[name]}
    ]
    own = host.per_context()
    for row in hourly:
        waits = row["teacher_repeated"] * own["host"]  # so many chips have one process
        row["per_hour_with_host"] = row["per_hour"] / (1 + waits / row["total"])
    return {
        "job": {
            "context": CONTEXT, "before": PREAMBLE_TOKENS, "queries": QUERIES, "held_out": HELD_OUT,
            "query": QUERY, "answer": ANSWER, "batch": dataclasses.astuple(PACKING),
            "length": SETTINGS.prompt.prompt_length, "steps": SETTINGS.training.steps,
        },
        "weights": {name: _weights(config) for name, config in MODELS.items()},
        "flops": {name: _flops(config) for name, config in MODELS.items()},
        "layouts": layouts,
        "memory": fitting,
        "hourly": hourly,
        "rows_over_data": [spread_seconds(name, n) for name in names for n in (1, 2, 4, 8)],
        "weights_over_model": [step_seconds("Llama-3.1-8B", n) for n in (1, 2, 4, 8)],
        "packing": [host.packing(config.width) for config in MODELS.values()],
        "encoding": host.encoding(),
        "host": own,
    }  # fmt: skip


def _weights(config: DecoderConfig) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(decoder.parameter_shapes(config)))


def _flops(config: DecoderConfig) -> dict[str, float]:
    total: defaultdict[str, float] = defaultdict(float)
    for work in works(config, 1):
        total[work.name] += work.times * work.flops
    return total


PARTS = ("context", "answers", "signals and brackets", "steps", "evaluations")


def table(results: Results) -> str:
    """Operations, bytes against the compiled programs, and contexts an hour."""
    found = results["default"]
    flops = [
        [name, *(f"{of[part] / 1e12:,.3g}" for part in PARTS), f"{sum(of.values()) / 1e12:,.0f}"]
        for name, of in found["flops"].items()
    ]
    layouts = [
        [
            row["model"], row["mesh"], f"{max(row['prompts'], 1)}", f"{row['tokens']:,}",
            f"{row['expected']['bytes']:,}", f"{row['compiled']['bytes']:,}",
            f"{row['compiled']['messages']}",
            f"{row['flops_loops_once'] / 1e9:,.1f}",
            f"{row['arguments'] / 1e9:.2f} + {row['temporaries'] / 1e9:.2f}",
        ]
        for row in found["layouts"]
    ]  # fmt: skip
    hourly = [
        [
            row["model"], f"{CHIPS // row['chips']} × {row['chips']}", f"{row['utilisation']:.2g}",
            f"{row['teacher_repeated']}", f"{row['prompts']}",
            *(_bound(row["seconds"][part]) for part in PARTS),
            f"{row['total']:.2f}", *(_rounded(row[key]) for key in ("per_hour", "per_hour_with_host")),
        ]
        for row in found["hourly"]
    ]  # fmt: skip
    return "\n\n".join([
        markdown(["TFLOP a context", *PARTS, "all"], flops),
        markdown(
            ["model", "mesh", "prompts", "T", "arithmetic, bytes", "compiled, bytes", "messages",
             "GFLOP, loops once", "arguments + temporaries, GB"],
            layouts,
            texts=2,
        ),
        markdown(
            ["model", "groups × chips", "utilisation", "chips that repeat the teacher", "prompts at once",
             *(f"{part}, s" for part in PARTS), "all, s", "contexts an hour", "with the host"],
            hourly,
            texts=2,
        ),
    ])  # fmt: skip


def _bound(seconds: dict[str, float]) -> str:
    """The time of a part, and what most of it is: products (p), memory (m) or exchange (x)."""
    most = max(seconds, key=lambda name: seconds[name])
    return f"{sum(seconds.values()):.3f} {most.replace('ex', 'x')[0]}"


def _rounded(value: float) -> str:
    return f"{float(f'{value:.3g}'):,.0f}"


def result(results: Results) -> str:
    rows = {row["model"]: _rounded(row["per_hour"]) for row in reversed(results["default"]["hourly"])}
    hourly = (f"{name} {rows[name]}" for name in MODELS)
    return f"by arithmetic, contexts an hour on 256 chips at 0.56 utilisation: {', '.join(hourly)}"


EXPERIMENT = Experiment(
    question="How many contexts an hour would a v5e-256 compress for models of 135 million, 1 and 8 billion"
    " parameters; which bytes do devices exchange in a step; and where do more chips stop helping?",
    cost="3 minutes on two cores; no TPU: arithmetic, held against compiled programs of eight fake devices",
    run=measure,
    table=table,
    result=result,
)
