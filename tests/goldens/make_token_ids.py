"""Makes ``token_ids.json``: llama.cpp's own token ids for the embedded model's tokenizer.

pip install llama-cpp-python && python -m tests.goldens.make_token_ids PATH/TO/MODEL.gguf
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

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


def main() -> None:
    from llama_cpp import Llama  # type: ignore[import-not-found]

    model = Llama(sys.argv[1], vocab_only=True, verbose=False)
    rows = [
        {"text": text, "ids": model.tokenize(text.encode(), add_bos=False, special=True)}
        for text in TEXTS
    ]
    target = Path(__file__).with_name("token_ids.json")
    target.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
