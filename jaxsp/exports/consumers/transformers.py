"""Answers questions with the soft prompt of this folder, by transformers alone.

python load.py "How long is the cable?"
"""

import copy
import inspect
import sys

import torch
from question import HERE, MODEL, PROMPT, check_weights, encode
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


def load_prefix(model):
    """The soft prompt as a cache; the answer to each question takes a copy of it."""
    check_weights(model)
    arrays, cache = load_file(HERE / "prefix.safetensors"), DynamicCache()
    pairs = (arrays[name].to(model.device, model.dtype) for name in ("keys", "values"))
    for layer, (keys, values) in enumerate(zip(*pairs, strict=True)):
        cache.update(keys[None], values[None], layer)
    if "bias" in arrays:
        vars(cache)["more"] = [arrays[name].to(model.device) for name in ("bias", "until")]
        model.set_attn_implementation("eager")  # the one that takes a mask of its own for each head
        for part in model.modules():
            if type(part).__name__.endswith("Attention") and add_bias not in part._forward_pre_hooks.values():
                part.register_forward_pre_hook(add_bias, with_kwargs=True)
    return cache


def add_bias(attention, args, kwargs):
    more = getattr(kwargs.get("cache", kwargs.get("past_key_values")), "more", None)
    if more is not None:
        mask, (bias, until) = kwargs["attention_mask"], (part[attention.layer_idx] for part in more)
        asked = mask.shape[-1] - bias.shape[-1]  # tokens behind the soft prompt, the new ones last
        offsets = torch.arange(asked - mask.shape[-2], asked, device=mask.device)
        gone, least = offsets[:, None] >= until, torch.finfo(mask.dtype).min
        bias = bias[:, None].to(mask.dtype).expand(-1, len(offsets), -1).masked_fill(gone, least)
        kwargs["attention_mask"] = mask + torch.nn.functional.pad(bias, (0, asked))
    return args, kwargs


def read(model, cache, ids):
    """Logits at ``ids`` [1, T], which the cache then holds, too."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return model(ids, **{name: cache}).logits


@torch.no_grad()
def answer(model, tokenizer, cache, question, max_tokens=128):
    """The greedy answer."""
    cache, found, ids = copy.deepcopy(cache), [], encode(tokenizer, question)
    while len(found) < max_tokens:
        logits = read(model, cache, torch.tensor([ids], device=model.device))
        ids = [int(logits[0, -1].argmax())]
        if ids[0] in PROMPT["stop_ids"]:
            break
        found += ids
    return tokenizer.decode(found, skip_special_tokens=True)


if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    print(answer(model, AutoTokenizer.from_pretrained(MODEL), load_prefix(model), " ".join(sys.argv[1:])))
