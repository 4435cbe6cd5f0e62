"""Small tokenizers with the traits of those that people use, and chat templates with the traits of theirs."""

from __future__ import annotations

import functools
import json
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "The tank of the K7 holds 1.2 litres. Its cable is 90 cm long; the lid is made of steel and glass.",
    "How long is the cable? How much does the tank hold? What is the lid made of?",
    "user\n\nassistant\n\nsystem Text: Question: Answer: INST [INST] [/INST] <<SYS>>",
]
SPECIAL = ["<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>"]


def _trained(core: Tokenizer, trainer: Any) -> Tokenizer:
    core.train_from_iterator(CORPUS * 4, trainer)
    core.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    return core


def byte_level(prefix_space: bool = False, regex: str | None = None) -> Tokenizer:
    core = Tokenizer(models.BPE())
    own = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=regex is None)
    split = [] if regex is None else [pre_tokenizers.Split(Regex(regex), "isolated")]
    core.pre_tokenizer = pre_tokenizers.Sequence([*split, own])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(core, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False))


def sentence_piece(prepend: bool) -> Tokenizer:
    """Llama 2's: a normalizer that writes blanks as ``▁`` and, if it prepends, one before each text."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prepend else spaces
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    # In training alone: a piece may begin with a blank, and has none elsewhere.
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokens = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    core = _trained(core, trainers.BpeTrainer(vocab_size=600, special_tokens=tokens, show_progress=False))
    content = json.loads(core.to_str())  # the trainer has added the bytes, too
    content["added_tokens"] = [t for t in content["added_tokens"] if not t["content"].startswith("<0x")]
    content["pre_tokenizer"] = None
    return Tokenizer.from_str(json.dumps(content))


def metaspace(scheme: Any) -> Tokenizer:
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    return _trained(core, trainer)


def word_piece() -> Tokenizer:
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return _trained(
        core, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    )


def words() -> Tokenizer:
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "</s>"], show_progress=False)
    return _trained(core, trainer)


def ignoring_merges() -> Tokenizer:
    """Llama 3's: a word that the vocabulary holds is taken whole, whatever the merges say."""
    content = json.loads(byte_level().to_str())
    content["model"]["ignore_merges"] = True
    content["model"]["vocab"]["</s>"] = content["model"]["vocab"].pop("Ġof")  # and none of the added tokens
    content["model"]["merges"] = [m for m in content["model"]["merges"] if "Ġof" not in ("".join(m), *m)]
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "</s>"]
    content["pre_tokenizer"]["pretokenizers"][-1]["use_regex"] = False
    return Tokenizer.from_str(json.dumps(content))


def with_added(**options: bool) -> Tokenizer:
    """Control tokens that are not special; or that take the blanks beside them."""
    core = byte_level()
    added = "<|user|>", "<|assistant|>", "<think>"
    content = json.loads(core.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in SPECIAL[3:5]]
    core = Tokenizer.from_str(json.dumps(content))
    core.add_tokens([AddedToken(word, normalized=False, **options) for word in added])
    return core


_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

KINDS = {
    "byte level": byte_level,
    "byte level, prefix space": lambda: byte_level(prefix_space=True),
    "byte level, words with signs": lambda: byte_level(regex=_QWEN),
    "byte level, merges ignored": ignoring_merges,
    "sentencepiece, prepends": lambda: sentence_piece(True),
    "sentencepiece": lambda: sentence_piece(False),
    "metaspace always": lambda: metaspace("always"),
    "metaspace first": lambda: metaspace("first"),
    "metaspace never": lambda: metaspace("never"),
    "wordpiece": word_piece,
    "words": words,
    "added, not special": with_added,
    "added, takes blanks after it": lambda: with_added(rstrip=True),
    "added, takes blanks before it": lambda: with_added(lstrip=True),
}

TEMPLATES = {
    # ChatML's kind: control tokens around each turn
    "turns": (
        "{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    # Llama 2's kind: signs that are no tokens, and a blank before the text
    "instructions": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
        "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
    ),
    # Gemma's kind: the text is stripped
    "stripped": (
        "{{ bos_token }}{% for m in messages %}<|user|>\n{{ m.content | trim }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    # Zephyr's kind: the text right behind a control token
    "close": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% else %}<|user|>{% endif %}"
        "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
}


@functools.cache
def tokenizer(kind: str, template: str | None = None) -> Any:
    from transformers import PreTrainedTokenizerFast

    core = KINDS[kind]()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=template, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
