"""Modules that adapters save whole, such as the head and norms: which adapter's copy is in use, and what a file calls them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import reduce
from typing import Any, cast

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.func import functional_call

from ..components import public_name


def saved_whole(model: nn.Module) -> Iterator[tuple[str, ModulesToSaveWrapper]]:
    """These modules of a model, by name."""
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield name, module


def holders(model: nn.Module, adapters: Iterable[str]) -> list[tuple[ModulesToSaveWrapper, list[str]]]:
    """Which one of the adapters has its copy of each module, in a list of none or one.

    Raises:
        ValueError: If two of the adapters have the same module.
    """
    found = []
    for name, wrapper in saved_whole(model):
        having = [adapter for adapter in dict.fromkeys(adapters) if adapter in wrapper.modules_to_save]
        if len(having) > 1:
            raise ValueError(
                f"{' and '.join(having)} each have {public_name(name)} of their own, trained whole, and only one of them "
                "can take its place: merge one of these adapters."
            )
        found.append((wrapper, having))
    return found


def put_in_place(held: Iterable[tuple[ModulesToSaveWrapper, list[str]]]) -> None:
    """Have each module be its holder's copy, or the original; gradient flags stay as they are."""
    for wrapper, adapters in held:
        flags = [(parameter, parameter.requires_grad) for parameter in wrapper.parameters()]
        wrapper.set_adapter(adapters)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@torch.no_grad()
def combine(model: nn.Module, adapters: list[str], weights: list[float], combined: str) -> None:
    """Have the copies of `combined` differ from the originals by the weighted differences of these adapters."""
    for _, wrapper in saved_whole(model):
        copies = wrapper.modules_to_save
        if combined not in copies:
            continue
        # peft has refused adapters that have the same module of their own
        for adapter, weight in zip(adapters, weights, strict=True):
            for name, original in wrapper.original_module.named_parameters() if adapter in copies else ():
                change = copies[adapter].get_parameter(name) - original
                copies[combined].get_parameter(name).copy_(original + weight * change)


class SavedModule(ModulesToSaveWrapper):
    """A module saved whole, where PEFT's own wrapper does not do.

    In a half-precision model its copies are float32, as LoRA's weights are: near 1, where the scales of norms lie, an
    optimizer's steps are below the resolution of bfloat16. The copy computes in the model's dtype, so that merging is exact.

    An adapter's file may hold the module under another release's name (`moved`). PEFT looks for its weights under this
    release's name, before the tuner can rename what the file holds; so it comes upon none, and
    `PlasticityModel._remap_adapter_state_dict_for_load` puts them in their place.
    """

    moved = False
    # parameters of a copy by name, noted since replicas of `nn.DataParallel` do not list theirs
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, wrapper: ModulesToSaveWrapper) -> SavedModule:
        """Make a wrapper that PEFT has put into a model one of these."""
        wrapper.__class__ = cls
        return cast(SavedModule, wrapper)

    def _forward_wrapped(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active_adapters:
            return self._forward_wrapped_passthrough(*args, **kwargs)
        return self._forward_of(self.active_adapters[0], *args, **kwargs)

    def _forward_wrapped_mixed_batch(self, x: torch.Tensor, active_adapter: str, *args: Any, **kwargs: Any) -> Any:
        return self._forward_of(active_adapter, x, *args, **kwargs)

    def _forward_of(self, adapter: str, *args: Any, **kwargs: Any) -> Any:
        held: Any = self.modules_to_save[adapter]
        weights: dict[str, torch.Tensor] = {}
        for name in self.names:
            modules: list[Any] = [held, self.original_module]
            weight, original = (reduce(getattr, name.split("."), module) for module in modules)
            if weight.dtype != original.dtype:
                weights[name] = weight.to(original.dtype)
        if not weights:
            return held(*args, **kwargs)
        dtype = next(iter(weights.values())).dtype

        def cast_down(value: Any) -> Any:
            # models bring images to the dtype of the weight that they find here
            return value.to(dtype) if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value

        args, kwargs = tuple(map(cast_down, args)), {name: cast_down(value) for name, value in kwargs.items()}
        return functional_call(held, weights, args, kwargs)

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> nn.Module:
        module: nn.Module = super().unload_and_optionally_merge_module(*args, **kwargs)
        dtype = floating_dtype(self.original_module)
        return module if dtype is None else module.to(dtype)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        places: dict[str, str] = super().adapter_state_dict_load_map(adapter_name)
        return _NotIterated(places) if self.moved else places


def floating_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of a module's weights, `None` if it has none that are numbers."""
    return next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), None)


def cast_saved(model: nn.Module, adapter: str, upcast: bool) -> None:
    """Bring an adapter's copies to the originals' device and dtype, or with `upcast` from half precision to float32."""
    for _, wrapper in saved_whole(model):
        # loading without initial values first leaves dtype and device of the file
        like = next((p for p in wrapper.original_module.parameters() if p.is_floating_point()), None)
        if like is None or adapter not in wrapper.modules_to_save:
            continue
        held = wrapper.modules_to_save[adapter]
        # DeepSpeed keeps float32 weights of its own
        if any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in [like, *held.parameters()]):
            continue
        # running statistics change in training, and have to stay in the dtype that they are computed in
        counted = any(buffer.is_floating_point() for buffer in held.buffers())
        half = upcast and like.dtype in (torch.float16, torch.bfloat16) and not counted
        if half:
            SavedModule.of(wrapper).names = tuple(name for name, _ in held.named_parameters())
        held.to(device=like.device, dtype=torch.float32 if half else like.dtype)


class _NotIterated(dict[str, str]):
    """A mapping whose keys PEFT's loading does not come upon; its items, which transformers' loading reads, are there."""

    def __iter__(self) -> Iterator[str]:
        return iter(())
