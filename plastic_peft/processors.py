"""Image processors of models, and the image sizes that models take."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

from torch import nn

from .embedded import located


Processor = Callable[..., Any]


class ModelProcessor:
    """Turns raw images into inputs of one model, by the processor given or the one saved with the model.

    The saved one is looked up, maybe on the Hub, when the first raw image is met.

    Args:
        model: The model; its config states the processor's place and the number of channels (3 if it does not).
        given: An image processor to use in the place of the saved one.
    """

    def __init__(self, model: nn.Module, given: Processor | None = None) -> None:
        config = getattr(model, "config", None)
        self.channels: int = getattr(getattr(config, "vision_config", config), "num_channels", 3)
        self._name: str = getattr(config, "_name_or_path", "") or ""
        self._given = given

    @functools.cached_property
    def processor(self) -> Processor | None:
        """The processor given, else the saved one, `None` if the model does not come from a saved one."""
        if self._given is not None or not self._name:
            return self._given
        from transformers import AutoImageProcessor

        try:
            return cast(Processor, AutoImageProcessor.from_pretrained(located(self._name)))
        except (OSError, ValueError):
            return None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.processor is None:
            raise ValueError(f"{self._name or 'The model'} has no saved image processor: pass image_processor=....")
        return self.processor(*args, **kwargs)


def find_processor(model: nn.Module, given: Processor | None = None) -> ModelProcessor:
    """What turns raw images into inputs of `model`: by the processor `given`, else the one saved with the model."""
    return given if isinstance(given, ModelProcessor) else ModelProcessor(model, given)


def output_size(processor: Any) -> tuple[int, int]:
    """(width, height) of the images that an image processor puts out.

    Raises:
        ValueError: If it does not say.
    """
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = crop or getattr(processor, "size", None) or {}
    if "height" in size:
        return size["width"], size["height"]
    if "shortest_edge" in size:
        return size["shortest_edge"], size["shortest_edge"]
    raise ValueError(f"{type(processor).__name__} states no output size: use augment='flip' or 'none'.")


def accept_image_size(model: nn.Module, size: int) -> None:
    """Let a model take square images of another size than it was pretrained on, by interpolating its position embeddings.

    The weights stay as they are: a hook asks for the interpolation in every forward pass, so an adapter trained this way
    belongs to the unchanged base model.

    Raises:
        ValueError: If the model cannot interpolate.
    """
    if size == getattr(getattr(model, "config", None), "image_size", None):
        return
    if "interpolate_pos_encoding" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"{type(model).__name__} takes images of {getattr(cast(Any, model).config, 'image_size', '?')} pixels and cannot "
            f"interpolate its position embeddings to {size}: leave --image_size out."
        )
    model.register_forward_pre_hook(_ask_for_interpolation, with_kwargs=True)


def _ask_for_interpolation(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "interpolate_pos_encoding": True}
