"""Which linears of an SD3-family transformer LoRA adapts, as ends of module paths.

Differs from Flow-GRPO's public list, which names `attn.*` alone: in SD3.5-Medium that matches 191 linears and
passes over the 52 of the second attention (`attn2`) in blocks 0-12. Drop the last four to compare with it.
Imports no torch, so that the config schema can name the default.
"""

DEFAULT_TARGETS: tuple[str, ...] = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn2.to_q",
    "attn2.to_k",
    "attn2.to_v",
    "attn2.to_out.0",
)
