"""The jobs of ``experiment.py`` by Hugging Face's Llama in torch, as a careful user would write them.

A line on stdin names a job; a line of JSON on stdout says how long it took. Scaled-dot-product attention,
no gradient to weights, the head on answer positions only, the teacher's states given.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import transformers
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from experiments.decoder_speed.workload import SHAPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    shape, dtype = SHAPES[sys.argv[1]], getattr(torch, sys.argv[2])
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_width,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    with torch.device(DEVICE):  # random numbers of a billion weights take a processor a minute
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model = model.to(DEVICE, dtype).eval().requires_grad_(False)

    def ids(rows: int, length: int) -> torch.Tensor:
        return torch.randint(0, shape.vocab_size, (rows, length), device=DEVICE)

    document, queries = ids(1, shape.document), ids(shape.slots, shape.query)
    rows = model.model.embed_tokens(ids(shape.rows, shape.row))
    sigma = rows.reshape(1, -1, shape.width)[:, : shape.prompt].clone()
    teacher = torch.randn(shape.rows, shape.answer, shape.width, device=DEVICE, dtype=dtype)

    def prefill() -> None:
        model.model(document, use_cache=True)

    context = model.model(document[:, : shape.context], use_cache=True).past_key_values

    def decode() -> None:
        cache = DynamicCache()
        for i, layer in enumerate(context.layers):
            copied = (part.expand(shape.slots, -1, -1, -1) for part in (layer.keys, layer.values))
            cache.update(*copied, i)
        tokens = queries
        for _ in range(shape.new_tokens):
            states = model.model(tokens, past_key_values=cache, use_cache=True).last_hidden_state
            tokens = model.lm_head(states[:, -1:]).argmax(-1)

    def prompt_gradient() -> None:
        with torch.enable_grad():
            prompt = sigma.detach().requires_grad_()
            inputs = torch.cat([prompt.expand(shape.rows, -1, -1), rows], dim=1)
            states = model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
            log_q = model.lm_head(states[:, -shape.answer :]).float().log_softmax(-1)
            with torch.no_grad():
                log_p = model.lm_head(teacher).float().log_softmax(-1)
            loss = kl_div(log_q, log_p, log_target=True, reduction="sum")
            (loss / (shape.rows * shape.answer)).backward()

    jobs = {"prefill": prefill, "decode": decode, "prompt gradient": prompt_gradient}
    say({"torch": torch.__version__, "transformers": transformers.__version__, "device": DEVICE})
    for line in sys.stdin:
        started = time.perf_counter()
        jobs[line.strip()]()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        say({"seconds": time.perf_counter() - started})


def say(answer: dict) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
