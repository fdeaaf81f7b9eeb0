"""Moving averages and the mixers around them."""

from attn_lab import ops
from attn_lab.catalogue.mechanism import ENGINE_1, QKV, Mechanism, Sizes

MEGA = "Mega: Moving Average Equipped Gated Attention", 2022, "2209.10655"
MEGALODON = "Megalodon: Efficient LLM Pretraining and Inference with Unlimited Context Length"
MEGALODON = MEGALODON, 2024, "2404.08801"
FORMS = tuple({"form": form} for form in ("recurrent", "chunk", "associative"))


def _ema_flops(s: Sizes) -> int:
    return 4 * s.B * s.T * s.D * s.P


def _turning_flops(s: Sizes) -> int:
    return 12 * s.B * s.T * s.D * s.P


def _wkv_flops(s: Sizes) -> int:
    return 10 * s.B * s.T * s.D


ROWS = (
    Mechanism(
        "damped_ema",
        ops.damped_ema,
        *MEGA,
        "recurrence",
        arguments={"x": ("normal", "BTD")}
        | {name: ("normal", "DP") for name in ("alpha", "delta", "beta", "gamma")}
        | {"omega": ("normal", "D")},
        causal=(True,),
        variants=FORMS,
        flops=_ema_flops,
        golden=("damped_ema", "damped_ema_bidirectional", "damped_ema_state"),
    ),
    Mechanism(
        "elementwise_attention",
        ops.elementwise_attention,
        *MEGA,
        arguments=QKV | {"bias": ("normal", "TS")},
        settings={"activation": "laplace"},
        golden=(
            "elementwise_attention",
            "elementwise_attention_relu2",
            "elementwise_attention_chunked",
        ),
        **ENGINE_1,
    ),
    Mechanism(
        "mega",
        ops.mega_gated_output,
        *MEGA,
        "linear",
        golden=("mega_gated_output",),
    ),
    Mechanism(
        "complex_ema",
        ops.complex_ema,
        *MEGALODON,
        "recurrence",
        arguments={
            "x": ("normal", "BTD"),
            "alpha": ("normal", "DP"),
            "delta": ("normal", "DP"),
            "theta": ("normal", "D"),
            "gamma": ("normal", ("D", "P", 2)),
            "omega": ("normal", "D"),
        },
        causal=(True,),
        variants=FORMS,
        flops=_turning_flops,
        golden=("complex_ema",),
    ),
    Mechanism(
        "timestep_norm",
        ops.timestep_norm,
        *MEGALODON,
        "linear",
        golden=("timestep_norm", "timestep_norm_prior"),
    ),
    Mechanism(
        "megalodon",
        ops.normalized_shared_qk,
        *MEGALODON,
        "linear",
        golden=("normalized_shared_qk",),
    ),
    Mechanism(
        "wkv",
        ops.wkv,
        "RWKV: Reinventing RNNs for the Transformer Era",
        2023,
        "2305.13048",
        "recurrence",
        arguments={name: ("normal", "BTD") for name in "kv"}
        | {name: ("normal", "D") for name in ("time_decay", "time_first")},
        causal=(True,),
        flops=_wkv_flops,
        golden=("wkv",),
    ),
)
