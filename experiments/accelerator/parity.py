"""The card computes what it must: attention backends, the decoder, SmolLM2's logits, the demo's KL."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.accelerator.checks import Check, Goal, NotRun, smollm2
from experiments.decoder_speed.jobs import decoder_config, our_jobs, random_params
from experiments.decoder_speed.workload import SHAPES
from experiments.suite import DEMO, HERE, Run
from jaxsp import device
from jaxsp.models.attention import BACKENDS, AttentionInputs, Slots, attention
from jaxsp.models.attention.inputs import visible

GOLDENS = HERE.parent / "tests" / "goldens" / "logits.npz"
TEXT = "The harbour master of Bodø wrote, on 14 May 1932: 'Two boats came in at 6:45, one with herring.'"
VOCABULARY = slice(0, None, 97)
"""The text of the stored logits, and the tokens whose logits they are (``tests/goldens/make_logits.py``)."""

ROUNDING = Goal(most=0.02)
"""Error of bfloat16 beside float32, in the norm: up to 0.004 by an entry, in a gradient some times that."""
ELSEWHERE = {"cudnn": "gpu", "splash": "tpu"}
"""The devices that the backends are written for; a CPU computes the same slowly, to see that it works."""
FORMS = {"after a prefix": False, "packed, with a bias": True}


def checks(run: Run) -> list[Check]:
    """All of them; those that need SmolLM2 last."""
    found = [
        Check(
            f"attention {backend}, {form}",
            "largest error of output and gradients, in the norm, beside float32",
            "of the norm",
            functools.partial(attention_error, backend, packed=packed, full=run.full),
            ROUNDING,
        )
        for backend in BACKENDS
        for form, packed in FORMS.items()
    ]
    found += [
        Check(
            f"{job} in float32",
            "largest error beside the same program on the machine's CPU, in the norm",
            "of the norm",
            functools.partial(beside_cpu, job, full=run.full),
            Goal(most=1e-3),
        )
        for job in ("prefill", "prompt gradient")
    ]
    return [
        *found,
        Check(
            "SmolLM2's logits",
            "largest difference from those stored of Hugging Face's model in torch, float32",
            "logits",
            golden_logits,
            Goal(most=1e-3),
        ),
        Check(
            "demo",
            "held-out KL of jaxsp demo with this device's own dtype",
            "nats",
            functools.partial(demo, full=run.full),
            Goal(most=0.1),
        ),
    ]


def attention_inputs(*, packed: bool, full: bool) -> AttentionInputs:
    """Rows after a shared prefix; packed ones hold two sequences each, after slots that stand for several."""
    B, T, P, H, G, F = (4, 512, 300, 32, 8, 64) if full else (2, 16, 6, 4, 2, 16)
    keys = iter(jax.random.split(jax.random.key(0), 6))

    def random(*shape: int) -> Any:
        return jax.random.normal(next(keys), shape).astype(jnp.bfloat16)

    q, own = random(B, T, H, F), (random(B, T, G, F), random(B, T, G, F))
    before = random(1, P, G, F), random(1, P, G, F)
    offsets, segments, bias = jnp.arange(T), None, None
    if packed:
        offsets = offsets % (T // 2)
        segments = jnp.broadcast_to(jnp.arange(T) // (T // 2), (B, T))
        bias = jax.random.normal(next(keys), (1, P, G))
    where = jnp.broadcast_to(P + offsets, (B, T))
    prefix = Slots(*before, jnp.arange(P)[None], bias=bias)
    slots = prefix, Slots(*own, where, segments)
    return AttentionInputs(q, where, slots, scale=F**-0.5, segment_ids_BT=segments)


def written_out(inputs: AttentionInputs) -> Any:
    """Attention in float32 as one would write it, with all scores at once."""
    rows, heads = inputs.q_BTHF.shape[0], inputs.q_BTHF.shape[2]
    product = functools.partial(jnp.einsum, precision="highest")

    def joined(parts: list[Any]) -> Any:
        whole = [jnp.broadcast_to(x, (rows, *x.shape[1:])).astype(jnp.float32) for x in parts]
        x = jnp.concatenate(whole, axis=1)
        return jnp.repeat(x, heads // x.shape[2], axis=2)

    k, v = joined([s.keys for s in inputs.slots]), joined([s.values for s in inputs.slots])
    bias = joined([jnp.zeros(s.keys.shape[:3]) if s.bias is None else s.bias for s in inputs.slots])
    seen = [visible(inputs.positions_BT, inputs.segment_ids_BT, s, None) for s in inputs.slots]
    scores = inputs.scale * product("bthf,bshf->bhts", inputs.q_BTHF.astype(jnp.float32), k)
    scores += bias.swapaxes(1, 2)[:, :, None]
    scores = jnp.where(jnp.concatenate(seen, axis=-1)[:, None], scores, -jnp.inf)
    return product("bhts,bshf->bthf", jax.nn.softmax(scores, axis=-1), v)


def value_and_gradients(form: Any, inputs: AttentionInputs) -> Any:
    """The output, and the gradients of a weighted sum of it to queries, keys, values and bias."""
    weights = jax.random.normal(jax.random.key(1), inputs.q_BTHF.shape)
    given = inputs.q_BTHF, [(s.keys, s.values, s.bias) for s in inputs.slots]

    @jax.jit
    def compute(given: Any, inputs: tuple[Any, ...]) -> Any:
        positions, segments, places = inputs

        def total(given: Any) -> Any:
            q, parts = given
            slots = tuple(
                Slots(k, v, where, ids, bias)
                for (k, v, bias), (where, ids) in zip(parts, places, strict=True)
            )
            # The queries' own slots have the same array of positions, as a decoder's have.
            slots = (*slots[:-1], slots[-1]._replace(positions=positions))
            out = form(AttentionInputs(q, positions, slots, q.shape[-1] ** -0.5, segment_ids_BT=segments))
            return jnp.sum(weights * out), out

        return jax.value_and_grad(total, has_aux=True)(given)

    places = [(s.positions, s.segment_ids) for s in inputs.slots]
    (_, out), gradients = compute(given, (inputs.positions_BT, inputs.segment_ids_BT, places))
    return out, gradients


def attention_error(backend: str, *, packed: bool, full: bool) -> tuple[float, dict[str, Any]]:
    """Beside ``written_out``."""
    wanted, here = ELSEWHERE.get(backend), device.platform()
    if wanted and here not in (wanted, "cpu"):
        raise NotRun(f"{backend} is for a {wanted.upper()}, not a {here.upper()}")
    inputs = attention_inputs(packed=packed, full=full)
    if reason := BACKENDS[backend].unsupported_reason(inputs):
        raise NotRun(reason)
    ours = value_and_gradients(functools.partial(attention, backend=backend), inputs)
    exact = value_and_gradients(written_out, inputs)
    errors = jax.tree.leaves(jax.tree.map(error, ours, exact))
    return max(errors), {"output": errors[0], "gradients": errors[1:]}


def error(ours: Any, exact: Any) -> float:
    """The norm of the difference, as a part of the exact array's norm."""
    a, b = (np.asarray(x.astype(jnp.float32), np.float64) for x in (ours, exact))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def beside_cpu(job: str, *, full: bool) -> tuple[float, dict[str, Any]]:
    """A job of SmolLM2's shape, random weights, on this device and on the machine's CPU."""
    shape = SHAPES["smollm2-135m" if full else "tiny"]
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError as reason:
        raise NotRun(f"jax has no CPU beside the card ({reason})") from reason
    params = random_params(decoder_config(shape, "float32"))
    ours = our_jobs(shape, "float32", params)[job]()
    with jax.default_device(cpu):  # with the card's own weights: a CPU draws some of them otherwise
        exact = our_jobs(shape, "float32", jax.device_put(params, cpu))[job]()
    floats = [x for x in zip(*map(jax.tree.leaves, (ours, exact)), strict=True) if x[0].dtype == jnp.float32]
    errors = [error(*pair) for pair in floats]
    return max(errors), {"arrays": errors}


def golden_logits() -> float:
    """SmolLM2 beside Hugging Face's model in torch on a CPU, of which some logits are stored."""
    if not GOLDENS.is_file():
        raise NotRun("the stored logits lie in a clone of the repository, and this is none")
    model = smollm2("float32")
    logits = np.asarray(model.logits(model.tokenizer(TEXT).input_ids))[:, VOCABULARY]
    return float(np.abs(logits - np.load(GOLDENS)["smollm2"]).max())


def demo(*, full: bool) -> tuple[float, dict[str, Any]]:
    """The held-out KL that ``jaxsp demo`` reaches."""
    if not full:
        raise NotRun("a small run trains no SmolLM2")
    import jaxsp
    from jaxsp.demo import read

    model = smollm2()
    context, queries, held_out = read()
    report = jaxsp.compress(model, context, queries, held_out=held_out, progress=False, **DEMO).report
    told = {"dtype": model.config.dtype, "gap_closed": report["gap_closed"]["value"]}
    return report["held_out"]["brackets"]["prompt"]["kl"], {**told, "phases": report["seconds"]}
