"""The measured jobs: shapes of models and jobs, and the arithmetic that each job can't do without."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder of Llama's kind with a tied head, and sizes of the jobs."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    vocab_size: int
    document: int
    """Prefill: tokens of one sequence."""
    context: int
    """Decoding: tokens of the shared prefix."""
    slots: int
    """Decoding: sequences at a time."""
    query: int
    """Decoding: tokens read before each answer."""
    new_tokens: int
    """Decoding: tokens of each answer."""
    prompt: int
    """Prompt gradient: K."""
    rows: int
    row: int
    """Prompt gradient: rows, and tokens of each."""
    answer: int
    """Prompt gradient: answer positions of each row, where the loss is."""
    matmul: int
    """Size of the square product that gives the machine's rate."""


SHAPES = {
    "smollm2-135m": Shape(
        layers=30, width=576, heads=9, kv_heads=3, head_width=64, mlp_width=1536, vocab_size=49152,
        document=1024, context=320, slots=16, query=16, new_tokens=48, prompt=16, rows=16, row=48,
        answer=24, matmul=2048,
    ),
    "llama-1b": Shape(
        layers=16, width=2048, heads=32, kv_heads=8, head_width=64, mlp_width=8192,
        vocab_size=128256, document=4096, context=2048, slots=64, query=32, new_tokens=128,
        prompt=128, rows=32, row=256, answer=64, matmul=8192,
    ),
    "tiny": Shape(
        layers=2, width=32, heads=4, kv_heads=2, head_width=8, mlp_width=48, vocab_size=256,
        document=32, context=16, slots=2, query=4, new_tokens=4, prompt=4, rows=2, row=16, answer=4,
        matmul=64,
    ),
}  # fmt: skip


def flops(shape: Shape, job: str) -> tuple[float, int]:
    """Floating-point operations of a job, and the tokens that it reads or writes.

    Two for each multiply-add of the matrix products; attention over the slots that are seen, causal ones
    alone. A gradient to the inputs costs as much again as the products that it goes through (twice as much
    in attention), as no weight has one. Nothing is counted for what is computed a second time.
    """
    s = shape
    projections = s.width * s.head_width * (2 * s.heads + 2 * s.kv_heads)
    layer = 2 * (projections + 3 * s.width * s.mlp_width)
    seen = 4 * s.heads * s.head_width  # for a token and a slot that it sees
    head = 2 * s.width * s.vocab_size
    if job == "prefill":
        return s.layers * (s.document * layer + seen * s.document**2 / 2), s.document
    if job == "decode":
        new, read = s.slots * s.new_tokens, s.slots * s.query
        slots = s.context + s.query + s.new_tokens / 2
        return (new + read) * s.layers * (layer + seen * slots) + new * head, new
    tokens = s.rows * s.row
    attended = tokens * (s.prompt + s.row / 2) + s.prompt**2 / 2
    trunk = s.layers * (2 * (tokens + s.prompt) * layer + 3 * seen * attended)
    return trunk + 3 * s.rows * s.answer * head, tokens + s.prompt
