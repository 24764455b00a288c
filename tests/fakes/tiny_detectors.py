"""Detectors and a CLIP for tests: the real classes with random weights, changed where a test needs an answer."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)

from rewards.geneval.clip_colors import TEMPLATES
from rewards.geneval.lab_colors import SRGB
from rewards.geneval.mask2former import build_model, published_config
from rewards.geneval.mmcv_ops import prepare_ops
from rewards.geneval.names import COLORS
from rewards.geneval.settings import DetectorSettings
from worlds.shapes.scenes.world import COLORS as SHAPE_COLORS

SMALL = (160, 128)
"""Scale at which Swin-S takes half a second an image."""


GAIN = 3
"""How much the tiny CLIP's image tower is stirred: enough to tell brown from red by more than brightness."""
RIDGE = 0.3
"""Damping of its projection, so that it also knows objects that it was not taught."""


def save_swin_s(path: Path, *, seed: int = 0) -> Path:
    """The published Swin-S Mask2Former with random weights, saved as mmengine saves; surer than random of its
    classes, so that scores spread over [0, 1]."""
    _save_mmdet(path, DetectorSettings(), seed)
    return path


def _save_mmdet(path: Path, settings: DetectorSettings, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, _, _ = build_model(settings)
    with torch.no_grad():
        model.panoptic_head.cls_embed.weight.mul_(60)
    torch.save({"meta": {"epoch": 50}, "state_dict": model.state_dict()}, path)


TINY_MMDET = """
_base_ = ["{published}"]
_attention = dict(embed_dims=32, num_heads=4)
_ffn = dict(embed_dims=32, feedforward_channels=64)
model = dict(
    backbone=dict(embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4]),
    panoptic_head=dict(
        in_channels=[16, 32, 64, 128],
        feat_channels=32,
        out_channels=32,
        positional_encoding=dict(num_feats=16),
        pixel_decoder=dict(
            positional_encoding=dict(num_feats=16),
            encoder=dict(num_layers=1, layer_cfg=dict(self_attn_cfg=_attention, ffn_cfg=_ffn)),
        ),
        transformer_decoder=dict(
            num_layers=2,
            layer_cfg=dict(self_attn_cfg=_attention, cross_attn_cfg=_attention, ffn_cfg=_ffn),
        ),
    ),
)
"""


def save_tiny_mmdet(folder: Path) -> DetectorSettings:
    """The published config with a hundredth of the weights, saved as `save_swin_s` does; at the scale SMALL."""
    prepare_ops()
    import mmdet

    config = folder / "tiny.py"
    config.write_text(TINY_MMDET.format(published=published_config(mmdet.__path__)))
    settings = DetectorSettings(config=str(config), checkpoint=str(folder / "tiny.pth"), scale=SMALL)
    _save_mmdet(folder / "tiny.pth", settings, seed=0)
    return settings


def save_tiny_hub(folder: Path, *, classes: int = 80, seed: int = 0) -> Path:
    """A tiny Mask2Former with random weights and preprocessor, as a hub folder."""
    swin = SwinConfig(
        image_size=64,
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 4],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=4,
        num_queries=20,
        num_labels=classes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight.mul_(60)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}'
    )
    return folder


def save_tiny_clip(folder: Path, *, swapped: bool = False) -> Path:
    """A tiny CLIP that tells the ten colours apart: its projection of images is solved for, from painted discs.

    swapped: it was taught on pictures with red and blue exchanged.
    """
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={word: k for k, word in enumerate(vocabulary)}, merges=[], model_max_length=64
    )
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 64}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(
                text_config=size | text,
                vision_config=size | {"image_size": 32, "patch_size": 8},
                projection_dim=32,
            )
        ).eval()
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_convert_rgb=True
    )
    _teach_colors(model, tokenizer, processor, swapped)
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return folder


def _teach_colors(model, tokenizer, processor, swapped: bool) -> None:
    """Make the image tower average its patches, and solve for the projection on discs and boxes of each colour."""
    pictures, names = [], []
    for name, rgb in [*SRGB.items(), *SHAPE_COLORS.items()]:
        for draw in ("ellipse", "rectangle"):
            for margin in (0, 2, 4):
                picture = Image.new("RGB", (20, 20), "#999999")
                box = (margin, margin, 19 - margin, 19 - margin)
                getattr(ImageDraw.Draw(picture), draw)(box, fill=rgb[::-1] if swapped else rgb)
                pictures.append(picture)
                names.append(name)
    with torch.no_grad():
        model.vision_model.embeddings.position_embedding.weight.zero_()
        for layer in model.vision_model.encoder.layers:
            layer.self_attn.q_proj.weight.zero_()
            for part in (layer.self_attn.v_proj, layer.self_attn.out_proj, layer.mlp.fc1, layer.mlp.fc2):
                part.weight.mul_(GAIN)
        pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
        features = model.vision_model(pixel_values=pixels).pooler_output
        targets = _answers(model, tokenizer)[:, [COLORS.index(name) for name in names]].T
        damped = torch.cat([features, RIDGE * torch.eye(features.shape[1])])
        wanted = torch.cat([targets, torch.zeros(features.shape[1], targets.shape[1])])
        model.visual_projection.weight.copy_(torch.linalg.lstsq(damped, wanted).solution.T)


def _answers(model, tokenizer) -> torch.Tensor:
    """[D, 10]: for each colour the embedding that its own prompts answer with 1 and all others with 0."""
    rows = []
    for name in ("circle", "ball"):
        for color in COLORS:
            prompts = [template.format(color=color, name=name) for template in TEMPLATES]
            tokens = tokenizer(prompts, padding=True, return_tensors="pt")
            texts = torch.nn.functional.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
            rows.append(torch.nn.functional.normalize(texts.mean(0), dim=-1))
    return torch.linalg.pinv(torch.stack(rows)) @ torch.eye(len(COLORS)).repeat(2, 1)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of coarse coloured noise, which gives a random network something to see."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BILINEAR)
