"""What a vision transformer is made of, read from how it behaves in one forward pass.

No class name, attribute name or model type decides anything here. The model runs once on three tiny images, the second
and third being the same, and the trace answers by behaviour: which dimension holds the images, which modules are linear
or norms, and which linears feed an attention (noise on one token of their output reaches other tokens). Everything else
follows from execution order and widths.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


BLOCK_ROLES = ("norm_attention", "attention", "norm_mlp", "mlp_in", "mlp_out")
"""Roles inside a transformer block; LN1, MHA, LN2, FC1 and FC2 in the paper."""

ROLES = (*BLOCK_ROLES, "patch_embedding", "norm_final", "head", "other")

_IMAGES = 3


@dataclass(frozen=True)
class Component:
    """A unit of a vision transformer with a role.

    Attributes:
        name: Dotted name of the module that is the component, or of its modules joined by `+` where no single module
            is (the two input projections of a gated MLP).
        role: One of `ROLES`.
        block: Index of the transformer block in execution order, `None` outside the blocks.
        kind: Class name of the module.
        modules: Names of the leaf modules that hold the component's parameters, in execution order.
        parameters: Number of parameters in those modules.
        inputs: Name of the module whose input is the component's input x.
        outputs: Names of the modules whose outputs, side by side, are the component's output f(x).
    """

    name: str
    role: str
    block: int | None
    kind: str
    modules: tuple[str, ...]
    parameters: int
    inputs: str
    outputs: tuple[str, ...]


@dataclass
class Leaf:
    """A module that holds parameters and is measured as a whole; `*_dim` is where the images lie in its tensors."""

    name: str
    kind: str
    parameters: int
    shape: tuple[int, ...] | None
    linear: bool
    norm: bool
    conv: bool
    opaque: bool
    start: int
    in_width: int
    out_width: int
    in_dim: int
    out_dim: int
    in_sum: float
    role: str = "other"
    block: int | None = None


@dataclass
class Structure:
    """A traced model: its components and leaves by name, in execution order, and where images lie in each tensor.

    `labels` is the width of the logits, 0 where they are not one row per image, and `None` where there are none.
    `unread` names modules with weights whose tensors hold no whole images, such as experts that get some tokens of each.
    """

    components: list[Component]
    leaves: dict[str, Leaf]
    dims: dict[str, tuple[int, int]]
    fingerprint: str
    labels: int | None = None
    parameters: int = 0
    unread: tuple[str, ...] = ()


def find_components(model: nn.Module, example_inputs: Any = None) -> list[Component]:
    """Find the components of a vision transformer by running it once on a few images.

    Args:
        model: Any vision transformer; wrappers of `torch.compile`, DDP, FSDP and PEFT are seen through.
        example_inputs: A pixel tensor (at least one image in dimension 0) or a dict of such tensors. Defaults to random
            images of the size that the model's config states.

    Returns:
        The components in execution order: those of each block, then patch embedding, final norm, head and the rest.

    Raises:
        ValueError: If no block with attention can be read; the message says what was found.
    """
    return trace(model, example_inputs).components


def trace(model: nn.Module, example_inputs: Any = None) -> Structure:
    """Run `model` once and read its structure; see `find_components` for arguments and errors."""
    core = unwrap(model)
    tracer = _Tracer(core)
    with quiet(core), _tokenwise(core):
        output = tracer.run(entry(model), _three_images(core, example_inputs))
    return _assemble(core, tracer, output)


# --- the model as given ------------------------------------------------------------------------------------------------


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, data-parallel and PEFT wrappers; names are relative to it."""
    return _layers(model)[-1]


def entry(model: nn.Module) -> nn.Module:
    """What to call to run a model: the unwrapped model, or where FSDP2 shards a wrapper, that one, as it gathers weights."""
    layers = _layers(model)
    return next((layer for layer in layers if type(layer).__name__.startswith("FSDP")), layers[-1])


def _layers(model: nn.Module) -> list[nn.Module]:
    """The model as given, and what is inside each of its wrappers, down to the model itself."""
    inner: Any = model
    layers = []
    while True:
        layers.append(inner)
        if type(inner).__name__ == "FullyShardedDataParallel":
            raise UnknownStructureError(
                "FullyShardedDataParallel (FSDP 1) gathers weights for its own calls only: use FSDP 2 (fsdp_version: 2 in "
                "accelerate's configuration), or measure before the model is sharded."
            )
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif type(inner).__name__ in ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine"):
            inner = inner.module
        elif hasattr(inner, "get_base_model") and hasattr(inner, "peft_config"):
            inner = inner.get_base_model()
        else:
            return layers


