"""Encoded training samples: latents of a fixed number of draws, and one embedding for each distinct text."""

import hashlib
import json
import logging
import os
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from models.components import load_vae
from models.folders import TEXT_PARTS, t5_length
from models.latents import encode_images
from models.text import SD3TextEncoder
from worlds.shapes.scenes.world import Scene
from worlds.shapes.training.config import KontextRecipe
from worlds.shapes.training.shapes import edit_batch, t2i_batch, to_tensor

log = logging.getLogger(__name__)

_CHUNK = 64


@dataclass(frozen=True)
class Pool:
    """N samples of each task, U distinct texts. Row 0 of the texts is the empty prompt.

    t2i_latents, edit_sources, edit_targets: N C H W, shifted and scaled; t2i_text, edit_text: N, rows of the
    texts; prompt_embeds: U L D; pooled_embeds: U P.
    """

    t2i_latents: Tensor
    t2i_text: Tensor
    edit_sources: Tensor
    edit_targets: Tensor
    edit_text: Tensor
    prompt_embeds: Tensor
    pooled_embeds: Tensor


def load_text(folder: str | Path) -> SD3TextEncoder:
    """SD3's three text encoders of a folder, on the CPU in float32, reading as many tokens as they were made for."""
    return SD3TextEncoder.from_pretrained(
        folder, dtype=torch.float32, device="cpu", max_sequence_length=t5_length(folder)
    )


def load_pool(recipe: KontextRecipe) -> Pool:
    """Read the pool of these encoders and settings from `pool_dir`, or make it (minutes) and keep it there."""
    path = Path(recipe.pool_dir) / f"pool-{_digest(recipe)}.safetensors"
    if path.is_file():
        log.info("encoded samples from %s", path)
        return Pool(**load_file(path))
    pool = build_pool(recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({item.name: getattr(pool, item.name).contiguous() for item in fields(pool)}, partial)
    os.replace(partial, path)
    return pool


@torch.no_grad()
def build_pool(recipe: KontextRecipe) -> Pool:
    """Draw and encode `pool_size` samples of each task, as a function of `pool_seed`."""
    vae = load_vae(recipe.vae)
    t2i_latents, sources, targets = [], [], []
    t2i_texts: list[str] = []
    edit_texts: list[str] = []
    for step in tqdm(range(-(-recipe.pool_size // _CHUNK)), desc="encoding", mininterval=2):
        count = min(_CHUNK, recipe.pool_size - step * _CHUNK)
        t2i = t2i_batch(recipe.pool_seed, step, count)
        edit = edit_batch(recipe.pool_seed, step, count)

        def encode(scenes: list[Scene]) -> Tensor:
            return encode_images(vae, to_tensor(scenes))

        t2i_latents.append(encode(t2i.scenes))
        sources.append(encode(edit.sources))
        targets.append(encode(edit.targets))
        t2i_texts += t2i.prompts
        edit_texts += edit.prompts
    texts = ["", *sorted({*t2i_texts, *edit_texts})]
    rows = {text: row for row, text in enumerate(texts)}
    embeds = load_text(recipe.text).encode(texts)
    return Pool(
        t2i_latents=torch.cat(t2i_latents),
        t2i_text=torch.tensor([rows[text] for text in t2i_texts]),
        edit_sources=torch.cat(sources),
        edit_targets=torch.cat(targets),
        edit_text=torch.tensor([rows[text] for text in edit_texts]),
        prompt_embeds=torch.stack([item.prompt_embeds for item in embeds]).float(),
        pooled_embeds=torch.stack([item.pooled_prompt_embeds for item in embeds]).float(),
    )


def _digest(recipe: KontextRecipe) -> str:
    """Identity of the encoders' files and of what is drawn."""
    digest = hashlib.sha256(json.dumps([recipe.pool_size, recipe.pool_seed]).encode())
    folders = [Path(recipe.vae) / "vae", *(Path(recipe.text) / part for part in TEXT_PARTS)]
    for folder in folders:
        for path in sorted(folder.glob("*")):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
