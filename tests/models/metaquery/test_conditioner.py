"""The conditioner: its size, its arithmetic against PyTorch's own encoder layer, and its folder."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.folders import METAQUERY_PARTS, check_model_folder, check_vlm_folder
from models.lora.attach import hash_state
from models.metaquery.conditioner import WEIGHTS, MetaQueryConditioner, load_conditioner
from models.metaquery.config import ConnectorConfig, MetaQueryConfig
from tests.fakes.tiny_metaquery import TINY_CONFIG, make_tiny_conditioner


def millions(module: torch.nn.Module) -> float:
    return round(sum(p.numel() for p in module.parameters()) / 1e6, 1)


def test_the_released_size() -> None:
    with torch.device("meta"):
        conditioner = MetaQueryConditioner(MetaQueryConfig())
    projectors = sum(millions(getattr(conditioner, f"projector_{k}")) for k in (1, 2, 3))
    assert millions(conditioner) == 903.5 and conditioner.meta_queries.shape == (256, 3584)
    assert millions(conditioner.connector) == 887.6
    assert round(millions(conditioner.connector) + projectors, 1) in (902.5, 902.6)
    names = {name for name, _ in conditioner.named_parameters()}
    layer = {
        f"connector.layers.23.{part}.{kind}"
        for part in (
            *(f"self_attn.{k}_proj" for k in ("q", "k", "v", "out")),
            "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2",
        )
        for kind in ("weight", "bias")
    }  # fmt: skip
    assert layer <= names and len(names) == 24 * len(layer) + 3 * 2 + 1


@torch.no_grad()
def test_project_equals_pytorchs_encoder_layers() -> None:
    conditioner = make_tiny_conditioner()
    config, width = TINY_CONFIG.connector_config, TINY_CONFIG.connector_config.hidden_size
    hidden = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0))
    expected = conditioner.projector_1(hidden)
    for layer in conditioner.connector.layers:
        stock = torch.nn.TransformerEncoderLayer(
            width, config.num_attention_heads, config.intermediate_size, dropout=0.0, layer_norm_eps=1e-6,
            activation=lambda x: torch.nn.functional.gelu(x, approximate="tanh"), batch_first=True, norm_first=True,
        )  # fmt: skip
        own = layer.state_dict()
        stacked = {
            f"self_attn.in_proj_{kind}": torch.cat([own[f"self_attn.{k}_proj.{kind}"] for k in "qkv"])
            for kind in ("weight", "bias")
        }
        renamed = {"layer_norm": "norm", "mlp.fc": "linear", "self_attn.out": "self_attn.out"}
        for name, tensor in own.items():
            for ours, theirs in renamed.items():
                if name.startswith(ours):
                    stacked[theirs + name.removeprefix(ours)] = tensor
        stock.load_state_dict(stacked)
        expected = stock(expected)
    embeds, pooled = conditioner.project(hidden)
    torch.testing.assert_close(embeds, conditioner.projector_3(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, conditioner.projector_2(expected.mean(1)), atol=1e-5, rtol=1e-5)
    assert embeds.shape == (2, 6, 48) and pooled.shape == (2, 40)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    hidden = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointed in (False, True):
        conditioner = make_tiny_conditioner()
        if checkpointed:
            conditioner.enable_gradient_checkpointing()
        embeds, pooled = conditioner(lambda queries: hidden + queries)  # noqa: B023 - called at once
        (embeds.square().sum() + pooled.square().sum()).backward()
        gradients.append({name: p.grad for name, p in conditioner.named_parameters()})
    assert all(torch.equal(gradients[1][name], g) for name, g in gradients[0].items())
    assert gradients[0]["meta_queries"].abs().max() > 0


def test_folder_round_trips(tmp_path: Path) -> None:
    conditioner = make_tiny_conditioner()
    conditioner.save_pretrained(tmp_path / "conditioner")
    again = load_conditioner(tmp_path, dtype=torch.float32)
    assert again.config == TINY_CONFIG and not again.training
    assert hash_state(again.state_dict()) == hash_state(conditioner.state_dict())
    assert not any(p.requires_grad for p in again.parameters())
    assert load_conditioner(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert json.loads((tmp_path / "conditioner" / "config.json").read_text())["_class_name"] == (
        "StableDiffusion3Conditioner"
    )


def test_a_released_config_is_read_without_its_attention() -> None:
    released = {
        "_class_name": "StableDiffusion3Conditioner", "_diffusers_version": "0.34.0",
        "connector_config": {
            "_attn_implementation": "flash_attention_2", "hidden_act": "gelu_pytorch_tanh", "hidden_size": 1536,
            "intermediate_size": 8960, "num_attention_heads": 24, "num_hidden_layers": 24,
        },
        "joint_attention_dim": 4096, "llm_hidden_size": 3584, "num_queries": 256, "pooled_projection_dim": 2048,
    }  # fmt: skip
    assert MetaQueryConfig.from_dict(released) == MetaQueryConfig()
    assert MetaQueryConfig.from_dict(MetaQueryConfig().to_dict()) == MetaQueryConfig()


def test_every_fault_of_a_config_is_reported() -> None:
    values = TINY_CONFIG.to_dict()
    values["num_querys"] = values.pop("num_queries")
    values["connector_config"] |= {"hidden_act": "relu", "rope_theta": 1e4}
    with pytest.raises(ValueError) as error:
        MetaQueryConfig.from_dict(values)
    for part in ("hidden_act='relu'", "unknown key num_querys", "missing key num_queries",
                 "unknown key connector_config.rope_theta"):  # fmt: skip
        assert part in str(error.value)
    with pytest.raises(ValueError, match="no 'connector_config'"):
        MetaQueryConfig.from_dict({"num_queries": 4})
    with pytest.raises(ValueError, match="not divisible by num_attention_heads=7"):
        ConnectorConfig(num_attention_heads=7) and MetaQueryConfig(ConnectorConfig(num_attention_heads=7))
    with pytest.raises(ValueError, match="num_queries=0"):
        MetaQueryConfig(num_queries=0)


def test_missing_and_surplus_weights_are_listed(tmp_path: Path) -> None:
    folder = tmp_path / "conditioner"
    make_tiny_conditioner().save_pretrained(folder)
    state = load_file(folder / WEIGHTS)
    del state["projector_2.bias"], state["connector.layers.1.mlp.fc1.weight"]
    state["projector_4.weight"] = torch.zeros(2)
    state["meta_queries"] = torch.zeros(5, 64)
    save_file(state, folder / WEIGHTS)
    with pytest.raises(ValueError) as error:
        MetaQueryConditioner.from_pretrained(folder)
    for line in ("missing: connector.layers.1.mlp.fc1.weight (48, 32)", "missing: projector_2.bias (40,)",
                 "surplus: projector_4.weight (2,)", "meta_queries is (5, 64), expected (6, 64)"):  # fmt: skip
        assert line in str(error.value)


def test_folder_checks_name_what_is_missing(tmp_path: Path, metaquery_folders: tuple[Path, Path]) -> None:
    folder, vlm = metaquery_folders
    assert check_model_folder(folder, METAQUERY_PARTS) == [] == check_vlm_folder(vlm)
    assert "text_encoder: missing" in check_model_folder(folder)[0]
    with pytest.raises(FileNotFoundError, match="conditioner: missing subfolder"):
        load_conditioner(tmp_path, dtype=torch.float32)
    with pytest.raises(FileNotFoundError, match="config.json: missing"):
        MetaQueryConditioner.from_pretrained(tmp_path)
    assert "no such folder" in check_vlm_folder(tmp_path / "absent")[0]
    assert "model_type is None" in check_vlm_folder_of(tmp_path, vlm)


def check_vlm_folder_of(tmp_path: Path, vlm: Path) -> str:
    """The problem of a VLM whose config names no model."""
    copy = tmp_path / "vlm"
    copy.mkdir()
    for path in vlm.iterdir():
        (copy / path.name).symlink_to(path)
    (copy / "config.json").unlink()
    (copy / "config.json").write_text("{}")
    (problem,) = check_vlm_folder(copy)
    return problem