@contextlib.contextmanager
def quiet(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Evaluation mode without gradients, compiled code or a moved random state; all is put back, whatever happens.

    With a `seed`, models that draw at random (masks, dropped tokens) draw the same each time.
    """
    training = {module: module.training for module in model.modules()}
    devices = sorted(
        {p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None}
    )
    # on some processors, 4-bit linears of bitsandbytes pack their weights for inference alone, from the first call on
    unpacked = _held_at(False, "support_avx512bf16_for_cpu", model.modules())
    forked = torch.random.fork_rng(devices=devices)
    # tensors of inference mode do not count their changes, by which a distance is known again
    counting = torch.inference_mode(False)
    with forked, unpacked, counting, torch.no_grad(), torch.compiler.set_stance("force_eager"):
        try:
            if seed is not None:
                for generator in [torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)]:
                    generator.manual_seed(seed)
            model.eval()
            yield
        finally:
            for module, flag in training.items():
                module.training = flag


def _tokenwise(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Have 8-bit linears of bitsandbytes treat each token by itself.

    They compute a feature with an outlier in half precision for every token, so that one token would reach all others.
    """
    return _held_at(0.0, "threshold", [getattr(module, "state", None) for module in model.modules()])


@contextlib.contextmanager
def _held_at(value: Any, name: str, objects: Iterable[Any]) -> Iterator[None]:
    """Set an attribute of those of the objects that have it, and put it back."""
    held = [(owner, getattr(owner, name)) for owner in objects if hasattr(owner, name)]
    try:
        for owner, _ in held:
            setattr(owner, name, value)
        yield
    finally:
        for owner, former in held:
            setattr(owner, name, former)


def public_name(name: str) -> str:
    """A module's name without what wrappers put into it."""
    for part in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = f"{name}.".replace(part, "").removesuffix(".")
    return name.replace(".base_layer", "")


def named_leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield (public name, module, is it opaque) for all modules, not looking inside adapters and saved heads."""

    def walk(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
        opaque = isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        yield public_name(prefix), module, opaque
        if not opaque:
            for name, child in module.named_children():
                yield from walk(f"{prefix}.{name}" if prefix else name, child)

    yield from walk("", model)


def synthetic_images(model: nn.Module, count: int, seed: int = 0) -> torch.Tensor:
    """Smooth random images (count, channels, height, width) of the size in the model's config.

    Raises:
        ValueError: If the config states no usable image size.
    """
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None)
    if size is None:
        raise ValueError(
            f"{type(model).__name__} has no config.image_size, so its input cannot be guessed: pass images of the size it "
            "takes (find_components: example_inputs=pixel_values; measure_plasticity: target=...)."
        )
    sides = [size, size] if isinstance(size, int) else list(size)[:2] if isinstance(size, (list, tuple)) else []
    if len(sides) < 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(
            f"{type(model).__name__} has config.image_size={size!r}, which is neither a side in pixels nor (height, width): pass "
            "images of the size it takes (find_components: example_inputs=pixel_values; measure_plasticity: target=...)."
        )
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, getattr(config, "num_channels", 3), 8, 8, generator=generator, device="cpu")
    images = nn.functional.interpolate(coarse, size=tuple(sides), mode="bicubic", align_corners=False)
    return as_input(model, images + 0.1 * torch.randn(images.shape, generator=generator, device="cpu"))


def as_input(model: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the device on which the model takes images, and in its floating type if it is floating."""
    # what is offloaded lies on no device until it is called, by hooks that know where
    placed = (p.device for p in model.parameters() if p.device.type != "meta")
    device = getattr(getattr(model, "_hf_hook", None), "execution_device", None) or next(placed, tensor.device)
    # packed weights are integers or floats of eight bits, which no image comes in
    floats = (p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() > 1)
    return tensor.to(device, next(floats, tensor.dtype) if tensor.is_floating_point() else tensor.dtype)


def main_input_name(model: nn.Module) -> str | None:
    """The keyword by which a transformers model takes images, `None` for other modules, which take them first.

    Raises:
        UnknownStructureError: If the model takes text.
    """
    name = getattr(model, "main_input_name", None)
    if not (isinstance(name, str) and hasattr(model, "config")):
        return None
    # transformers' word for models that do not say
    if name == "input_ids":
        if name in inspect.signature(model.forward).parameters:
            part = next((n for n, _ in model.named_children() if "vision" in n or "visual" in n), "vision_model")
            raise UnknownStructureError(
                f"{type(model).__name__} takes text ({name}): pass the part that takes images alone, such as model.{part}."
            )
        return "pixel_values"
    return name


def call(model: nn.Module, inputs: Any) -> Any:
    """Call the model with a dict as keywords or a tuple as positions."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def first_tensor(*places: Any) -> torch.Tensor | None:
    """The first floating-point tensor of at least two dimensions in nested arguments or outputs, `None` if none."""
    for place in places:
        if isinstance(place, torch.Tensor):
            if place.is_floating_point() and place.ndim >= 2:
                return place
        elif isinstance(place, Mapping):
            if (found := first_tensor(*place.values())) is not None:
                return found
        elif isinstance(place, (tuple, list)) and (found := first_tensor(*place)) is not None:
            return found
    return None


def _three_images(model: nn.Module, example: Any) -> dict[str, Any] | tuple[Any, ...]:
    """Inputs with images a, b, b: equal and unequal neighbours show where a tensor keeps the images."""
    if example is None:
        example = synthetic_images(model, 2)
    if isinstance(example, torch.Tensor):
        name = main_input_name(model)
        example = (example,) if name is None else {name: example}
    tensors = example.values() if isinstance(example, Mapping) else example

    def three(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            return value
        a, b = value[:1], value[1:2]
        if a.is_floating_point() and (len(b) == 0 or torch.equal(a, b)):
            b = a.flip(-1) + 0.5
        elif len(b) == 0:
            b = a
        return as_input(model, torch.cat([a, b, b]))

    if isinstance(example, Mapping):
        return {key: three(value) for key, value in example.items()}
    return tuple(three(value) for value in tensors)


# --- the trace ---------------------------------------------------------------------------------------------------------


class NotFiniteError(ValueError):
    """A module's output holds NaN or infinity."""


class UnknownStructureError(ValueError):
    """No transformer blocks can be read from a model."""


@dataclass
class _Unit:
    """A module in which tokens meet: the innermost one with linears whose outputs reach other tokens."""

    name: str
    start: int
    out_sum: float
    feeding: list[str]
    output: str | None = None


def _image_dim(tensor: torch.Tensor, images: int = _IMAGES) -> int | None:
    """The dimension (0 or 1) that holds images a, b, b; `None` if the tensor does not depend on the image."""
    for dim in (0, 1):
        if tensor.ndim > dim and tensor.shape[dim] > 0 and tensor.shape[dim] % images == 0:
            a, b, c = per_image(tensor, dim, images).float()
            near, far = (b - c).norm(), (a - b).norm()
            if far > 0 and near <= 1e-2 * far:
                return dim
            # models that shuffle or drop tokens at random treat even equal images differently
            if far > 0 and dim == 0 and tensor.shape[0] == images:
                return dim
    return None


def per_image(tensor: torch.Tensor, dim: int, images: int) -> torch.Tensor:
    """View `tensor` as (images, features): windows and tokens of one image end up in its row."""
    return tensor.movedim(dim, 0).reshape(images, -1)


def _checksum(tensor: torch.Tensor) -> float:
    # Apple's GPUs have no float64
    dtype = torch.float32 if tensor.device.type == "mps" else torch.float64
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=dtype)) ** 2


