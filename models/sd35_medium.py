"""The configuration of SD3.5-Medium's transformer, which is also UniPic2-SD3.5M-Kontext's: data only."""

from typing import Any

NUM_TENSORS = 909
"""Tensors of its state dict, the position table among them."""

NUM_PARAMETERS = 2_243_171_520
"""Trained parameters. The position table adds 384 x 384 x 1536 = 226 492 416 values that are not."""


def sd35_medium_config() -> dict[str, Any]:
    """Arguments of `KontextTransformer(**sd35_medium_config())`.

    Build it under `torch.device("meta")` where shapes are enough: the position table alone is 0.9 GB in
    float32, the weights are 9.0 GB.
    """
    return {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    }
