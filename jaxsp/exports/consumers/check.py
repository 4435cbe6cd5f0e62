"""Measures an export in its consumer, in a process of its own: jaxsp's hides torch.

python -P check.py FORMAT FOLDER MODEL EXPECTED.npz

It prints {"kl", "logit_difference"}, or {"missing": package}. EXPECTED.npz has for each row ``i`` what is
read behind the soft prompt, ``ids_i``, the first of them that predicts an answer, ``first_i``, and jaxsp's
logits from there on, ``logits_i``; and the ids before the soft prompt, ``before``.
"""

import importlib.util
import json
import sys
import warnings

import numpy as np


def script(folder, name):
    """A Python file of the export."""
    spec = importlib.util.spec_from_file_location(name, f"{folder}/{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def reader(kind, folder, model, before):
    """A function from ids to logits behind the soft prompt."""
    import torch

    if kind == "vllm":
        import base64
        import io

        with open(f"{folder}/prompt_embeds.b64") as file:
            sigma = torch.load(io.BytesIO(base64.b64decode(file.read())), weights_only=True)
        embed = model.get_input_embeddings()
        return lambda ids: (
            model(inputs_embeds=torch.cat([embed(before), sigma[None], embed(ids)], dim=1)).logits
        )
    script(folder, "question")
    load = script(folder, "load")
    if kind == "peft":
        behind = load.load(model)
        return lambda ids: behind(input_ids=ids).logits
    import copy

    cache = load.load_prefix(model)
    return lambda ids: load.read(model, copy.deepcopy(cache), ids)


def main(kind, folder, path, expected):
    warnings.simplefilter("ignore")
    try:
        import torch
        import transformers

        if kind == "peft":
            importlib.import_module("peft")
    except ImportError as error:
        return {"missing": error.name}
    transformers.logging.set_verbosity_error()
    expected, kl, difference, count = np.load(expected), 0.0, 0.0, 0
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    read = reader(kind, folder, model, torch.tensor(expected["before"])[None])
    for i in range(sum(name.startswith("ids_") for name in expected)):
        ids, ours = torch.tensor(expected[f"ids_{i}"])[None], torch.tensor(expected[f"logits_{i}"]).double()
        with torch.no_grad():
            all_logits = read(ids)[0]
        theirs = all_logits[len(all_logits) - ids.shape[1] + int(expected[f"first_{i}"]) :].double()
        log_p, log_q = ours.log_softmax(-1), theirs.log_softmax(-1)
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        difference = max(difference, float((ours - theirs).abs().max()))
        count += len(ours)
    return {"kl": max(kl / count, 0.0), "logit_difference": difference}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