def _is_finite(tensor: torch.Tensor) -> bool:
    # a sum is finite only if all its terms are; it can overflow where they are not infinite
    return bool(tensor.sum().isfinite()) or bool(torch.isfinite(tensor).all())


def _touched_tokens(before: torch.Tensor, after: torch.Tensor, dim: int) -> int:
    """How many tokens of the first image differ between two outputs of one module."""
    change = (after.float() - before.float()).abs()
    change = change.movedim(dim, 0)
    first = change[: change.shape[0] // _IMAGES]
    # wherever the channels lie: of a single token, only one place differs along all other dimensions
    return min(int((first.amax(dim=axis) > 1e-6 * first.max()).sum()) for axis in range(first.ndim))


class _Tracer:
    """Forward hooks that note order, shapes and behaviour of every module; see `Structure` for what comes out."""

    def __init__(self, model: nn.Module) -> None:
        self.names: dict[nn.Module, str] = {}
        self.modules: dict[str, nn.Module] = {}
        self.opaque: set[nn.Module] = set()
        for name, module, opaque in named_leaves(model):
            self.modules[self.names.setdefault(module, name)] = module
            if opaque:
                self.opaque.add(module)
        self.leaves: dict[str, Leaf] = {}
        self.units: list[_Unit] = []
        self.probed: dict[Any, tuple[list[str], str | None]] = {}
        self.dims: dict[str, tuple[int, int]] = {}
        self.kinds: dict[str, str] = {}
        self.flat: list[torch.Tensor] = []
        self.unread: list[str] = []
        self.clock = 0
        self.starts: dict[nn.Module, list[int]] = {}
        self.probing = False

    def run(self, model: nn.Module, inputs: Any) -> Any:
        """Call `model`, which holds the traced one."""
        handles = []
        try:
            for module in self.names:
                handles.append(module.register_forward_pre_hook(self._enter))
                handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
            return call(model, inputs)
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not self.probing:
            self.clock += 1
            self.starts.setdefault(module, []).append(self.clock)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.probing:
            return
        start, name = self.starts[module].pop(), self.names[module]
        x, y = first_tensor(args, kwargs), first_tensor(output)
        if x is None or y is None or name in self.dims:
            return
        if not _is_finite(y):
            raise NotFiniteError(f"{name} puts out NaN or infinity{' from finite input' if _is_finite(x) else ''}")
        in_dim, out_dim = _image_dim(x), _image_dim(y)
        if out_dim is None and x.shape[:-1] == y.shape[:-1] and any(True for _ in module.parameters(recurse=False)):
            # a weight of zeros, as some heads start with, puts out the same for all images
            out_dim = in_dim
        if in_dim is None or out_dim is None:
            if any(p.ndim > 1 for p in module.parameters(recurse=False)):
                self.unread.append(name)
            return
        self.dims[name] = (in_dim, out_dim)
        self.kinds[name] = kind_of(module)
        inner = [leaf for leaf in self.leaves.values() if leaf.start > start]
        own = module in self.opaque or any(True for _ in module.parameters(recurse=False))
        if own and not inner:
            self._note_leaf(module, name, start, x, y, args, kwargs, output)
        elif not any(unit.start > start for unit in self.units):
            self._note_unit(module, name, start, inner, y, args, kwargs)

    def _again(self, module: nn.Module, args: Any, kwargs: Any) -> torch.Tensor | None:
        self.probing = True
        try:
            return first_tensor(module(*args, **kwargs))
        finally:
            self.probing = False

    def _note_leaf(
        self, module: nn.Module, name: str, start: int, x: Any, y: Any, args: Any, kwargs: Any, output: Any
    ) -> None:
        weight = base_weight(module)
        in_dim, out_dim = self.dims[name]
        tokenwise = x.shape[:-1] == y.shape[:-1]
        parameters = own_parameters(module)
        shapes = [whole_shape(p) for p in parameters]
        light = x.shape == y.shape and all(len(shape) <= 1 or shape.numel() == max(shape) for shape in shapes)
        conv = weight is not None and len(whole_shape(weight)) >= 3 and not light
        linear = not conv and not light and tokenwise and weight is not None
        single = light and bool(parameters) and [id(value) for value in (*args, *kwargs.values())] == [id(x)]
        norm = single and self._does_not_scale(module, x, next(iter(kwargs), None))
        opaque = not (linear or norm or conv or light)
        leaf = Leaf(
            name=name,
            kind=("Grouped" if conv and _is_grouped(module) else "") + self.kinds[name],
            parameters=sum(parameter_count(p) for p in parameters),
            shape=_weight_shape("linear" if linear else "other", _fused_weight(module) if opaque else weight, x, y),
            linear=linear,
            norm=norm,
            conv=conv,
            opaque=opaque,
            start=start,
            in_width=x.shape[-1],
            out_width=y.shape[-1],
            in_dim=in_dim,
            out_dim=out_dim,
            in_sum=_checksum(x),
        )
        if leaf.opaque and x.ndim >= 3 and self._mixes(module, args, kwargs, x, y):
            self.units.append(_Unit(name, start, _checksum(y), [name]))
        self.leaves[name] = leaf
        if linear and y.ndim == 2:
            self.flat.append(y)

    def _does_not_scale(self, module: nn.Module, x: torch.Tensor, keyword: str | None) -> bool:
        """A scale per channel triples with its input; a norm does not, unless the input is as small as its epsilon."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(x.shape, generator=generator, device="cpu").to(x) + 0.5
        once, thrice = (
            self._again(module, *(((z,), {}) if keyword is None else ((), {keyword: z}))) for z in (noise, 3 * noise)
        )
        if once is None or thrice is None:
            return False
        return float((thrice.float() - 3 * once.float()).norm()) > 1e-2 * float(once.float().norm())

    def _mixes(self, module: nn.Module, args: Any, kwargs: Any, x: torch.Tensor, y: torch.Tensor) -> bool:
        """Does noise on one input token of the first image reach other tokens of the output?"""
        in_dim, out_dim = self.dims[self.names[module]]
        noisy = _perturb_token(x, in_dim)

        def swap(value: Any) -> Any:
            if value is x:
                return noisy
            return type(value)(swap(v) for v in value) if type(value) in (tuple, list) else value

        after = self._again(module, swap(tuple(args)), {key: swap(value) for key, value in kwargs.items()})
        return after is not None and after.shape == y.shape and _touched_tokens(y, after, out_dim) > 1

    def _note_unit(
        self, module: nn.Module, name: str, start: int, inner: list[Leaf], y: torch.Tensor, args: Any, kwargs: Any
    ) -> None:
        if y.ndim < 3 and not any(leaf.linear for leaf in inner):
            return
        # attentions of the same make answer alike: the first of them is asked
        make = (self.kinds[name], y.shape, *((leaf.name[len(name) :], leaf.kind, leaf.shape) for leaf in inner))
        if make not in self.probed:
            feeding, output = self._probe(module, name, inner, y, args, kwargs)
            self.probed[make] = [leaf[len(name) :] for leaf in feeding], output and output[len(name) :]
        feeding, output = self.probed[make]
        if feeding:
            whole = [name + leaf for leaf in feeding]
            self.units.append(_Unit(name, start, _checksum(y), whole, None if output is None else name + output))

    def _probe(
        self, module: nn.Module, name: str, inner: list[Leaf], y: torch.Tensor, args: Any, kwargs: Any
    ) -> tuple[list[str], str | None]:
        """Which linears inside `module` feed an attention (none if there is no attention), and which one puts it out."""

        def noise_on(leaf: Leaf, watched: list[Leaf]) -> tuple[torch.Tensor | None, set[str]]:
            """Run again with noise on one token that `leaf` puts out; return the output and which inputs changed."""
            moved: set[str] = set()

            def compare(other: Leaf) -> Any:
                def hook(_: nn.Module, seen: Any) -> None:
                    if abs(_checksum(seen[0]) - other.in_sum) > 1e-9 * other.in_sum:
                        moved.add(other.name)

                return hook

            handles = [
                self.modules[leaf.name].register_forward_hook(lambda m, a, out: _perturb_token(out, leaf.out_dim))
            ]
            handles += [self.modules[other.name].register_forward_pre_hook(compare(other)) for other in watched]
            try:
                return self._again(module, args, kwargs), moved
            finally:
                for handle in handles:
                    handle.remove()

        linears = [leaf for leaf in inner if leaf.linear]
        convs = [leaf for leaf in inner if leaf.conv]
        feeding = []
        for leaf in linears:
            after, moved = noise_on(leaf, convs)
            # tokens that meet in a convolution meet there for any linear before it; that is no attention
            same = not moved and after is not None and after.shape == y.shape
            if same and after is not None and _touched_tokens(y, after, self.dims[name][1]) > 1:
                feeding.append(leaf.name)
        if not feeding:
            return [], None
        # the output projection is the first linear that receives what was mixed; a query, which reaches its own token
        # only, receives nothing mixed and moves what the output projection receives, or the output where there is none
        downstream = noise_on(self.leaves[feeding[0]], linears)[1]
        if downstream & set(feeding):
            # what feeds one attention does not follow on itself: tokens met where no module shows it
            return [], None
        output = next((leaf for leaf in linears if leaf.name in downstream), None)
        for leaf in linears:
            if leaf.name in feeding or leaf.name in downstream:
                continue
            after, moved = noise_on(leaf, [output] if output else [])
            if moved or (output is None and after is not None and not torch.equal(after, y)):
                feeding.append(leaf.name)
        return feeding, output.name if output else None


def _perturb_token(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """A copy with strong noise on one token (a middle one) of the first image."""
    if tensor.ndim < 3:
        return tensor
    moved = tensor.clone().movedim(dim, 0)
    first = moved[: moved.shape[0] // _IMAGES]
    position = tuple(size // 2 for size in first.shape[:-1])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(first.shape[-1], generator=generator, device="cpu").to(tensor)
    first[position] += noise * (first.float().std().to(tensor) + 1)
    return moved.movedim(0, dim)


def kind_of(module: nn.Module) -> str:
    """Class name of a module without what adapters, saved heads and FSDP make of it."""
    base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    base = type(getattr(base, "original_module", base))
    # fully_shard derives a class of its own from each module's
    return str(next(kind for kind in base.__mro__ if "FSDP" not in kind.__name__).__name__)


def own_parameters(module: nn.Module) -> list[torch.Tensor]:
    """The base model's parameters of a leaf: adapters on it do not count."""
    if isinstance(module, BaseTunerLayer):
        return list(module.get_base_layer().parameters())
    if isinstance(module, AuxiliaryTrainingWrapper):
        return list(module.original_module.parameters())
    return list(module.parameters())


def base_weight(module: nn.Module) -> torch.Tensor | None:
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    module = getattr(module, "original_module", module)
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, torch.Tensor) else None


