"""The methods that `method_comparison.py` compares: what each adapts, at the same number of trainable parameters.

A method is written as a short text:

    head | full | layernorm | only:ROLE             full training of these weights (the head is always trained)
    all-linear | q+v | attention | attention-out | mlp | mlp-in | mlp-out
    first-blocks | middle-blocks | last-blocks      all linears of a third of the blocks
    kappa | eva                                     peft's KappaTune and EVA
    select:KEY=VALUE,...                            `PlasticityReport.select` with these options, `signal` among them
    best-role:SIGNAL                                the role with the highest mean signal, over all depths
    random                                          random modules; the run's seed draws them
    gradient:SHAPE                                  ranks by gradient norms on labelled images; see `_gradient`
    norms:METHOD                                    METHOD on what the budget leaves after all norms, trained in full
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from torch import nn

from plastic_peft import PlasticityReport, find_components
from plastic_peft.selection import Candidate, Selection


# fixed rules go by name, as they do in practice: transformers 5 and 4
QUERY, KEY, VALUE = ("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")


@dataclass(frozen=True)
class Choice:
    """What a run trains besides the head: LoRA ranks by module name, and the names of modules trained in full."""

    ranks: Mapping[str, int] = field(default_factory=dict)
    full: Sequence[str] = ()
    init: str = "default"


@dataclass(frozen=True)
class Situation:
    """What methods may look at: the pretrained model, the run's training images and its budget of parameters."""

    model: nn.Module
    budget: int
    seed: int
    report: Callable[[str], PlasticityReport]
    gradients: Callable[[], Mapping[str, float]]


def choose(method: str, situation: Situation) -> Choice:
    name, _, options = method.partition(":")
    candidates = [c for c in situation.report("hidden").candidates() if c.cost_per_rank > 0]
    blocks = 1 + max(c.block for c in candidates)
    third = blocks // 3
    if name == "head":
        return Choice()
    if name == "norms":
        norms = _whole("layernorm", "", situation.model)
        spent = sum(p.numel() for norm in norms for p in situation.model.get_submodule(norm).parameters())
        return replace(choose(options, replace(situation, budget=situation.budget - spent)), full=norms)
    if name in ("full", "layernorm", "only"):
        return Choice(full=_whole(name, options, situation.model))
    if name == "select":
        chosen = dict(pair.split("=") for pair in options.split(","))
        report = situation.report(chosen.pop("inputs", "hidden"))
        settings = {k: int(v) if v.isdigit() else v for k, v in chosen.items()}
        # all methods adapt linears; `norms:` in front of any of them adds the norms
        settings = {"granularity": "module", "r": 8, "rank_allocation": "uniform", "train_norms": False, **settings}
        return Choice(
            _filled(report.select(budget=situation.budget, seed=situation.seed, **settings), candidates, situation)
        )
    if name == "random":
        drawn = situation.report("hidden").select(
            budget=situation.budget, granularity="module", order="random", rank_allocation="uniform",
            seed=situation.seed, train_norms=False,
        )  # fmt: skip
        return Choice(_filled(drawn, candidates, situation))
    if name == "best-role":
        scored = [c for c in situation.report("hidden").candidates(options) if c.cost_per_rank > 0]
        roles = {c.role for c in scored}
        best = max(
            roles, key=lambda role: fmean({c.component: c.component_score for c in scored if c.role == role}.values())
        )
        return Choice(spread([c for c in scored if c.role == best], situation.budget))
    if name == "gradient":
        return Choice(_gradient(options, candidates, situation))
    if name == "kappa":
        from peft.helpers import find_kappa_target_modules

        low = set(find_kappa_target_modules(situation.model, show_progress=False)["target_modules"] or ())
        return Choice(spread([c for c in candidates if c.name in low], situation.budget))
    rules: dict[str, Callable[[Candidate], bool]] = {
        "all-linear": lambda c: True,
        "eva": lambda c: True,
        "q+v": lambda c: c.name.endswith(QUERY + VALUE),
        "attention-out": lambda c: c.role == "attention" and not c.name.endswith(QUERY + KEY + VALUE),
        "attention": lambda c: c.role == "attention",
        "mlp": lambda c: c.role in ("mlp_in", "mlp_out"),
        "mlp-in": lambda c: c.role == "mlp_in",
        "mlp-out": lambda c: c.role == "mlp_out",
        "first-blocks": lambda c: c.block < third,
        "middle-blocks": lambda c: third <= c.block < blocks - third,
        "last-blocks": lambda c: c.block >= blocks - third,
    }
    if name not in rules:
        raise ValueError(f"Method {method!r} is unknown: see benchmarks/methods.py.")
    ranks = spread([c for c in candidates if rules[name](c)], situation.budget)
    return Choice(ranks, init="eva" if name == "eva" else "default")


