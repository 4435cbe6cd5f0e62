"""Answers questions with the soft prompt of this folder, by PEFT.

python load.py MODEL "How long is the cable?"
"""

import sys

import torch
from peft import PeftModel
from question import HERE, PROMPT, check_weights, encode
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(model):
    """The model behind the soft prompt."""
    check_weights(model)
    return PeftModel.from_pretrained(model, HERE)


@torch.no_grad()
def answer(model, tokenizer, question, max_tokens=128):
    """The greedy answer."""
    asked, found = encode(tokenizer, question), []
    while len(found) < max_tokens:
        logits = model(input_ids=torch.tensor([asked + found], device=model.device)).logits
        token = int(logits[0, -1].argmax())
        if token in PROMPT["stop_ids"]:
            break
        found.append(token)
    return tokenizer.decode(found, skip_special_tokens=True)


if __name__ == "__main__":
    model, tokenizer = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModelForCausalLM, AutoTokenizer))
    print(answer(load(model), tokenizer, " ".join(sys.argv[2:])))