def _fused_weight(module: nn.Module) -> torch.Tensor | None:
    """The weight of a module that adapters take as a whole: of `nn.MultiheadAttention`, the queries', keys' and values'."""
    base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return base.in_proj_weight if isinstance(base, nn.MultiheadAttention) else base_weight(module)


def _is_grouped(module: nn.Module) -> bool:
    base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return bool(getattr(base, "groups", 1) > 1)


def parameter_count(parameter: torch.Tensor) -> int:
    """How many numbers a parameter stands for, whatever packing or sharding does."""
    return whole_shape(parameter).numel()


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """Shape of a parameter, whatever packing or sharding does."""
    # bitsandbytes packs two numbers of four bits into one, ZeRO-3 leaves empty parameters; both keep the shape beside them
    packed: Any = getattr(parameter, "quant_state", None) or parameter
    return torch.Size(getattr(parameter, "ds_shape", packed.shape))


def _weight_shape(leaf: str, weight: torch.Tensor | None, x: torch.Tensor, y: torch.Tensor) -> tuple[int, ...] | None:
    """The logical weight shape: of a linear (out, in) as its tensors show it, whatever packing or sharding does."""
    if weight is None:
        return None
    if leaf != "linear":
        return tuple(whole_shape(weight))
    return (y.shape[-1], x.shape[-1])


