"""A whole model folder in the released layout, at SD3.5-Medium's published shapes, with random weights.

With it a recipe runs at its real size where no weights can be had: every tensor, batch and message has the size of the
real model's, the pictures are noise and the rewards mean nothing. Tokenizers are the shapes world's (small
vocabularies, the published sequence lengths).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.sizes import SIZES, fill, transformer_config
from models.components import load_tokenizer, save_component
from models.folders import TOKENIZERS

TOKENIZER_SOURCE = Path(__file__).resolve().parents[1] / "recipes" / "shapes" / "base"
TOKENIZER_LENGTHS = (77, 77, 256)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench model`."""
    parser.add_argument("folder", type=Path, help="the model folder to write: 16 GB in bfloat16 at full size")
    parser.add_argument("--size", choices=SIZES, default="sd35m")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where the weights are drawn"
    )
    parser.add_argument("--seed", type=int, default=0)


def run(arguments: argparse.Namespace) -> int:
    """Write the folder. Refuses one that exists."""
    if arguments.folder.exists():
        raise SystemExit(f"{arguments.folder} exists: remove it, or name another folder")
    write_random_model(arguments.folder, arguments.size, device=arguments.device, seed=arguments.seed)
    print(f"{arguments.folder}: {arguments.size}, random weights, bfloat16")
    return 0


def write_random_model(folder: Path, size: str, *, device: str = "cpu", seed: int = 0) -> None:
    """Write transformer, autoencoder, text encoders, tokenizers and scheduler; one part in memory at a time."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    for index, (name, build) in enumerate(parts(size).items()):
        with torch.device("meta"):
            part = build()
        part = torch.nn.Module.to(part, torch.bfloat16).to_empty(device=device)
        if hasattr(part, "tie_weights"):
            part.tie_weights()
        fill(part, seed + index)
        save_component(part.to("cpu"), folder / name)
    for name, length in zip(TOKENIZERS, TOKENIZER_LENGTHS, strict=True):
        tokenizer = load_tokenizer(TOKENIZER_SOURCE, name)
        tokenizer.model_max_length = length
        tokenizer.save_pretrained(folder / name)
    save_component(FlowMatchEulerDiscreteScheduler(shift=3.0), folder / "scheduler")


def parts(size: str) -> dict[str, Callable[[], Any]]:
    """Constructors of the parts that have weights, by folder name."""
    from models.kontext import KontextTransformer

    full, config = size == "sd35m", transformer_config(size)
    pooled = config["pooled_projection_dim"]
    small = _Clip(pooled // 2, 2, 2, "quick_gelu")
    return {
        "transformer": lambda: KontextTransformer(**config),
        "vae": lambda: _autoencoder(full, config["in_channels"]),
        "text_encoder": lambda: _clip(_Clip(768, 12, 12, "quick_gelu") if full else small),
        "text_encoder_2": lambda: _clip(_Clip(1280, 32, 20, "gelu") if full else small),
        "text_encoder_3": lambda: _t5(full, config["joint_attention_dim"]),
    }


class _Clip(NamedTuple):
    width: int
    layers: int
    heads: int
    activation: str


def _clip(shape: _Clip) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    tokenizer = load_tokenizer(TOKENIZER_SOURCE, TOKENIZERS[0])
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=shape.width,
            intermediate_size=4 * shape.width,
            projection_dim=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            hidden_act=shape.activation,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _t5(full: bool, width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    inner, layers, heads = (10240, 24, 64) if full else (64, 2, 2)
    return T5EncoderModel(
        T5Config(
            vocab_size=32128,
            d_model=width,
            d_kv=64,
            d_ff=inner,
            num_layers=layers,
            num_heads=heads,
            feed_forward_proj="gated-gelu",
        )
    )


def _autoencoder(full: bool, channels: int) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512) if full else (8, 16, 16, 16),
        layers_per_block=2,
        latent_channels=channels,
        norm_num_groups=32 if full else 4,
        sample_size=1024,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
