"""`alphaadam plan`: what the model states of a training run take on each GPU, and what a step moves between them.

Counted are weights, gradients, fp32 masters and moments, and under ZeRO-3 and FSDP the weights gathered for the layers
at work. Activations, communication buckets, workspaces and fragmentation are not: a share of the card is kept free for
them. Nor are the copies of the model that ranks hold in CPU memory while they load it. Under adapters only these are
trained, and the frozen weights stay in bf16 or 4 bits. ZeRO computes in bf16 with fp32 masters; FSDP holds fp32 weights
of what is trained and casts them to bf16 layer by layer, as Accelerate does. ZeRO-2 and ZeRO-3 are counted as
DeepSpeed's own `estimate_zero2_model_states_mem_needs` and `estimate_zero3_model_states_mem_needs` count them, plus
what these leave out and DeepSpeed 0.19.8 allocates: one more bf16 value a parameter at stage 3, and in CPU memory under
offload.

With bf16 state parameters, gradients and moments are all in bf16, without masters: under ZeRO-1 and 2 DeepSpeed keeps a
copy of each rank's parameters for the optimizer, under ZeRO-3 none, but two of the gradients of the sub-group at work.
"""

import os
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .files import read_object
from .paths import config_path
from .plan_models import BF16, Shapes, shapes

__all__ = ["Cluster", "Row", "Shapes", "first_fit", "rows", "shapes", "show"]

GIB = 2**30
FP32 = 4
OPTIMIZER = 4 * FP32
"""Bytes a parameter of what the optimizer works on: master weight, gradient and two moments."""
SUB_GROUP = 10**8
"""Elements of a ZeRO-3 sub-group in the configs for bf16 state."""
HEADROOM = {None: 0.4, "bfloat16": 0.3}
"""Share of a GPU's memory kept free by default, by the state's dtype: buckets and casts are half as large in bf16."""

MOST_GPUS, MOST_MEMORY = 10**6, 10**6
"""More than anybody has."""

GLOBAL_BYTES, LAYER_BYTES = 16, 16
"""What AlphaAdam all-reduces a step: in all with scope="global", for each parameter tensor with scope="layer"."""

WIDTH = 64
"""Columns of a terminal in which the whole table has its place."""

DEEPSPEED_ORDER = ("ZeRO-2", "ZeRO-3", "ZeRO-2, CPU offload", "ZeRO-3, CPU offload", "ZeRO-3, NVMe offload")
FSDP_ORDER = ("HSDP", "FSDP2", "FSDP2, CPU offload")
"""The first that fits is recommended: what stays on the GPUs comes first, then what sends less, then less memory."""


@dataclass(frozen=True)
class Row:
    """One way to shard the model. All sizes in bytes."""

    sharding: str
    config: str
    gpu: float
    """On each GPU."""
    node: float
    """In each node's CPU memory, or on its disk."""
    sent: float
    """By each GPU in a step of one micro-batch, where collectives run as rings."""
    counts: int
    """All-reduced by AlphaAdam in a step with scope="global"."""


