"""Makes llama.cpp's own token ids: of the embedded model's tokenizer, and of every kind that is read.

``token_ids.json`` is about the embedded model. ``token_ids_kinds.json`` holds two small vocabularies made
here from the texts below, and their ids under each splitting rule. Their merges cross what the rules
split, and some of their words have no merge, so that every rule gives ids of its own.

pip install llama-cpp-python && python -m tests.goldens.make_token_ids PATH/TO/MODEL.gguf
"""

# pyright: reportMissingImports=false
# llama.cpp is only where the goldens are made.

from __future__ import annotations

import json
import sys
import tempfile
import unicodedata
from pathlib import Path

import gguf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

TEXTS = [
    "Hello, world!",
    "The tank holds 1.2 litres; 12345 people, 007, 3.14159.",
    "  leading and trailing  ",
    "tabs\tand\nnew\n\nlines\r\n\r\nand   runs    of spaces",
    "don't you'll we've I'm she'd it's they're DON'T",
    "naïve café Ångström Zürich façade œuvre",
    "日本語のテキスト と 한국어 and 中文混排123",
    "Привет, мир! Ελληνικά العربية עברית",
    "🙂🙃👩‍👩‍👧‍👦 emoji 🇳🇴 flags",
    "def f(x):\n    return {'a': [x ** 2, x // 3]}  # comment",
    "https://example.org/path?query=1&b=2#frag user@example.org",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "CamelCaseWords and snake_case_words and kebab-case-words",
    "x² + y³ ≤ ½ · π ≈ 1,5 × 10⁻³",
    "٣٤٥ and ४५६ and ２０２６",
    "\u00a0non-breaking\u2003em space\u200bzero width",
    'ALL CAPS HEADLINE: "QUOTED" — dash – en … ellipsis',
    "a",
    " ",
    "\n",
    "1",
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>text after<|im_end|>",
    "mixed123numbers456in789words",
    "e\u0301 combining a\u030a marks",
]


RULES = ("gpt-2", "smollm", "qwen2", "llama-bpe")


def learned(texts: list[str], alphabet: list[str], size: int, byte_level: bool):
    """Words and merges of a BPE that may merge across anything."""
    tokenizer = Tokenizer(models.BPE())
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), model["merges"]


def byte_level() -> dict[str, list]:
    words, merges = learned(TEXTS, sorted(pre_tokenizers.ByteLevel.alphabet()), 900, byte_level=True)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [word for word in words if word not in special]
    kept = [" ".join(pair) for i, pair in enumerate(merges) if i % 7]
    return {"tokens": [*special, *words], "token_type": [3] * len(special) + [1] * len(words), "merges": kept}


def sentence_piece() -> dict[str, list]:
    texts = [text.replace(" ", "▁") for text in TEXTS]
    words, _ = learned(texts, [], 700, byte_level=False)
    words = [word for word in words if "|>" not in word]  # llama.cpp takes such names for control
    first = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    own = ["<|im_end|>", "\n\n", "  "]  # user-defined: found before anything merges
    used = {character for word in words if len(word) > 1 for character in word}
    pieces = [word for word in words if word not in own and (len(word) > 1 or word in used)]
    return {
        "tokens": [*first, *own, *pieces],
        "scores": [0.0] * (len(first) + len(own)) + [-float(i) for i in range(len(pieces))],
        "token_type": [2, 3, 3, *[6] * 256, 3, 4, 4, *[1] * len(pieces)],
    }


def ids_by_llama_cpp(vocabulary: dict[str, list], texts: list[str], **fields) -> list[list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for name, values in vocabulary.items():
            writer.add_array(f"tokenizer.ggml.{name}", values)
        for name, value in fields.items():
            if isinstance(value, bool):
                writer.add_bool(f"tokenizer.ggml.{name}", value)
            else:
                writer.add_string(f"tokenizer.ggml.{name}", value)
        for role in ("bos", "eos", "unknown"):
            writer.add_uint32(f"tokenizer.ggml.{role}_token_id", 0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return ids_of_file(path, texts)


def ids_of_file(path: Path, texts: list[str]) -> list[list[int]]:
    from llama_cpp import Llama

    model = Llama(str(path), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]


def write(name: str, what, **options) -> None:
    text = json.dumps(what, ensure_ascii=False, **options)
    Path(__file__).with_name(name).write_text(text + "\n", "utf-8")


def main() -> None:
    ids = ids_of_file(Path(sys.argv[1]), TEXTS)
    rows = [{"text": text, "ids": its} for text, its in zip(TEXTS, ids, strict=True)]
    write("token_ids.json", rows, indent=1)

    vocabularies = {"gpt2": byte_level(), "llama": sentence_piece()}
    # The original of the rule "qwen2" composes characters first, which llama.cpp leaves out.
    composed = [unicodedata.normalize("NFC", text) for text in TEXTS]
    cases = [({"model": "gpt2", "pre": rule}, composed if rule == "qwen2" else TEXTS) for rule in RULES]
    cases += [({"model": "llama", "add_space_prefix": prefix}, TEXTS) for prefix in (True, False)]
    rows = [
        {"fields": fields, "ids": ids_by_llama_cpp(vocabularies[fields["model"]], texts, **fields)}
        for fields, texts in cases
    ]
    write("token_ids_kinds.json", {"vocabularies": vocabularies, "rows": rows})


if __name__ == "__main__":
    main()
