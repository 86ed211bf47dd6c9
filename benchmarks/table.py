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


def overhead(data: dict[str, Any]) -> str:
    rows = []
    for r in data["results"]:
        memory = r["peak_mib"]
        rows.append(
            {
                "model": r["model"],
                "pairs per batch": r["pairs_per_batch"],
                "hidden / bare": spread(r["hidden_over_bare"]),
                "embedding / bare": spread(r["embedding_over_bare"]),
                "reference protocol / bare": spread(r["reference_over_bare"]),
                "peak MiB: bare, hidden, embedding, reference": ", ".join(
                    f"{memory[way]:.0f}" for way in ("bare", "hidden", "embedding", "reference")
                ),
            }
        )
    text = "Time over a bare forward pass of the same images (median of rounds, quartiles), two batches a call, tracing of the structure included.\n\n"
    return text + markdown(rows)


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
            "worst of the seeds that settled": r["worst"] if r["worst"] is not None else "none settled",
            f"seeds still wrong after {settings['pairs_per_seed']} pairs": r["missed"],
        }
        for r in data["results"]
    ]
    text = (
        f"Pairs after which a selection equals that of all {settings['pairs']:,} pairs and stays so, for {settings['seeds']} "
        f"disjoint draws, in steps of {settings['step']}.\n\n"
    )
    ranking = ", ".join(f"{role} {v['mean']:.3f} (shift {v['shift']:.3f})" for role, v in settings["ranking"].items())
    return text + markdown(rows) + f"\n\nMeans over all pairs: {ranking}."


SECTIONS = {
    "measurement_reference": ("The reference implementation's figures", reference),
    "measurement_overhead": ("Cost of the measurement", overhead),
    "measurement_pairs_cifar10": ("Pairs needed: DeiT-tiny, CIFAR-10", pairs),
    "measurement_pairs_sketch": ("Pairs needed: DeiT-tiny, PACS sketch", pairs),
    "measurement_bounds": ("Bounds", bounds),
}


def main() -> None:
    parts = [
        "# Benchmarks",
        "Made by `python benchmarks/table.py` from `benchmarks/results/*.json`; each file states seeds,",
    ]
    parts[-1] += (
        " versions and machine. Times were taken side by side in one run on two shared CPU cores: read the ratios."
    )
    for name, (title, render) in SECTIONS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            parts += [f"## {title}", render(json.loads(path.read_text()))]
    (ROOT / "docs" / "benchmarks.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