def spread(candidates: Sequence[Candidate], budget: int, weights: Mapping[str, float] | None = None) -> dict[str, int]:
    """Ranks in proportion to `weights` (equal by default) that spend the budget to within one rank."""
    weights = weights or dict.fromkeys((c.name for c in candidates), 1.0)
    scale = budget / sum(weights[c.name] * c.cost_per_rank for c in candidates)
    ideal = {c.name: weights[c.name] * scale for c in candidates}
    ranks = {c.name: math.floor(ideal[c.name]) for c in candidates}
    left = budget - sum(ranks[c.name] * c.cost_per_rank for c in candidates)
    while fitting := [c for c in candidates if c.cost_per_rank <= left]:
        next_up = max(fitting, key=lambda c: ideal[c.name] - ranks[c.name])
        ranks[next_up.name] += 1
        left -= next_up.cost_per_rank
    return {name: rank for name, rank in ranks.items() if rank > 0}


def _filled(selection: Selection, candidates: Sequence[Candidate], situation: Situation) -> dict[str, int]:
    """The ranks of a selection, raised in turn until the budget is spent as other methods spend it."""
    ranks, left = dict(selection.ranks), situation.budget - selection.parameters
    chosen = [c for c in candidates if c.name in ranks]
    while fitting := [c for c in chosen if c.cost_per_rank <= left]:
        lowest = min(fitting, key=lambda c: ranks[c.name] / selection.ranks[c.name])
        ranks[lowest.name] += 1
        left -= lowest.cost_per_rank
    return ranks


def _whole(name: str, role: str, model: nn.Module) -> list[str]:
    leaves = [n for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None]
    if name == "full":
        return leaves
    components = [c for c in find_components(model) if c.block is not None]
    if name == "layernorm":
        return [leaf for leaf in leaves if isinstance(model.get_submodule(leaf), nn.LayerNorm)]
    inside = [module for c in components if c.role == role for module in c.modules]
    if not inside:
        raise ValueError(f"No component has the role {role!r}: choose among {sorted({c.role for c in components})}.")
    return inside


def _gradient(shape: str, candidates: Sequence[Candidate], situation: Situation) -> dict[str, int]:
    """Selection by the norms of weight gradients on labelled training images, after a short fit of the head alone.

    `proportional`: ranks over all modules in proportion to squared norm per parameter of a rank; `root`: to its square
    root; `module`: rank 8 on the modules with the most of it; `role`: the best role, over all depths.
    """
    norms = situation.gradients()
    gain = {c.name: norms[c.name] ** 2 / c.cost_per_rank for c in candidates}
    if shape == "proportional":
        return spread(candidates, situation.budget, gain)
    if shape == "root":
        return spread(candidates, situation.budget, {name: math.sqrt(value) for name, value in gain.items()})
    if shape == "role":
        roles = {c.role for c in candidates}
        best = max(roles, key=lambda role: fmean(gain[c.name] for c in candidates if c.role == role))
        return spread([c for c in candidates if c.role == best], situation.budget)
    if shape == "module":
        ranked, spent, ranks = sorted(candidates, key=lambda c: -gain[c.name]), 0, {}
        for c in ranked:
            if (spent := spent + 8 * c.cost_per_rank) > situation.budget:
                break
            ranks[c.name] = 8
        return ranks
    raise ValueError(f"gradient:{shape} is unknown: choose proportional, root, module or role.")


def gradient_norms(
    model: nn.Module, head: nn.Module, pixels: torch.Tensor, labels: torch.Tensor, names: Sequence[str], seed: int
) -> dict[str, float]:
    """Frobenius norms of the loss gradient of each named weight, averaged over batches of 32, with a fitted head.

    Costs a forward pass of all images for the head, which is fitted on what reaches it, and one forward and backward
    pass of the images that the gradients are taken on (the first 128).
    """
    seen: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in pixels.split(64):
            model(pixel_values=batch)
    handle.remove()
    features = torch.cat(seen)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(features), labels).backward()
        optimizer.step()
    weights: dict[str, Any] = {name: model.get_submodule(name).weight for name in names}
    sums = dict.fromkeys(names, 0.0)
    parts = list(zip(pixels[:128].split(32), labels[:128].split(32), strict=True))
    for batch, truth in parts:
        loss = nn.functional.cross_entropy(model(pixel_values=batch).logits, truth)
        for name, gradient in zip(names, torch.autograd.grad(loss, list(weights.values())), strict=True):
            sums[name] += gradient.norm().item() / len(parts)
    return sums
