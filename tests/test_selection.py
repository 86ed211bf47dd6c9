"""Selection as a pure function: units, budgets, ranks, order and ties."""

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from plastic_peft.selection import NORM_ROLES, Candidate, select


ROLES = ("norm_attention", "attention", "norm_mlp", "mlp_in", "mlp_out")


def candidate(name, role="mlp_in", block=0, score=1.0, component_score=None, cost=10, parameters=100):
    return Candidate(
        name=name,
        role=role,
        block=block,
        component=f"{block}.{role}",
        score=score,
        component_score=score if component_score is None else component_score,
        cost_per_rank=0 if role.startswith("norm") else cost,
        parameters=parameters,
    )


def vit(scores):
    """Two modules per role and block with the given score per role and block."""
    return [
        candidate(f"{block}.{role}.{part}", role, block, score + 0.01 * part, score)
        for block in range(3)
        for role, score in ((role, scores[role] + 0.1 * block) for role in scores)
        for part in range(2)
    ]


SCORES = {"norm_attention": 5.0, "attention": 3.0, "mlp_in": 4.0, "mlp_out": 1.0}


def chosen(**options):
    return select(vit(SCORES), base_parameters=10_000, **options)


def test_a_component_is_a_role_over_all_depths():
    """Without it the paper's unit, one kind of component in every block, could not be chosen."""
    selection = chosen(top_k=1)
    assert selection.units == ("mlp_in",)
    assert sorted(selection.modules) == sorted(f"{b}.mlp_in.{p}" for b in range(3) for p in range(2))
    assert chosen(top_k=1, adapter="full").units == ("norm_attention",)


def test_full_adapters_by_default_reach_the_first_weight_matrices():
    """Without it a norm that ranks first would be all that is trained, which costs tens of points of accuracy."""
    assert chosen(adapter="full").units == ("norm_attention", "mlp_in")
    assert chosen(adapter="full", order="lowest").units == ("mlp_out",)
    norms = [c for c in vit(SCORES) if c.cost_per_rank == 0]
    assert select(norms, base_parameters=10_000, adapter="full").units == ("norm_attention",)


def test_lora_leaves_out_norms_and_full_does_not():
    """Without it LoRA would be asked for on norms, or full adapters would skip the paper's norms."""
    assert not any("norm" in name for name in chosen(fraction=1.0).modules)
    assert sum("norm" in name for name in chosen(fraction=1.0, adapter="full").modules) == 6


def test_blocks_and_modules_are_finer_units():
    """Without it granularity would not change what top_k counts."""
    assert chosen(top_k=2, granularity="block").units == ("2.mlp_in", "1.mlp_in")
    assert chosen(top_k=2, granularity="module").modules == ["2.mlp_in.1", "2.mlp_in.0"]


def test_within_role_takes_the_best_of_every_role_first():
    """Without it a role with a large scale would take all places."""
    selection = chosen(top_k=3, granularity="block", within="role")
    assert selection.units == ("2.mlp_in", "2.attention", "2.mlp_out")


def test_order_reverses_and_random_takes_a_seed():
    """Without it controls would not be controls, or could not be repeated."""
    assert chosen(top_k=1, order="lowest").units == ("mlp_out",)
    draws = [tuple(chosen(top_k=4, granularity="module", order="random", seed=seed).modules) for seed in range(6)]
    assert len(set(draws)) > 1
    assert draws[3] == tuple(chosen(top_k=4, granularity="module", order="random", seed=3).modules)


def test_ties_go_to_the_earlier_module():
    """Without it equal scores would be broken by chance, and a selection could not be repeated."""
    equal = [candidate(f"m{i}", block=i, score=2.0) for i in range(8)]
    selection = select(equal, base_parameters=1000, top_k=3, granularity="module")
    assert selection.modules == ["m0", "m1", "m2"]
    assert (
        select(equal, base_parameters=1000, top_k=3, granularity="module", order="lowest").modules == selection.modules
    )


def test_threshold_and_fraction():
    """Without it the two other ways to say how much could keep too few or too many units."""
    assert chosen(threshold=3.05, granularity="component").units == ("mlp_in", "attention")
    assert len(chosen(fraction=0.5, granularity="block").units) == 5
    with pytest.raises(ValueError, match="No score reaches threshold=9"):
        chosen(threshold=9)