# --- from trace to components ------------------------------------------------------------------------------------------


def _inside(name: str, prefix: str) -> bool:
    return prefix == "" or name == prefix or name.startswith(prefix + ".")


def _common_ancestor(names: list[str]) -> str:
    parts = [name.split(".") for name in names]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared)


def _attention_output(unit: _Unit, leaves: list[Leaf]) -> Leaf | None:
    """The output projection: inside the unit as traced, else the linear outside that reads what the unit puts out."""
    if unit.output is not None:
        return next(leaf for leaf in leaves if leaf.name == unit.output)
    for leaf in leaves:
        outside = leaf.linear and leaf.start > unit.start and not _inside(leaf.name, unit.name)
        if outside and abs(leaf.in_sum - unit.out_sum) <= 1e-6 * abs(unit.out_sum):
            return leaf
    return None


@dataclass
class _Block:
    name: str
    unit: _Unit
    attention: list[Leaf]
    rest: list[Leaf]


def _find_blocks(tracer: _Tracer, leaves: list[Leaf]) -> list[_Block]:
    blocks = []
    for unit in tracer.units:
        output = _attention_output(unit, leaves)
        projections = {*unit.feeding} | ({output.name} if output else set())
        # the block is the smallest part around this one attention that holds an MLP too
        name, chosen = unit.name, None
        while True:
            within = [leaf for leaf in leaves if _inside(leaf.name, name)]
            if sum(_inside(other.name, name) for other in tracer.units) > 1:
                break
            chosen = name
            # an attention may hold more linears than were found; those of an MLP expand or contract
            others = [leaf for leaf in within if leaf.linear and leaf.name not in projections]
            if sum(leaf.in_width != leaf.out_width for leaf in others) >= 2 or not name:
                break
            name = name.rpartition(".")[0]
        if chosen is None:
            continue
        within = [leaf for leaf in leaves if _inside(leaf.name, chosen)]
        inline = chosen == unit.name and any(leaf.linear and leaf.name not in projections for leaf in within)
        container = unit.name if inline else _common_ancestor([unit.name, *projections])
        attention = [
            leaf
            for leaf in within
            if leaf.name in projections or (not inline and container != chosen and _inside(leaf.name, container))
        ]
        blocks.append(_Block(chosen, unit, attention, [leaf for leaf in within if leaf not in attention]))
    _lend_following_mlp(blocks, leaves)
    # blocks repeat, by class or by shapes, and an attention that pools for the head does not
    kinds = [kind_of(tracer.modules[block.name]) for block in blocks]
    shapes = [sorted((leaf.kind, leaf.shape or ()) for leaf in block.attention + block.rest) for block in blocks]
    repeated = [i for i in range(len(blocks)) if kinds.count(kinds[i]) > 1 or shapes.count(shapes[i]) > 1]
    return blocks[repeated[0] : repeated[-1] + 1] if repeated else blocks


