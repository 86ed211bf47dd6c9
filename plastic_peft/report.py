"""The record of a measurement: one row per component and per module, and how it was obtained.

A report is plain data. It is saved as JSON, read back with every field checked, drawn, tabulated, and selected from as
often as one likes; it never holds weights or images.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .components import BLOCK_ROLES, ROLES
from .selection import Candidate, Selection, select


if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


FORMAT_VERSION = 1
REPORT_NAME = "plasticity_report.json"
SIGNALS = ("plasticity", "shift")
LABELS = {
    "norm_attention": "norm before attention (LN1)",
    "attention": "attention (MHA)",
    "norm_mlp": "norm before MLP (LN2)",
    "mlp_in": "MLP in (FC1)",
    "mlp_out": "MLP out (FC2)",
}
_COLORS = dict(zip(BLOCK_ROLES, ("#9db4c0", "#c1121f", "#5c677d", "#f4a259", "#2a9d8f"), strict=True))
_MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Row:
    """The measurement of one component or module.

    Attributes:
        name: Dotted module name.
        level: `"component"` or `"module"`.
        role: Role of the component (for a module: of the component that it belongs to).
        block: Block index in execution order, `None` outside the blocks.
        kind: Class name of the module.
        component: Name of the component that the row is or belongs to.
        parameters: Parameters of the component or module.
        shape: Weight shape of a module: (out, in) for a linear.
        mean: Plasticity, the mean rate of change; for `plasticity_bounds` the bound. No unit.
        std: Standard deviation of the rate over pairs.
        pairs: Number of pairs measured.
        ci_low, ci_high: Confidence interval of the mean.
        source_source, target_target: Mean rate for pairs inside each set, `None` without a source.
        shift: `mean / source_source`, `None` without a source and where that is zero.
        shift_low, shift_high: Confidence interval of the shift; `None` above where the pairs bound it not.
    """

    name: str
    level: str
    role: str
    block: int | None
    kind: str
    component: str
    parameters: int
    shape: tuple[int, ...] | None
    mean: float
    std: float
    pairs: int
    ci_low: float
    ci_high: float
    source_source: float | None = None
    target_target: float | None = None
    shift: float | None = None
    shift_low: float | None = None
    shift_high: float | None = None


@dataclass(frozen=True)
class PlasticityReport:
    """One measurement: its rows, and how it was obtained.

    Attributes:
        rows: Components and modules in execution order.
        inputs: The protocol: `"hidden"`, `"embedding"`, or `"bounds"` for upper bounds.
        pairs: Pairs used; `dropped` were left out because their two images reached some module equal.
        stopped: Why the measurement stopped: `"settled"`, `"max_pairs"` or `"data exhausted"`.
        confidence, tolerance, seed, max_pairs: As given to `measure_plasticity`.
        base_model: Name or path of the measured model.
        base_parameters: Its number of parameters.
        fingerprint: Digest of its architecture without the head: roles, blocks and weight shapes, no names.
        versions: Versions of the libraries that measured.
        notes: Remarks, such as components that the protocol could not measure.
    """

    rows: tuple[Row, ...]
    inputs: str
    pairs: int
    dropped: int
    stopped: str
    confidence: float
    tolerance: float
    seed: int
    max_pairs: int
    base_model: str
    base_parameters: int
    fingerprint: str
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    # --- files -----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as JSON, whole or not at all; a folder gets `plasticity_report.json`. Returns the path."""
        target = Path(path)
        if target.is_dir():
            target = target / REPORT_NAME
        write_whole(
            target, json.dumps({"format": "plastic_peft.report", "version": FORMAT_VERSION, **asdict(self)}, indent=1)
        )
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PlasticityReport:
        """Read a report from a JSON file, or from `plasticity_report.json` in a folder.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If the file is no whole report of a known version; the message says what is wrong with it.
        """
        source = Path(path)
        if source.is_dir():
            source = source / REPORT_NAME
        if source.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{source} is larger than {_MAX_BYTES // 2**20} MiB, which no plasticity report is.")
        try:
            data = json.loads(source.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{source} is not valid JSON ({error}): measure again, or restore the file.") from None
        return cls.from_dict(data, origin=str(source))

    @classmethod
    def from_dict(cls, data: Any, origin: str = "the report") -> PlasticityReport:
        """Build a report from parsed JSON, checking every field; errors as for `load`."""
        if not isinstance(data, dict) or data.get("format") != "plastic_peft.report":
            raise ValueError(f"{origin} is no plasticity report: it does not say format 'plastic_peft.report'.")
        if data.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"{origin} has format version {data.get('version')!r}; this release reads {FORMAT_VERSION}."
            )
        body = {key: value for key, value in data.items() if key not in ("format", "version")}
        rows = body.pop("rows", None)
        if not isinstance(rows, list) or not rows:
            raise ValueError(f"{origin} has no rows: measure again.")
        parsed = tuple(_checked(Row, row, f"{origin}, row {number}") for number, row in enumerate(rows))
        return _checked(cls, {**body, "rows": parsed}, origin)

    # --- views -----------------------------------------------------------------------------------------------------

    def select_rows(self, level: str | None = None, role: str | None = None) -> list[Row]:
        return [row for row in self.rows if level in (None, row.level) and role in (None, row.role)]

    def to_pandas(self, level: str | None = None) -> pandas.DataFrame:
        """The rows as a table, one column per field of `Row`; `level` keeps `"component"` or `"module"` rows only."""
        import pandas

        return pandas.DataFrame([asdict(row) for row in self.select_rows(level)])

    def by_role(self) -> pandas.DataFrame:
        """The block components averaged over depth, highest plasticity first: the paper's view."""
        table = self.to_pandas("component")
        table = table[table.role.isin(BLOCK_ROLES)]
        numeric = ["mean", "std", "source_source", "target_target", "shift", "parameters"]
        table[numeric] = table[numeric].astype(float)
        grouped = table.groupby("role", sort=False).agg(
            blocks=("name", "size"),
            parameters=("parameters", "sum"),
            mean=("mean", "mean"),
            lowest=("mean", "min"),
            highest=("mean", "max"),
            shift=("shift", "mean"),
        )
        return grouped.sort_values("mean", ascending=False).astype({"parameters": int})

    def plot(self, path: str | os.PathLike[str] | None = None, *, signal: str = "plasticity") -> Figure:
        """Draw the signal of every block component over depth with its interval, and the mean of each role.

        Args:
            path: Where to save the picture (format by suffix); without it only the figure is returned.
            signal: `"plasticity"` or `"shift"`.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.8), layout="constrained")
        depth, bars = figure.subplots(1, 2, width_ratios=(2.2, 1))
        _draw(self, depth, bars, signal)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    # --- selection -------------------------------------------------------------------------------------------------

    def candidates(self, signal: str | None = None) -> list[Candidate]:
        """The modules inside blocks with their scores; errors as in `plastic_peft.report.candidates`."""
        return candidates(self.rows, signal)

    def select(self, *, signal: str | None = None, **options: Any) -> Selection:
        """Choose modules and ranks by this report; options as in `plastic_peft.selection.select`."""
        return select(self.candidates(signal), base_parameters=self.base_parameters, **options)


def default_signal(rows: Iterable[Row]) -> str:
    """`"shift"` where source images were measured, else `"plasticity"`.

    Raw rates compare scales as well as components: shift finds the roles whose tuning helps, and raw rates need not
    (docs/method_comparison.md).
    """
    blocks = [row for row in rows if row.level == "module" and row.block is not None and row.role in BLOCK_ROLES]
    return "plasticity" if any(_shift(row) is None for row in blocks) else "shift"


def candidates(rows: Iterable[Row], signal: str | None = None) -> list[Candidate]:
    """The modules inside blocks with their scores, ready for `plastic_peft.selection.select`.

    Args:
        signal: `"plasticity"` or `"shift"`; see `default_signal` for the default.

    Raises:
        ValueError: If the signal is unknown or was not measured.
    """
    rows = list(rows)
    signal = default_signal(rows) if signal is None else signal
    if signal not in SIGNALS:
        raise ValueError(f"signal={signal!r} is unknown: choose one of {', '.join(map(repr, SIGNALS))}.")
    components = {(row.name, row.role): row for row in rows if row.level == "component"}
    found = []
    for row in rows:
        if row.level != "module" or row.role not in BLOCK_ROLES or row.block is None:
            continue
        component = components.get((row.component, row.role), row)
        found.append(
            Candidate(
                name=row.name,
                role=row.role,
                block=row.block,
                component=row.component,
                score=_signal(row, signal),
                component_score=_signal(component, signal),
                cost_per_rank=lora_cost_per_rank(row.kind, row.shape),
                parameters=row.parameters,
            )
        )
    return found


def lora_cost_per_rank(kind: str, shape: tuple[int, ...] | None) -> int:
    """Trainable parameters of one LoRA rank on a module with this weight shape; 0 where LoRA does not apply."""
    if kind == "MultiheadAttention" and shape is not None:
        # peft puts one pair on the fused input projection and one on the output projection
        return shape[0] + shape[1] + 2 * shape[1]
    # LoRA of grouped convolutions takes ranks that the groups divide only, and cannot be merged
    if shape is None or len(shape) < 2 or kind.startswith("Grouped"):
        return 0
    return shape[0] + math.prod(shape[1:])


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that no reader ever sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            # a full disk has no name of its own
            error.filename = str(path)
        raise


def _shift(row: Row) -> float | None:
    """The shift; that of a module which puts out the same for all source images, such as one that starts at zero, is 1."""
    return 1.0 if row.shift is None and row.source_source == 0 else row.shift


def _signal(row: Row, signal: str) -> float:
    value = row.mean if signal == "plasticity" else _shift(row)
    if value is None:
        raise ValueError(
            f"signal={signal!r} needs source images, and this report was measured without: pass source= to "
            "measure_plasticity, or use signal='plasticity'."
        )
    return value


# JSON has no types of its own: what each field must be, and what a reader may rely on afterwards
_STRINGS = {"name", "level", "role", "kind", "component", "inputs", "stopped", "base_model", "fingerprint"}
_COUNTS = {"parameters", "pairs", "dropped", "seed", "max_pairs", "base_parameters"}
_NUMBERS = {"mean", "std", "ci_low", "ci_high", "confidence", "tolerance"}
_OPTIONAL_NUMBERS = {"source_source", "target_target", "shift", "shift_low", "shift_high"}


def _checked(kind: type[Any], data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{where} is no JSON object.")
    known = {f.name for f in fields(kind)}
    if unknown := sorted(set(data) - known):
        raise ValueError(f"{where} has unknown fields: {', '.join(map(str, unknown))}.")
    for name in known:
        value = data.get(name)
        if name in _STRINGS:
            right = isinstance(value, str)
        elif name in _COUNTS:
            right = isinstance(value, int) and not isinstance(value, bool) and (value >= 0 or name == "seed")
        elif name in _NUMBERS:
            right = _is_finite(value)
        elif name in _OPTIONAL_NUMBERS:
            right = value is None or _is_finite(value)
        elif name == "block":
            right = value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)
        elif name == "shape":
            right = value is None or _is_list(value, int)
        elif name == "notes":
            right = name not in data or _is_list(value, str)
        elif name == "versions":
            right = name not in data or (isinstance(value, dict) and _is_list([*value, *value.values()], str))
        else:
            right = name in data
        if not right:
            raise ValueError(f"{where}: field {name!r} is {str(value)[:80]!r}, which no report holds. Measure again.")
    if kind is Row and (data["level"] not in ("component", "module") or data["role"] not in ROLES):
        raise ValueError(f"{where}: level {data['level']!r} or role {data['role']!r} is unknown.")
    lists = {name: tuple(data[name]) for name in ("shape", "notes") if isinstance(data.get(name), (list, tuple))}
    return kind(**{**data, **lists})


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_list(values: Any, kind: type) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)


def _draw(report: PlasticityReport, depth: Axes, bars: Axes, signal: str) -> None:
    shown = []
    for role in BLOCK_ROLES:
        rows = [row for row in report.select_rows("component", role) if row.block is not None]
        if not rows:
            continue
        values = [_signal(row, signal) for row in rows]
        blocks = [row.block for row in rows if row.block is not None]
        depth.plot(blocks, values, color=_COLORS[role], marker="o", markersize=3.5, label=LABELS[role])
        if signal == "plasticity":
            depth.fill_between(
                blocks,
                [row.ci_low for row in rows],
                [row.ci_high for row in rows],
                color=_COLORS[role],
                alpha=0.2,
                linewidth=0,
            )
        shown.append((sum(values) / len(values), role))
    shown.sort()
    title = "upper bound" if report.inputs == "bounds" else signal
    depth.set(xlabel="block", ylabel=title, title=f"{title.capitalize()} over depth ({report.inputs} inputs)")
    depth.locator_params(axis="x", integer=True)
    depth.grid(alpha=0.25)
    if report.inputs == "bounds":
        depth.set_yscale("log")
        bars.set_xscale("log")
    bars.barh(
        [LABELS[role] for _, role in shown], [value for value, _ in shown], color=[_COLORS[role] for _, role in shown]
    )
    for position, (value, _) in enumerate(shown):
        bars.annotate(
            f"{value:.3g}", (value, position), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8
        )
    bars.margins(x=0.15)
    bars.tick_params(axis="y", labelsize=8)
    bars.set(title="Mean over blocks")
    for axes in (depth, bars):
        axes.spines[["top", "right"]].set_visible(False)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint naming the known name that is most like `name`, empty if none is."""
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
