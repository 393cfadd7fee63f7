"""Why a run failed, in one line: what a rank tells the process that started it, and what people read last."""

import json
import sys
import traceback
from dataclasses import dataclass

import torch.distributed as dist
from rich.console import Console
from rich.markup import escape

from alphaadam_dist import rank_failures
from alphaadam_dist.files import sentence

_MARK = "alphaadam failed: "
_LENGTH = 2000


class Explained(RuntimeError):
    """An error whose message says what happened and what to do: its traceback tells no more."""


@dataclass(frozen=True)
class Reason:
    """Why a rank ended. ``lost``: because another one was gone, so that one's reason counts more."""

    text: str
    lost: bool = False


def of(error: BaseException) -> Reason:
    """The reason that an exception gives."""
    if isinstance(error, OSError):
        text = sentence(error)
    elif is_explained(error):
        text = str(error)
    else:
        rank = f" on rank {dist.get_rank()}" if dist.is_initialized() and dist.get_world_size() > 1 else ""
        text = f"{type(error).__name__}{rank}: {error}"
    text = " ".join(text.split())
    if len(text) > _LENGTH:
        text = f"{text[: _LENGTH // 2]} ... {text[-_LENGTH // 2 :]}"
    return Reason(text, isinstance(error, rank_failures.RankLost))


def is_explained(error: BaseException) -> bool:
    """Whether its message is enough for a person, who needs no traceback."""
    return isinstance(error, (ValueError, OSError, ImportError, rank_failures.RankLost, Explained))


def is_of_communication(error: Exception) -> bool:
    """Whether a collective failed, and not what this rank computes by itself."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))


def with_missing_ranks(error: Exception) -> Exception | None:
    """Where ranks lost each other, an error that says which, after waiting some seconds for them. None elsewhere."""
    if dist.is_initialized() and is_of_communication(error):
        return rank_failures.explained(error, "training", dist.group.WORLD)  # type: ignore[arg-type]
    return None


def tell(error: Exception) -> None:
    """In a rank: the traceback for the log, and a line that `heard` understands."""
    traceback.print_exception(error)
    reason = of(with_missing_ranks(error) or error)
    line = json.dumps({"text": reason.text, "lost": reason.lost})
    # one write, shorter than a pipe's buffer: lines of several ranks do not mix
    sys.stderr.write(f"{_MARK}{line}\n")
    sys.stderr.flush()


def heard(line: str) -> Reason | None:
    """The reason in a line that a rank wrote; None where it is another line."""
    _, mark, told = line.partition(_MARK)
    if not mark:
        return None
    try:
        held = json.loads(told)
        return Reason(str(held["text"]), bool(held["lost"]))
    except (ValueError, KeyError, TypeError):
        return None


def print_error(message: str) -> None:
    """Say what went wrong, as every command of this package does, after all that it has said."""
    sys.stdout.flush()
    told = f"[bold red]Error:[/bold red] {escape(message)}"
    Console(stderr=True).print(told, highlight=False, soft_wrap=True, emoji=False)  # a path may have ":x:" in it
