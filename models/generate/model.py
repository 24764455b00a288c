"""The model that makes the pictures: which one a folder holds, what identifies its weights, and the call that draws.

Importing this module needs no torch, so that a command line can refuse at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.failures import DataFailure, InfrastructureFailure
from core.pictures import decode_picture, picture_name
from models.folders import METAQUERY_PARTS, PARTS, is_metaquery_folder, model_sha256, t5_length, vlm_sha256
from models.generate.jobs import Job
from models.generate.task_lines import Refused
from models.preflight import model_problems

if TYPE_CHECKING:
    import numpy as np
    import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a generator is built from, on any node.

    Attributes:
        vlm: folder of the Qwen2.5-VL; None for Kontext, which has text encoders.
        max_sequence_length: T5 tokens; None for MetaQuery.
        position_mode: what positions MetaQuery's VLM sees; None for Kontext.
    """

    model: Path
    vlm: Path | None = None
    adapter: Path | None = None
    dtype: str
    device: str
    threads: int
    max_sequence_length: int | None = None
    position_mode: str | None = None

    @property
    def folders(self) -> dict[str, Path | None]:
        """Where the model's parts are."""
        return {"model": self.model, "vlm": self.vlm, "adapter": self.adapter}


def checked(spec: ModelSpec) -> ModelSpec:
    """The spec with absolute paths, and with what its folders say where it says nothing.

    Raises:
        Refused: everything that is missing or does not fit.
    """
    metaquery, length, mode = is_metaquery_folder(spec.model), spec.max_sequence_length, spec.position_mode
    problems = model_problems(spec.model, spec.vlm, model_key="--model", vlm_key="--vlm")
    if mode is not None and not metaquery:
        problems.append(
            f"--position-mode {mode}: {spec.model} is a Kontext folder (it has no conditioner/), which has none"
        )
    if length is not None and metaquery:
        problems.append(f"--max-sequence-length {length}: MetaQuery reads prompts whole")
    if problems:
        raise Refused(problems)
    if metaquery:
        mode = mode or "flat"
    else:
        length = length or t5_length(spec.model)
    folders: dict[str, Any] = {name: path and path.absolute() for name, path in spec.folders.items()}
    return replace(spec, **folders, max_sequence_length=length, position_mode=mode)


def weights_record(spec: ModelSpec) -> dict[str, Any]:
    """The part of a picture's record that says which weights made it: hashes, and how they were used.

    Reads every weight file once: some ten seconds for a model of 16 GB.

    Raises:
        Refused: an adapter that is not there, cannot be read or does not fit the model.
    """
    parts = PARTS if spec.vlm is None else METAQUERY_PARTS
    return {
        "adapter_sha256": _adapter_sha256(spec),
        "model_sha256": model_sha256(spec.model, parts),
        "vlm_sha256": None if spec.vlm is None else vlm_sha256(spec.vlm),
        "dtype": spec.dtype,
        "max_sequence_length": spec.max_sequence_length,
        "position_mode": spec.position_mode,
    }


class Generator:
    """A loaded model that makes pictures. A plain class, so that it works here and as a Ray actor."""

    def __init__(self, spec: ModelSpec) -> None:
        """Load the pipeline and attach the adapter. Raises RuntimeError for weights that cannot be loaded."""
        import torch
        from safetensors import SafetensorError

        torch.set_num_threads(spec.threads)
        self.spec = spec
        try:
            self.pipeline = _load_pipeline(spec, getattr(torch, spec.dtype))
            if spec.adapter is not None:
                self.pipeline.load_adapter(spec.adapter)
        except (ValueError, OSError, KeyError, SafetensorError) as error:
            raise RuntimeError(f"{spec.model} cannot be loaded: {error}") from error
        self.pipeline.set_progress_bar_config(disable=True)

    def ready(self) -> str:
        """Answers once the model is loaded."""
        return f"{os.uname().nodename}:{os.getpid()}"

    def generate(self, jobs: Sequence[Job], pictures: Sequence[Sequence[bytes]]) -> np.ndarray:
        """uint8 N H W 3: a picture for each of N jobs that are `alike`, in one forward pass a step.

        Args:
            pictures: the encoded references of each job, in order.

        Raises:
            DataFailure: a picture cannot be used, a prompt cannot be read, or the latents are not finite.
            InfrastructureFailure: the device has too little memory at present.
        """
        import torch

        from models.latents import decode_latents

        try:
            latents = self.latents(jobs, pictures)
            return decode_latents(self.pipeline.vae, latents).numpy()
        except ValueError as error:
            raise DataFailure(str(error)) from error
        except torch.OutOfMemoryError as error:
            raise InfrastructureFailure(
                f"out of memory on {self.spec.device} making {len(jobs)} pictures of {jobs[0].height} x "
                f"{jobs[0].width} px: lower --batch-size or the size"
            ) from error

    def latents(self, jobs: Sequence[Job], pictures: Sequence[Sequence[bytes]]) -> torch.Tensor:
        """Normalised latents N C h w, float32: one CPU generator per job, so that its noise is its seed's alone.

        Raises ValueError for inputs that cannot be used and for results that are not finite.
        """
        import torch

        options: dict[str, Any] = {}
        if self.spec.max_sequence_length is not None:
            options["max_sequence_length"] = self.spec.max_sequence_length
        if jobs[0].image is not None:
            options["image"] = [
                [
                    decode_picture(one, picture_name(image))
                    for image, one in zip(job.images, data, strict=True)
                ]
                for job, data in zip(jobs, pictures, strict=True)
            ]
            options["reference_pixels"] = jobs[0].reference_pixels
        latents = self.pipeline(
            prompt=[job.prompt for job in jobs],
            negative_prompt=[job.negative_prompt for job in jobs],
            height=jobs[0].height,
            width=jobs[0].width,
            num_inference_steps=jobs[0].steps,
            guidance_scale=jobs[0].guidance,
            generator=[torch.Generator().manual_seed(job.seed) for job in jobs],
            output_type="latent",
            **options,
        ).images
        if not torch.isfinite(latents).all():
            raise ValueError(f"the model came to latents that are not finite, with {asdict(jobs[0])}")
        return latents


def made_on(spec: ModelSpec) -> dict[str, Any]:
    """The part of a picture's record that says where the model was and what computed."""
    from importlib.metadata import version

    import core

    libraries = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    places = {name: path and str(path) for name, path in spec.folders.items()}
    machine = {"device": spec.device, "threads": spec.threads}
    return places | machine | {"version": core.__version__, "libraries": libraries}


def _load_pipeline(spec: ModelSpec, dtype: torch.dtype) -> Any:
    if spec.vlm is None:
        from models.pipeline import KontextPipeline

        return KontextPipeline.from_pretrained(spec.model, torch_dtype=dtype, device=spec.device)
    from models.metaquery.pipeline import MetaQueryPipeline

    mode: Any = spec.position_mode
    return MetaQueryPipeline.from_pretrained(
        spec.model, spec.vlm, torch_dtype=dtype, device=spec.device, position_mode=mode
    )


def _adapter_sha256(spec: ModelSpec) -> str | None:
    """Over tensors and settings alike: the same tensors with another alpha draw something else."""
    if spec.adapter is None:
        return None
    from models.lora.load import load_adapter

    try:
        settings, adapter = load_adapter(spec.model, spec.adapter, "float32")
    except (ValueError, OSError) as error:
        raise Refused([f"--adapter {spec.adapter}: {error}"]) from error
    decides = [adapter.sha256, settings.rank, settings.alpha, sorted(settings.targets)]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
