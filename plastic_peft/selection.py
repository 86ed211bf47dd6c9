"""From scores to modules and ranks: a pure function of numbers, with no model in sight.

Units (a role over all depths, a component of one block, or a module) are put in one order; `top_k`, `fraction` and
`threshold` count units, `budget` counts trainable parameters and takes modules one by one in that order.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from statistics import fmean


GRANULARITIES = ("component", "block", "module")
WITHIN = ("model", "role")
ORDERS = ("highest", "lowest", "random")
RANK_ALLOCATIONS = ("uniform", "proportional")
ADAPTERS = ("lora", "full")
NORM_ROLES = ("norm_attention", "norm_mlp")
DEFAULT_BUDGET = 0.01
NORMS_SHARE = 0.25


@dataclass(frozen=True)
class Candidate:
    """A module that could be adapted.

    Attributes:
        name: Dotted module name.
        role: Role of the component it belongs to.
        block: Index of its block.
        component: Name of its component; modules of one component share it.
        score: The module's own score.
        component_score: The score of its component.
        cost_per_rank: Trainable parameters that one LoRA rank on it costs, 0 if it cannot take LoRA.
        parameters: Its own parameters, which `adapter="full"` trains.
        constant_cost: Trainable parameters that LoRA costs on it whatever the rank, such as DoRA's magnitudes.
    """

    name: str
    role: str
    block: int
    component: str
    score: float
    component_score: float
    cost_per_rank: int
    parameters: int
    constant_cost: int = 0

    def cost(self, adapter: str, r: int) -> int:
        return self.parameters if adapter == "full" else self.constant_cost + self.cost_per_rank * r


@dataclass(frozen=True, repr=False)
class Selection:
    """Which modules to adapt: what `PlasticityConfig` will choose by the same options.

    Attributes:
        scores: Exact module name to the score it was chosen by, best first.
        ranks: Exact module name to LoRA rank; empty for `adapter="full"`.
        parameters: Trainable parameters of the selection, norms included, without the head.
        units: The units taken, as they were ranked: role, component or module names.
        norms: Exact names of the norms that are trained in full beside LoRA, in execution order.
    """

    scores: dict[str, float]
    ranks: dict[str, int]
    parameters: int
    units: tuple[str, ...]
    norms: tuple[str, ...] = ()

    @property
    def modules(self) -> list[str]:
        return list(self.scores)

    def __repr__(self) -> str:
        used = sorted(set(self.ranks.values()))
        ranks = f" at rank {used[0]}{f' to {used[-1]}' if len(used) > 1 else ''}" if used else ""
        norms = f", {len(self.norms)} norms in full" if self.norms else ""
        named = ", ".join(self.units[:5]) + (", ..." if len(self.units) > 5 else "")
        return f"Selection({len(self.scores)} modules{ranks}{norms}; {self.parameters:,} parameters; {named})"


def check_options(
    *,
    budget: float | int | None,
    top_k: int | None,
    fraction: float | None,
    threshold: float | None,
    granularity: str,
    within: str,
    order: str,
    rank_allocation: str | None,
    adapter: str,
    train_norms: bool | None = None,
) -> None:
    """Raise a `ValueError` that names the option at fault; see `select` for their meaning."""
    given = {"budget": budget, "top_k": top_k, "fraction": fraction, "threshold": threshold}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ValueError(
            f"{' and '.join(named)} say two different things about how much to adapt: pass only one of them."
        )
    for name, choice, allowed in (
        ("granularity", granularity, GRANULARITIES),
        ("within", within, WITHIN),
        ("order", order, ORDERS),
        ("rank_allocation", rank_allocation, (*RANK_ALLOCATIONS, None)),
        ("adapter", adapter, ADAPTERS),
    ):
        if choice not in allowed:
            raise ValueError(f"{name}={choice!r} is unknown: choose one of {', '.join(map(repr, allowed))}.")
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value)):
            raise ValueError(f"{name}={value!r} is not a number: pass a finite one.")
    if budget is not None and budget <= 0:
        raise ValueError(
            f"budget={budget} leaves nothing to train: pass parameters (int) or a share of the model (float)."
        )
    if budget is not None and not isinstance(budget, Integral) and budget > 1:
        raise ValueError(f"budget={budget} is a share above 1: pass an int to count parameters.")
    if top_k is not None and (top_k < 1 or int(top_k) != top_k):
        raise ValueError(f"top_k={top_k} must be a whole number of at least 1.")
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} must lie above 0 and at most at 1.")
    if train_norms not in (True, False, None):
        raise ValueError(f"train_norms={train_norms!r} must be True, False or None.")
    if adapter == "full" and train_norms:
        raise ValueError(
            'train_norms applies to adapter="lora": full adapters select norms as they select other modules.'
        )
    if adapter == "full" and rank_allocation == "proportional":
        raise ValueError('rank_allocation applies to adapter="lora": full adapters have no rank.')


def select(
    candidates: Sequence[Candidate],
    *,
    base_parameters: int,
    budget: float | int | None = None,
    top_k: int | None = None,
    fraction: float | None = None,
    threshold: float | None = None,
    granularity: str = "component",
    within: str = "model",
    order: str = "highest",
    rank_allocation: str | None = None,
    adapter: str = "lora",
    train_norms: bool | None = None,
    r: int = 8,
    seed: int = 0,
) -> Selection:
    """Choose modules and ranks.

    Args:
        candidates: In execution order, which also breaks ties: of two equal scores the earlier module wins.
        base_parameters: Parameters of the base model, to which a float `budget` refers.
        budget: Trainable parameters to spend at most: an int, or a float share of the base model. Modules are taken in
            order until the next one does not fit; inside a unit the better component and module come first.
        top_k, fraction, threshold: How many units, what share of them (rounded up), or which score they need at least.
            If none of the four is given: a budget of 1 % for LoRA; for full adapters all units down to the first that holds
            weight matrices, since norms alone adapt too little.
        granularity: What is ranked: `"component"`, a role over all depths, scored by the mean over its blocks (as the
            paper does); `"block"`, one component of one block; `"module"`.
        within: `"model"` ranks all units together; `"role"` takes the best of every role first, then the second, ...,
            and proportional ranks compare scores inside each role only.
        order: `"highest"` or `"lowest"` score first, or `"random"` (with `seed`) for controls.
        rank_allocation: `"uniform"` gives every module rank `r`; `"proportional"` gives ranks in proportion to the modules'
            scores, at least 1, until no further rank fits: a `budget` goes to as many modules as it pays one rank for, and
            otherwise the chosen units share what rank `r` on each would cost. By default proportional for a budget, and
            uniform otherwise.
        adapter: `"lora"` or `"full"`; LoRA goes on the modules that can take it, which norms cannot.
        train_norms: Train the norms of all blocks in full beside LoRA. They cost next to nothing, and a budget pays for
            them first. By default for a budget of which they take at most a quarter.
        r: LoRA rank; without effect where a budget is spent proportionally.

    Raises:
        ValueError: If options contradict each other, nothing can be selected, or the budget is below the first module.
    """
    check_options(
        budget=budget,
        top_k=top_k,
        fraction=fraction,
        threshold=threshold,
        granularity=granularity,
        within=within,
        order=order,
        rank_allocation=rank_allocation,
        adapter=adapter,
        train_norms=train_norms,
    )
    able = [c for c in candidates if adapter == "full" or c.cost_per_rank > 0]
    if not able:
        some = ", ".join(c.name for c in candidates[:3]) or "none"
        raise ValueError(
            f"None of the {len(candidates)} modules with a score can take adapter={adapter!r} ({some}): LoRA goes on linears, "
            "convolutions and embeddings; adapter='full' takes norms too."
        )
    open_ended = budget is None and top_k is None and fraction is None and threshold is None
    if open_ended and adapter == "lora":
        budget = DEFAULT_BUDGET
    if rank_allocation is None:
        rank_allocation = "proportional" if budget is not None and adapter == "lora" else "uniform"

    units = _ranked_units(able, granularity, within, order, seed)
    if open_ended and adapter == "full":
        matrices = (i for i, unit in enumerate(units) if any(c.cost_per_rank for c in unit.members))
        units = units[: 1 + next(matrices, 0)]
    elif top_k is not None:
        units = units[: int(top_k)]
    elif fraction is not None:
        units = units[: math.ceil(fraction * len(units))]
    elif threshold is not None:
        best = max(unit.score for unit in units)
        units = [unit for unit in units if unit.score >= threshold]
        if not units:
            raise ValueError(f"No score reaches threshold={threshold}: the highest is {best:.4g}. Lower the threshold.")

    chosen = [c for unit in units for c in unit.members]
    norms = [c for c in candidates if c.role in NORM_ROLES and c.cost_per_rank == 0] if adapter == "lora" else []
    cost_of_norms = sum(c.parameters for c in norms)
    if budget is not None:
        limit = int(budget) if isinstance(budget, Integral) else int(budget * base_parameters)
        if train_norms is None:
            train_norms = cost_of_norms <= NORMS_SHARE * limit
        if train_norms:
            limit -= cost_of_norms
        least = 1 if rank_allocation == "proportional" else r
        fitting = _prefix_within(chosen, limit, adapter, least)
        if not fitting:
            first = chosen[0]
            share = "" if isinstance(budget, Integral) else f" ({budget} of {base_parameters:,})"
            share = f"{share} without the norms" if train_norms else share
            remedy = f"lower r (now {r}), raise the budget" if adapter == "lora" and least > 1 else "raise the budget"
            raise ValueError(
                f"A budget of {limit:,} parameters{share} is below the first module, {first.name}, which needs "
                f"{first.cost(adapter, least):,}: {remedy}, or use top_k."
            )
        chosen = fitting
    ranks: dict[str, int] = {}
    if adapter == "lora":
        ranks = {c.name: r for c in chosen}
        if rank_allocation == "proportional":
            spend = limit if budget is not None else sum(c.cost("lora", r) for c in chosen)
            ranks = _proportional_ranks(chosen, spend, _weights(chosen, within, order, seed))
    norms = norms if train_norms else []
    names = {c.name for c in chosen}
    return Selection(
        scores={c.name: c.score for c in chosen},
        ranks=ranks,
        parameters=sum(c.cost(adapter, ranks.get(c.name, r)) for c in chosen) + sum(c.parameters for c in norms),
        units=tuple(unit.name for unit in units if names & {c.name for c in unit.members}),
        norms=tuple(c.name for c in norms),
    )


@dataclass(frozen=True)
class _Unit:
    name: str
    role: str
    score: float
    members: list[Candidate]


def _ranked_units(candidates: Sequence[Candidate], granularity: str, within: str, order: str, seed: int) -> list[_Unit]:
    def key(c: Candidate) -> tuple[object, ...]:
        return {"component": (c.role,), "block": (c.block, c.component), "module": (c.name,)}[granularity]

    groups: dict[tuple[object, ...], list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(key(candidate), []).append(candidate)
    sign = 1 if order == "lowest" else -1
    shuffle = random.Random(seed)
    units = []
    for members in groups.values():
        first = members[0]
        if granularity == "module":
            name, score = first.name, first.score
        elif granularity == "block":
            name, score = first.component, first.component_score
        else:
            name, score = first.role, fmean({c.component: c.component_score for c in members}.values())
        members = sorted(members, key=lambda c: (sign * c.component_score, c.block, sign * c.score))
        if order == "random":
            shuffle.shuffle(members)
        units.append(_Unit(name, first.role, score, members))
    if order == "random":
        shuffle.shuffle(units)
    else:
        units.sort(key=lambda unit: sign * unit.score)
    if within == "role":
        seen: dict[str, int] = {}
        places = []
        for unit in units:
            places.append(seen.get(unit.role, 0))
            seen[unit.role] = places[-1] + 1
        units = [unit for _, unit in sorted(zip(places, units, strict=True), key=lambda pair: pair[0])]
    return units


def _prefix_within(candidates: Iterable[Candidate], limit: int, adapter: str, r: int) -> list[Candidate]:
    taken, spent = [], 0
    for candidate in candidates:
        spent += candidate.cost(adapter, r)
        if spent > limit:
            break
        taken.append(candidate)
    return taken


def _weights(chosen: Sequence[Candidate], within: str, order: str, seed: int) -> dict[str, float]:
    """What ranks are proportional to: scores, over the role's mean where scales of roles should not count.

    The controls turn them round: inverse scores for the lowest order, shuffled ones for the random order.
    """
    weights = {c.name: max(c.score, 0.0) for c in chosen}
    if within == "role":
        mean = {role: fmean(weights[c.name] for c in chosen if c.role == role) for role in {c.role for c in chosen}}
        weights = {c.name: weights[c.name] / mean[c.role] if mean[c.role] > 0 else 1.0 for c in chosen}
    if order == "lowest":
        least = min((w for w in weights.values() if w > 0), default=1.0)
        weights = {name: 1 / max(weight, least) for name, weight in weights.items()}
    elif order == "random":
        shuffled = list(weights.values())
        random.Random(seed).shuffle(shuffled)
        weights = dict(zip(weights, shuffled, strict=True))
    return weights


def _proportional_ranks(chosen: Sequence[Candidate], limit: int, weight: Mapping[str, float]) -> dict[str, int]:
    """Ranks in proportion to weights, at least 1, spending `limit` until no further rank of any module fits."""
    limit -= sum(c.constant_cost for c in chosen)
    total = sum(weight[c.name] * c.cost_per_rank for c in chosen)
    scale = limit / total if total > 0 else 0.0
    ideal = {name: w * scale for name, w in weight.items()}
    ranks = {c.name: max(1, math.floor(ideal[c.name])) for c in chosen}
    spent = sum(ranks[c.name] * c.cost_per_rank for c in chosen)
    # the floor of 1 can overspend: take back where the rank is furthest above its share
    while spent > limit:
        over = max((c for c in chosen if ranks[c.name] > 1), key=lambda c: ranks[c.name] - ideal[c.name], default=None)
        if over is None:
            break
        ranks[over.name] -= 1
        spent -= over.cost_per_rank
    while True:
        fitting = [c for c in chosen if spent + c.cost_per_rank <= limit]
        if not fitting:
            return ranks
        under = max(fitting, key=lambda c: ideal[c.name] - ranks[c.name])
        ranks[under.name] += 1
        spent += under.cost_per_rank