def _lend_following_mlp(blocks: list[_Block], leaves: list[Leaf]) -> None:
    """Where attention and MLP are no parts of one module, an MLP belongs to the attention before it.

    They may lie in one flat list, or in lists of their own. A norm just before an attention is that attention's.
    """
    taken = {leaf.name for block in blocks for leaf in block.attention + block.rest}
    groups: dict[str, list[_Block]] = {}
    for block in blocks:
        if not any(leaf.linear for leaf in block.rest) and "." in block.name:
            groups.setdefault(block.name.rpartition(".")[0], []).append(block)
    for scope, group in groups.items():
        wide, gaps = _gaps([leaf for leaf in leaves if leaf.name not in taken], scope, group)
        first = min(leaf.start for leaf in group[0].attention)
        before = [leaf for leaf in leaves if leaf.start < first and leaf.name not in taken and _inside(leaf.name, wide)]
        leading = before[-1:] if before and before[-1].norm else []
        if leading:
            for gap, following in zip(gaps, group[1:], strict=False):
                following.rest += [gap.pop()] if gap and gap[-1].norm else []
        if wide != scope:
            # in a wider scope the last attention is followed by more than its MLP
            gaps[-1] = gaps[-1][: min(map(len, gaps[:-1]))]
        group[0].rest += leading
        for block, gap in zip(group, gaps, strict=True):
            block.rest += gap
        taken |= {leaf.name for block in group for leaf in block.rest}


