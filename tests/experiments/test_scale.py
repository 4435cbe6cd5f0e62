"""experiments.scale: the arithmetic of what devices exchange is what the compiled program says."""

from __future__ import annotations

import math

import pytest

from experiments.scale import arithmetic
from experiments.scale.arithmetic import SETTINGS, Exchange, decoder_config
from experiments.scale.experiment import exchanged
from jaxsp.data.packing import Packing
from jaxsp.models.sharding import DATA, as_mesh
from jaxsp.plan import compiled, step_flops
from tests import programs

TINY = decoder_config(
    layers=3, width=32, heads=8, kv_heads=4, head_width=4, mlp_width=48, vocab_size=260, window=512,
    tied_head=False,
).replace(dtype="float32")  # fmt: skip
PACKING = Packing(4, 96)
ANSWERS = 128


@pytest.mark.parametrize(
    ("layout", "prompts"),
    [
        pytest.param("data=4", 8, marks=pytest.mark.slow),
        pytest.param("data=2,model=4", 0, marks=pytest.mark.slow),
        pytest.param("data=2,model=2", 4, marks=pytest.mark.slow),
    ],
)
def test_bytes_are_those_of_the_compiled_program(layout, prompts):
    mesh = as_mesh(layout)
    share = max(prompts, 1) / mesh.shape[DATA]
    tokens = int(PACKING.rows * PACKING.length * share)
    loops = arithmetic.head_chunks(TINY, tokens, ANSWERS * share)[1]
    program = compiled(TINY, SETTINGS, PACKING, mesh, max(prompts, 1))
    found = exchanged(programs.text(program), loops)
    expected = arithmetic.expected(TINY, PACKING, mesh.shape, prompts, ANSWERS)
    assert found.bytes == expected.bytes
    assert (found.bytes == 0) == (prompts > 0 and "model" not in layout)


def test_loops_count_as_often_as_they_run():
    text = """
%body (x: f32[8]) -> f32[8] {
  %a = (f32[2,4]{1,0}, bf16[3]{0}) all-reduce(%x, %y), to_apply=%add
}
%add (x: f32[]) -> f32[] {
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %b = f32[] all-reduce-start(%x), to_apply=%add.clone_promoted
  %c = f32[8] while(%b), condition=%if, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %d = f32[8] while(%c), condition=%if, body=%body
}
%add.clone_promoted (x: f32[]) -> f32[] {
}
"""
    assert exchanged(text, loops=2) == Exchange(messages=8, bytes=2 + 7 * 38)
    with pytest.raises(ValueError, match="Something other than an all-reduce"):
        exchanged(text.replace("all-reduce-start", "all-gather"), loops=2)


def test_a_context_is_all_of_its_steps():
    config, steps = arithmetic.MODELS["Llama-3.2-1B"], SETTINGS.training.updates
    one, several = (
        sum(work.times * work.flops for work in arithmetic.works(config, prompts) if work.name == "steps")
        for prompts in (1, 8)
    )
    flops = step_flops(config, SETTINGS.prompt.prompt_length, arithmetic.ROW, arithmetic.PACKING)
    assert one == pytest.approx(steps * flops)
    assert several == pytest.approx(one)


def test_a_rings_sum():
    assert arithmetic.all_reduce(1, 10, 1e9) == 0
    assert arithmetic.all_reduce(4, 0, 100e9) == pytest.approx(1.5)  # 2 · 3/4 of it at 100 GB/s
    assert arithmetic.all_reduce(2, 3, 0) == pytest.approx(6 * arithmetic.HOP)
    assert math.isclose(arithmetic.LINK, 50e9)
