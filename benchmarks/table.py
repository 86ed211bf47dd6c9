"""Make docs/benchmarks.md from the JSON files under benchmarks/results: `python benchmarks/table.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def spread(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})"


def markdown(rows: list[dict[str, Any]]) -> str:
    table = pandas.DataFrame(rows)
    lines = ["| " + " | ".join(table.columns) + " |", "|" + " --- |" * len(table.columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines)


def cost(r: dict[str, Any]) -> dict[str, str]:
    memory = r["peak_mib"]
    over = {way: f"{memory[way] / memory['bare']:.2f}" for way in ("hidden", "embedding", "reference")}
    return {
        "pairs": f"{r['pairs']} in batches of {r['pairs_per_batch']}",
        "hidden / bare": spread(r["hidden_over_bare"]),
        "tracing alone": f"{r['trace_over_bare']['median']:.2f}" if "trace_over_bare" in r else "",
        "embedding / bare": spread(r["embedding_over_bare"]),
        "reference / bare": spread(r["reference_over_bare"]),
        "peak memory / bare: hidden, embedding, reference": ", ".join(over.values()),
    }


def overhead(data: dict[str, Any]) -> str:
    rows = [{"model": r["model"], **cost(r)} for r in data["results"]]
    text = (
        "Time of a whole call, tracing of the structure included (once, however many pairs), over bare forward passes of the same images (median of "
        "rounds, quartiles), and peak memory of tensors over theirs. `reference` is the paper's protocol, every activation "
        "copied to the host, for five components of a block; ours give a row to every linear as well. The distances read every "
        "activation once: some 18 numbers per token, block and feature, beside 12 d multiplications at width d and the attention's. So "
        "their share falls with the width, and on narrow models it is memory that sets it.\n\n"
    )
    return text + markdown(rows)


def scaling(data: dict[str, Any]) -> str:
    rows = [{"blocks": r["depth"], "width": r["width"], **cost(r)} for r in data["results"]]
    return "How the cost goes with depth, width and number of pairs.\n\n" + markdown(rows)


def training(data: dict[str, Any]) -> str:
    rows = [
        {
            "comparison": r["comparison"],
            "model": r["model"],
            "batch": r.get("batch", ""),
            "time": spread(r["time"]),
            "memory of a step": f"{r['memory_of_a_step']:.3f}" if "memory_of_a_step" in r else "",
            "peak memory, weights included": f"{r['memory']:.3f}" if "memory" in r else "",
        }
        for r in data["results"]
    ]
    return "Ours over theirs, on the same modules, in turn (median of rounds, quartiles).\n\n" + markdown(rows)


def bounds(data: dict[str, Any]) -> str:
    r = data["results"][0]
    return (
        f"Full SVDs take {spread(r['full_svd_over_ours'])} times as long as Lanczos and thin QR on the {r['linears']} linears and "
        f"{r['attentions']} attentions of a ViT-B (random weights); largest relative difference {r['largest_relative_error']:.1e}. "
        f"`plasticity_bounds` as a whole, with two forward passes and the probing: {r['all_bounds_seconds']} s."
    )


def reference(data: dict[str, Any]) -> str:
    worst = max(data["results"][0]["largest_relative_difference"].values())
    return (
        f'`inputs="embedding"` on DeiT-tiny against the reference implementation, {data["settings"]["pairs"]} pairs, '
        f"{data['results'][0]['components']} components: largest relative difference {worst:.1e}."
    )


def pairs(data: dict[str, Any]) -> str:
    settings = data["settings"]
    rows = [
        {
            "selection": r["policy"],
            "pairs needed, median": f"{r['needed_median']:.0f}" if r["needed_median"] else "",
            "worst": r["needed_worst"] or "",
            f"not within {settings['pairs_per_seed']}": r["not_within_draw"],
            "rule stopped": f"{r['stopped']} of {settings['seeds']}",
            "median": f"{r['stopped_median']:.0f}" if r["stopped_median"] else "",
            "wrong": r["wrong_when_stopped"],
        }
        for r in data["results"]
    ]
    text = (
        f"Pairs after which a selection equals that of all {settings['pairs']:,} pairs and stays so, for {settings['seeds']} "
        f"disjoint draws, in steps of {settings['step']}; and where the stopping rule (tolerance 0.05, confidence 0.95, "
        "selection given) stopped within its draw, and how often that selection was another one. The default reaches every "
        "module here, whatever the scores: its rows only show where the rule stops.\n\n"
    )
    ranking = ", ".join(f"{role} {v['mean']:.3f} (shift {v['shift']:.3f})" for role, v in settings["ranking"].items())
    return text + markdown(rows) + f"\n\nMeans over all pairs: {ranking}."


SECTIONS = {
    "measurement_reference": ("The reference implementation's figures", reference),
    "measurement_overhead": ("Cost of the measurement", overhead),
    "measurement_pairs_cifar10": ("Pairs needed: DeiT-tiny, CIFAR-10", pairs),
    "measurement_pairs_sketch": ("Pairs needed: DeiT-tiny, PACS sketch", pairs),
    "measurement_scaling": ("Growth of the measurement's cost", scaling),
    "measurement_bounds": ("Bounds", bounds),
    "training": ("Training and loading", training),
}


def main() -> None:
    parts = [
        "# Benchmarks",
        "Made by `python benchmarks/table.py` from `benchmarks/results/*.json`; each file states seeds, versions and machine. "
        "Times were taken side by side in one run on shared CPU cores, as processor seconds of one thread: read the ratios.",
    ]
    for name, (title, render) in SECTIONS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            parts += [f"## {title}", render(json.loads(path.read_text()))]
    (ROOT / "docs" / "benchmarks.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
