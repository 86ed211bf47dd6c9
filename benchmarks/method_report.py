"""Make docs/method_comparison.md and its picture from what method_comparison.py has run so far.

python benchmarks/method_report.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas
from common import RESULTS
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from table import ROOT, markdown

from plastic_peft.runs import half_width


DOCS = ROOT / "docs"
EPOCHS = 5
"""Epochs of a run whose task does not say otherwise."""
EQUAL_TIME = {"all-linear": "", "q+v": "-7epochs", "attention-out": "-7epochs", "norms:q+v": "-7epochs"}
"""Rules whose runs of about equal time are in the task of this ending."""
TIE = 0.006
"""Accuracies that differ by less count as equal: half a point, or one image of the smallest test set."""

RULES = ("all-linear", "q+v", "attention", "attention-out", "kappa", "eva", "random")
RULES_WITH_NORMS = ("norms:all-linear", "norms:q+v")
# shift ranks attention first on every task, so that its best role is what this rule names
MEASURED = ("select:", "gradient:", "norms:select:", "norms:attention")


def runs() -> pandas.DataFrame:
    rows = []
    for path in sorted((RESULTS / "methods").glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        rows += [{"task": path.stem, **line} for line in lines if "method" in line]
    return pandas.DataFrame(rows)


def at_best_rate(table: pandas.DataFrame) -> pandas.DataFrame:
    """The runs of each task, method and budget at one learning rate: the one that validates best for the first seed."""
    keys = ["task", "method", "budget", "rate"]
    best = table[table.seed == 0].sort_values("validation", ascending=False, kind="stable").drop_duplicates(keys[:3])
    return table.merge(best[keys], on=keys)


def interval(values: Sequence[float]) -> str:
    """Mean in points, with its 95 % t interval where there are values enough to say something."""
    if not values:
        return ""
    mean, half = 100 * sum(values) / len(values), half_width(list(values))
    return f"{mean:+.1f}" if half is None or len(values) < 4 else f"{mean:+.1f} ± {100 * half:.1f}"


def paired(table: pandas.DataFrame, method: str, other: str) -> pandas.Series:
    """Differences in test accuracy, by task and seed, where both have runs."""
    mine, others = (table[table.method == name].set_index(["task", "seed"]).test for name in (method, other))
    return (mine - others).dropna()


def score(differences: Sequence[float]) -> str:
    """Wins, ties (see `TIE`) and losses."""
    won, lost = sum(x > TIE for x in differences), sum(x < -TIE for x in differences)
    return f"{won}/{len(differences) - won - lost}/{lost}"


def task_table(table: pandas.DataFrame, task: str, costs: dict[str, Any]) -> str:
    rows = []
    mine = table[table.task == task]
    for method, group in mine.groupby("method", sort=False):
        cost = costs.get(str(method), {})
        tests = group.test.tolist()
        rows.append(
            {
                "method": f"`{method}`",
                "trained": f"{group.parameters.iloc[0]:,}",
                "modules": int(group.modules.iloc[0]),
                "rate": f"{group.rate.iloc[0]:g}",
                "seeds": len(group),
                "validation": f"{100 * group.validation.mean():.1f}",
                "test": f"{100 * sum(tests) / len(tests):.1f}",
                "against q+v": interval(paired(mine, str(method), "q+v").tolist()) if method != "q+v" else "",
                "step time": f"{cost['step_over_head']:.2f}" if cost else "",
                "peak MiB": cost.get("peak_mib", ""),
            }
        )
    rows.sort(key=lambda row: -float(row["test"]))
    return markdown(rows)


def duels(table: pandas.DataFrame) -> str:
    """Every measured method against every rule, those with norms also against rules with norms: paired over tasks and seeds."""
    rows = []
    methods = [m for m in table.method.unique() if m.startswith(MEASURED)]
    for method in sorted(methods, key=lambda m: not m.startswith("norms:")):
        row: dict[str, Any] = {"method": f"`{method}`"}
        for rule in (*RULES, *RULES_WITH_NORMS):
            row[rule] = against(paired(table, method, rule).tolist())
        rows.append(row)
    return markdown(rows)


def norms_table(table: pandas.DataFrame) -> str:
    """What it changes to train the norms in full at the same number of trainable parameters, method by method.

    The last rows take the mean over methods for each task and seed, since these share their images.
    """
    rows, totals = [], []
    for budget, same in table.groupby("budget", sort=False):
        gains = []
        for task, mine in same.groupby("task", sort=False):
            for method in mine.method.unique():
                d = paired(mine, f"norms:{method}", method)
                if len(d):
                    gains.append(d)
                    rows.append({"task": task, "trained": f"{budget:,}", "method": f"`{method}`", **gain(d)})
        if gains:
            mean = pandas.concat(gains).groupby(level=["task", "seed"]).mean()
            totals.append({"task": "all", "trained": f"{budget:,}", "method": "mean over methods", **gain(mean)})
    return markdown(rows + totals) if rows else ""


def gain(differences: pandas.Series) -> dict[str, Any]:
    values = differences.tolist()
    return {"pairs": len(values), "gain": interval(values), "wins/ties/losses": score(values)}


def time_table(table: pandas.DataFrame, costs: dict[str, Any]) -> str:
    """Methods trained longer because their steps are cheaper, against rules that took as much time.

    `time` is that of the whole training over all linears at the usual number of epochs.
    """
    rows: list[dict[str, Any]] = []
    together: dict[tuple[str, str], dict[str, list[float]]] = {}
    for task in table.task.unique():
        base, _, epochs = re.fullmatch(r"(.*?)(-(\d+)epochs)?", task).groups()
        cost = costs.get(base, {})
        if epochs is None or "all-linear" not in cost:
            continue
        rivals = {
            name: table[(table.task == base + more) & (table.method == name)] for name, more in EQUAL_TIME.items()
        }
        for method, group in table[table.task == task].groupby("method", sort=False):
            step = cost[method]["step_over_head"] / cost["all-linear"]["step_over_head"]
            all_of_it = together.setdefault((str(method), epochs), {name: [] for name in rivals})
            row = {
                "task": base,
                "method": f"`{method}`",
                "epochs": epochs,
                "time": f"{int(epochs) / EPOCHS * step:.2f}",
            }
            row |= {"seeds": len(group), "test": f"{100 * group.test.mean():.1f}"}
            for name, rival in rivals.items():
                both = group.merge(rival, on=["seed", "budget"], suffixes=("", "_rival"))
                differences = [] if method == name else (both.test - both.test_rival).tolist()
                all_of_it[name] += differences
                row[f"against `{name}`"] = against(differences)
            rows.append(row)
    for (method, epochs), differences in together.items():
        row = {"task": "all", "method": f"`{method}`", "epochs": epochs}
        rows.append(row | {f"against `{name}`": against(values) for name, values in differences.items()})
    return markdown([{column: row.get(column, "") for column in rows[0]} for row in rows]) if rows else ""


def against(differences: Sequence[float]) -> str:
    return f"{interval(differences)} ({score(differences)})" if differences else ""


def trial_table(table: pandas.DataFrame, default: str = "norms:all-linear") -> str:
    """What the most generous trial could gain: each seed takes the method with its best validation accuracy."""
    rows = []
    for task, mine in table.groupby("task", sort=False):
        seeds = mine.groupby("method").seed.apply(set)
        usual = default if default in seeds else "all-linear"
        if usual not in seeds or len(seeds[usual]) < 3:
            continue
        rivals = [m for m in seeds.index if seeds[m] >= seeds[usual]]
        runs = mine[mine.method.isin(rivals) & mine.seed.isin(seeds[usual])]
        if len(rivals) < 3:
            continue
        tests = runs.pivot(index="seed", columns="method", values="test")
        validation = runs.pivot(index="seed", columns="method", values="validation")
        picked = validation.idxmax(axis=1)
        gains = [tests.loc[seed, method] - tests.loc[seed, usual] for seed, method in picked.items()]
        best = [tests.loc[seed].max() - tests.loc[seed, usual] for seed in tests.index]
        rows.append(
            {
                "task": task,
                "methods": len(rivals),
                "seeds": len(gains),
                "against": f"`{usual}`",
                "chosen by validation": interval(gains),
                "best by test (not attainable)": interval(best),
            }
        )
    return markdown(rows) if rows else ""


def correlations(table: pandas.DataFrame, task: str, signals: dict[str, dict[str, float]]) -> str:
    """Spearman correlation of each signal with the gain of training one role over all depths."""
    mine = table[table.task == task].groupby("method").test.mean()
    if "head" not in mine or not any(m.startswith("only:") for m in mine.index):
        return ""
    gains = {m.partition(":")[2]: mine[m] - mine["head"] for m in mine.index if m.startswith("only:")}
    order = sorted(gains, key=lambda role: -gains[role])
    text = "Gain over the head alone, in points: " + ", ".join(f"{r} {100 * gains[r]:.1f}" for r in order) + ". "
    if len(order) < 3:
        return text
    parts = []
    for name, values in signals.items():
        rho = spearmanr([values[r] for r in order], [gains[r] for r in order]).statistic
        parts.append(f"{name} {rho:+.2f}")
    return text + "Rank correlation of the signals with it: " + ", ".join(parts) + "."


def picture(table: pandas.DataFrame, costs: dict[str, Any], path: Path) -> None:
    """Test accuracy against step time for each task; the line joins what no other method beats in both."""
    tasks = [task for task in table.task.unique() if task in costs]
    figure = Figure(figsize=(8.2, 5 * len(tasks)), layout="constrained")
    for axes, task in zip(figure.subplots(len(tasks), 1, squeeze=False)[:, 0], tasks, strict=True):
        groups = table[table.task == task].groupby("method").test
        means = (100 * groups.mean()).sort_values(ascending=False)
        shown = [m for m in means.index if m in costs[task] and m != "head" and not m.startswith("only:")]
        points = {m: (costs[task][m]["step_over_head"], means[m]) for m in shown}
        front, best = [], 0.0
        for time, accuracy in sorted(points.values()):
            if accuracy > best:
                front, best = [*front, (time, accuracy)], accuracy
        axes.plot(*zip(*front, strict=True), color="#9db4c0", linewidth=5, alpha=0.5, zorder=0)
        for number, (method, (time, accuracy)) in enumerate(points.items(), start=1):
            color = "#c1121f" if method.startswith(MEASURED) else "#33415c"
            several = groups.size()[method] >= 3
            axes.plot(time, accuracy, "o", color=color, markerfacecolor=color if several else "white", markersize=5)
            axes.annotate(str(number), (time, accuracy), xytext=(3, 3), textcoords="offset points", fontsize=7)
            label = f"{number}  {short(method)}  {accuracy:.1f}"
            height = 1 - number / (len(points) + 1)
            axes.text(1.02, height, label, transform=axes.transAxes, fontsize=7.5, color=color, va="center")
        axes.set(xlabel="time of a training step over that of the head alone", ylabel="test accuracy (%)", title=task)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def short(method: str) -> str:
    names = {
        "select:": "",
        "signal=": "highest ",
        "granularity=": "",
        "rank_allocation=": "",
        "within=role": "in roles",
    }
    if method.endswith(",order=lowest"):
        names["signal="] = "lowest "
    for long, brief in {**names, ",order=lowest": "", ",": " ", "r=2 ": ""}.items():
        method = method.replace(long, brief)
    return method


def main() -> None:
    table = at_best_rate(runs())
    costs, signals = {}, {}
    for task in table.task.unique():
        path = RESULTS / f"methods_cost_{task}.json"
        if path.exists():
            data = json.loads(path.read_text())
            costs[task], signals[task] = data["results"], data["settings"]["signals"]
    lora = table[table.budget > 0]
    times = time_table(lora, costs)
    table = table[~table.task.str.fullmatch(r".*-\d+epochs")]
    lora = table[table.budget > 0]
    norms = norms_table(lora)
    # budgets other than the main one of a task are for the comparison above only
    main_budget = table.task.map({task: mine.budget.mode()[0] for task, mine in lora.groupby("task")})
    table = table[(table.budget == 0) | (table.budget == main_budget)]
    lora = table[table.budget > 0]
    trials = trial_table(lora)
    parts = [(ROOT / "benchmarks" / "method_comparison.md").read_text().strip()]
    parts += ["## Norms in full beside LoRA", norms] if norms else []
    parts += ["## At equal training time", times] if times else []
    parts += ["## What a trial could gain", trials] if trials else []
    # one image of the digits' test set is more than half a point, and all methods are level there
    large = lora[~lora.task.str.contains("digits")]
    parts += ["## Measured selections against fixed rules, DeiT-tiny", duels(large)]
    section: Callable[[str], list[str]] = lambda task: [  # noqa: E731
        f"## {task}",
        correlations(table, task, signals.get(task, {})),
        task_table(table, task, costs.get(task, {})),
    ]
    for task in table.task.unique():
        parts += section(task)
    if costs:
        picture(table, costs, DOCS / "method_comparison.png")
    (DOCS / "method_comparison.md").write_text("\n\n".join(part for part in parts if part) + "\n")


if __name__ == "__main__":
    main()
