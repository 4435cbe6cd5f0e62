"""The cache of load.py where the soft prompt has biases: they are added to the attention's mask."""

import torch
from transformers import DynamicCache


def biased_cache(model, arrays, key_values):
    cache = DynamicCache(key_values)
    vars(cache)["biases"] = [arrays[name].to(model.device) for name in ("bias", "until")]
    model.set_attn_implementation("eager")  # the one that takes a mask of its own for each head
    for part in model.modules():
        if type(part).__name__.endswith("Attention") and add_bias not in part._forward_pre_hooks.values():
            part.register_forward_pre_hook(add_bias, with_kwargs=True)
    return cache


def add_bias(part, args, kwargs):
    for bias, until in (vars(given)["biases"] for given in kwargs.values() if hasattr(given, "biases")):
        mask, bias, until = kwargs["attention_mask"], bias[part.layer_idx, :, None], until[part.layer_idx]
        asked = mask.shape[-1] - len(until)  # tokens behind the soft prompt, the new ones last
        new = torch.arange(asked - mask.shape[-2], asked, device=mask.device)[:, None]
        bias = torch.where(new < until, bias, -torch.inf).to(mask.dtype)
        kwargs["attention_mask"] = mask + torch.nn.functional.pad(bias, (0, asked))
    return args, kwargs
