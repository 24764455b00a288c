"""What would stop a run, found without loading weights or decoding pictures, Ray or a GPU: all of it, in one list."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import recipes
from core.failures import DataError
from core.inputs import folder_files, hash_files, stamp_files
from core.logs import relative_path_problems
from core.output import output_problems
from models.folders import METAQUERY_PARTS, PARTS, TEXT_PARTS, check_model_folder, check_vlm_folder
from models.preflight import conditioner_problems
from models.sizes import geometry
from pretrain.data.buckets import areas, bucket_size
from pretrain.data.encoded import open_encoded
from pretrain.data.index import source_files
from pretrain.data.sources import open_sources
from pretrain.flow.config import FlowRecipe
from pretrain.flow.plan import disk_needs
from pretrain.flow.sizes import measure


def preflight(recipe: FlowRecipe) -> list[str]:
    """Every problem with files, sizes and paths; empty when the run may start."""
    problems = [*_model_problems(recipe), *_data_problems(recipe), *_path_problems(recipe)]
    needs = None if problems else disk_needs(recipe, measure(recipe))
    problems += output_problems(f"output_dir={recipe.output_dir!r}", recipe.run_dir, needs)
    if recipe.data.cache_dir:
        problems += output_problems(f"data.cache_dir={recipe.data.cache_dir!r}", recipe.data.cache_dir)
    if not problems:
        problems += [*_fit_problems(recipe), *_size_problems(recipe), *_cache_problems(recipe)]
    return problems


def model_folders(recipe: FlowRecipe) -> dict[str, str]:
    """Folders of the model, by key."""
    model = recipe.model
    folders = {"model.path": model.path, "model.vlm": model.vlm, "model.conditioner": model.conditioner}
    return {key: folder for key, folder in folders.items() if folder is not None}


def held_inputs(recipe: FlowRecipe) -> dict[str, str]:
    """Identity of all that a sound recipe reads: models by their bytes, sources by path, size and time of each file."""
    files: dict[str, Path] = {}
    for key, folder in model_folders(recipe).items():
        parts = {"model.path": PARTS, "model.conditioner": METAQUERY_PARTS[3:]}.get(key, (".",))
        files |= folder_files(key, folder, parts)
    sources = {
        f"data.sources[{i}]": stamp_files(source_files(source))
        for i, source in enumerate(recipe.data.sources)
        if source.kind != "shapes"
    }
    return hash_files(files) | sources


def _model_problems(recipe: FlowRecipe) -> Iterator[str]:
    model = recipe.model
    parts: tuple[str, ...] = ("transformer", "vae", "scheduler")
    if not recipe.uses_vlm and not recipe.data.cache.text:
        parts += TEXT_PARTS
    yield from (
        f"model.path: {problem}" for problem in check_model_folder(recipes.resolve(model.path), parts)
    )
    if recipe.uses_vlm:
        yield from (f"model.vlm: {problem}" for problem in check_vlm_folder(recipes.resolve(str(model.vlm))))
        if model.conditioner is not None:
            folder = recipes.resolve(model.conditioner)
            yield from (
                f"model.conditioner: {problem}" for problem in check_model_folder(folder, METAQUERY_PARTS[3:])
            )


def _data_problems(recipe: FlowRecipe) -> Iterator[str]:
    for source in recipe.data.sources:
        if source.kind == "shapes":
            continue
        try:
            source_files(source)
        except DataError as error:
            yield str(error)


def _fit_problems(recipe: FlowRecipe) -> Iterator[str]:
    """Whether a saved conditioner fits its neighbours."""
    model = recipe.model
    if model.conditioner is not None:
        found = conditioner_problems(
            recipes.resolve(model.conditioner) / "conditioner",
            ("model.path", recipes.resolve(model.path) / "transformer"),
            ("model.vlm", recipes.resolve(str(model.vlm))),
        )
        yield from (f"model.conditioner: {problem}" for problem in found)


def _size_problems(recipe: FlowRecipe) -> Iterator[str]:
    """Whether the transformer can make pictures of the buckets' sizes."""
    model = geometry(recipes.resolve(recipe.model.path))
    if recipe.data.multiple % model.multiple:
        yield (
            f"data.multiple={recipe.data.multiple} is no multiple of {model.multiple}, the VAE's factor times the "
            "transformer's patch size"
        )
    for area in areas(recipe.data.resolution):
        largest = max(
            max(bucket_size(k, area, recipe.data.multiple))
            for k in range(7 if recipe.data.aspect_buckets else 1)
        )
        if largest > model.largest:
            yield (
                f"data.resolution: about {area} px make sides of {largest}, the transformer's position table ends at "
                f"{model.largest}"
            )


def _cache_problems(recipe: FlowRecipe) -> Iterator[str]:
    """Whether the cache has all that the batches take from it; opening the sources indexes them if nothing has yet."""
    cache = recipe.data.cache
    if not (cache.latents or cache.text or cache.queries):
        return
    try:
        open_encoded(recipe.data, open_sources(recipe.data))
    except DataError as error:
        yield str(error)


def _path_problems(recipe: FlowRecipe) -> Iterator[str]:
    read = {
        "model.path": recipe.model.path, "model.vlm": recipe.model.vlm,
        "model.conditioner": recipe.model.conditioner, "data.cache_dir": recipe.data.cache_dir or None,
    }  # fmt: skip
    yield from relative_path_problems(
        {f"output_dir={recipe.output_dir!r}": recipe.output_dir},
        read={f"{key}={path!r}": path for key, path in read.items()},
    )
