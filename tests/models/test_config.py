"""A decoder's hyper-parameters, as they are shown."""

from __future__ import annotations

from typing import Any

from jaxsp.models.config import DecoderConfig
from jaxsp.models.rope import make_rope

SIZES: dict[str, Any] = {
    "vocab_size": 49152, "width": 576, "layers": 30, "heads": 9, "kv_heads": 3, "head_width": 64,
    "mlp_width": 1536, "window": 8192, "norm_epsilon": 1e-5, "tied_head": True,
}  # fmt: skip
NEAR, FAR = (make_rope({"rope_theta": theta}, 64) for theta in (1e4, 1e6))


def fits_a_screen(text: str) -> bool:
    lines = text.splitlines()
    return len(lines) <= 15 and max(map(len, lines)) <= 100


def test_what_all_layers_share_is_shown_once_and_defaults_are_not():
    shown = repr(DecoderConfig(**SIZES, ropes=(NEAR,) * 30))
    assert fits_a_screen(shown)
    flat = " ".join(shown.split())
    assert flat.startswith("DecoderConfig(vocab_size=49152, width=576, layers=30,")
    assert "ropes=30 × Rope(32 frequencies, 1 to 0.000133, mean 0.0115))" in flat
    assert "qkv_bias" not in flat
    assert "sliding_windows" not in flat


def test_layers_of_two_kinds_are_told_apart():
    ropes = (NEAR, NEAR, FAR) * 20 + (NEAR, NEAR)
    windows = (512, 512, None) * 20 + (512, 512)
    sizes: dict[str, Any] = SIZES | {"layers": 62}
    config = DecoderConfig(**sizes, ropes=ropes, sliding_windows=windows, qkv_bias=True)
    assert fits_a_screen(repr(config))
    flat = " ".join(repr(config).split())
    assert "sliding_windows=[512, None][0 0 1 0 0 1 0 0 1" in flat
    near, far = "1 to 0.000133, mean 0.0115", "1 to 1.54e-06, mean 0.00124"
    assert f"ropes=[Rope(32 frequencies, {near}), Rope(32 frequencies, {far})]" in flat
    assert "qkv_bias=True" in flat
