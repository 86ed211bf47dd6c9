"""A pytest plugin that runs PEFT's own test-suite with plasticity in the place of LoRA.

While the suite's modules are imported, `peft.LoraConfig` is a `PlasticityConfig` of the adapter mode under test, so that
every LoRA case and every test that builds a `LoraConfig` tests plasticity. The suite's lists of cases are then narrowed to
rows of that class and widened by rows that only plasticity has. What is left out is named in `not_applicable.py`, each
with its reason; an entry there that no test matches is an error.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import pytest
import torch
from not_applicable import NOT_APPLICABLE
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from PIL import Image
from transformers import AutoModelForImageClassification, ConvNextImageProcessor, ResNetConfig

from plastic_peft import PlasticityConfig, PlasticityReport
from plastic_peft.report import Row
from plastic_peft.tuner.config import LORA_ONLY, PEFT_TYPE


@dataclass
class FullPlasticityConfig(PlasticityConfig):
    """A `PlasticityConfig` for tests that name no mode."""

    adapter: str = "full"  # type: ignore[assignment]


CLASSES: dict[str, type[PlasticityConfig]] = {"lora": PlasticityConfig, "full": FullPlasticityConfig}

# rows of the suite's TEST_CASES that a quick run keeps: one for each kind of layer
QUICK_ROWS = (
    "Vanilla MLP 1 LoRA",
    "Vanilla MLP 5 LoRA",
    "Vanilla MLP 8 LoRA with DoRA",
    "Embedding + transformers Conv1D 3 LoRA",
    "Conv2d 2 LoRA",
    "MHA 2 LoRA",
    "MLP 2 using nn.Parameter LoRA",
)
REFUSED_ROW = "Row of TEST_CASES with an option of low-rank matrices, which full adapters refuse with an error."
EVERY = {"fraction": 1.0, "granularity": "module"}


def report(model: str, *leaves: tuple[str, str, str, tuple[int, ...], float]) -> PlasticityReport:
    """A report of one block, each of whose components is one of the suite's modules: name, role, class, shape, rate."""
    rows = [
        Row(
            name=name, level=level, role=role, block=0, kind=kind, component=name, parameters=0, shape=shape, mean=rate,
            std=0.1, pairs=64, ci_low=0.9 * rate, ci_high=1.1 * rate,
        )
        for name, role, kind, shape, rate in leaves
        for level in ("component", "module")
    ]  # fmt: skip
    return PlasticityReport(
        rows=tuple(rows), inputs="hidden", pairs=64, dropped=0, stopped="settled", confidence=0.95, tolerance=0.05, seed=0,
        max_pairs=64, base_model=model, base_parameters=1000, fingerprint="0" * 16,
    )  # fmt: skip


# no vision transformer is among the suite's models, so their reports are stated here
MLP = report("MLP", ("lin0", "mlp_in", "Linear", (20, 10), 1.5), ("lin1", "mlp_out", "Linear", (2, 20), 0.5))
MLP_LAYERNORM = report(
    "MLP_LayerNorm",
    ("layernorm0", "norm_attention", "LayerNorm", (10,), 2.0),
    ("lin0", "mlp_in", "Linear", (20, 10), 1.0),
    ("layernorm1", "norm_mlp", "LayerNorm", (20,), 3.0),
    ("lin1", "mlp_out", "Linear", (2, 20), 0.5),
)
OWN_ROWS: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "lora": [
        ("MLP by scores", "MLP", {"plasticity": {"lin0": 1.0, "lin1": 0.5}, "top_k": 1, "granularity": "module"}),
        ("MLP by report", "MLP", {"plasticity": MLP, "top_k": 1}),
        ("MLP by report and budget", "MLP", {"plasticity": MLP, "budget": 100}),
        ("Conv2d by scores", "Conv2d", {"plasticity": {"conv2d": 1.0, "lin0": 2.0}, **EVERY}),
    ],
    "full": [
        ("MLP by scores", "MLP", {"plasticity": {"lin0": 1.0, "lin1": 0.5}, "top_k": 1, "granularity": "module"}),
        ("MLP by report", "MLP", {"plasticity": MLP, "top_k": 1}),
        ("LayerNorm by report", "MLP_LayerNorm", {"plasticity": MLP_LAYERNORM, "top_k": 1}),
        ("Everything by report", "MLP_LayerNorm", {"plasticity": MLP_LAYERNORM, "fraction": 1.0}),
        ("MLP with LayerNorm", "MLP_LayerNorm", {"target_modules": ["layernorm0", "lin1"]}),
        ("LayerNorms by scores", "MLP_LayerNorm", {"plasticity": {"layernorm0": 1.0, "layernorm1": 0.5}, **EVERY}),
    ],
}
PLASTICITY_PAIRS = [
    (
        "Plasticity by scores",
        "lora",
        {"plasticity": {"lin0": 1.0}, **EVERY, "init_lora_weights": False},
        {"plasticity": {"lin0": 1.0, "lin1": 0.5}, **EVERY, "init_lora_weights": False},
    ),
    (
        "Plasticity by report",
        "lora",
        {"plasticity": MLP, "top_k": 1, "init_lora_weights": False},
        {"plasticity": MLP, "fraction": 1.0, "init_lora_weights": False},
    ),
]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("plasticity")
    group.addoption("--plasticity-adapter", choices=sorted(CLASSES), default="lora", help="Adapter mode under test.")
    group.addoption("--plasticity-quick", action="store_true", help="Keep one row of the suite per kind of layer.")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(PlasticitySuite(config), "plasticity-suite")