@dataclass(frozen=True)
class Cluster:
    """The GPUs to plan for.

    Raises:
        ValueError: a value out of range, or nodes that are not equally full.
    """

    gpus: int
    per_node: int
    memory: float
    """GiB of each GPU."""
    headroom: float
    """Share of that memory kept free for what the plan does not count."""

    def __post_init__(self) -> None:
        for name, value in (("gpus", self.gpus), ("per-node", self.per_node)):
            if value < 1:
                raise ValueError(f"--{name} is {value}: it must be 1 or more")
            if value > MOST_GPUS:
                raise ValueError(f"--{name} is {value}: it must be {MOST_GPUS:,} or less")
        if self.gpus > self.per_node and self.gpus % self.per_node:
            raise ValueError(
                f"--gpus is {self.gpus}, which does not fill nodes of {self.per_node}: give a multiple of "
                f"{self.per_node}, or --per-node"
            )
        if not 0 < self.memory <= MOST_MEMORY:
            raise ValueError(f"--memory is {self.memory:g}: give the GiB of one GPU, such as 80")
        if not 0 <= self.headroom < 1:
            raise ValueError(
                f"--headroom is {self.headroom:g}: give a share of the memory from 0 to below 1, such as 0.4"
            )

    @property
    def nodes(self) -> int:
        """Nodes, all of them full."""
        return max(1, self.gpus // self.per_node)

    @property
    def usable(self) -> float:
        """Bytes of each GPU that model states may take."""
        return self.memory * (1 - self.headroom) * GIB


def rows(model: Shapes, cluster: Cluster) -> list[Row]:
    """Every way to shard this model over this cluster, DeepSpeed's first."""
    gpus, nodes = cluster.gpus, cluster.nodes
    inside = gpus // nodes
    counts = GLOBAL_BYTES if gpus > 1 else 0
    weights, states, frozen = BF16 * model.trained, OPTIMIZER * model.trained, model.frozen_bytes
    # A gradient is there in bf16 as backward leaves it, and in fp32 as the optimizer takes it.
    partition = (states + weights) / gpus
    # Under offload the bf16 copy is in CPU memory too: at stage 2 of the weights, at stage 3 of the gradients.
    offloaded = (states + weights) / nodes
    gathered = 2 * (frozen + weights)  # for forward and for backward
    reduced, gathered_twice = 2 * weights * _ring(gpus), (gathered + weights) * _ring(gpus)

    def zero(name: str, file: str, gpu: float, node: float = 0.0) -> Row:
        sent = gathered_twice if name.startswith("ZeRO-3") else reduced
        return Row(name, f"ds_configs/{file}.json", gpu, node, sent, 0 if name == "ZeRO-0" else counts)

    def fsdp(name: str, file: str, gpu: float, node: float = 0.0, sent: float = gathered_twice) -> Row:
        return Row(name, f"accelerate_configs/{file}.yaml", gpu, node, sent, counts)

    result = [
        zero("ZeRO-0", "zero0", frozen + 2 * weights + states),
        zero("ZeRO-1", "zero1", frozen + 2 * weights + states / gpus),
        zero("ZeRO-2", "zero2", frozen + weights + partition),
        zero("ZeRO-2, CPU offload", "zero2_offload", frozen + weights, offloaded),
    ]
    if model.four_bit:  # to be partitioned they would have to be stored as another dtype, which nothing here has tried
        return result
    # A module's weights and their gradients under ZeRO-3; FSDP has the next block's weights there already.
    layer = BF16 * model.largest
    blocks = BF16 * (model.rest + 2 * model.block)
    if not model.frozen:
        layer += BF16 * model.largest
        blocks += BF16 * max(model.rest, model.block)
    shard = (frozen + weights) / gpus
    result += [
        zero("ZeRO-3", "zero3", layer + shard + partition),
        zero("ZeRO-3, CPU offload", "zero3_offload", layer + shard, offloaded),
        zero("ZeRO-3, NVMe offload", "zero3_nvme", layer + shard, offloaded),
        fsdp("FSDP2", "fsdp2", blocks + (frozen + states) / gpus),
        fsdp("FSDP2, CPU offload", "fsdp2_offload", blocks, (frozen + states) / nodes),
    ]
    if nodes > 1:
        sent = (gathered + weights) * _ring(inside) + 2 * weights / inside * _ring(nodes)
        result.append(fsdp("HSDP", "fsdp2_hybrid", blocks + (frozen + states) / inside, sent=sent))
    return result


def rows_in_bf16(model: Shapes, cluster: Cluster) -> list[Row]:
    """The same for bf16 parameters without masters and bf16 moments, where that is served."""
    gpus, nodes = cluster.gpus, cluster.nodes
    counts = GLOBAL_BYTES if gpus > 1 else 0
    weights, states = BF16 * model.total, 4 * BF16 * model.total
    layer, sub_group = 2 * BF16 * model.largest, 2 * BF16 * min(SUB_GROUP, model.total / gpus)
    blocks = BF16 * (model.rest + 2 * model.block + max(model.rest, model.block))
    reduced, gathered_twice = 2 * weights * _ring(gpus), 3 * weights * _ring(gpus)
    own = weights / gpus  # of a rank's parameters, at stage 3 and under offload
    return [
        Row("ZeRO-2", "ds_configs/zero2_bf16.json", weights + states / gpus, 0, reduced, counts),
        Row("ZeRO-3", "ds_configs/zero3_bf16.json", layer + sub_group + states / gpus, 0, gathered_twice, counts),
        Row("ZeRO-3, CPU offload", "ds_configs/zero3_offload_bf16.json", layer + 2 * own,
            states / nodes, gathered_twice, counts),
        Row("FSDP2", "accelerate_configs/fsdp2_bf16.yaml", blocks + states / gpus, 0, gathered_twice, counts),
    ]  # fmt: skip


def in_backward(planned: list[Row], model: Shapes, cluster: Cluster, state_dtype: str | None) -> list[Row]:
    """Of these the ones that take step_in_backward, without the gradients that it frees: all but those of a module.

    Under offload they wait in CPU memory for the end of the backward, as without it.
    """
    size = FP32 if state_dtype is None else BF16
    freed = size * max(0, model.trained - max(model.rest, model.block))
    found = []
    for row in planned:
        if row.sharding not in FSDP_ORDER:
            continue
        ranks = cluster.gpus // cluster.nodes if row.sharding == "HSDP" else cluster.gpus
        found.append(row if row.node else replace(row, gpu=row.gpu - freed / ranks))
    return found


def _ring(ranks: int) -> float:
    """Share of a tensor that each rank sends where it is reduce-scattered or all-gathered; twice that to all-reduce."""
    return (ranks - 1) / ranks


def first_fit(planned: list[Row], order: tuple[str, ...], cluster: Cluster) -> Row | None:
    """The first of the shardings in `order` that leaves the headroom free."""
    by_name = {row.sharding: row for row in planned}
    fitting = (by_name[name] for name in order if name in by_name and by_name[name].gpu <= cluster.usable)
    return next(fitting, None)


def show(
    console: Console,
    model: Shapes,
    cluster: Cluster,
    state_dtype: str | None = None,
    *,
    step_in_backward: bool = False,
) -> bool:
    """Print the table and what to use; whether anything fits."""
    planned = rows(model, cluster) if state_dtype is None else rows_in_bf16(model, cluster)
    if step_in_backward:
        planned = in_backward(planned, model, cluster, state_dtype)
    chosen = [first_fit(planned, order, cluster) for order in (DEEPSPEED_ORDER, FSDP_ORDER)]
    where = f"{cluster.gpus} GPU{'s' * (cluster.gpus > 1)} of {cluster.memory:g} GiB"
    if cluster.nodes > 1:
        where += f", {cluster.nodes} nodes"
    trained = f", {model.trained / 1e6:,.1f}M of them trained" if model.frozen else ""
    console.print(_table(
        f"{escape(model.name)}, {model.total / 1e6:,.1f}M parameters{trained}, on {where}", planned, chosen, cluster,
        whole=console.width >= WIDTH,
    ))  # fmt: skip

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    free = cluster.memory * cluster.headroom
    say(
        f"\nOf each GPU {free:.1f} GiB are kept free (--headroom {cluster.headroom:g}) for activations, buckets and "
        f'workspaces, which are not counted. With scope="layer" AlphaAdam\'s share is {LAYER_BYTES * model.tensors:,} '
        f"bytes, {LAYER_BYTES} for each of {model.tensors} tensors."
    )
    for choice in filter(None, chosen):
        say(f"\n[bold]{choice.sharding}[/bold]")
        for reader, line in _commands(choice, model, cluster):
            say(f"  {reader}:\n    {escape(line)}")
    if model.four_bit:
        say("\nOnly shardings that leave weights whole are listed: those in 4 bits are not partitioned here.")
    if not any(chosen):
        say(
            f"\n[red]Nothing fits in {cluster.usable / GIB:.1f} GiB a GPU:[/red] give more --gpus, GPUs of more "
            "--memory, or less --headroom"
        )
    return any(chosen)


def _table(title: str, planned: list[Row], chosen: list[Row | None], cluster: Cluster, *, whole: bool) -> Table:
    """The rows; not ``whole``: without the columns that a narrow terminal has no place for."""
    caption = "GiB on each GPU. A wider terminal shows CPU memory and network."
    if whole:
        caption = (
            "GiB. CPU: of each node; under NVMe offload, disk. sent: by each GPU in a step of one micro-batch.\n"
            "AlphaAdam: bytes that it adds, one all-reduce a step."
        )
    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, title=title, caption=caption
    )  # fmt: skip
    for heading in ("sharding", "GPU", *(("CPU", "sent", "AlphaAdam") if whole else ()), ""):
        table.add_column(heading, justify="left" if heading in ("sharding", "") else "right", no_wrap=True)
    for row in planned:
        fits = "[green]fits[/green]" if row.gpu <= cluster.usable else "[red]too large[/red]"
        more = f"{row.node / GIB:.1f}" if row.node else "", f"{row.sent / GIB:.2f}", str(row.counts)
        table.add_row(
            row.sharding, f"{row.gpu / GIB:.2f}", *(more if whole else ()),
            "[bold green]use this[/bold green]" if row in chosen else fits,
        )  # fmt: skip
    return table


