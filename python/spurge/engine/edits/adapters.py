"""Adapters as ``peft`` reads them: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

The fields are those of peft's ``LoraConfig`` and ``IA3Config``; what is left out has its default there. peft itself is
not needed to write them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spurge.engine.base.files import PathLike, canonical_json, spurge_version, write_json, write_parts
from spurge.engine.base.tensor_files import pack
from spurge.engine.edits.low_rank import Factors
from spurge.engine.edits.new_folders import new_folder
from spurge.engine.models.heads import find_head
from spurge.engine.models.parameters import plain_name, unwrapped
from spurge.engine.models.projections import features
from spurge.engine.models.readout import language_head
from spurge.engine.models.verbalizers import Verbalized

Format = Literal["lora", "ia3", "head"]
_PREFIX = "base_model.model."  # of every name, by the two modules that peft puts around a model
_LANGUAGE = ("ForCausalLM", "LMHeadModel")  # how classes of causal language models end


@dataclass(frozen=True, eq=False)
class Exported:
    """What was written.

    Attributes:
        folder: where.
        format: ``"lora"``, ``"ia3"`` or ``"head"``.
        ranks: module path to the rank of its change; of ``"ia3"`` none.
        gates: module path to the number of its inputs that are multiplied; of ``"ia3"`` alone.
        errors: module path to the relative error of its change (Frobenius), of those that were truncated.
        whole: paths of the modules that are held whole.
    """

    folder: Path
    format: Format
    ranks: dict[str, int]
    gates: dict[str, int]
    errors: dict[str, float]
    whole: tuple[str, ...]

    def __str__(self) -> str:
        parts = []
        if self.ranks:
            low, high = min(self.ranks.values()), max(self.ranks.values())
            ranks = f"rank {high}" if low == high else f"ranks {low} to {high}"
            parts.append(f"{_count(len(self.ranks), 'module')} of {ranks}")
        if self.gates:
            parts.append(f"{_count(sum(self.gates.values()), 'gate')} of {_count(len(self.gates), 'module')}")
        if self.whole:
            few = len(self.whole) <= 3
            parts.append(f"whole {', '.join(self.whole)}" if few else f"{len(self.whole)} whole modules")
        text = f"{self.format}, {'; '.join(parts) or 'nothing'}: {self.folder}"
        if not self.errors:
            return text
        worst = max(self.errors, key=lambda name: self.errors[name])
        count = _count(len(self.errors), "module")
        return f"{text}\n{count} truncated, relative error up to {self.errors[worst]:.2g} ({worst})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


class Adapter:
    """What an adapter changes, by the paths of the model's modules.

    Args:
        model: what it is for; what wraps that is looked through.
        info: provenance, JSON-able.

    Attributes:
        lora: changes of the weights of linear layers ``[O, I]``.
        biases: changes of their biases ``[O]``.
        gates: what multiplies the inputs of linear layers, float32 ``[I]``.
        whole: other modules' parameters, all of them.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has adapters already.
    """

    def __init__(self, model: nn.Module, info: Mapping[str, Any]) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if hasattr(model, "peft_config") or any(hasattr(module, "base_layer") for module in model.modules()):
            raise ValueError(
                "model: has adapters of its own, beside which an exported one would have to lie; merge them first "
                "(merge_and_unload), and export an edit of the merged model"
            )
        self._model = unwrapped(model.language_model if isinstance(model, Verbalized) else model)
        self._modules = {plain_name(path): module for path, module in self._model.named_modules()}
        self._paths = {module: path for path, module in self._modules.items()}
        self._info = info
        self.lora: dict[str, Factors] = {}
        self.biases: dict[str, Tensor] = {}
        self.gates: dict[str, Tensor] = {}
        self.whole: dict[str, dict[str, Tensor]] = {}

    def path(self, module: nn.Module) -> str:
        """Where a module is in the model without wrappers."""
        return self._paths[module]

    def head(self) -> str | None:
        """Where the classifier's head is; None where the model has none."""
        if language_head(self._model) is not None:
            return None
        try:
            return find_head(self._model)[0]
        except ValueError:
            return None

    def write(self, folder: PathLike, format_: Format) -> Exported:
        """Writes the folder, whole or not at all.

        Raises:
            ValueError: it exists already, peft would take a name for other modules too, or there is no layer for it.
            OSError: it cannot be written.
        """
        whole = self._with_twins()
        lora = {name: self.lora.get(name) or self._zero(name) for name in (*self.lora, *self.biases)}
        if not lora and not self.gates:
            lora = self._nothing(whole)
        tensors = {f"{_PREFIX}{name}.ia3_l": vector[None] for name, vector in self.gates.items()}
        for name, factors in lora.items():
            tensors[f"{_PREFIX}{name}.lora_A.weight"] = factors.a
            tensors[f"{_PREFIX}{name}.lora_B.weight"] = factors.b
            if self.biases:
                bias = self.biases.get(name, torch.zeros(len(factors.b)))
                tensors[f"{_PREFIX}{name}.lora_B.bias"] = bias.float()
        for name, parameters in whole.items():
            tensors |= {f"{_PREFIX}{name}.{key}": value for key, value in parameters.items()}
        texts = {"format": "pt", "spurge": spurge_version(), "info": canonical_json(self._info)}
        settings = self._settings(_ia3(self.gates) if self.gates else _lora(lora, bool(self.biases)))
        with new_folder("folder", folder) as draft:
            write_parts(draft / "adapter_model.safetensors", pack(tensors, texts))
            write_json(draft / "adapter_config.json", settings)
        return Exported(
            Path(folder),
            format_,
            {name: lora[name].rank for name in lora if name in self.lora or name in self.biases},
            {name: int((vector != 1).sum()) for name, vector in self.gates.items()},
            {name: factors.error for name, factors in lora.items() if factors.error},
            tuple(self.whole),
        )

    def _settings(self, own: dict[str, Any]) -> dict[str, Any]:
        """The fields of any kind of adapter, and those of this one."""
        kind, config = type(self._model), getattr(self._model, "config", None)
        return {
            "auto_mapping": {"base_model_class": kind.__name__, "parent_library": kind.__module__},
            "base_model_name_or_path": getattr(config, "name_or_path", None) or None,
            "fan_in_fan_out": any(isinstance(self._modules[name], Conv1D) for name in own["target_modules"]),
            "inference_mode": True,
            "modules_to_save": sorted(self.whole) or None,
            "revision": None,
            "task_type": "CAUSAL_LM" if kind.__name__.endswith(_LANGUAGE) else None,
            **own,
        }

    def _nothing(self, whole: Collection[str]) -> dict[str, Factors]:
        """A change of nothing in the smallest layer that is not held whole: peft takes no adapter without a layer."""
        found = {}
        for path, module in self._modules.items():
            if not any(f"{path}.".startswith(f"{name}.") for name in whole):
                if isinstance(module, (nn.Linear, Conv1D)):
                    found[path] = self._zero(path)
                elif isinstance(module, nn.Conv2d) and module.groups == 1:
                    first, second = (1, module.in_channels, *module.kernel_size), (module.out_channels, 1, 1, 1)
                    found[path] = Factors(torch.zeros(first), torch.zeros(second))
        if not found:
            raise ValueError(
                "model: peft needs a linear or convolutional layer beside those held whole, and the model has none"
            )
        smallest = min(found, key=lambda path: found[path].a.numel() + found[path].b.numel())
        return {smallest: found[smallest]}

    def _zero(self, name: str) -> Factors:
        inputs, outputs = features(self._modules[name]) or (0, 0)
        return Factors(torch.zeros(1, inputs), torch.zeros(outputs, 1))

    def _with_twins(self) -> dict[str, dict[str, Tensor]]:
        """The modules held whole, and those whose names end like theirs, by which alone peft knows modules."""
        found = dict(self.whole)
        for name in self.whole:
            if not name:
                raise ValueError("model: is one layer, beside which peft holds no adapter; fold the edit instead")
            for twin in self._modules.keys() - found.keys():
                if twin.endswith(name):
                    module = self._modules[twin]
                    if next(module.children(), None) is not None or twin in self.lora or twin in self.biases:
                        raise ValueError(
                            f"model: peft cannot hold {name!r} beside an adapter, for it would take {twin!r} for it, "
                            "too; fold the edit instead"
                        )
                    found[twin] = parameters_of(module)
        return found


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters by name, on the CPU."""
    return {key: value.detach().cpu().contiguous() for key, value in module.named_parameters(recurse=False)}


def _lora(layers: Mapping[str, Factors], biases: bool) -> dict[str, Any]:
    """Settings of LoRA whose changes are added as they are: alpha is the rank, of each layer its own."""
    ranks = {name: factors.rank for name, factors in layers.items()}
    rank = max(ranks.values())
    others = {name: own for name, own in ranks.items() if own != rank}
    return {
        "alpha_pattern": others,
        "bias": "none",
        "init_lora_weights": True,
        "lora_alpha": rank,
        **({"lora_bias": True} if biases else {}),
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": others,
        "target_modules": sorted(layers),
        "use_dora": False,
        "use_rslora": False,
    }


def _ia3(gates: Mapping[str, Tensor]) -> dict[str, Any]:
    """Settings of vectors that multiply inputs."""
    names = sorted(gates)
    return {"feedforward_modules": names, "init_ia3_weights": True, "peft_type": "IA3", "target_modules": names}
