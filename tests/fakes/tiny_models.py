"""Complete tiny models of the real classes with random weights, in the released folder layout."""

import string
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from models.kontext import KontextTransformer

# 32 x 32 px images -> 4 x 8 x 8 latents -> 16 tokens.
IMAGE_SIZE = 32
LATENT_CHANNELS = 4
CLIP_LENGTH = 16
T5_WIDTH = 48

TRANSFORMER_CONFIG = dict(
    sample_size=8,
    patch_size=2,
    in_channels=LATENT_CHANNELS,
    out_channels=LATENT_CHANNELS,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=T5_WIDTH,
    caption_projection_dim=32,
    pooled_projection_dim=40,
    pos_embed_max_size=16,
    dual_attention_layers=(0,),
    qk_norm="rms_norm",
)

_VOCABULARY = """
a an and the of photo two three four red green blue yellow orange purple pink black white brown circle square
triangle star cross left right above below make remove add replace move with to on background
"""
_WORDS = _VOCABULARY.split()


def make_tiny_folder(path: str | Path, *, seed: int = 0) -> Path:
    """Write a whole model folder with weights drawn from `seed`; returns the folder. Takes about a second."""
    path = Path(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make_tiny_transformer().save_pretrained(path / "transformer")
        make_tiny_vae().save_pretrained(path / "vae")
        for suffix, projection in (("", 16), ("_2", 24)):
            tokenizer = _clip_tokenizer()
            tokenizer.save_pretrained(path / f"tokenizer{suffix}")
            _clip_encoder(tokenizer, projection).save_pretrained(path / f"text_encoder{suffix}")
        t5_tokenizer = _t5_tokenizer()
        t5_tokenizer.save_pretrained(path / "tokenizer_3")
        _t5_encoder(len(t5_tokenizer)).save_pretrained(path / "text_encoder_3")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(path / "scheduler")
    return path


def make_tiny_transformer(**changes: object) -> KontextTransformer:
    """A random transformer in eval mode, from the global generator; `changes` override its config."""
    return KontextTransformer(**(TRANSFORMER_CONFIG | changes)).eval()


def make_tiny_vae() -> AutoencoderKL:
    """A random autoencoder that halves the image twice."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def _clip_tokenizer() -> CLIPTokenizer:
    """Byte-pair tokens for `_WORDS`, single characters for everything else in ASCII."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    vocabulary = list(characters) + [f"{character}</w>" for character in characters]
    merges = []
    for word in _WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            if (pieces[0], pieces[1]) not in merges:
                merges.append((pieces[0], pieces[1]))
                vocabulary.append(pieces[0] + pieces[1])
            pieces[:2] = [pieces[0] + pieces[1]]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=CLIP_LENGTH)


def _t5_tokenizer() -> T5Tokenizer:
    """Unigram tokens for `_WORDS`, single characters for everything else in ASCII."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    characters = string.ascii_letters + string.digits + string.punctuation
    vocabulary = [("▁", -2.0)] + [(f"▁{word}", -3.0) for word in _WORDS]
    vocabulary += [(character, -8.0) for character in characters]
    vocabulary = list(dict(vocabulary).items())
    return T5Tokenizer(vocab=special + vocabulary, extra_ids=0, model_max_length=64)


def _clip_encoder(tokenizer: CLIPTokenizer, projection: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=projection,
            intermediate_size=32,
            projection_dim=projection,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CLIP_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()


def _t5_encoder(vocabulary: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=T5_WIDTH,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    ).eval()
