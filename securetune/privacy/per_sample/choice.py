"""Which module of a model gets which exact per-sample path, and which is refused."""

import inspect
import re
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from securetune.errors import PrivacyError
from securetune.privacy.per_sample.attention import AttentionPath, attention_path
from securetune.privacy.per_sample.bags import BagPath
from securetune.privacy.per_sample.conv import conv_path
from securetune.privacy.per_sample.disentangled import disentangled_path, table_path
from securetune.privacy.per_sample.frozen import frozen_linear_path
from securetune.privacy.per_sample.functional import FunctionalPath, PromptPath, position_bias_path
from securetune.privacy.per_sample.lora import LoraPath, is_plain_lora
from securetune.privacy.per_sample.moe import AdaptedRouterPath, ExpertsPath, routed_path
from securetune.privacy.per_sample.norms import norm_path
from securetune.privacy.per_sample.paths import DensePath, EmbeddingPath, Path
from securetune.privacy.per_sample.recurrent import recurrent_path
from securetune.privacy.per_sample.subclass import SubclassPath
from securetune.privacy.per_sample.tied_uses import tied_uses_path

if TYPE_CHECKING:
    from securetune.privacy.per_sample.engine import PerSampleGradients

# weak: a class made in a function keeps alive what its methods close over
_sources: WeakKeyDictionary[type[nn.Module], str] = WeakKeyDictionary()
_KNOWN_LAYERS = (
    nn.Linear,
    nn.Embedding,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.conv._ConvNd,
    nn.modules.instancenorm._InstanceNorm,
)


def find_paths(model: nn.Module, engine: "PerSampleGradients") -> list[Path]:
    """Choose a path for every module that owns a trainable parameter.

    Args:
        model: The model.
        engine: Who will record.

    Returns:
        The paths, not yet attached, in the order of the modules.

    Raises:
        PrivacyError: If a module couples samples or has no exact path.
    """
    paths: list[Path] = []
    covered: list[str] = []  # prefixes of modules that are handled as a whole
    for name, module in model.named_modules():
        _refuse_coupling(name, module)
        _refuse_merged_adapter(name, module)
        _refuse_embedding_options(name, module)
        if any(name == prefix or not prefix or name.startswith(f"{prefix}.") for prefix in covered):
            continue
        if _has_trainable_prompt(module):
            prefix = f"{name}.prompt_encoder" if name else "prompt_encoder"
            paths.append(PromptPath(engine, prefix, module))
            covered.append(prefix)
        position_bias = position_bias_path(engine, name, module)
        if position_bias is not None:
            paths.append(position_bias)
            covered.append(position_bias.name)
        table = table_path(engine, name, module)
        if table is not None:
            paths.append(table)
            covered += table.prefixes
        disentangled = disentangled_path(engine, name, module, paths)
        if disentangled is not None:
            paths.append(disentangled)
        if _is_unlike_its_class(module):
            paths.append(FunctionalPath(engine, name, module))
            covered.append(name)
            continue
        routed = routed_path(engine, name, module)
        if routed is not None:
            paths.append(routed)
            has_adapters = isinstance(routed, ExpertsPath) and routed.has_adapters
            if has_adapters or isinstance(routed, FunctionalPath | AdaptedRouterPath):
                covered.append(name)
            continue
        if is_plain_lora(name, module):
            paths.append(LoraPath(engine, name, module))
            covered += [f"{name}.lora_A", f"{name}.lora_B", f"{name}.lora_dropout"]
            continue
        fast_norm = None if "forward" in module.__dict__ else norm_path(engine, name, module)
        if fast_norm is not None:
            paths.append(fast_norm)
            continue
        frozen = frozen_linear_path(engine, name, module)
        if frozen is not None:
            paths.append(frozen)
            continue
        attention = attention_path(engine, name, module)
        if attention is not None:
            paths.append(attention)
            covered.append(name)
            continue
        is_whole = (
            _is_adapter_with_parameters(module) or _takes_weights(name, module) or _uses_containers(module)
        )
        if not is_whole and _all_owned_below(module):
            tied = tied_uses_path(engine, name, module)
            paths += [] if tied is None else [tied]
            continue
        if is_whole:
            paths.append(FunctionalPath(engine, name, module))
            covered.append(name)
        elif _is_dense(module):
            paths.append(DensePath(engine, name, module))
        elif isinstance(module, nn.EmbeddingBag) and _has_forward_of(module, nn.EmbeddingBag):
            paths.append(BagPath(engine, name, module))
        elif isinstance(module, nn.Embedding):
            path = EmbeddingPath(engine, name, module)
            paths.append(path if _has_forward_of(module, nn.Embedding) else SubclassPath(path))
        elif (spatial := conv_path(engine, name, module)) is not None:
            paths.append(spatial)
        elif (recurrent := recurrent_path(engine, name, module)) is not None:
            paths.append(recurrent)
        elif isinstance(module, nn.Linear):
            paths.append(SubclassPath(DensePath(engine, name, module)))
        else:
            paths.append(FunctionalPath(engine, name, module))
            covered.append(name)
    whole = [path for path in paths if type(path) in (FunctionalPath, AttentionPath)]
    inside = {id(child) for path in whole for child in path.module.modules()} - {
        id(path.module) for path in whole
    }
    return [path for path in paths if id(path.module) not in inside]  # a shared one may be listed before


