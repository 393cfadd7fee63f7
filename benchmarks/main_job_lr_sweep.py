"""Find AdamW's best learning rate on the main job: the real job, launcher and all, at each rate of a grid.

    .venv/bin/python benchmarks/main_job_lr_sweep.py

AlphaAdam runs at the same rates, to see whether AdamW's best carries over. Runs that have finished are not repeated,
so the sweep can be interrupted. It takes about a quarter of an hour on two cores.
"""

import datetime
import json
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from alphaadam_dist.training import metrics
from alphaadam_dist.training.main_job import train_one
from alphaadam_dist.training.run_folder import open_run
from alphaadam_dist.training.settings import DEFAULT_BATCH, DEFAULT_STEPS, OPTIMIZERS, TINY, TINY_BLOCK, Settings
from alphaadam_dist.training.summary import final_held_out

RATES = (1e-3, 2e-3, 3e-3, 4e-3, 8e-3, 1.6e-2)
MACHINE = "2 cores, x86-64 cloud VM, no GPU"
RUNS = Path("runs/main-job-lr-sweep")
RESULTS = Path(__file__).parent / "results"


def sweep(console: Console) -> dict[str, dict[str, float]]:
    """The held-out loss of each optimizer at each learning rate."""
    losses: dict[str, dict[str, float]] = {name: {} for name in OPTIMIZERS.values()}
    for lr in RATES:
        settings = main_job_settings(lr)
        with open_run(RUNS / f"{lr:g}", resume=True, settings=settings) as run:
            for optimizer, name in OPTIMIZERS.items():
                train_one(console, run, optimizer, settings)
                losses[name][f"{lr:g}"] = final_held_out(metrics.read(run / optimizer / metrics.FILE_NAME))
    return losses


def main_job_settings(lr: float) -> Settings:
    """What `alphaadam train` runs without options on a machine without a GPU, at another learning rate."""
    return Settings(
        model=TINY,
        data="stdlib",
        zero=2,
        fsdp=False,
        offload=False,
        steps=DEFAULT_STEPS,
        gpus=2,
        lr=lr,
        batch=DEFAULT_BATCH,
        block=TINY_BLOCK,
        seed=0,
    )


def _row(rate: str, losses: dict[str, dict[str, float]]) -> str:
    return f"| {rate} | {' | '.join(f'{by_rate[rate]:.4f}' for by_rate in losses.values())} |"


def main() -> None:
    """Sweep, and write the results as JSON and as a table."""
    console = Console()
    losses = sweep(console)
    today = datetime.date.today().isoformat()
    settings = {key: value for key, value in asdict(main_job_settings(RATES[0])).items() if key != "lr"}
    result = {
        "date": today,
        "machine": MACHINE,
        "torch": torch.__version__,
        "settings": settings,
        "held_out_loss": losses,
    }
    lines = [
        "# Main job: held-out loss by learning rate",
        "",
        f"{today}, {MACHINE}, torch {torch.__version__}. `benchmarks/main_job_lr_sweep.py`: {settings['steps']} steps, "
        f"ZeRO-{settings['zero']} on {settings['gpus']} ranks, seed {settings['seed']}.",
        "",
        f"| lr | {' | '.join(losses)} |",
        f"|---|{'---|' * len(losses)}",
        *(_row(f"{lr:g}", losses) for lr in RATES),
        "",
    ]
    stem = RESULTS / f"{today}-main-job-lr-sweep"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    stem.with_suffix(".md").write_text("\n".join(lines))
    console.print("\n".join(lines), markup=False)


if __name__ == "__main__":
    main()
