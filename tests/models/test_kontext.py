"""The Kontext transformer against SD3's, and against what a reference must and must not change."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0

from models.components import load_transformer
from models.kontext import KontextTransformer
from models.lora.attach import adapter_parameters, attach_lora
from tests.fakes.tiny_models import TRANSFORMER_CONFIG, make_tiny_transformer

Inputs = dict[str, torch.Tensor]


@pytest.fixture
def transformer(folder: Path) -> KontextTransformer:
    return load_transformer(folder, dtype=torch.float32)


@pytest.fixture
def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(
            2, 10, TRANSFORMER_CONFIG["joint_attention_dim"], generator=generator
        ),
        "pooled_projections": torch.randn(
            2, TRANSFORMER_CONFIG["pooled_projection_dim"], generator=generator
        ),
        "timestep": torch.tensor([900.0, 300.0]),
    }


def reference(height: int = 8, width: int = 8, seed: int = 2) -> torch.Tensor:
    return torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(seed))


def independent_forward(
    model: SD3Transformer2DModel, inputs: Inputs, references: list[torch.Tensor]
) -> torch.Tensor:
    """The sequence `[references, target]` spelled out: embedding by hand, output by pixel_shuffle."""

    def embed(image: torch.Tensor, place: int = 0) -> torch.Tensor:
        rows, columns = image.shape[2] // 2, image.shape[3] // 2
        patches = torch.nn.functional.unfold(image, 2, stride=2).transpose(1, 2)
        projection = model.pos_embed.proj
        moved = (0, 10, 4)[place]  # 0, .618 and 1.236 of 16, around the edge
        grid = model.pos_embed.pos_embed.view(16, 16, -1).roll(-moved, dims=1)
        top, left = (16 - rows) // 2, (16 - columns) // 2
        crop = grid[top : top + rows, left : left + columns].flatten(0, 1)
        return patches @ projection.weight.flatten(1).T + projection.bias + crop

    target = inputs["hidden_states"]
    time = model.time_text_embed(inputs["timestep"], inputs["pooled_projections"])
    text = model.context_embedder(inputs["encoder_hidden_states"])
    tokens = torch.cat([*map(embed, references, range(3)), embed(target)], dim=1)
    for block in model.transformer_blocks:
        text, tokens = block(tokens, text, time)
    patches = model.proj_out(model.norm_out(tokens[:, -16:], time))
    # proj_out orders (row, column, channel); pixel_shuffle wants (channel, row, column).
    channels_first = patches.view(2, 4, 4, 4, 4).permute(0, 4, 3, 1, 2).reshape(2, 16, 4, 4)
    return torch.nn.functional.pixel_shuffle(channels_first, 2)


@torch.no_grad()
def test_without_reference_equals_sd3_bit_for_bit(
    folder: Path, transformer: KontextTransformer, inputs: Inputs
) -> None:
    sd3 = SD3Transformer2DModel.from_pretrained(folder / "transformer").eval()
    assert list(sd3.state_dict()) == list(transformer.state_dict()), "the reference must add no parameter"
    expected = sd3(**inputs).sample
    assert torch.equal(transformer(**inputs).sample, expected)
    assert torch.equal(transformer(**inputs, reference_hidden_states=[], return_dict=False)[0], expected)


@torch.no_grad()
def test_reference_path_with_no_tokens_equals_sd3(transformer: KontextTransformer, inputs: Inputs) -> None:
    got = transformer._forward_sequence(inputs["hidden_states"], [], *list(inputs.values())[1:])
    assert torch.equal(got, transformer(**inputs).sample), "the two forwards have drifted apart"


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[(8, 8)], [(4, 12)], [(8, 8), (6, 10)], [(6, 6), (8, 8), (4, 16)]])
def test_reference_tokens_come_before_the_target(
    transformer: KontextTransformer, inputs: Inputs, sizes: list[tuple[int, int]]
) -> None:
    references = [reference(*size, seed=index) for index, size in enumerate(sizes)]
    expected = independent_forward(transformer, inputs, references)
    got = transformer(**inputs, reference_hidden_states=references).sample
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert (got - transformer(**inputs).sample).abs().max() > 1e-3, "the reference has no effect"


@torch.no_grad()
def test_the_order_of_references_matters(transformer: KontextTransformer, inputs: Inputs) -> None:
    """Attention alone would not see it: of three at centre crops, any order would give one result."""
    one, two, three = (reference(seed=seed) for seed in (2, 3, 4))
    found = [
        transformer(**inputs, reference_hidden_states=order).sample
        for order in ([one, two, three], [two, one, three], [one, three, two])
    ]
    assert all((found[0] - other).abs().max() > 1e-3 for other in found[1:])


def test_a_table_as_small_as_the_picture_has_places_for_several_references() -> None:
    model = make_tiny_transformer(pos_embed_max_size=4)
    picture = reference(8, 8)
    with torch.no_grad():
        places = [model.pos_embed(picture), *(model._embed_further(picture, place) for place in (1, 2, 3))]
    for index, one in enumerate(places):
        assert all((one - other).abs().max() > 0.1 for other in places[:index])


@torch.no_grad()
def test_samples_of_a_batch_keep_their_own_reference(transformer: KontextTransformer, inputs: Inputs) -> None:
    together = transformer(**inputs, reference_hidden_states=reference()).sample
    for row in range(2):
        alone = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        single = transformer(**alone, reference_hidden_states=reference()[row : row + 1]).sample
        torch.testing.assert_close(together[row : row + 1], single, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("with_reference", [False, True])
def test_gradient_checkpointing_keeps_every_gradient(inputs: Inputs, with_reference: bool) -> None:
    torch.manual_seed(0)
    model = make_tiny_transformer()
    options = {"reference_hidden_states": reference()} if with_reference else {}

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(**inputs, **options).sample.square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.enable_gradient_checkpointing()
    for stored, recomputed in zip(plain, gradients(), strict=True):
        assert torch.equal(stored, recomputed)


@torch.no_grad()
@pytest.mark.parametrize("with_reference", [False, True])
def test_compiles_without_graph_breaks(
    transformer: KontextTransformer, inputs: Inputs, with_reference: bool
) -> None:
    options = {"reference_hidden_states": [reference(), reference(6, 10)]} if with_reference else {}
    compiled = torch.compile(transformer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs, **options).sample, transformer(**inputs, **options).sample)


@pytest.mark.parametrize(
    "name", ["SD3Transformer2DKontextModel", "SD3Transformer2DModel", "KontextTransformer"]
)
def test_loads_folders_under_any_of_its_names(
    tmp_path: Path, transformer: KontextTransformer, inputs: Inputs, name: str
) -> None:
    transformer.save_pretrained(tmp_path / "transformer")
    config_path = tmp_path / "transformer" / "config.json"
    config = json.loads(config_path.read_text())
    assert config["_class_name"] == "SD3Transformer2DKontextModel", "saved folders keep the released name"
    config_path.write_text(json.dumps(config | {"_class_name": name}))
    loaded = load_transformer(tmp_path, dtype=torch.float32)
    assert isinstance(loaded, KontextTransformer)
    for key, tensor in transformer.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)


def test_wrong_references_are_refused(transformer: KontextTransformer, inputs: Inputs) -> None:
    with pytest.raises(ValueError, match=r"reference_hidden_states\[0\] has shape \(1, 4, 8, 8\)"):
        transformer(**inputs, reference_hidden_states=reference()[:1])
    with pytest.raises(ValueError, match="same batch and channels"):
        transformer(**inputs, reference_hidden_states=reference()[:, :3])
    with pytest.raises(TypeError, match="skip_layer"):
        transformer(**inputs, reference_hidden_states=reference(), skip_layer=[0])


class ImageProjection(torch.nn.Module):
    """As an IP adapter's: embeddings and time to what its processors read."""

    def forward(self, embeds: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return embeds, timestep[:, None] / 1000 * torch.linspace(0, 1, 8)


def with_adapters(model: KontextTransformer) -> None:
    """A LoRA that does something, and an IP adapter on the joint attention of each block."""
    torch.manual_seed(3)
    attach_lora(model, rank=2, alpha=4.0)
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.2)
    model.image_proj = ImageProjection()
    for block in model.transformer_blocks:
        block.attn.set_processor(
            SD3IPAdapterJointAttnProcessor2_0(
                hidden_size=32, ip_hidden_states_dim=12, head_dim=16, timesteps_emb_dim=8
            )
        )