def _gaps(free: list[Leaf], scope: str, group: list[_Block]) -> tuple[str, list[list[Leaf]]]:
    """The free leaves between one attention and the next, in the narrowest scope where linears are in every gap.

    Where there is none, the free leaves in `scope`.
    """
    starts = [min(leaf.start for leaf in block.attention) for block in group[1:]]
    ends = [max(leaf.start for leaf in block.attention) for block in group]

    def within(scope: str) -> list[list[Leaf]]:
        return [
            [leaf for leaf in free if end < leaf.start < start and _inside(leaf.name, scope)]
            for end, start in zip(ends, [*starts, float("inf")], strict=True)
        ]

    parts = scope.split(".")
    for wide in [".".join(parts[:length]) for length in range(len(parts), -1, -1)] if starts else []:
        gaps = within(wide)
        if all(any(leaf.linear for leaf in gap) for gap in gaps[:-1]):
            return wide, gaps
    return scope, within(scope)


def _assign_block_roles(block: _Block, index: int) -> None:
    for leaf in block.attention + block.rest:
        leaf.block = index
    for leaf in block.attention:
        leaf.role = "attention"
    projections = [leaf for leaf in block.attention if leaf.linear or leaf.opaque]
    first, last = min(leaf.start for leaf in projections), max(leaf.start for leaf in projections)
    linears = [leaf for leaf in block.rest if leaf.linear]
    mlp = [leaf for leaf in linears if leaf.start > last]
    mlp = [leaf for leaf in linears if leaf.start > first] if mlp else linears
    width = mlp[0].in_width if mlp else 0
    back = [leaf for leaf in mlp if leaf.out_width == width != leaf.in_width]
    if not back and (len(mlp) > 1 or (mlp and mlp[0].in_width > mlp[0].out_width)):
        back = mlp[-1:]
    for leaf in mlp:
        leaf.role = "mlp_out" if leaf in back else "mlp_in"

    norms = [leaf for leaf in block.rest if leaf.norm]
    if mlp:
        start, end = mlp[0].start, mlp[-1].start
        before = [n for n in norms if n.start < min(first, start)]
        after = [n for n in norms if n.start > max(last, end)]
        between = [n for n in norms if last < n.start < start]
        if start > last and before and between:
            *attention_side, mlp_side = between  # pre-norm: the norm nearest to the MLP is the MLP's
        elif start > last:
            attention_side, mlp_side = between, None
        else:
            attention_side, mlp_side = [], None
        for norm in [*before, *attention_side]:
            norm.role = "norm_attention"
        for norm in [*after, *([mlp_side] if mlp_side else [])]:
            norm.role = "norm_mlp"
    else:
        for norm in norms:
            norm.role = "norm_attention"