def test_lora_by_default_spends_one_per_cent():
    """Without it a config that says nothing about how much would adapt everything or nothing."""
    assert chosen().parameters <= 100


def test_a_budget_decides_the_ranks_and_otherwise_r_does():
    """Without it a budget at the default rank would pile up on few modules, and units chosen by number would not get rank r."""
    assert len(chosen(budget=240).ranks) == 18
    assert set(chosen(top_k=1, r=3).ranks.values()) == {3}
    assert chosen(top_k=1, adapter="full").ranks == {}


def test_a_budget_below_one_module_says_what_is_needed():
    """Without it a small budget would give an empty adapter."""
    with pytest.raises(
        ValueError, match=r"budget of 50 parameters is below the first module, 2.mlp_in.1, which needs 80"
    ):
        chosen(budget=50, rank_allocation="uniform")
    with pytest.raises(ValueError, match=r"100 parameters \(0.01 of 10,000\).*lower r \(now 64\)"):
        chosen(budget=0.01, r=64, rank_allocation="uniform")
    with pytest.raises(ValueError, match=r"which needs 10: raise the budget"):
        chosen(budget=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 10, "top_k": 1}, "budget and top_k say two different things"),
        ({"fraction": 0.5, "threshold": 1.0}, "fraction and threshold"),
        ({"budget": 1.5}, "share above 1"),
        ({"budget": 0}, "leaves nothing to train"),
        ({"budget": float("nan")}, "not a number"),
        ({"budget": True}, "not a number"),
        ({"top_k": 0}, "top_k=0"),
        ({"fraction": 1.5}, "fraction=1.5"),
        ({"granularity": "layer"}, "'component', 'block', 'module'"),
        ({"within": "block"}, "'model', 'role'"),
        ({"order": "best"}, "'highest', 'lowest', 'random'"),
        ({"rank_allocation": "even"}, "'uniform', 'proportional'"),
        ({"adapter": "dora"}, "'lora', 'full'"),
        ({"adapter": "full", "rank_allocation": "proportional"}, "full adapters have no rank"),
    ],
)
def test_contradictions_are_named(options, message):
    """Without it two options that contradict each other would silently let one win."""
    with pytest.raises(ValueError, match=message):
        chosen(**options)


def test_nothing_to_adapt_is_an_error():
    """Without it LoRA on norms alone would give an adapter without parameters."""
    with pytest.raises(ValueError, match=r"None of the 1 modules with a score can take adapter='lora' \(n\)"):
        select([candidate("n", "norm_mlp")], base_parameters=100)


candidates = st.lists(
    st.tuples(st.sampled_from(ROLES), st.integers(0, 5), st.floats(0.01, 10), st.integers(1, 50), st.integers(1, 500)),
    min_size=1,
    max_size=40,
).map(
    lambda drawn: [
        candidate(f"m{i}", role, block, score, None, cost, parameters)
        for i, (role, block, score, cost, parameters) in enumerate(drawn)
    ]
)


@given(
    candidates,
    st.integers(1, 20_000),
    st.integers(1, 16),
    st.sampled_from(["component", "block", "module"]),
    st.sampled_from(["model", "role"]),
    st.sampled_from(["highest", "lowest", "random"]),
    st.sampled_from(["uniform", "proportional"]),
    st.sampled_from([None, True, False]),
)
def test_a_budget_is_never_exceeded_and_spent_to_within_one_step(
    pool, budget, r, granularity, within, order, allocation, train_norms
):
    """Without it the trainable parameters could exceed the budget, or leave more than one module or rank unspent."""
    able = [c for c in pool if c.cost_per_rank]
    assume(able)
    by_name = {c.name: c for c in able}
    options = dict(budget=budget, r=r, granularity=granularity, within=within, order=order, rank_allocation=allocation)
    options["train_norms"] = train_norms
    try:
        selection = select(pool, base_parameters=10**6, **options)
    except ValueError as error:
        assert "below the first module" in str(error)
        return
    cost = sum(by_name[name].cost_per_rank * rank for name, rank in selection.ranks.items())
    norms = {c.name: c.parameters for c in pool if c.role in NORM_ROLES and not c.cost_per_rank}
    assert selection.norms == (() if train_norms is False else selection.norms and tuple(norms))
    assert bool(selection.norms) == bool(norms) or train_norms is not True
    cost += sum(norms[name] for name in selection.norms)
    assert cost == selection.parameters <= budget
    left = budget - cost
    if allocation == "proportional":
        assert left < min(by_name[name].cost_per_rank for name in selection.modules)
        assert min(selection.ranks.values()) >= 1
    elif len(selection.modules) < len(able):
        uniform = select(pool, base_parameters=10**6, **{**options, "budget": None, "fraction": 1.0})
        following = uniform.modules[len(selection.modules)]
        assert uniform.modules[: len(selection.modules)] == selection.modules
        assert by_name[following].cost_per_rank * r > left


