"""Run PEFT's own test-suite with plasticity in the place of LoRA, once for each adapter mode.

The suite comes from the source distribution of the installed peft, which is unpacked into a cache folder and never built.
`tests/peft_suite` says which cases take part and what does not apply. Exits with 1 if a test fails or no test of a file ran.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
FILES = (
    "test_custom_models.py",
    "test_tuners_utils.py",
    "test_config.py",
    "test_low_level_api.py",
    "test_vision_models.py",
)
# imported by the suite's modules; none of the tests that run offline calls into them
COMPANIONS = ("parameterized", "diffusers")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", choices=("lora", "full"), action="append", help="mode to test, default both")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "peft-suite", help="where the suite is kept")
    parser.add_argument("--quick", action="store_true", help="one row of the suite's cases per kind of layer")
    parser.add_argument("--fetch-only", action="store_true", help="get the suite, run nothing")
    parser.add_argument("pytest", nargs="*", help="further arguments for pytest, after --")
    arguments = parser.parse_args()
    suite = fetch(arguments.cache)
    if arguments.fetch_only:
        print(suite)
        return 0
    failed = [mode for mode in arguments.adapter or ("lora", "full") if run(suite, mode, arguments) != 0]
    if failed:
        print(f"PEFT's test-suite failed with adapter={' and '.join(map(repr, failed))}.", file=sys.stderr)
    return 1 if failed else 0


def fetch(cache: Path) -> Path:
    """The folder with the suite of the installed peft, downloaded unless the cache holds it."""
    name = f"peft-{version('peft')}"
    target = cache / name
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            folder = Path(scratch)
            pip("download", "--no-deps", "--no-binary", "peft", "--dest", scratch, name.replace("-", "=="))
            with tarfile.open(next(folder.glob("peft-*.tar.gz"))) as archive:
                archive.extractall(folder, filter="data")
            tests = folder / name / "tests"
            # source distributions leave these out, and the suite's modules import each other as a package
            (tests / "__init__.py").touch()
            pip("install", "--no-deps", "--target", str(folder / name / "companions"), *COMPANIONS)
            shutil.move(folder / name, target)
    missing = [file for file in FILES if not (target / "tests" / file).is_file()]
    if missing:
        raise SystemExit(f"{target} has no {', '.join(missing)}: remove the folder and try again.")
    return target


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments], check=True)


def run(suite: Path, adapter: str, arguments: argparse.Namespace) -> int:
    paths = [str(ROOT / "tests" / "peft_suite"), str(suite / "companions"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        # the suite follows the device that it finds, and the same cases must run everywhere
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(suite), "-p", "no:cacheprovider"]
    command += ["-p", "plasticity_suite", "--plasticity-adapter", adapter, "-q", "--tb=short", "-W", "ignore"]
    command += ["--plasticity-quick"] if arguments.quick else []
    command += arguments.pytest or [f"tests/{file}" for file in FILES]
    return subprocess.run(command, cwd=suite, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
