"""The end that each objective comes to, on one position where the teacher is 60% / 30% / 10% sure.

python experiments/textbook/run.py
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure

from jaxsp import losses

HERE = Path(__file__).parent
TEACHER = jnp.log(jnp.array([[0.60, 0.30, 0.10]]))
GOLD = jnp.array([0])
STEPS = 400


def student(objective: losses.Objective) -> jax.Array:
    """The logits after gradient descent (Adam) on the objective, from even odds."""
    optimizer = optax.adam(0.05)

    def cost(logits):
        values = objective(teacher_logits=TEACHER, student_logits=logits, targets=GOLD)
        return objective.cost(values).sum()

    def step(carry, _):
        logits, state = carry
        updates, state = optimizer.update(jax.grad(cost)(logits), state)
        return (optax.apply_updates(logits, updates), state), None

    start = jnp.zeros((1, 3))
    return jax.lax.scan(step, (start, optimizer.init(start)), length=STEPS)[0][0]


def main() -> None:
    chosen = {
        "the teacher": TEACHER,
        "kl": student(losses.OBJECTIVES["kl"]),
        "nll": student(losses.OBJECTIVES["nll"]),
        "0.5 kl + 0.5 nll": student(losses.mixture(kl=0.5, nll=0.5)),
    }
    results = {}
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    for axes, (name, logits) in zip(figure.subplots(1, 4, sharey=True), chosen.items(), strict=True):
        p = jax.nn.softmax(logits)[0]
        results[name] = {
            "distribution": [round(float(x), 3) for x in p],
            "kl": round(abs(float(losses.kl_divergence(TEACHER, logits)[0])), 3),
            "zero_one": float(losses.zero_one(TEACHER, logits)[0]),
            "confidence_shift": round(float(losses.confidence_shift(TEACHER, logits)[0]), 3),
        }
        axes.bar(["right\nanswer", "alternative", "others"], p, color=["#0b7a75", "#d98e04", "#b0a990"])
        for place, x in enumerate(p):
            axes.text(place, float(x) + 0.02, f"{float(x):.0%}", ha="center", fontsize=9)
        title = name if name == "the teacher" else f"trained on {name}"
        figures = f"KL {results[name]['kl']:.2f} · 0/1 {results[name]['zero_one']:.0f}"
        axes.set_title(title if name == "the teacher" else f"{title}\n{figures}", fontsize=10)
        axes.set_ylim(0, 1.12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.savefig(HERE / "textbook.png", dpi=150)
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
