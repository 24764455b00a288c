"""LoRA on the transformer: attach, select, read, write, hash. Files are in `models/lora/files.py`.

A state is a plain dict from `<module path>.lora_A.weight` and `<module path>.lora_B.weight` to CPU tensors.
"""

import hashlib
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from models.lora.linear import LoraLinear
from models.lora.targets import DEFAULT_TARGETS

logger = logging.getLogger(__name__)

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class LoraReport:
    """What `attach_lora` did: the number of linears it matched and of adapter parameters it made."""

    matched: int
    parameters: int


@dataclass(frozen=True)
class LoraSettings:
    """What must be known beside the tensors: the update is `alpha / rank * B @ A` on the `targets`."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Adapter:
    """A published policy: the learner's version, `hash_state(tensors)`, and the state."""

    version: int
    sha256: str
    tensors: State


def attach_lora(
    transformer: SD3Transformer2DModel,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] = DEFAULT_TARGETS,
    adapter_name: str = "policy",
    seed: int = 0,
    trainable: bool = True,
) -> LoraReport:
    """Add one LoRA adapter in the base layers' dtype and freeze the base.

    A is Kaiming-uniform as in PEFT, but drawn in sorted-name order from a CPU generator of its own, so that
    it depends on `seed` alone and no other random stream moves; B is zero. The first adapter becomes the
    active one. A later one (`adapter_name="reference", trainable=False` for the KL term) changes neither
    which adapter is active nor what is trained; `use_adapter` selects it.

    Args:
        targets: ends of module paths, such as `attn.to_q`; each must match at least one linear layer.

    Raises:
        ValueError: a target matches no linear layer (all such are named), or the adapter exists already.
    """
    matched = _match_targets(transformer, targets)
    if adapter_name in attached_adapters(transformer):
        raise ValueError(
            f"the transformer already has an adapter named {adapter_name!r}: choose another name"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=sorted(set(targets)),
        lora_dropout=0.0,
        bias="none",
    )
    config._register_custom_module({nn.Linear: LoraLinear})
    _inject(transformer, config, adapter_name)
    parameters = adapter_parameters(transformer, adapter_name)
    _initialise(parameters, seed)
    for parameter in parameters.values():
        parameter.requires_grad_(trainable)
    count = sum(p.numel() for p in parameters.values())
    logger.info(
        "LoRA %r: %d linear layers matched, %.2f M parameters", adapter_name, len(matched), count / 1e6
    )
    return LoraReport(len(matched), count)


def attached_adapters(transformer: nn.Module) -> list[str]:
    """Names of the adapters on the transformer, sorted."""
    return sorted({name for _, layer in _named_lora_layers(transformer) for name in layer.lora_A})


def adapter_settings(transformer: SD3Transformer2DModel, adapter_name: str = "policy") -> LoraSettings:
    """Rank, alpha and targets with which an adapter was attached. Raises ValueError if there is none."""
    _require_adapter(transformer, adapter_name)
    config = transformer.peft_config[adapter_name]
    return LoraSettings(rank=config.r, alpha=config.lora_alpha, targets=tuple(sorted(config.target_modules)))


def adapter_parameters(transformer: nn.Module, adapter_name: str = "policy") -> dict[str, nn.Parameter]:
    """The live parameters of an adapter under their state names, sorted. Raises ValueError if it has none."""
    _require_adapter(transformer, adapter_name)
    named = {
        f"{path}.{part}.weight": getattr(layer, part)[adapter_name].weight
        for path, layer in _named_lora_layers(transformer)
        if adapter_name in layer.lora_A
        for part in ("lora_A", "lora_B")
    }
    return dict(sorted(named.items()))


def adapter_state(transformer: nn.Module, adapter_name: str = "policy") -> State:
    """A copy of an adapter: sorted names, contiguous CPU tensors in the adapter's dtype.

    Under ZeRO-3 call it inside `deepspeed.zero.GatheredParameters(adapter_parameters(...).values())`.
    """
    return {
        name: parameter.detach().to("cpu", copy=True).contiguous()
        for name, parameter in adapter_parameters(transformer, adapter_name).items()
    }


