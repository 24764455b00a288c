"""Small collections in the layouts that pre-training reads, made by hand."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from pretrain.data.config import DataConfig, Resolution, SourceConfig


def picture(number: int, width: int = 40, height: int = 40) -> Image.Image:
    """A smooth picture that differs from number to number."""
    x, y = np.meshgrid(np.linspace(0, 200, width), np.linspace(0, 200, height))
    pixels = np.stack([x, y, np.full_like(x, 17 * number % 250)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def t2i_members(count: int, *, first: int = 0, size: tuple[int, int] = (40, 40)) -> dict[str, bytes]:
    """`count` pictures with captions `caption N`."""
    members: dict[str, bytes] = {}
    for number in range(first, first + count):
        members[f"{number:04d}.png"] = encoded(picture(number, *size))
        members[f"{number:04d}.txt"] = f"caption {number}\n".encode()
    return members


def edit_members(count: int, *, size: tuple[int, int] = (40, 40)) -> dict[str, bytes]:
    """`count` edits with instructions `instruction N`; the target is the source's number + 100."""
    members: dict[str, bytes] = {}
    for number in range(count):
        members[f"{number:04d}.source.png"] = encoded(picture(number, *size))
        members[f"{number:04d}.target.png"] = encoded(picture(number + 100, *size))
        members[f"{number:04d}.json"] = json.dumps({"instruction": f"instruction {number}"}).encode()
    return members


def config_of(tmp_path: Path, *sources: SourceConfig, **keys: object) -> DataConfig:
    """Square pictures of 32 px from these sources, without dropout; `keys` change it."""
    tasks = {source.task for source in sources}
    values: dict[str, object] = {
        "edit_share": {("edit",): 1.0, ("t2i",): 0.0}.get(tuple(sorted(tasks)), 0.5),
        "multiple": 8,
        "resolution": [Resolution(side=32)],
        "prompt_dropout": 0.0,
        "cache_dir": str(tmp_path / "cache"),
        "index_workers": 1,
    }
    return DataConfig(sources=list(sources), **(values | keys))  # type: ignore[arg-type]


def tar_source(task: str, *paths: Path, **keys: object) -> SourceConfig:
    return SourceConfig(kind="webdataset", task=task, paths=[str(path) for path in paths], **keys)  # type: ignore[arg-type]


def shapes_source(task: str, samples: int = 64, **keys: object) -> SourceConfig:
    return SourceConfig(kind="shapes", task=task, samples=samples, **keys)  # type: ignore[arg-type]
