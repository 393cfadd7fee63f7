"""The `alphaadam` command. What a subcommand needs is imported when it runs, so that `--help` answers at once.

Nothing here may import torch before a command runs: `tests/recipes/test_cli.py` looks.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from alphaadam_dist import __version__
from alphaadam_dist.training import settings

app = typer.Typer(rich_markup_mode="rich", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

_REPOSITORY = "https://github.com/alphaadam-dist/alphaadam-dist"
_CPU_RANKS, _CPU_RANKS_A_CORE = 2, 4
_MOST = 10**6
_ZERO = 2


def _what(text: str, *names: str) -> Any:
    """An option of `train`."""
    return typer.Option(*names, help=text, rich_help_panel="What to train")


def _how(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="How to run it")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"alphaadam-dist {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """AlphaAdam: one optimizer, the same under any sharding."""


@app.command()
def train(
    model: Annotated[
        str,
        _what(
            "A Hugging Face id, a local folder, or [bold]tiny-llama[/bold], a Llama of 1M parameters trained from "
            "scratch."
        ),
    ] = settings.TINY,
    data: Annotated[
        str,
        _what(
            "A Hugging Face id (or id:config), a local file or folder of text, or [bold]stdlib[/bold], the source of "
            "Python's standard library."
        ),
    ] = "stdlib",
    steps: Annotated[int, _what("Optimizer steps.")] = settings.DEFAULT_STEPS,
    lr: Annotated[
        float | None,
        _what(
            f"Peak learning rate, for all optimizers. Default: {settings.TINY_LR:g} for tiny-llama, "
            f"{settings.FINE_TUNING_LR:g} otherwise."
        ),
    ] = None,
    batch: Annotated[int, _what("Blocks of text a rank and step.")] = settings.DEFAULT_BATCH,
    block: Annotated[
        int | None,
        _what(
            f"Tokens in a block. Default: {settings.TINY_BLOCK} for tiny-llama, {settings.FINE_TUNING_BLOCK} otherwise."
        ),
    ] = None,
    seed: Annotated[int, _what("Seed of the weights and the data order.")] = 0,
    groups: Annotated[
        Path | None,
        _what(
            "A JSON file with groups of parameters by name that have a rate, decay or betas of their own, for all "
            "optimizers. What it does not name decays."
        ),
    ] = None,
    compare: Annotated[
        bool,
        _what(
            "Train AlphaAdam with look-ahead in place of masks, and AdamW, beside it: same data, seed, steps and "
            "learning rate.",
            "--compare/--no-compare",
        ),
    ] = True,
    zero: Annotated[int | None, _how("DeepSpeed ZeRO stage: 0, 1, 2 or 3. Default: 2.")] = None,
    fsdp: Annotated[bool, _how("Shard with PyTorch's FSDP2, under torchrun, not with ZeRO.", "--fsdp")] = False,
    offload: Annotated[bool, _how("Keep the optimizer's state in CPU memory.", "--offload")] = False,
    gpus: Annotated[
        int | None, _how("Ranks. Default: every GPU; two processes on the CPU where there is none.")
    ] = None,
    out: Annotated[Path | None, _how("Folder for the results. Default: runs/train-1, runs/train-2, ...")] = None,
    resume: Annotated[bool, _how("Go on from the last checkpoint in --out, or of the newest run.", "--resume")] = False,
) -> None:
    """Train a language model with AlphaAdam under DeepSpeed or FSDP, with look-ahead and AdamW beside it.

    Without options: a small Llama on the standard library's own source, at ZeRO-2, in a few minutes without a GPU.

    Needs pip install 'alphaadam-dist\\[deepspeed,hf]', with --fsdp without deepspeed. The first run under DeepSpeed
    compiles an operator of it, once a machine, in a minute or two.

    SIGTERM saves at the end of the step and exits with 143; Ctrl-C ends at once, with 130. --resume goes on.

    [bold]Examples[/bold]

      alphaadam train

      alphaadam train --resume

      alphaadam train --fsdp

      alphaadam train --model gpt2 --data notes/ --zero 3 --steps 1000 --no-compare
    """
    console = Console()
    with _in_one_line(f"training needs pip install 'alphaadam-dist[{'hf' if fsdp else 'deepspeed,hf'}]'"):
        chosen = settings.Settings(
            model=model, data=data, steps=steps, batch=batch, seed=seed, fsdp=fsdp, offload=offload, gpus=_ranks(gpus),
            zero=_ZERO if zero is None and not fsdp else zero,
            lr=settings.default_lr(model) if lr is None else lr,
            block=settings.default_block(model) if block is None else block,
            groups=None if groups is None else str(groups),
        )  # fmt: skip
        _require("transformers", "accelerate", "datasets", "tensorboard", "matplotlib", *(["deepspeed"] * (not fsdp)))
        from alphaadam_dist.training.run_folder import open_run
        from alphaadam_dist.training.start_ranks import SIGTERM_CODE, LaunchError, Stopped

        try:
            with open_run(out, resume, chosen) as run:
                if resume and not any(run.glob("*/checkpoint-*")):
                    console.print(f"No checkpoint in {run} yet: starting from the first step.", highlight=False)
                # Imported once the settings are known to be good: transformers takes seconds.
                from alphaadam_dist.training.main_job import run_main_job

                run_main_job(console, run, chosen, list(settings.OPTIMIZERS) if compare else ["alphaadam"])
        except KeyboardInterrupt:
            console.print("\nInterrupted. The same command with --resume goes on from the last checkpoint.")
            raise typer.Exit(130) from None
        except Stopped as stopped:
            console.print(f"\n{stopped}")
            raise typer.Exit(SIGTERM_CODE) from None
        except LaunchError as error:
            if error.tail:
                Console(stderr=True).print(error.tail, markup=False, highlight=False, soft_wrap=True)
            raise


@app.command()
def verify() -> None:
    """Check on these machines that every sharding gives the same step. Start it on all ranks, under any launcher.

    Trains a small Llama in one process and under DDP, FSDP1, FSDP2, HSDP, tensor parallelism and DeepSpeed's ZeRO, as
    far as the number of ranks allows. Exits with 1 where a sharding's step is not that of one process.

    [bold]Examples[/bold]

      torchrun --nproc-per-node 4 --no-python alphaadam verify

      deepspeed --num_gpus 4 --no_python --no_local_rank alphaadam verify

      srun alphaadam verify
    """
    from alphaadam_dist.training.rank import leave
    from alphaadam_dist.verify import verify as run

    try:
        leave(run())
    except ValueError as error:
        raise _failure(str(error)) from None


@app.command()
def bench(
    size: Annotated[list[int] | None, typer.Option(help="Elements of the flat tensor, in Mi; may be repeated.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns that each contestant takes.")] = 15,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the picture.")] = Path("benchmarks/results"),
) -> None:
    """Measure what a step costs, beside AdamW and its peers, in one run on the same tensors.

    Needs a clone of the repository, where the peers are: a wheel does not have them.

    [bold]Examples[/bold]

      alphaadam bench

      alphaadam bench --size 32 --rounds 9
    """
    import torch

    try:
        from benchmarks import step_time
    except ImportError as error:
        raise _failure(
            f"{error}. What it measures beside, and what that imports, is not in the wheel: `git clone {_REPOSITORY}`, "
            "then `make bench` there"
        ) from None
    if not (1 <= rounds <= _MOST) or any(not 1 <= each <= _MOST for each in size or ()):
        raise _failure(f"--rounds is {rounds}, --size is {size}: they must be from 1 to {_MOST:,}")
    if not out.is_dir():
        raise _failure(f"--out is {out}: there is no such folder; make it, or choose another")
    with _in_one_line("measuring needs pip install 'alphaadam-dist[deepspeed,hf]'"):
        found = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if found.partition(":")[0] not in ("cpu", "cuda") or (found != "cpu" and not torch.cuda.is_available()):
            raise ValueError(f"--device is {found}: give cpu, or cuda where torch.cuda.is_available() says True")
        step_time.run(size or step_time.SIZES, rounds, torch.device(found), out)


@app.command()
def convert(
    universal: Annotated[
        Path, typer.Argument(help="A DeepSpeed universal checkpoint, written by deepspeed.checkpoint.ds_to_universal.")
    ],
    dcp: Annotated[Path, typer.Argument(help="Where to write the DCP checkpoint: a folder that does not exist.")],
) -> None:
    """Turn a DeepSpeed universal checkpoint into one of torch.distributed.checkpoint (DCP), to go on under FSDP2.

    Model, moments, steps, AlphaAdam's state and the hyperparameters of every parameter group are carried over, from
    AlphaAdam and from AdamW. Every file is compared with its checksums on the way.

    [bold]Examples[/bold]

      python -m deepspeed.checkpoint.ds_to_universal --input_folder ck/step100 --output_folder ck/universal \\
      --inject_missing_state

      alphaadam convert ck/universal ck/dcp
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console()
    columns = (TextColumn("converting"), BarColumn(bar_width=24), DownloadColumn(), TimeRemainingColumn())
    with _in_one_line("reading the checkpoint needs pip install 'alphaadam-dist[deepspeed]'"):
        from alphaadam_dist.zero.convert import convert as run

        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=None)
            run(universal, dcp, lambda done, total: bar.update(task, completed=done, total=total))
    console.print(
        f"{dcp} is written: load it with torch.distributed.checkpoint.load (docs/checkpoints.md shows how).",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def run(
    command: Annotated[
        list[str],
        typer.Argument(metavar="-- COMMAND...", help="What to start, with its arguments.", show_default=False),
    ],
) -> None:
    """Start a command in which every Python process knows AlphaAdam, without a line of code.

    A DeepSpeed config may then name "AlphaAdam", and HF's Trainer takes --optim alphaadam, or ALPHAADAM_OPTIM=alphaadam
    from the environment where a tool does not pass it on.

    [bold]Examples[/bold]

      alphaadam run -- llamafactory-cli train llama.yaml

      alphaadam run -- torchrun --nproc-per-node 8 sft.py --optim alphaadam --optim_args gamma=0.1

      ALPHAADAM_OPTIM=alphaadam alphaadam run -- accelerate launch train.py
    """
    with _in_one_line("reinstall alphaadam-dist"):
        from alphaadam_dist import run as starting

        starting.replace_process(command)


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A built-in name ([bold]llama-3-8b[/bold], [bold]qwen3-8b[/bold], [bold]mistral-7b[/bold], ...; any "
            "other word lists them), a local folder with a config.json, or a Hugging Face id.",
            show_default=False,
        ),
    ],
    gpus: Annotated[int, typer.Option(help="GPUs in all.")] = 8,
    memory: Annotated[float, typer.Option(help="GiB of each GPU.")] = 80,
    per_node: Annotated[int, typer.Option(help="GPUs of a node.")] = 8,
    headroom: Annotated[
        float | None,
        typer.Option(
            help="Share of the memory kept free for activations, buckets and workspaces, which are not counted. "
            "Default: 0.4, with --state-dtype 0.3.",
            show_default=False,
        ),
    ] = None,
    lora: Annotated[
        int | None, typer.Option(help="Train LoRA adapters of this rank on the linear layers of the blocks.")
    ] = None,
    qlora: Annotated[int | None, typer.Option(help="The same, with the frozen linear layers in 4 bits.")] = None,
    state_dtype: Annotated[
        Literal["bfloat16"] | None,
        typer.Option(help="Moments and parameters in bf16, without fp32 masters.", show_default=False),
    ] = None,
    step_in_backward: Annotated[
        bool,
        typer.Option("--step-in-backward", help="Gradients are freed in the backward; FSDP alone, one micro-batch."),
    ] = False,
) -> None:
    """Say which sharding fits a model on these GPUs, what a step sends, and what to start.

    Counts weights, gradients, fp32 masters and moments, trained in bf16, on each GPU under ZeRO-0 to ZeRO-3, FSDP2 and
    HSDP, with and without offload. Every parameter is trained without --lora or --qlora. Exits with 1 where nothing
    fits.

    [bold]Examples[/bold]

      alphaadam plan llama-7b --gpus 16 --memory 40

      alphaadam plan llama-7b --gpus 1 --memory 80 --state-dtype bfloat16

      alphaadam plan llama-7b --gpus 1 --memory 48 --state-dtype bfloat16 --step-in-backward --headroom 0.15

      alphaadam plan ./my-model --gpus 4 --memory 24 --headroom 0.3

      alphaadam plan llama-3-70b --gpus 8 --qlora 16
    """
    console = Console()
    with _in_one_line("planning needs pip install 'alphaadam-dist[hf]'"):
        from alphaadam_dist import plan as planning

        if lora is not None and qlora is not None:
            raise ValueError(f"--lora {lora} with --qlora {qlora}: give one of them")
        for name, rank in (("lora", lora), ("qlora", qlora)):
            if rank is not None and not 1 <= rank <= _MOST:
                raise ValueError(f"--{name} is {rank}: it is the rank of the adapters, from 1 to {_MOST:,}")
        if qlora is not None and step_in_backward:
            raise ValueError(
                f"--qlora {qlora} with --step-in-backward: it counts FSDP alone, which does not partition weights in 4 "
                "bits here, and the gradients of adapters are small; leave --step-in-backward out"
            )
        if state_dtype is not None and (lora or qlora):
            raise ValueError(
                f"--state-dtype {state_dtype} with adapters: their states are small, leave one of them out"
            )
        free = planning.HEADROOM[state_dtype] if headroom is None else headroom
        cluster = planning.Cluster(gpus, per_node, memory, free)
        with console.status("Reading the model's sizes"):
            sizes = planning.shapes(model, qlora if lora is None else lora, four_bit=qlora is not None)
        if not planning.show(console, sizes, cluster, state_dtype, step_in_backward=step_in_backward):
            raise typer.Exit(1)