@torch.no_grad()
def load_adapter_state(
    transformer: nn.Module, state: Mapping[str, torch.Tensor], adapter_name: str = "policy"
) -> None:
    """Overwrite an adapter in place, casting to its dtype.

    After a cast `hash_state(adapter_state(...))` is the hash of the cast tensors, not of `state`.

    Raises:
        ValueError: names missing or surplus, or shapes that differ; nothing is written then.
    """
    parameters = adapter_parameters(transformer, adapter_name)
    missing, surplus = sorted(parameters.keys() - state.keys()), sorted(state.keys() - parameters.keys())
    if missing or surplus:
        raise ValueError(
            f"adapter {adapter_name!r} does not fit this state: {len(missing)} names missing {missing[:3]}, "
            f"{len(surplus)} surplus {surplus[:3]}; attach the adapter with the targets it was saved with"
        )
    wrong = [name for name, parameter in parameters.items() if parameter.shape != state[name].shape]
    if wrong:
        raise ValueError(
            f"adapter {adapter_name!r}: {len(wrong)} tensors of another shape, first {wrong[0]}: "
            f"{tuple(state[wrong[0]].shape)} given, {tuple(parameters[wrong[0]].shape)} attached; "
            "attach the adapter with the rank it was saved with"
        )
    for name, parameter in parameters.items():
        parameter.copy_(state[name])


def hash_state(state: Mapping[str, torch.Tensor]) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor, in sorted-name order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def use_adapter(transformer: nn.Module, name: str | None) -> Iterator[None]:
    """Run the transformer with one adapter, or with none (`None`), and restore what was selected before.

    With gradient checkpointing, `backward` must run inside the block too: the recomputed forward uses the
    adapter selected at that time.

    Raises:
        ValueError: no adapter of that name is attached.
    """
    layers = _lora_layers(transformer)
    if name is not None and not any(name in layer.lora_A for layer in layers):
        _require_adapter(transformer, name)
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer, active, _ in before:
            # PEFT's set_adapter and enable_adapters also rewrite requires_grad, which would unfreeze the
            # reference adapter and freeze the policy under a live optimizer. The two fields alone decide
            # what the forward adds.
            layer._active_adapter = active if name is None else [name]
            layer._disable_adapters = name is None
        yield
    finally:
        for layer, active, disabled in before:
            layer._active_adapter, layer._disable_adapters = active, disabled


def _match_targets(transformer: nn.Module, targets: Sequence[str]) -> set[str]:
    """Paths of the linears that end in a target, by PEFT's rule. Base layers of attached adapters count."""
    if isinstance(targets, str) or not targets:
        raise ValueError(f"LoRA targets must be a non-empty list of module path ends, not {targets!r}")
    linears = [
        path
        for path, module in transformer.named_modules()
        if (isinstance(module, nn.Linear) and ".lora_" not in path and not path.endswith(".base_layer"))
        or isinstance(module, LoraLayer)
    ]
    matches = {target: {p for p in linears if p == target or p.endswith(f".{target}")} for target in targets}
    dead = sorted(target for target, paths in matches.items() if not paths)
    if dead:
        raise ValueError(
            f"LoRA targets match no linear layer of this transformer: {', '.join(dead)}. "
            f"Remove or correct them; the last linear layers are {', '.join(linears[-3:])}"
        )
    return set().union(*matches.values())


def _inject(transformer: SD3Transformer2DModel, config: LoraConfig, name: str) -> None:
    """Add an adapter by PEFT, then undo what it does to the others: deselect and freeze them."""
    attached = attached_adapters(transformer)
    trained = [
        p for other in attached for p in adapter_parameters(transformer, other).values() if p.requires_grad
    ]
    selected = [(layer._active_adapter, layer._disable_adapters) for layer in _lora_layers(transformer)]
    # PEFT's own initialisation would advance the global generator, and a second adapter is meant to be there.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        transformer.add_adapter(config, name)
    for parameter in trained:
        parameter.requires_grad_(True)
    if selected:
        # One selection holds for all layers, so also for those that only the new adapter has wrapped.
        for layer in _lora_layers(transformer):
            layer._active_adapter, layer._disable_adapters = selected[0]


def _initialise(parameters: Mapping[str, nn.Parameter], seed: int) -> None:
    """A uniform within 1/sqrt(in_features) (Kaiming with a = sqrt 5), B zero; `parameters` are sorted."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name.endswith("lora_B.weight"):
                parameter.zero_()
                continue
            bound = 1 / math.sqrt(parameter.shape[1])
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


def _named_lora_layers(transformer: nn.Module) -> list[tuple[str, LoraLayer]]:
    return [(path, module) for path, module in transformer.named_modules() if isinstance(module, LoraLayer)]


def _lora_layers(transformer: nn.Module) -> list[LoraLayer]:
    return [layer for _, layer in _named_lora_layers(transformer)]


def _require_adapter(transformer: nn.Module, name: str) -> None:
    attached = attached_adapters(transformer)
    if name not in attached:
        raise ValueError(f"no adapter named {name!r} on the transformer (attached: {attached or 'none'})")