def residuals(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(2, 16, 32, generator=generator) for _ in range(count)]


OPTIONS = {
    "skipped": {"skip_layers": [1]},
    "skipped last": {"skip_layers": [0, 2]},
    "one residual": {"block_controlnet_hidden_states": residuals(1)},
    "two residuals": {"block_controlnet_hidden_states": residuals(2), "skip_layers": [0]},
    "scale": {"joint_attention_kwargs": {"scale": 0.25}},
    "ip": {"joint_attention_kwargs": {"ip_adapter_image_embeds": torch.ones(2, 5, 12), "scale": 0.5}},
}


@torch.no_grad()
@pytest.mark.parametrize("name", OPTIONS)
def test_the_sequence_path_takes_sd3s_options_as_sd3_does(inputs: Inputs, name: str) -> None:
    torch.manual_seed(0)
    model, option = make_tiny_transformer(), OPTIONS[name]
    if "joint_attention_kwargs" in option:
        with_adapters(model)
    given = {key: dict(value) if isinstance(value, dict) else value for key, value in option.items()}
    expected = model(**inputs, **given).sample
    got = model._forward_sequence(inputs["hidden_states"], [], *list(inputs.values())[1:], **option)
    assert torch.equal(got, expected)
    assert option.keys() == given.keys() and all(len(option[key]) == len(given[key]) for key in option)
    plain = (
        {"joint_attention_kwargs": {"ip_adapter_image_embeds": torch.zeros(2, 5, 12)}} if name == "ip" else {}
    )
    with_one = [
        model(**inputs, **each, reference_hidden_states=reference()).sample for each in (option, plain)
    ]
    assert (with_one[0] - with_one[1]).abs().max() > 1e-3, "beside a reference it has an effect"


@torch.no_grad()
def test_beside_a_reference_blocks_are_skipped_whole_and_residuals_are_the_targets(inputs: Inputs) -> None:
    torch.manual_seed(0)
    model, shown = make_tiny_transformer(), [reference(), reference(6, 10)]
    skipped = model(**inputs, reference_hidden_states=shown, skip_layers=[1]).sample
    (control,) = residuals(1)
    controlled = model(
        **inputs, reference_hidden_states=shown, skip_layers=[1], block_controlnet_hidden_states=[control]
    ).sample
    del model.transformer_blocks[1]
    torch.testing.assert_close(skipped, independent_forward(model, inputs, shown), atol=1e-5, rtol=1e-5)

    def add(
        _: object, __: object, output: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return output[0], torch.cat([output[1][:, :-16], output[1][:, -16:] + 2 * control], dim=1)

    # Of three blocks the last adds none, and the one that is skipped adds its own to what the first came to.
    model.transformer_blocks[0].register_forward_hook(add)
    torch.testing.assert_close(controlled, independent_forward(model, inputs, shown), atol=1e-5, rtol=1e-5)