@contextmanager
def _in_one_line(needs: str) -> Iterator[None]:
    """End with exit code 1 and one line on an error that a person can do something about."""
    try:
        yield
    except typer.Exit:
        raise
    except ImportError as error:
        raise _failure(f"{error}; {needs}") from None
    except (ValueError, OSError, RuntimeError) as error:
        from alphaadam_dist.training import reasons

        raise _failure(reasons.of(error).text) from None


def _require(*packages: str) -> None:
    """Raise ImportError, before anything starts, that names all of these packages that are not installed."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ImportError(f"not installed: {', '.join(missing)}")


def _failure(message: str) -> typer.Exit:
    from alphaadam_dist.training import reasons

    reasons.print_error(message)
    return typer.Exit(1)


def _ranks(gpus: int | None) -> int:
    import torch

    found = torch.cuda.device_count()
    if gpus is None:
        return found or _CPU_RANKS
    if found and gpus > found:
        raise ValueError(f"--gpus is {gpus}, but this machine has {found}: give --gpus {found} or leave it out")
    cores = os.cpu_count() or 1
    if not found and gpus > max(8, _CPU_RANKS_A_CORE * cores):
        raise ValueError(
            f"--gpus is {gpus}, but this machine has no GPU, and {cores} cores do not take so many ranks: give --gpus "
            f"{max(_CPU_RANKS, cores)} or leave it out"
        )
    return gpus