def test_norms_are_trained_where_a_budget_has_room_for_them():
    """Without it small budgets would go to norms alone, or large ones leave the cheapest parameters of all untrained."""
    norms = [candidate(f"n{i}", "norm_mlp", i, parameters=20) for i in range(2)]
    pool = [*norms, candidate("a", cost=10)]
    options = dict(base_parameters=1000, rank_allocation="proportional")
    assert select(pool, budget=160, **options).norms == ("n0", "n1")
    assert select(pool, budget=160, **options).ranks == {"a": 12}
    assert select(pool, budget=159, **options).norms == ()
    assert select(pool, budget=159, train_norms=True, **options).ranks == {"a": 11}
    assert select(pool, top_k=1, **options).norms == ()
    assert select(pool, top_k=1, train_norms=True, base_parameters=1000, r=2).parameters == 20 + 40
    with pytest.raises(ValueError, match="without the norms.*below the first module"):
        select(pool, budget=45, train_norms=True, **options)
    with pytest.raises(ValueError, match="full adapters select norms"):
        select(pool, adapter="full", train_norms=True, base_parameters=1000)


def test_a_budget_with_proportional_ranks_reaches_as_many_modules_as_it_pays_for():
    """Without it a budget would go to a few modules at rank r, and the measured shares would say little."""
    pool = [candidate(f"m{i}", block=i, score=float(1 + i), cost=10) for i in range(8)]
    options = dict(base_parameters=1000, granularity="module", rank_allocation="proportional", r=8)
    assert set(select(pool, budget=360, **options).ranks.values()) == set(range(1, 9))
    assert select(pool, budget=50, **options).modules == ["m7", "m6", "m5", "m4", "m3"]


def test_proportional_ranks_within_roles_do_not_compare_roles():
    """Without it the role with the largest scale would take the ranks of all others."""
    pool = [candidate("a0", "attention", 0, 0.1), candidate("a1", "attention", 1, 0.3)]
    pool += [candidate("f0", "mlp_in", 0, 10.0), candidate("f1", "mlp_in", 1, 30.0)]
    options = dict(base_parameters=1000, fraction=1.0, granularity="module", rank_allocation="proportional", r=8)
    assert select(pool, within="role", **options).ranks == {"a0": 4, "f0": 4, "a1": 12, "f1": 12}
    assert select(pool, within="model", **options).ranks == {"a0": 1, "f0": 7, "a1": 1, "f1": 23}


def test_controls_turn_proportional_ranks_round():
    """Without it the lowest and random orders would give the same ranks as the highest, and control nothing."""
    pool = [candidate(f"m{i}", block=i, score=float(1 + i)) for i in range(6)]
    options = dict(base_parameters=1000, fraction=1.0, granularity="module", rank_allocation="proportional", r=8)
    highest, lowest = (list(select(pool, order=order, **options).ranks.items()) for order in ("highest", "lowest"))
    assert dict(highest)["m5"] > dict(highest)["m0"]
    assert dict(lowest)["m5"] < dict(lowest)["m0"]
    assert len({tuple(sorted(select(pool, order="random", seed=s, **options).ranks.items())) for s in range(5)}) > 1


@given(candidates, st.floats(0.1, 100))
def test_ranks_follow_the_scores(pool, factor):
    """Without it proportional ranks could favour the wrong modules or change with the unit of the scores."""
    able = [c for c in pool if c.cost_per_rank]
    assume(able)
    options = dict(base_parameters=10**6, fraction=1.0, granularity="module", rank_allocation="proportional", r=8)
    ranks = select(pool, **options).ranks
    equal_cost = {}
    for c in able:
        equal_cost.setdefault(c.cost_per_rank, []).append(c)
    for group in equal_cost.values():
        group.sort(key=lambda c: c.score)
        for low, high in pairwise(group):
            assert ranks[low.name] <= ranks[high.name] + 1
