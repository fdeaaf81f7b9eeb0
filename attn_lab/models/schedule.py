"""Which layers of a decoder rotate, and how far they see."""

from __future__ import annotations

from typing import Any


def layer_schedule(
    num_layers: int,
    *,
    pattern: str = "rrrn",
    window: int | None = 4096,
    rope_theta: float = 10000.0,
) -> list[dict[str, Any]]:
    """Layers with rotary positions and a window, and among them layers with neither.

    Layer n is of the kind `pattern[n % len(pattern)]`: "r" rotates queries and keys and sees
    `window` tokens back, "n" has no positions and sees its whole past.

    Args:
      num_layers: of the decoder.
      pattern: letters r and n, repeated.
      window: of the layers that rotate, their own token included; None has no bound.
      rope_theta: base of their rotary positions.

    Returns:
      For each layer `rope_theta` and `window`, either of which may be None: the `mixer_args` of
      `DecoderLM` for mixers that take these, as "dot_product_attention" does.

    Raises:
      ValueError: if the pattern is empty or has other letters, or the window is below 1.

    Source: Yang et al., 2025, arXiv 2501.18795.
    """
    if not pattern or set(pattern) - set("rn"):
        raise ValueError(f"pattern must be made of the letters r and n, got {pattern!r}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 or None, got {window}")
    kinds = {
        "r": {"rope_theta": rope_theta, "window": window},
        "n": {"rope_theta": None, "window": None},
    }
    return [dict(kinds[pattern[n % len(pattern)]]) for n in range(num_layers)]