def _assemble(model: nn.Module, tracer: _Tracer, output: Any) -> Structure:
    leaves = sorted(tracer.leaves.values(), key=lambda leaf: leaf.start)
    blocks = _find_blocks(tracer, leaves)
    if not blocks:
        kinds = sorted({leaf.kind for leaf in leaves})
        raise UnknownStructureError(
            f"No transformer blocks found in {kind_of(model)}: none of its {len(leaves)} executed modules with parameters "
            f"({', '.join(kinds) or 'none'}) feeds an attention, that is, lets one token of its output reach other tokens. If "
            "this model is no vision transformer, choose the modules yourself: PlasticityConfig(target_modules=[...])."
        )
    for index, block in enumerate(blocks):
        _assign_block_roles(block, index)

    labels = _label_count(model, output, tracer.flat)
    first = min(leaf.start for leaf in leaves if leaf.block is not None)
    last = max(leaf.start for leaf in leaves if leaf.block is not None)
    for leaf in leaves:
        if leaf.block is not None:
            continue
        if (leaf.conv and leaf.start < last) or (leaf.linear and leaf.start < first):
            leaf.role = "patch_embedding"
        elif leaf.linear and leaf.start > last and labels is not None and leaf.out_width == labels:
            leaf.role = "head"
        elif leaf.norm and leaf.start > last:
            leaf.role = "norm_final"

    components = [c for index, block in enumerate(blocks) for c in _block_components(tracer, block, index, leaves)]
    for leaf in leaves:
        if leaf.block is None:
            components.append(_component(tracer, leaf.role, None, [leaf], leaf.name, [leaf.name], leaf.name))
    digest = hashlib.sha256(
        repr([(leaf.role, leaf.block, leaf.shape) for leaf in leaves if leaf.role != "head"]).encode()
    )
    return Structure(
        components=components,
        leaves={leaf.name: leaf for leaf in leaves},
        dims=tracer.dims,
        fingerprint=digest.hexdigest()[:16],
        labels=labels,
        unread=tuple(dict.fromkeys(tracer.unread)),
        parameters=sum(parameter_count(p) for _, module, _ in named_leaves(model) for p in _direct_parameters(module)),
    )


def _direct_parameters(module: nn.Module) -> list[torch.Tensor]:
    if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        return own_parameters(module)
    return list(module.parameters(recurse=False))


def _block_components(tracer: _Tracer, block: _Block, index: int, leaves: list[Leaf]) -> list[Component]:
    found: list[tuple[int, Component]] = []
    for role in (*BLOCK_ROLES, "other"):
        members = [leaf for leaf in leaves if leaf.block == index and leaf.role == role]
        if not members:
            continue
        if role in ("norm_attention", "norm_mlp", "other"):
            groups = [[leaf] for leaf in members]
        elif role == "attention":
            groups = [members]
        else:
            # the two inputs of a gated MLP receive the same; experts put out from what each received
            received: dict[float, list[Leaf]] = {}
            for leaf in members:
                received.setdefault(leaf.in_sum, []).append(leaf)
            groups = list(received.values())
        for group in groups:
            inputs, outputs, name = group[0].name, [group[0].name], group[0].name
            if role == "attention":
                container = _common_ancestor([block.unit.name, *(leaf.name for leaf in group)])
                linears = [leaf for leaf in group if leaf.linear or leaf.opaque]
                if container != block.name and container in tracer.dims:
                    inputs, outputs, name = container, [container], container
                elif block.unit.name != block.name and len(linears) == len(block.unit.feeding):
                    inputs, outputs, name = block.unit.name, [block.unit.name], block.unit.name
                else:
                    inputs, outputs = linears[0].name, [linears[-1].name]
                    name = "+".join(leaf.name for leaf in group)
            elif len(group) > 1:
                outputs = [leaf.name for leaf in group]
                name = _joined(outputs)
            found.append((group[0].start, _component(tracer, role, index, group, inputs, outputs, name)))
    return [component for _, component in sorted(found, key=lambda pair: pair[0])]


def _joined(names: list[str]) -> str:
    parent = _common_ancestor([name.rpartition(".")[0] for name in names])
    short = "+".join(name[len(parent) + 1 :] if parent else name for name in names)
    return f"{parent}.{short}" if parent else short


def _component(
    tracer: _Tracer, role: str, block: int | None, group: list[Leaf], inputs: str, outputs: list[str], name: str
) -> Component:
    return Component(
        name=name,
        role=role,
        block=block,
        kind=tracer.kinds.get(name, group[0].kind),
        modules=tuple(leaf.name for leaf in group),
        parameters=sum(leaf.parameters for leaf in group),
        inputs=inputs,
        outputs=tuple(outputs),
    )


def _label_count(model: nn.Module, output: Any, flat: Iterable[torch.Tensor]) -> int | None:
    """Width of the model's logits, 0 where they are not one row per image; `None` for a model that returns features. `flat` is what linears put out per image."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if logits is None and not hasattr(output, "to_tuple"):
        given = list(_tensors(output))
        # among features and logits, the logits are what a linear has put out
        logits = next((tensor for tensor in reversed(given) if any(tensor is other for other in flat)), None)
        if logits is None and not hasattr(model, "config"):
            logits = first_tensor(output)
    if not isinstance(logits, torch.Tensor):
        return None
    return int(logits.shape[-1]) if logits.ndim == 2 else 0


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)
