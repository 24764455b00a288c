"""The configuration of MetaQuery's conditioner under its released keys. Needs no torch."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

RELEASED_CLASS_NAME = "StableDiffusion3Conditioner"

_COMPUTED = {"hidden_act": "gelu_pytorch_tanh", "attention_dropout": 0.0, "model_type": None}
"""Keys that a connector's config may state with this value only (None: any); the code has no other."""


@dataclass(frozen=True)
class ConnectorConfig:
    """The transformer between VLM and DiT; the defaults are the released one's (887.6 M parameters)."""

    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    layer_norm_eps: float = 1e-6


@dataclass(frozen=True)
class MetaQueryConfig:
    """The conditioner; the defaults are the released one's (903.5 M parameters, for Qwen2.5-VL-7B and SD3.5-Medium).

    Attributes:
        num_queries: learnable queries, which become as many prompt tokens of the transformer.
        llm_hidden_size: width of the VLM's language model.
        pooled_projection_dim, joint_attention_dim: what the transformer's config says under these names.
    """

    connector_config: ConnectorConfig = field(default_factory=ConnectorConfig)
    num_queries: int = 256
    llm_hidden_size: int = 3584
    pooled_projection_dim: int = 2048
    joint_attention_dim: int = 4096

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that make no model."""
        connector = self.connector_config
        sizes = {**asdict(connector), **{k: v for k, v in asdict(self).items() if k != "connector_config"}}
        bad = [f"{name}={value!r}" for name, value in sizes.items() if not _positive(name, value)]
        if bad:
            raise ValueError(f"not positive whole numbers: {', '.join(bad)}")
        if connector.hidden_size % connector.num_attention_heads:
            raise ValueError(
                f"connector hidden_size={connector.hidden_size} is not divisible by "
                f"num_attention_heads={connector.num_attention_heads}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MetaQueryConfig":
        """From the JSON of a `conditioner/config.json`. Keys that begin with `_`, the attention implementation
        and dtypes say nothing of the model and are ignored.

        Raises:
            ValueError: unknown or missing keys, or values this code does not compute; all of them.
        """
        if not isinstance(values, Mapping) or not isinstance(values.get("connector_config"), Mapping):
            raise ValueError("not a conditioner's config: it has no 'connector_config' object")
        own = _known(values)
        connector = _known(own.pop("connector_config"))
        problems = []
        for key, value in _COMPUTED.items():
            if key in connector and value is not None and connector[key] != value:
                problems.append(f"connector_config.{key}={connector[key]!r}: only {value!r} is supported")
            connector.pop(key, None)
        for part, given, kind in (("", own, cls), ("connector_config.", connector, ConnectorConfig)):
            names = {one.name for one in fields(kind)} - {"connector_config"}
            problems += [f"unknown key {part}{key}" for key in sorted(given.keys() - names)]
            required = names - {"layer_norm_eps"}
            problems += [f"missing key {part}{key}" for key in sorted(required - given.keys())]
        if problems:
            raise ValueError("; ".join(problems))
        return cls(connector_config=ConnectorConfig(**connector), **own)

    def to_dict(self) -> dict[str, Any]:
        """The JSON of a `conditioner/config.json`, with the released class name."""
        return {"_class_name": RELEASED_CLASS_NAME, **asdict(self)}


def read_metaquery_config(folder: str | Path) -> MetaQueryConfig:
    """The config of a `conditioner/` folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: as `MetaQueryConfig.from_dict`, naming the file.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing config file; give the conditioner/ folder of a model")
    try:
        return MetaQueryConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys that do not describe the model."""
    ignored = ("attn_implementation", "dtype", "torch_dtype", "transformers_version")
    return {key: value for key, value in values.items() if not key.startswith("_") and key not in ignored}


def _positive(name: str, value: object) -> bool:
    if name == "layer_norm_eps":
        return isinstance(value, float) and value > 0
    return isinstance(value, int) and value > 0
