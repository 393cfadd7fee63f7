"""`make test-versions`: the suite on the oldest and the newest versions served, each in an environment of its own.

Each corner and suite by itself: what passed on this commit is not run again. `python -m tests.corners oldest` runs one
corner. The environments are in `.versions/`, some GB each; results are told at the end, for the table in
docs/versions.md.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".versions"
TOOLS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "expecttest", "ninja", "tensorboard")

FAST = "not slow and not nightly and not nvme and not torchtitan and not tools"
SUITES = {
    "fast suite": ["tests", "-m", FAST],
    "equality matrix": ["tests/equality", "-m", "slow"],
    "ZeRO": ["tests/zero", "tests/checkpoint/test_same_ranks.py", "-m", "slow and not nvme"],
}


@dataclass(frozen=True)
class Corner:
    """Attributes:
    python: the interpreter's version.
    packages: what pip installs, torch first.
    without: what they bring along and must not be there.
    """

    python: str
    packages: tuple[str, ...]
    without: tuple[str, ...] = ()


CORNERS = {
    "oldest": Corner(
        "3.10",
        ("torch==2.6.0", "numpy<2.3", "setuptools<80", "deepspeed==0.15.4", "transformers==4.48.3",
         "accelerate==1.3.0", "peft==0.14.0", "datasets==3.2.0", "matplotlib", "typer", "rich"),
        without=("triton",),  # beside it DeepSpeed 0.15.4 cannot be imported where there is no GPU
    ),
    "newest": Corner(
        "3.13",
        ("torch==2.15.0", "setuptools", "deepspeed==0.19.8", "transformers==5.24.0", "accelerate", "peft", "datasets",
         "matplotlib", "typer", "rich"),
    ),
}  # fmt: skip


def environment(name: str, corner: Corner) -> Path:
    """The corner's programs; makes its environment where there is none."""
    programs = FOLDER / name / "bin"
    if not (FOLDER / name / "installed").exists():
        python = shutil.which(f"python{corner.python}")
        if python is None:
            raise SystemExit(f"{name}: there is no python{corner.python}: install it, or run another corner")
        subprocess.run([python, "-m", "venv", FOLDER / name], check=True)
        pip = [programs / "python", "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "--upgrade", "pip", "wheel"], check=True)
        subprocess.run([*pip, *corner.packages[:3]], check=True)  # DeepSpeed's build looks for torch
        subprocess.run([*pip, "--no-build-isolation", *corner.packages, *TOOLS], check=True)
        if corner.without:
            subprocess.run(
                [programs / "python", "-m", "pip", "uninstall", "--quiet", "-y", *corner.without], check=True
            )
        (FOLDER / name / "installed").touch()
    return programs


def run(name: str, corner: Corner, suite: str, commit: str) -> str:
    """What pytest said last of a suite, from the last run where that passed on this commit."""
    done = FOLDER / name / f"{suite}.txt"
    if done.exists() and done.read_text().startswith(commit):
        return done.read_text().partition("\n")[2]
    programs = environment(name, corner)
    own = {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'launch'}",
        "ALPHAADAM_CACHE": str(FOLDER / name / "cache"), "TORCH_EXTENSIONS_DIR": str(FOLDER / name / "extensions"),
    }  # fmt: skip
    line = [programs / "python", "-m", "pytest", "-n", "2", "--dist", "loadgroup", "--no-loadscope-reorder", "-q"]
    print(f"{name}: {suite}", flush=True)
    with open(FOLDER / name / f"{suite}.log", "w") as log:
        code = subprocess.run(
            [*line, *SUITES[suite]], cwd=ROOT, env=os.environ | own, stdout=log, stderr=log
        ).returncode
    last = Path(log.name).read_text().strip().splitlines()[-1].strip("= ")
    if code == 0:
        done.write_text(f"{commit}\n{last}")
    return last if code == 0 else f"FAILED, see {log.name}: {last}"


def main(names: list[str]) -> int:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    said = {
        (name, suite): run(name, CORNERS[name], suite, commit.strip()) for name in names or CORNERS for suite in SUITES
    }
    for (name, suite), last in said.items():
        print(f"{name:8} {suite:16} {last}")
    return int(any(not re.match(r"\d+ passed", last) for last in said.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
