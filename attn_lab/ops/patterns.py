"""Static patterns along one axis."""

from attn_kernels.attention import Mask
from attn_lab.ops.masks import causal_mask, head_masks, sliding_window_mask
from attn_lab.ops.predicates import (
    Below,
    Blocks,
    LastOfBlock,
    Multiple,
    Offset,
    PowerOfTwo,
    Rolled,
)

__all__ = [
    "global_window_mask",
    "log_sparse_mask",
    "offset_mask",
    "power_mask",
    "shifted_group_mask",
    "sink_window_mask",
    "sparse_transformer_mask",
]


def offset_mask(offset: int) -> Mask:
    """Every query sees the one key at a fixed distance: `j = i + offset`.

    Source: Li et al., 2021, arXiv 2112.05364.
    """
    return Mask(Offset(offset))


def sink_window_mask(window: int, sinks: int) -> Mask:
    """The first tokens and the last ones: `j <= i`, and `j < sinks` or `i - j < window`.

    Args:
      window: how many tokens up to the query it sees.
      sinks: how many tokens at the start every query sees.

    Raises:
      ValueError: if an argument is negative.

    Source: Xiao et al., StreamingLLM, 2023, arXiv 2309.17453.
    """
    _check(window=window, sinks=sinks)
    return causal_mask() & (_recent(window) | Mask(Below(sinks)))


def power_mask(window: int, sinks: int = 0, block: int = 1) -> Mask:
    """Recent tokens and those at distances of powers of two, so that reach doubles with depth.

    `j <= i`, and `i - j < window`, `j < sinks`, or `i // block - j // block` is 0 or a power of 2.

    Args:
      window: how many tokens up to the query it sees.
      sinks: how many tokens at the start every query sees.
      block: the number of tokens in a block; distances are counted in blocks.

    Raises:
      ValueError: if an argument is negative, or `block` is 0.

    Source: PowerAttention, 2025, arXiv 2503.03588.
    """
    _check(window=window, sinks=sinks)
    _check(1, block=block)
    far = Mask(Blocks(block)) | Mask(PowerOfTwo(block))
    return causal_mask() & (_recent(window) | Mask(Below(sinks)) | far)


def log_sparse_mask() -> Mask:
    """The token itself and those at distances of powers of two: `power_mask(1)`.

    Source: Li et al., LogSparse, 2019, arXiv 1907.00235.
    """
    return power_mask(1)


def sparse_transformer_mask(stride: int, kind: str) -> Mask:
    """Recent tokens and every `stride`-th one, causal.

    "strided": `i - j < stride` or `(i - j) % stride == 0`; "fixed": `i // stride == j // stride` or
    `j % stride == stride - 1`.

    Args:
      stride: about the square root of the length makes the cost O(T^1.5).
      kind: "strided" or "fixed".

    Raises:
      ValueError: if `stride` is not positive or `kind` is unknown.

    Source: Child et al., 2019, arXiv 1904.10509.
    """
    _check(1, stride=stride)
    if kind not in ("strided", "fixed"):
        raise ValueError(f"kind must be 'strided' or 'fixed', got {kind!r}")
    if kind == "strided":
        return causal_mask() & (_recent(stride) | Mask(Multiple(stride)))
    return causal_mask() & (Mask(Blocks(stride)) | Mask(LastOfBlock(stride)))


def global_window_mask(num_global: int, window: int, causal: bool = False) -> Mask:
    """A band and a few tokens that see and are seen by all: `|i - j| <= window`, or i or j global.

    Args:
      num_global: how many tokens at the start are global.
      window: how far the band reaches on both sides.
      causal: whether to keep only `j <= i`.

    Raises:
      ValueError: if `num_global` or `window` is negative.

    Source: Beltagy et al., Longformer, 2020, arXiv 2004.05150.
    """
    _check(num_global=num_global, window=window)
    ends = Mask(Below(num_global)) | Mask(Below(num_global, of_query=True))
    mask = ends | sliding_window_mask(window, window)
    return mask & causal_mask() if causal else mask


def shifted_group_mask(
    num_heads: int,
    group: int,
    variant: str = "split",
    shifted_heads: int | None = None,
    sinks: int = 0,
    causal: bool = True,
    length: int | None = None,
) -> Mask:
    """Attention inside groups of tokens; some heads shift the groups by half of their size.

    "split": `(i - s) // group == (j - s) // group` and `j <= i`, with `s = group // 2` in shifted
    heads and 0 in others. "roll" has positions `(i - s) % length` and `(j - s) % length` in place
    of i and j, so that one group holds the last and the first tokens, in this order.

    Args:
      num_heads: H.
      group: the number of tokens in a group.
      variant: "split" or "roll".
      shifted_heads: how many heads, the last ones, are shifted; by default `H // 2`.
      sinks: how many tokens at the start are seen by all, causally.
      causal: whether to keep `j <= i`, in rolled order for "roll".
      length: T, of which only "roll" depends.

    Returns:
      A Mask whose dense form is `[H, T, T]`.

    Raises:
      ValueError: if a number is out of its range, `variant` is unknown, or "roll" has no `length`.

    Source: Chen et al., LongLoRA, 2023, arXiv 2309.12307; sinks: SinkLoRA, 2024, arXiv 2406.05678.
    """
    shifted = num_heads // 2 if shifted_heads is None else shifted_heads
    _check(1, num_heads=num_heads, group=group)
    _check(sinks=sinks, shifted_heads=shifted)
    if shifted > num_heads:
        raise ValueError(f"shifted_heads must be at most {num_heads}, got {shifted}")
    if variant not in ("split", "roll"):
        raise ValueError(f"variant must be 'split' or 'roll', got {variant!r}")
    if variant == "roll" and length is None:
        raise ValueError("length must be given for variant 'roll', got None")

    def narrowed(mask):
        return mask & causal_mask() if causal else mask

    def groups(shift):
        if variant == "split":
            return narrowed(Mask(Blocks(group, shift)))
        return Mask(Rolled(narrowed(Mask(Blocks(group))).predicate, shift, length))

    first = narrowed(Mask(Below(sinks)))
    plain, moved = (groups(s) | first if sinks else groups(s) for s in (0, group // 2))
    return head_masks([plain] * (num_heads - shifted) + [moved] * shifted)


def _recent(window: int) -> Mask:
    return sliding_window_mask(window - 1, 0) if window else Mask(Below(0))


def _check(least: int = 0, **numbers: int) -> None:
    for name, value in numbers.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
