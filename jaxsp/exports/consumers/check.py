"""Measures an export in its consumer, in a process of its own: jaxsp's hides torch.

python -P check.py FORMAT FOLDER MODEL EXPECTED.npz

It prints {"kl", "logit_difference"}, or {"missing": package}. EXPECTED.npz has for each row ``i`` the
question, ``query_i``, what is read behind the soft prompt, ``ids_i``, the first of them that predicts an
answer, ``first_i``, and jaxsp's logits from there on, ``logits_i``; and the ids before the soft prompt,
``before``.
"""

import importlib.util
import inspect
import json
import os
import sys
import warnings

import numpy as np

NEEDS = {
    "llama.cpp": ["llama_cpp"],
    "peft": ["torch", "transformers", "peft"],
    "transformers": ["torch", "transformers"],
    "vllm": ["torch", "transformers"],
}


def script(folder, name):
    """A Python file of the export."""
    spec = importlib.util.spec_from_file_location(name, f"{folder}/{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def llama_cpp_reader(folder, path, questions):
    """A function from ids to logits behind the soft prompt, by llama.cpp; its own ids must be the same."""
    question, load = script(folder, "question"), script(folder, "load")
    model = load.load(path, type_k=0, type_v=0)  # the cache in float32
    tokenizer = load.Tokenizer(model)
    for query, ids in questions:
        if question.encode(tokenizer, query) != ids.tolist():
            raise SystemExit(f"it gives other tokens to the question {query!r:.100}")
    return lambda ids: load.read(model, len(load.VECTORS), ids)


def torch_reader(kind, folder, path, before):
    """The same by torch."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    read = behind(kind, folder, model, torch.tensor(before)[None])

    def logits(ids):
        with torch.no_grad():
            return read(torch.tensor(ids)[None])[0].numpy()

    return logits


def behind(kind, folder, model, before):
    """A function from a tensor of ids to logits behind the soft prompt."""
    import torch

    if kind == "vllm":
        import base64
        import io

        with open(f"{folder}/request.json", encoding="utf-8") as file:
            sent = json.load(file)["messages"][0]["content"][0]
        sigma = torch.load(io.BytesIO(base64.b64decode(sent["data"])), weights_only=True)
        embed = model.get_input_embeddings()
        return lambda ids: (
            model(inputs_embeds=torch.cat([embed(before), sigma[None], embed(ids)], dim=1)).logits
        )
    if kind == "peft":
        script(folder, "question")
        own = script(folder, "load").load(model)
        return lambda ids: own(input_ids=ids).logits
    if os.path.exists(f"{folder}/biases.py"):
        script(folder, "biases")
    load = script(folder, "load")
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return lambda ids: model(ids, **{name: load.load_prefix(model)}).logits


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def main(kind, folder, path, expected):
    warnings.simplefilter("ignore")
    try:
        for package in NEEDS[kind]:
            importlib.import_module(package)
    except ImportError as error:
        return {"missing": error.name}
    expected, kl, difference, count = np.load(expected), 0.0, 0.0, 0
    names = "query", "ids", "first", "logits"
    rows = [[expected[f"{name}_{i}"] for name in names] for i in range(len(expected.files) // len(names))]
    if kind == "llama.cpp":
        asked = [(str(query), ids[: first + 1]) for query, ids, first, _ in rows]
        read = llama_cpp_reader(folder, path, asked)
    else:
        read = torch_reader(kind, folder, path, expected["before"])
    for _, ids, first, ours in rows:
        ours, theirs = ours.astype(np.float64), read(ids)
        theirs = theirs[len(theirs) - len(ids) + first :].astype(np.float64)
        log_p, log_q = log_softmax(ours), log_softmax(theirs)
        kl += float((np.exp(log_p) * (log_p - log_q)).sum())
        difference = max(difference, float(np.abs(ours - theirs).max()))
        count += len(ours)
    return {"kl": max(kl / count, 0.0), "logit_difference": difference}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
