"""MetaQuery's conditioner: learnable queries and the connector that turns what a frozen VLM makes of them into
the prompt embeddings of SD3.5 (UniPic 2.0, sections 3.1 and 4.1).

Shapes: B prompts, Q queries (256), D width of the VLM (3584), C width of the connector (1536), J the transformer's
`joint_attention_dim` (4096), P its `pooled_projection_dim` (2048).
"""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.components import read_weights
from models.folders import check_model_folder, require
from models.metaquery.config import ConnectorConfig, MetaQueryConfig, read_metaquery_config

logger = logging.getLogger(__name__)

WEIGHTS = "diffusion_pytorch_model.safetensors"
_INIT_STD = 0.02


class ConnectorAttention(nn.Module):
    """Multi-head self-attention over all queries, in both directions and without positions."""

    def __init__(self, config: ConnectorConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, Q, C] -> [B, Q, C]."""
        query, key, value = (
            projection(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class ConnectorMLP(nn.Module):
    """Two linears around tanh-GELU."""

    def __init__(self, config: ConnectorConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, Q, C] -> [B, Q, C]."""
        return self.fc2(nn.functional.gelu(self.fc1(hidden), approximate="tanh"))


class ConnectorLayer(nn.Module):
    """One pre-LN block."""

    def __init__(self, config: ConnectorConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = ConnectorAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ConnectorMLP(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, Q, C] -> [B, Q, C]."""
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + self.mlp(self.layer_norm2(hidden))


class Connector(nn.Module):
    """The stack of blocks; no norm follows the last one."""

    def __init__(self, config: ConnectorConfig):
        super().__init__()
        self.layers = nn.ModuleList(ConnectorLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, Q, C] -> [B, Q, C]."""
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, use_reentrant=False)
            else:
                hidden = layer(hidden)
        return hidden


class MetaQueryConditioner(nn.Module):
    """`meta_queries` [Q, D], the connector, and its three projectors, under the released key names.

    Attention is PyTorch's SDPA whatever the folder's config asks for.
    """

    def __init__(self, config: MetaQueryConfig):
        """Random weights: queries of length about 1, linears of std .02, residual outputs scaled by depth."""
        super().__init__()
        self.config = config
        width = config.connector_config.hidden_size
        self.meta_queries = nn.Parameter(torch.empty(config.num_queries, config.llm_hidden_size))
        self.projector_1 = nn.Linear(config.llm_hidden_size, width)
        self.connector = Connector(config.connector_config)
        self.projector_2 = nn.Linear(width, config.pooled_projection_dim)
        self.projector_3 = nn.Linear(width, config.joint_attention_dim)
        self._initialize()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.meta_queries.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.meta_queries.device

    def project(self, query_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The connector alone: the VLM's states at the queries [B, Q, D] -> prompt_embeds [B, Q, J],
        pooled_prompt_embeds [B, P] (a projection of the mean over the queries)."""
        hidden = self.connector(self.projector_1(query_hidden_states.to(self.projector_1.weight.dtype)))
        return self.projector_3(hidden), self.projector_2(hidden.mean(dim=1))

    def forward(self, read: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """`project(read(meta_queries))`; `read` shows the queries [Q, D] to the VLM and returns [B, Q, D].

        Training goes through this, so that wrappers of modules (DDP, ZeRO-3) see the queries used.
        """
        return self.project(read(self.meta_queries))

    def enable_gradient_checkpointing(self) -> None:
        """Compute each connector layer again in the backward pass instead of keeping its activations."""
        self.connector.gradient_checkpointing = True

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "MetaQueryConditioner":
        """Load a `conditioner/` folder, in eval mode.

        Raises:
            FileNotFoundError: there is no config or no weight file.
            ValueError: the config has unknown keys or other values than this code computes, or the weights are not
                exactly those it asks for; every difference is listed.
        """
        folder = Path(folder)
        config = read_metaquery_config(folder)
        with torch.device("meta"):
            conditioner = cls(config)
        state = read_weights(folder)
        problems = _differences(conditioner.state_dict(), state)
        if problems:
            raise ValueError(f"{folder}: the weights do not fit the config:\n" + "\n".join(problems))
        state = {name: tensor.to(device, dtype) for name, tensor in state.items()}
        conditioner.load_state_dict(state, assign=True)
        return conditioner.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `diffusion_pytorch_model.safetensors`, as `from_pretrained` reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(self.config.to_dict(), indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")

    @torch.no_grad()
    def _initialize(self) -> None:
        nn.init.normal_(self.meta_queries, std=1 / math.sqrt(self.config.llm_hidden_size))
        depth = self.config.connector_config.num_hidden_layers
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                residual = name.endswith((".out_proj", ".fc2"))
                nn.init.normal_(
                    module.weight, std=_INIT_STD / math.sqrt(2 * depth) if residual else _INIT_STD
                )
                nn.init.zeros_(module.bias)


def _differences(expected: dict[str, Any], found: dict[str, Tensor]) -> list[str]:
    """Every key that is missing, surplus or of another shape."""
    problems = [
        f"missing: {name} {tuple(expected[name].shape)}" for name in sorted(expected.keys() - found.keys())
    ]
    problems += [
        f"surplus: {name} {tuple(found[name].shape)}" for name in sorted(found.keys() - expected.keys())
    ]
    problems += [
        f"shape: {name} is {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & found.keys())
        if found[name].shape != expected[name].shape
    ]
    return problems


def load_conditioner(
    folder: str | Path, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> MetaQueryConditioner:
    """Load `conditioner/` of a model folder, frozen. Raises as `MetaQueryConditioner.from_pretrained`."""
    require(check_model_folder(folder, ("conditioner",)))
    part = Path(folder) / "conditioner"
    return MetaQueryConditioner.from_pretrained(part, dtype=dtype, device=device).requires_grad_(False)
