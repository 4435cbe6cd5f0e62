"""The question behind the soft prompt of this folder, and the weights that it needs; part of load.py."""

import json
from pathlib import Path

HERE = Path(__file__).parent
PROMPT = json.loads((HERE / "prompt.json").read_text("utf-8"))


def encode(tokenizer, question):
    """Token ids of a question with the chat's texts around it; it can't hold control tokens."""
    known = PROMPT["question"]
    text = known["behind"] + question.rstrip(known["blanks"])
    own = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)[known["skip"] :]
    if not set(own).isdisjoint(known["control_ids"]):
        raise ValueError("The question holds a control token of this model; take it out.")
    return [*known["before_ids"], *own, *known["after_ids"]]


def check_weights(model):
    """Raises ValueError if the model's embeddings are not those that the soft prompt was trained for."""
    known = PROMPT["weights"]
    table = model.get_input_embeddings().weight[known["rows"]].float().tolist()
    for row, expected in zip(table, known["entries"], strict=True):
        # The widest rounding that is no other model: bfloat16's.
        if any(abs(a - b) > abs(b) / 256 + 1e-6 for a, b in zip(row, expected, strict=False)):
            name = PROMPT["model"]["name"]
            raise ValueError(f"The soft prompt was trained for {name}; this model has other weights.")