def _commands(row: Row, model: Shapes, cluster: Cluster) -> list[tuple[str, str]]:
    """For whom and what to type, on the first node, or on each where MACHINE_RANK stands."""
    many = cluster.nodes > 1
    if row.config.endswith(".yaml"):
        words = ["accelerate launch", f"--config_file {_shown(row.config)}", f"--num_processes {cluster.gpus}"]
        if many:
            words.append(f"--num_machines {cluster.nodes} --machine_rank $MACHINE_RANK --main_process_ip node1")
        if row.sharding == "HSDP":
            words.append(f"--parallelism_config_dp_replicate_size {cluster.nodes}")
            words.append(f"--parallelism_config_dp_shard_size {cluster.gpus // cluster.nodes}")
        return [("HF Trainer or Accelerate", " ".join([*words, "train.py"]))]
    start = f"deepspeed {'--hostfile hostfile' if many else f'--num_gpus {cluster.gpus}'} --no_local_rank train.py"
    result = [("HF Trainer", f"{start} --deepspeed {_shown(row.config)}")]
    kind = "_bf16" if "bf16" in row.config else ""
    plain = [f"ds_configs/{model.name.replace('-', '_')}_{cluster.gpus}x{cluster.memory:g}gb{kind}.json",
             row.config.replace(".json", "_plain.json")]  # fmt: skip
    for name in plain:
        if _shards_by(name) == _shards_by(row.config):
            result.append(("deepspeed.initialize", f"{start} --deepspeed_config {_shown(name)}"))
            break
    return result


def _shards_by(name: str) -> Any:
    """ZeRO stage and offload device of a config that comes with the library; None where there is no such config."""
    try:
        path = config_path(name)
    except FileNotFoundError:
        return None
    zero = read_object(path, "restore it as it came with the library").get("zero_optimization")
    if not isinstance(zero, dict) or "stage" not in zero:
        raise ValueError(f"{path} has zero_optimization={zero!r}: restore it as it came with the library")
    offload = zero.get("offload_optimizer")
    return zero["stage"], offload.get("device") if isinstance(offload, dict) else None


def _shown(name: str) -> str:
    """The path to type from the current folder."""
    path = config_path(name)
    return os.path.relpath(path) if path.is_relative_to(os.getcwd()) else str(path)
