"""Encoded training samples: latents of a fixed number of draws, and one embedding for each distinct text."""

import hashlib
import json
import logging
import os
from collections import defaultdict
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
from worlds.shapes.training.shapes import edit_batch, insert_batch, t2i_batch, to_tensor

log = logging.getLogger(__name__)

_CHUNK = 64


@dataclass(frozen=True)
class Pool:
    """N samples of each task, U distinct texts. Row 0 of the texts is the empty prompt.

    *_latents, *_sources, *_shown, *_targets: N C H W, shifted and scaled; *_text: N, rows of the texts;
    prompt_embeds: U L D; pooled_embeds: U P. What belongs to insertion is None where it is not trained.
    """

    t2i_latents: Tensor
    t2i_text: Tensor
    edit_sources: Tensor
    edit_targets: Tensor
    edit_text: Tensor
    prompt_embeds: Tensor
    pooled_embeds: Tensor
    insert_sources: Tensor | None = None
    insert_shown: Tensor | None = None
    insert_targets: Tensor | None = None
    insert_text: Tensor | None = None


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
    tensors = {item.name: getattr(pool, item.name) for item in fields(pool)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}, partial)
    os.replace(partial, path)
    return pool


@torch.no_grad()
def build_pool(recipe: KontextRecipe) -> Pool:
    """Draw and encode `pool_size` samples of each task, as a function of `pool_seed`."""
    vae = load_vae(recipe.vae)
    latents: dict[str, list[Tensor]] = defaultdict(list)
    prompts: dict[str, list[str]] = defaultdict(list)

    def encode(name: str, scenes: list[Scene]) -> None:
        latents[name].append(encode_images(vae, to_tensor(scenes)))

    for step in tqdm(range(-(-recipe.pool_size // _CHUNK)), desc="encoding", mininterval=2):
        count = min(_CHUNK, recipe.pool_size - step * _CHUNK)
        t2i = t2i_batch(recipe.pool_seed, step, count)
        edit = edit_batch(recipe.pool_seed, step, count)
        encode("t2i_latents", t2i.scenes)
        encode("edit_sources", edit.sources)
        encode("edit_targets", edit.targets)
        prompts["t2i_text"] += t2i.prompts
        prompts["edit_text"] += edit.prompts
        if recipe.insert_share:
            inserts = insert_batch(recipe.pool_seed, step, count)
            encode("insert_sources", [item.source for item in inserts])
            encode("insert_shown", [item.shown for item in inserts])
            encode("insert_targets", [item.target for item in inserts])
            prompts["insert_text"] += [item.instruction for item in inserts]
    texts = ["", *sorted({text for drawn in prompts.values() for text in drawn})]
    rows = {text: row for row, text in enumerate(texts)}
    embeds = load_text(recipe.text).encode(texts)
    tensors = {name: torch.cat(parts) for name, parts in latents.items()}
    tensors |= {name: torch.tensor([rows[text] for text in drawn]) for name, drawn in prompts.items()}
    return Pool(
        prompt_embeds=torch.stack([item.prompt_embeds for item in embeds]).float(),
        pooled_embeds=torch.stack([item.pooled_prompt_embeds for item in embeds]).float(),
        **tensors,
    )


def _digest(recipe: KontextRecipe) -> str:
    """Identity of the encoders' files and of what is drawn."""
    drawn = [recipe.pool_size, recipe.pool_seed, *(["insert"] if recipe.insert_share else [])]
    digest = hashlib.sha256(json.dumps(drawn).encode())
    folders = [Path(recipe.vae) / "vae", *(Path(recipe.text) / part for part in TEXT_PARTS)]
    for folder in folders:
        for path in sorted(folder.glob("*")):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
