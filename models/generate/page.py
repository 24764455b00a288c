"""A page in the browser for one loaded model: a prompt, perhaps a picture to edit and others, and the result. Needs
Gradio.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from models.generate.jobs import Options, job_pictures, orders_of_line
from models.generate.metadata import png_bytes
from models.generate.model import Generator, ModelSpec, made_on, weights_record
from models.generate.task_lines import Refused
from models.sizes import geometry


class Page:
    """What the page's button does, apart from Gradio."""

    def __init__(self, spec: ModelSpec, options: Options, folder: Path) -> None:
        """Load the model; pictures are kept in `folder`, with their metadata."""
        self.options, self.folder, self.geometry = options, folder, geometry(spec.model)
        self.record = weights_record(spec) | made_on(spec) | {"batch": 1}
        self.generator = Generator(spec)
        self.count = 0

    def draw(
        self,
        prompt: str,
        picture: str | None,
        seed: float,
        steps: float,
        guidance: float,
        further: Sequence[str] | None = None,
    ) -> str:
        """The path of the PNG made; `picture` is that of a picture to edit, `further` has those of other references.

        Raises:
            Refused, DataFailure: with the reason.
        """
        self.count += 1
        options = replace(self.options, seed=int(seed), steps=int(steps), guidance=guidance)
        output = self.folder / f"{self.count:05d}.png"
        if further and not picture:
            raise Refused(["further references are beside a picture to edit: give one"])
        images = [*([picture] if picture else []), *(further or [])]
        (order,) = orders_of_line(prompt, images, output, options, model=self.geometry, origin="page")
        (pixels,) = self.generator.generate([order.job], [job_pictures(order.job)])
        order.output.write_bytes(png_bytes(pixels, self.record | asdict(order.job)))
        return str(order.output)


def serve(spec: ModelSpec, options: Options, port: int) -> None:
    """Serve the page on this machine until interrupted.

    Raises:
        Refused: Gradio is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise Refused([f"--page needs Gradio ({error}): pip install 'unipic-rl[page]'"]) from error
    with tempfile.TemporaryDirectory(prefix="unipic-rl-") as folder:
        page = Page(spec, options, Path(folder))

        def draw(*inputs: Any) -> str:
            try:
                return page.draw(*inputs)
            except (ValueError, RuntimeError) as error:
                raise gradio.Error(str(error)) from error

        gradio.Interface(
            draw,
            [
                gradio.Textbox(label="Prompt, or how to edit"),
                gradio.Image(label="Picture to edit", type="filepath"),
                gradio.Number(options.seed, label="Seed", precision=0),
                gradio.Slider(1, 100, options.steps, step=1, label="Steps"),
                gradio.Slider(0, 10, options.guidance, label="Guidance"),
                gradio.File(
                    label="Further references, in order", file_count="multiple", file_types=["image"]
                ),
            ],
            gradio.Image(label="Picture", type="filepath", format="png"),
            title=spec.model.name,
        ).launch(server_port=port)
