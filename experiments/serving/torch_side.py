"""The same questions by Hugging Face's ``generate``, in batches; the document read each time, or its cache.

python -m experiments.serving.torch_side JOB, started by ``speed.py``. A line on stdin is a JSON list: a key
of ``KINDS`` and the requests of a batch; a line of JSON on stdout says what that took. Answers are greedy,
with scaled-dot-product attention.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, LogitsProcessor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class FirstToken(LogitsProcessor):
    """Notes when the first token's logits are there."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        del input_ids
        if self.at is None:
            float(scores[0, 0])  # waits for the device
            self.at = time.perf_counter()
        return scores


class Side:
    """The model, and the document that it has read."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._job, self._shared = job, job["shared"]
        dtype = getattr(torch, job["dtype"])
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
        self._model = model.to(DEVICE).eval()
        read = self._model(torch.tensor([self._shared], device=DEVICE), use_cache=True)
        self._cache: DynamicCache = read.past_key_values

    def answers(self, queries: list[list[int]], *, cached: bool) -> tuple[float, list[int]]:
        """The time of the first token, and the tokens of each answer; padded in front of the query."""
        longest, pad = max(map(len, queries)), self._job["stop_ids"][0]
        pads = [longest - len(query) for query in queries]
        shared = self._shared
        ids = [[*shared, *[pad] * n, *query] for n, query in zip(pads, queries, strict=True)]
        live = [[1] * len(shared) + [0] * n + [1] * (longest - n) for n in pads]
        past, clock = None, FirstToken()
        if cached:
            past = copy.deepcopy(self._cache)
            past.batch_repeat_interleave(len(queries))
        made = self._model.generate(
            torch.tensor(ids, device=DEVICE),
            attention_mask=torch.tensor(live, device=DEVICE),
            past_key_values=past,
            logits_processor=[clock],
            do_sample=False,
            max_new_tokens=self._job["max_tokens"],
            eos_token_id=self._job["stop_ids"],
            pad_token_id=pad,
        )
        assert clock.at is not None
        return clock.at, [self._length(row) for row in made[:, len(ids[0]) :].tolist()]

    def _length(self, ids: list[int]) -> int:
        """Tokens up to the first stop id, included."""
        ends = [at for at, token in enumerate(ids) if token in self._job["stop_ids"]]
        return ends[0] + 1 if ends else len(ids)


KINDS = {"read": False, "cached": True}
"""Whether the document's cache is used."""


def main() -> None:
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    side = Side(json.loads(Path(sys.argv[1]).read_text("utf-8")))
    say({"torch": torch.__version__, "transformers": transformers.__version__, "device": DEVICE})
    for line in sys.stdin:
        kind, queries = json.loads(line)
        started = time.perf_counter()
        first, tokens = side.answers(queries, cached=KINDS[kind])
        say({"seconds": time.perf_counter() - started, "first": first - started, "tokens": tokens})


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
