"""Upper bounds of the rates of change, from the weights alone.

Source: arXiv 2602.06883, section on theory. For attention (after Castin et al. 2024) with n tokens of norm at most r:
`sum_h ||O_h|| ||V_h|| sqrt(3n + (12n + 3) r^4 ||A_h||^2)`, with `A_h = Q_h^T K_h / sqrt(d_h)` and spectral norms
throughout. An `nn.Linear` stores (out, in), so a head is a block of rows of the q, k and v weights and a block of columns
of the output weight. (The paper's reference code cuts q, k and v along columns instead, which mixes heads.)
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .components import (
    BLOCK_ROLES,
    Component,
    Structure,
    base_weight,
    call,
    entry,
    first_tensor,
    kind_of,
    named_leaves,
    quiet,
    synthetic_images,
    trace,
    unwrap,
)
from .images import model_inputs
from .measure import origin
from .report import PlasticityReport, Row


def plasticity_bounds(
    model: nn.Module, *, radius: float | None = None, tokens: int | None = None, images: torch.Tensor | None = None
) -> PlasticityReport:
    """Bound the plasticity of every component from its weights.

    A norm is bounded by its largest absolute scale, for tokens whose standard deviation is at least 1; a linear layer by
    its spectral norm; attention as the module says, for tokens no longer than `radius`. A bias of the queries counts as one
    more feature of each token; other biases leave the distances as they are. Where position terms come between queries and
    keys (biases of the logits, rotations), `||Q_h|| ||K_h||` takes the place of `||Q_h^T K_h||`, which holds for either at the
    usual scale `1 / sqrt(d_h)`; where queries or keys are normalised, or position terms depend on the query alone, no bound is
    known. Modules with an adapter count with what it adds.

    Args:
        model: A vision transformer.
        radius: Largest token norm that reaches the attention. By default the largest one that each attention really
            receives from `images`.
        tokens: Number of tokens n in one attention; by default as traced.
        images: Pixel values (n, channels, height, width) to take radius and tokens from; random ones by default.

    Returns:
        A report whose `mean` is the bound, with `inputs="bounds"`; components without a known bound are in its notes.

    Raises:
        ValueError: If the model's structure cannot be read.
    """
    core = unwrap(model)
    pixels = synthetic_images(core, 2) if images is None else images
    structure = trace(model, model_inputs(core, {"pixel_values": pixels[:2]}))
    modules = {name: module for name, module, _ in named_leaves(core)}
    attentions = {c.name: c for c in structure.components if c.role == "attention"}
    probe = _AttentionProbe(modules, structure, attentions)
    with quiet(core), probe.attached():
        for part in pixels.split(32):
            call(entry(model), model_inputs(core, {"pixel_values": part}))

    rows, notes = [], []
    for component in structure.components:
        if component.role not in BLOCK_ROLES:
            continue
        alone = {name: _weight_bound([modules[name]]) for name in component.modules}
        bound = None
        if component.role == "attention":
            heads = probe.heads.get(component.name)
            if heads is not None:
                r = probe.radius[component.name] if radius is None else radius
                n = tokens or probe.tokens[component.name]
                bound = max(weights.bound(n, r) for weights in heads)
        elif len(component.outputs) == 1:
            bound = alone.get(component.outputs[0])
        else:
            bound = _weight_bound([modules[name] for name in component.outputs])
        if bound is None:
            notes.append(f"component {component.name} has no row: no bound is known for its structure")
        else:
            rows.append(_row(component, structure, None, bound))
        rows += [_row(component, structure, name, bound) for name, bound in alone.items() if bound is not None]
    return PlasticityReport(
        rows=tuple(rows),
        inputs="bounds",
        pairs=0,
        dropped=0,
        stopped="bounds need no pairs",
        confidence=1.0,
        tolerance=0.0,
        seed=0,
        max_pairs=0,
        notes=tuple(notes),
        **origin(core, structure),
    )


def spectral_norm(weight: torch.Tensor, *, tolerance: float = 1e-4, steps: int = 200) -> float:
    """Largest singular value of a matrix by Lanczos on its Gram matrix, without a full SVD.

    Stops when the value has grown by less than `tolerance` (relative) over four steps; far below 1 % off in practice.
    """
    matrix = weight.detach().flatten(1).float()
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T
    width = matrix.shape[1]
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(width, generator=generator, device="cpu").to(matrix)
    v = v / v.norm()
    basis = [v]
    diagonal: list[float] = []
    off: list[float] = []
    history: list[float] = []
    for _ in range(min(steps, width)):
        w = matrix.T @ (matrix @ basis[-1])
        diagonal.append(float(w @ basis[-1]))
        known = torch.stack(basis)
        # twice is enough to keep the basis orthogonal in float32
        for _ in range(2):
            w = w - known.T @ (known @ w)
        tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64, device="cpu"))
        if off:
            side = torch.tensor(off, dtype=torch.float64, device="cpu")
            tridiagonal += torch.diag(side, 1) + torch.diag(side, -1)
        history.append(float(torch.linalg.eigvalsh(tridiagonal)[-1]))
        length = float(w.norm())
        if length <= 1e-7 * max(history[-1], 1e-30):
            break
        if len(history) > 4 and history[-1] - history[-5] <= 2 * tolerance * history[-1]:
            break
        off.append(length)
        basis.append(w / length)
    return math.sqrt(max(history[-1], 0.0))


def attention_bound(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    head_dim: int,
    *,
    n: int,
    r: float,
    q_bias: torch.Tensor | None = None,
    positions: bool = False,
) -> float:
    """The attention bound from weights stored as (out, in); fewer k and v heads than q heads are shared in order.

    Args:
        q, k, v, o: Projection weights: q (heads · head_dim, d), k and v (kv_heads · head_dim, d), o (d, heads · head_dim).
        head_dim: Rows of one head.
        n: Number of tokens.
        r: Largest token norm.
        q_bias: Bias of the queries (heads · head_dim), which acts as the weight of one more feature, always 1. (A bias of
            the keys moves all logits of a query alike, and one of the values or the output moves all outputs alike.)
        positions: Position terms come between queries and keys: a rotation R_ij makes `Q_h^T R_ij K_h` of `Q_h^T K_h`, whose norm
            is at most `||Q_h|| ||K_h||`. (What is added to the logits leaves the bound as it is.)
    """
    return _Heads.of(q, k, v, o, head_dim, q_bias, positions).bound(n, r)


@dataclass(frozen=True)
class _Heads:
    """What the bound of an attention needs of its weights; these themselves may be in memory for its own call only.

    Attributes:
        around: `||O_h|| ||V_h||` of each head.
        inside: `||A_h||`, or a bound of it.
        biased: Whether tokens have one more feature, always 1.
    """

    around: torch.Tensor
    inside: torch.Tensor
    biased: bool

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        o: torch.Tensor,
        head_dim: int,
        q_bias: torch.Tensor | None,
        positions: bool = False,
    ) -> _Heads:
        """Arguments as of `attention_bound`."""
        q, k, v, o = map(_double, (q, k, v, o))
        biased = q_bias is not None and bool(q_bias.any())
        if q_bias is not None and biased:
            q = torch.cat([q, _double(q_bias)[:, None]], dim=1)
        heads, kv_heads = q.shape[0] // head_dim, k.shape[0] // head_dim
        shared = torch.arange(heads, device=q.device) // (heads // kv_heads)
        q_h = q.view(heads, head_dim, -1)
        k_h = k.view(kv_heads, head_dim, -1)
        v_h = v.view(kv_heads, head_dim, -1)
        o_h = o.view(o.shape[0], heads, head_dim).permute(1, 2, 0)
        if positions:
            inside = _norms(q_h) * _norms(k_h)[shared]
        else:
            # ||Q^T K|| = ||R_q R_k^T|| with the triangular factors of Q^T and K^T, which are only head_dim wide
            r_q = torch.linalg.qr(q_h.mT, mode="r").R
            r_k = torch.linalg.qr(k_h.mT, mode="r").R[shared]
            inside = torch.linalg.matrix_norm(r_q @ r_k.mT, ord=2)
        return cls(_norms(o_h) * _norms(v_h)[shared], inside / math.sqrt(head_dim), biased)

    def bound(self, n: int, r: float) -> float:
        square = r**2 + self.biased
        return float((self.around * torch.sqrt(3 * n + (12 * n + 3) * square**2 * self.inside**2)).sum())


def _double(tensor: torch.Tensor) -> torch.Tensor:
    # Apple's GPUs have no float64
    return (tensor.detach().cpu() if tensor.device.type == "mps" else tensor.detach()).double()


def _norms(wide: torch.Tensor) -> torch.Tensor:
    """Spectral norms of a stack of matrices with few rows."""
    return torch.linalg.eigvalsh(wide @ wide.mT)[:, -1].clamp(min=0).sqrt()


def _weight_bound(modules: list[nn.Module]) -> float | None:
    """Largest absolute scale of a norm, spectral norm of linears whose outputs lie side by side, `None` for others."""
    known = [_weight(module) for module in modules]
    if any(w is None or w.numel() == 0 for w in known):
        return None
    weights = [w for w in known if w is not None]
    if all(w.ndim == 1 for w in weights):
        return float(max(w.abs().max() for w in weights))
    if all(w.ndim == 2 for w in weights):
        stacked = torch.cat([w.T if kind_of(m) == "Conv1D" else w for w, m in zip(weights, modules, strict=True)])
        return spectral_norm(stacked)
    return None


def _weight(module: nn.Module) -> torch.Tensor | None:
    """The weight that a module computes with, whole and with its adapters; `None` where it is quantised or cannot be told."""
    if isinstance(module, ModulesToSaveWrapper) and not module.disable_adapters and module.active_adapters:
        module = module.modules_to_save[module.active_adapters[0]]
    # what is offloaded is fetched for as long as it is read
    with align_module_device(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module):
        weight = base_weight(module)
        if weight is None or not weight.is_floating_point():
            return None
        weight = _whole(weight).detach()
    if not isinstance(module, BaseTunerLayer) or module.merged or module.disable_adapters:
        return weight
    adapters = [name for name in module.active_adapters if name in module._all_available_adapter_names()]
    if adapters and (not hasattr(module, "get_delta_weight") or any(getattr(module, "use_dora", {}).values())):
        return None
    layer: Any = module
    return weight + sum((layer.get_delta_weight(name).detach() for name in adapters), torch.zeros_like(weight))


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def _whole(weight: torch.Tensor) -> torch.Tensor:
    """A weight that FSDP or ZeRO-3 has spread over processes, put together; others as they are."""
    if hasattr(weight, "ds_shape"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def _row(component: Component, structure: Structure, name: str | None, bound: float) -> Row:
    leaf = structure.leaves[name] if name else None
    return Row(
        name=name or component.name,
        level="module" if name else "component",
        role=component.role,
        block=component.block,
        kind=leaf.kind if leaf else component.kind,
        component=component.name,
        parameters=leaf.parameters if leaf else component.parameters,
        shape=leaf.shape if leaf else None,
        mean=bound,
        std=0.0,
        pairs=0,
        ci_low=bound,
        ci_high=bound,
    )


def _softmax(
    outputs: dict[str, torch.Tensor], parts: tuple[tuple[str, slice], ...], head_dim: int
) -> torch.Tensor | None:
    """softmax(q k^T / sqrt(head_dim)) v of these parts of outputs, heads side by side; `None` if they are no tokens."""
    found = [outputs[name][..., rows] for name, rows in parts if name in outputs]
    if len(found) != 3 or any(part.ndim != 3 for part in found):
        return None
    q, k, v = (part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in found)
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _in_full_precision(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Call a module with its weights and inputs in float32, where rounding cannot be taken for something in between."""

    def full(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
        if isinstance(value, Mapping):
            return {key: full(entry) for key, entry in value.items()}
        return type(value)(full(entry) for entry in value) if type(value) in (tuple, list) else value

    if any(parameter.is_meta for parameter in module.parameters()):
        # offloaded weights come and go by hooks, in their own precision; rounding may then give a larger bound
        module(*args, **kwargs)
        return
    half = {
        name: value.float()
        for name, value in itertools.chain(module.named_parameters(), module.named_buffers())
        if value.dtype in (torch.float16, torch.bfloat16)
    }
    torch.func.functional_call(module, half, full(tuple(args)), full(dict(kwargs)))


@dataclass
class _Probe:
    """Noise or a factor on some output features of one linear."""

    rows: slice
    factor: float
    noise: float


class _AttentionProbe:
    """Finds, by behaviour, which weights are v, how wide a head is, and how long tokens are.

    Doubling v's output doubles what the output projection receives; nothing else does. Making q larger changes it, unless q is
    normalised. Noise on one feature of q moves the features of one head. q and k need not be told apart: swapping them leaves
    `||Q^T K||` as it is, except with grouped heads, where k is the narrower one, and with a bias, where the larger of the two
    bounds holds. Position terms show in that softmax(q k^T / sqrt(d)) v is not what the output projection receives.
    """

    def __init__(self, modules: dict[str, nn.Module], structure: Structure, attentions: dict[str, Component]) -> None:
        self.modules, self.structure, self.attentions = modules, structure, attentions
        # one entry for each of the two that may be q
        self.heads: dict[str, list[_Heads]] = {}
        self.radius: dict[str, float] = {}
        self.tokens: dict[str, int] = {}
        self.probing = False

    def attached(self) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        for name, component in self.attentions.items():
            module = self.modules.get(component.inputs)
            if module is not None:
                handle = module.register_forward_hook(self._hook(name, component), with_kwargs=True)
                stack.callback(handle.remove)
        return stack

    def _hook(self, name: str, component: Component) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self.probing:
                return
            x = first_tensor(args, kwargs)
            if x is None:
                return
            norms = float(x.float().norm(dim=-1).max())
            self.radius[name] = max(norms, self.radius.get(name, 0.0))
            dim = self.structure.dims[component.inputs][0]
            self.tokens[name] = int(x.shape[1 - dim] if x.ndim == 3 else x[0].numel() // x.shape[-1])
            if name not in self.heads and component.inputs == component.outputs[0]:
                self.probing = True
                try:
                    with torch.autocast(x.device.type, enabled=False):
                        found = self._heads(component, module, args, kwargs)
                finally:
                    self.probing = False
                if found is not None:
                    self.heads[name] = found

        return hook

    def _heads(self, component: Component, module: nn.Module, args: Any, kwargs: Any) -> list[_Heads] | None:
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            q_weight, k_weight, v_weight = _whole(module.in_proj_weight).chunk(3)
            bias = None if module.in_proj_bias is None else _whole(module.in_proj_bias).chunk(3)[0]
            return [_Heads.of(q_weight, k_weight, v_weight, _whole(module.out_proj.weight), module.head_dim, bias)]
        linears = [name for name in component.modules if self.structure.leaves[name].linear]
        *feeding, out = linears
        weights = {name: _weight(self.modules[name]) for name in linears}
        # a norm or convolution inside the attention is outside the theorem
        if (
            not feeding
            or len(linears) != len(component.modules)
            or any(weight is None or weight.ndim != 2 for weight in weights.values())
        ):
            return None
        parts: list[tuple[str, slice]] = []
        for name in feeding:
            width = self.structure.leaves[name].out_width
            thirds = 3 if len(feeding) == 1 and width % 3 == 0 else 1
            parts += [(name, slice(i * width // thirds, (i + 1) * width // thirds)) for i in range(thirds)]
        if len(parts) != 3:
            return None
        plain = self._received(module, args, kwargs, out)
        if plain is None:
            return None
        values = []
        for name, rows in parts:
            doubled = self._received(module, args, kwargs, out, (name, _Probe(rows, 2.0, 0.0)))
            if doubled is not None and _alike(doubled, 2 * plain):
                values.append((name, rows))
        if len(values) != 1:
            return None
        q, k = (part for part in parts if part != values[0])
        # far larger queries look nowhere else, unless they are normalised
        larger = self._received(module, args, kwargs, out, (q[0], _Probe(q[1], 1e4, 0.0)))
        if larger is None or torch.allclose(larger, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max())):
            return None
        # where one of the two is nothing the other decides nothing, unless position terms depend on it alone
        for gone, other in ((q, k), (k, q)):
            probes = (gone[0], _Probe(gone[1], 0.0, 0.0)), (other[0], _Probe(other[1], -3.0, 0.0))
            if not _alike(*(self._received(module, args, kwargs, out, *probes[:count]) for count in (1, 2))):
                return None
        if q[1].stop - q[1].start < k[1].stop - k[1].start:
            q, k = k, q
        feature = _Probe(slice(q[1].start, q[1].start + 1), 1.0, 1.0)
        noisy = self._received(module, args, kwargs, out, (q[0], feature))
        if noisy is None:
            return None
        change = (noisy - plain).abs().flatten(0, -2).amax(dim=0)
        head_dim = int((change > 1e-6 * change.max()).sum())
        part_weights = [cast(torch.Tensor, weights[name])[rows] for name, rows in (q, k, values[0])]
        if head_dim == 0 or any(w.shape[0] % head_dim for w in part_weights):
            return None
        # heads of the values as wide as those of the keys
        if part_weights[1].shape[0] != part_weights[2].shape[0]:
            return None
        q_weight, k_weight, v_weight = part_weights
        output = cast(torch.Tensor, weights[out])
        q_bias, k_bias = (self._bias(*part) for part in (q, k))
        # either of the two may be q
        ways = [(q, k)] if q_weight.shape != k_weight.shape else [(q, k), (k, q)]
        outputs = self._outputs(module, args, kwargs, feeding)
        mixed = [_softmax(outputs, (*way, values[0]), head_dim) for way in ways]
        positions = not any(output is not None and _alike(output, plain) for output in mixed)
        found = [_Heads.of(q_weight, k_weight, v_weight, output, head_dim, q_bias, positions)]
        if k_bias is not None and q_weight.shape == k_weight.shape:
            found.append(_Heads.of(k_weight, q_weight, v_weight, output, head_dim, k_bias, positions))
        return found

    def _outputs(self, module: nn.Module, args: Any, kwargs: Any, names: list[str]) -> dict[str, torch.Tensor]:
        """What these linears put out."""
        seen: dict[str, torch.Tensor] = {}

        def keep(name: str) -> Any:
            return lambda m, inputs, output: seen.update({name: output.float()})

        handles = [self.modules[name].register_forward_hook(keep(name)) for name in names]
        try:
            _in_full_precision(module, args, kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def _bias(self, name: str, rows: slice) -> torch.Tensor | None:
        module = self.modules[name]
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        with align_module_device(module):
            bias = getattr(module, "bias", None)
            return _whole(bias)[rows] if isinstance(bias, torch.Tensor) else None

    def _received(self, module: nn.Module, args: Any, kwargs: Any, out: str, *probes: tuple[str, _Probe]) -> Any:
        """What the output projection receives when each of the `probes` changes the output of the linear that it names."""
        seen: list[torch.Tensor] = []

        def changed_by(probe: _Probe, output: torch.Tensor) -> torch.Tensor:
            changed = output.clone()
            part = changed[..., probe.rows]
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(part.shape, generator=generator, device="cpu").to(part)
            scale = probe.noise * (part.abs().max() + 1)
            changed[..., probe.rows] = probe.factor * part + scale * noise
            return changed

        def change(probe: _Probe) -> Any:
            return lambda module, inputs, output: changed_by(probe, output)

        handles = [self.modules[out].register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].float()))]
        handles += [self.modules[name].register_forward_hook(change(probe)) for name, probe in probes]
        try:
            _in_full_precision(module, args, kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return seen[0] if seen else None