class PlasticitySuite:
    """State of one run: which mode is under test, and what became of each test."""

    def __init__(self, config: pytest.Config) -> None:
        self.adapter: str = config.getoption("--plasticity-adapter")
        self.quick: bool = config.getoption("--plasticity-quick")
        self.case = CLASSES[self.adapter]
        self.replaced = {"LoraConfig": peft.LoraConfig, "load_dataset": datasets.load_dataset}
        self.narrowed: set[int] = set()
        self.left_out: Counter[str] = Counter()
        self.unused: list[str] = []
        self.refused: list[str] = []
        self.passed: Counter[str] = Counter()
        self.files: set[str] = set()
        peft.LoraConfig = self.case  # type: ignore[misc]
        PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = self.case
        datasets.load_dataset = _picture_in_place_of_the_hub

    # --- which cases -----------------------------------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        module = metafunc.module
        if id(module) in self.narrowed:
            return
        self.narrowed.add(id(module))
        # the decorators hold these very lists, so they are changed in place
        for name, value in vars(module).items():
            if name.isupper() and isinstance(value, list) and any(self._is_case(row) for row in value):
                value[:] = [row for row in value if self._is_case(row) and self._is_wanted(name, row)]
        if hasattr(module, "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES"):
            own = [(name, model, self.case, kwargs) for name, model, kwargs in OWN_ROWS[self.adapter]]
            module.TEST_CASES.extend(own)
            pairs = [(name, method, self.case, *kwargs) for name, method, *kwargs in PLASTICITY_PAIRS]
            module.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES.extend(pairs)

    def _is_case(self, row: Any) -> bool:
        values = row if isinstance(row, tuple) else (row,)
        return any(value is self.case or isinstance(value, self.case) for value in values)

    def _is_wanted(self, name: str, row: Any) -> bool:
        if name not in ("TEST_CASES", "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES"):
            return True
        kwargs = row[-1]
        if self.adapter == "full" and (
            any(kwargs.get(option) for option in LORA_ONLY) or isinstance(kwargs.get("init_lora_weights"), str)
        ):
            self.left_out[REFUSED_ROW] += 1
            self.refused.append(row[0])
            return False
        return not self.quick or name != "TEST_CASES" or row[0] in QUICK_ROWS

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        peft.LoraConfig = self.replaced["LoraConfig"]
        datasets.load_dataset = self.replaced["load_dataset"]
        kept, left_out, used = [], [], set()
        for item in items:
            name = item.nodeid.partition("tests/")[2] or item.nodeid
            self.files.add(_file(item.nodeid))
            entry = next((e for e in NOT_APPLICABLE if self._names(e, name)), None)
            if entry is not None:
                used.add(entry)
                self.left_out[entry.reason] += 1
            elif _is_other_method(item, self.case):
                self.left_out["Case of another method, in whose place plasticity's cases run."] += 1
            else:
                kept.append(item)
                continue
            left_out.append(item)
        if not config.option.keyword and not any("::" in arg for arg in config.args):
            mine = [e for e in NOT_APPLICABLE if self.adapter in e.modes and _file(e.pattern) in self.files]
            self.unused = [e.pattern for e in mine if e not in used]
        items[:] = kept
        config.hook.pytest_deselected(items=left_out)

    def _names(self, entry: Any, name: str) -> bool:
        return self.adapter in entry.modes and fnmatch.fnmatchcase(name, entry.pattern)

    @pytest.fixture(scope="session", autouse=True)
    def _resnet(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        """Give the vision tests a tiny ResNet of the same architecture as theirs, which lives on the hub."""
        modules = {item.module for item in request.session.items if _file(item.nodeid) == "test_vision_models.py"}
        for module in modules:
            module.TestResnet.model_id = str(_tiny_resnet(tmp_path_factory.mktemp("resnet")))
        yield

    # --- what became of them ---------------------------------------------------------------------------------------

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed[_file(report.nodeid)] += 1

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        silent = self.files - set(self.passed)
        if exitstatus == 0 and not session.config.option.collectonly and (self.unused or silent):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any, exitstatus: int) -> None:
        if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            return
        terminalreporter.section(f'PEFT {peft.__version__} with PlasticityConfig(adapter="{self.adapter}")')
        for name in sorted(self.files):
            terminalreporter.line(f"{self.passed[name]:5} passed in {name}")
            if not self.passed[name]:
                terminalreporter.line(f"ERROR: no test of {name} passed", red=True)
        for reason, count in self.left_out.most_common():
            terminalreporter.line(f"{count:5} left out: {reason}")
        if self.refused:
            terminalreporter.line(f"      such as {', '.join(self.refused[:6])}")
        for pattern in self.unused:
            terminalreporter.line(f"ERROR: not_applicable.py names {pattern}, which matches no test", red=True)


def _file(nodeid: str) -> str:
    return Path(nodeid.partition("::")[0]).name


def _is_other_method(item: pytest.Item, case: type) -> bool:
    """Is the test parametrised by the config of another method, and not by ours?"""
    callspec = getattr(item, "callspec", None)
    values = list(callspec.params.values()) if callspec else []
    kinds = [v if inspect.isclass(v) else type(v) for v in values]
    kinds = [kind for kind in kinds if issubclass(kind, PeftConfig)]
    return bool(kinds) and not all(issubclass(kind, case) for kind in kinds)


def _picture_in_place_of_the_hub(name: str, *args: Any, **kwargs: Any) -> Any:
    assert name == "huggingface/cats-image", f"the suite asks for the data set {name}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return {"test": {"image": [Image.fromarray(noise)]}}


def _tiny_resnet(folder: Path) -> Path:
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=10, hidden_sizes=[10, 20, 30, 40], depths=[1, 1, 2, 1], layer_type="basic", num_labels=3
    )
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    ConvNextImageProcessor(size={"shortest_edge": 224}).save_pretrained(folder)
    return folder