def _is_unlike_its_class(module: nn.Module) -> bool:
    """Whether a layer differs from its class: a forward of its own, or a weight computed from others."""
    own = [name for name, p in module._parameters.items() if p is not None and p.requires_grad]
    if is_parametrized(module):
        return any(p.requires_grad for p in module.parameters())
    is_known = isinstance(module, _KNOWN_LAYERS) or _is_transformers_conv1d(module)
    return bool(own) and is_known and ("forward" in module.__dict__ or not set(own) <= {"weight", "bias"})


def _has_trainable_prompt(module: nn.Module) -> bool:
    from peft import PeftModel, PeftType

    if not isinstance(module, PeftModel) or not module.active_peft_config.is_prompt_learning:
        return False
    if not any(parameter.requires_grad for parameter in module.prompt_encoder.parameters()):
        return False
    kind = module.active_peft_config.peft_type
    if kind == PeftType.PREFIX_TUNING:  # its encoder runs with one row per sample
        return False
    if kind not in (PeftType.PROMPT_TUNING, PeftType.P_TUNING):
        raise PrivacyError(
            f"{getattr(kind, 'value', kind)} has no exact per-sample path. Use LoRA, IA3, prefix tuning, "
            "prompt tuning or p-tuning instead."
        )
    return True


def _is_adapter_with_parameters(module: nn.Module) -> bool:
    """Whether this is a peft layer whose trainable parameters sit in its children (DoRA, IA3, LoHa, ...)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer) and any(p.requires_grad for p in module.parameters())


def _takes_weights(name: str, module: nn.Module) -> bool:
    """Whether a module hands the weight of a layer in it on, so that the layer's own forward does not run.

    Mamba's and LFM2's causal convolutions go to a kernel, WavLM's projections to torch's attention. Only the
    source tells; where it does not, the weight gets an ordinary gradient, which the engine refuses.
    """
    from transformers import PreTrainedModel

    if not name or isinstance(module, PreTrainedModel):
        return False
    taken = [
        key
        for key, child in module.named_children()
        if isinstance(child, nn.Conv1d | nn.Linear) and any(p.requires_grad for p in child.parameters())
    ]
    if not taken:
        return False
    uses = rf"self\.({'|'.join(map(re.escape, taken))})\.(weight|bias)(\.\w+\(|[,)])"
    lines = _source(type(module)).splitlines()
    return any(re.search(uses, line) and not re.search(r"isinstance\(|init", line) for line in lines)


def _uses_containers(module: nn.Module) -> bool:
    """Whether a module has lists or dictionaries of trainable parameters, which have no forward to watch.

    A peft tuner has some only for its layers (VB-LoRA), and is not called itself.
    """
    from peft.tuners.tuners_utils import BaseTuner

    containers = (nn.ParameterList, nn.ParameterDict)
    return not isinstance(module, BaseTuner) and any(
        isinstance(child, containers) and any(p.requires_grad for p in child.parameters())
        for child in module.children()
    )


def _source(kind: type[nn.Module]) -> str:
    if kind not in _sources:
        try:
            _sources[kind] = inspect.getsource(kind)
        except (OSError, TypeError):  # made where no file is
            _sources[kind] = ""
    return _sources[kind]


def _is_dense(module: nn.Module) -> bool:
    is_linear = isinstance(module, nn.Linear) and _has_forward_of(module, nn.Linear)
    return is_linear or _is_transformers_conv1d(module)


def _all_owned_below(module: nn.Module) -> bool:
    """Whether a layer inside owns each trainable parameter too, as an output layer owns its head's bias.

    Any other use of such a parameter gets an ordinary gradient, which the engine refuses.
    """
    own = {id(p) for p in module._parameters.values() if p is not None and p.requires_grad}
    if not own:
        return True
    below = {
        id(parameter)
        for child in module.modules()
        if child is not module
        for parameter in child._parameters.values()
    }
    return own <= below


def _has_forward_of(module: nn.Module, base: type[nn.Module]) -> bool:
    return type(module).forward is base.forward


def _is_transformers_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return type(module) is Conv1D


def _refuse_coupling(name: str, module: nn.Module) -> None:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        raise PrivacyError(
            f"layer {name} is a {type(module).__name__}, which mixes the samples of a batch: no sample's "
            "gradient is its own. Replace it with nn.GroupNorm or nn.LayerNorm."
        )
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
        raise PrivacyError(
            f"layer {name} is a {type(module).__name__} with track_running_stats, which keeps averages of "
            "private samples that no noise protects. Build it with track_running_stats=False."
        )


def _refuse_merged_adapter(name: str, module: nn.Module) -> None:
    from peft.tuners.lora.layer import MultiheadAttention

    if isinstance(module, MultiheadAttention) and any(p.requires_grad for p in module.parameters()):
        raise PrivacyError(
            f"layer {name} is an adapter of nn.MultiheadAttention, which peft merges into the weights and "
            "takes out again in each forward pass, so that no layer computes with it. Leave it out of "
            "target_modules (exclude_modules), or train its own weights, which have an exact path."
        )


def _refuse_embedding_options(name: str, module: nn.Module) -> None:
    if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return
    if module.max_norm is not None:  # frozen or not
        raise PrivacyError(
            f"layer {name} has max_norm, which changes the weights of what private samples look up, without "
            "noise. Set it to None."
        )
    if module.scale_grad_by_freq and module.weight.requires_grad:
        raise PrivacyError(
            f"layer {name} has scale_grad_by_freq, which counts ids over the whole batch and so couples "
            "samples. Set it to False."
        )
