"""The statistics of the masks: counts of local shards in, one all-reduce, alpha of the whole model out.

Counts are integers in float64, exact to 2^53 and in any order of summation, so every rank computes the same bits of
alpha however the model is sharded. Device values are read on the host only where a docstring says so.

The numbers, all float64 on the layout's device:

    _buffer (2 * rows + norms,)
                               what one step sends: agree and conflict of row 0, of row 1, ...; then _norms. One row
                               with scope="global" (16 bytes), one a parameter with "layer", none with gamma=1. Zeroed
                               by open, added to by add and add_norms, all-reduced by reduce or close.
    _norms (0, 1 or 2,)        the end of _buffer. With clip_norm, skip_nonfinite or telemetry the squared norm of the
                               whole model's gradient; with telemetry then that of an update: of the open step where it
                               is sent by close, or else of the last that was applied.
    _moved ()                  this rank's part of the squared norm of the update. Zeroed when a step begins that will
                               be applied, added to by add_update, sent in _norms. Below 0 before the first.
    _alpha (rows,)             alpha of each row in the open step or else the last. Read by strengths.
    _strengths (rows, 2)       what strengths made of these two in the open step; None until then.
    _applied ()                T of the open step, itself included. Read by strengths, for alpha_warmup.
    _memory (4,)               [T, alpha, A, C] after the last step that had evidence: what checkpoints carry. With
                               gamma=1 [T, 1, 0, 0].
    _squared_norm ()           of the open step, once it is known, or else of the last. Read by clip_coefficient and
                               norm.
    _squared_update ()         of the last update that is known. Read by update_norm.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from . import rank_failures, rule
from .layout import Layout, Segment
from .options import FamilyOptions

INITIAL_STATE = [0.0, 1.0, 0.0, 0.0]  # alphaadam_state = [T, alpha, A, C] before the first step


class Statistics:
    """T, alpha, A and C of a run, and the counts of the step that is open.

    A step is ``open``, then with ``sync="exact"`` add* and reduce before strengths, with ``"delayed"`` strengths and
    add* in any order and close at the end. A step that is opened and never reduced or closed leaves no trace.
    """

    # A trainer may look during validation, in inference mode; what is made there no step could write to.
    @torch.inference_mode(False)
    def __init__(self, options: FamilyOptions) -> None:
        self.options = options
        self.layout: Layout | None = None
        self.opened = 0  # steps of this process
        self.skipped = 0  # of them, those left out by skip_nonfinite
        self.skipping = False  # the open step is one of these
        self._memory = torch.tensor(INITIAL_STATE, dtype=torch.float64, device="cpu")
        self._alpha = torch.ones(1, dtype=torch.float64, device="cpu")
        self._applied = torch.ones((), dtype=torch.float64, device="cpu")
        self._strengths: Tensor | None = None
        self._buffer = torch.zeros(0, dtype=torch.float64, device="cpu")
        self._norms = self._buffer
        self._moved = torch.tensor(-1.0, dtype=torch.float64, device="cpu")
        self._squared_norm: Tensor | None = None
        self._squared_update: Tensor | None = None
        self._in_flight: tuple[Tensor, Tensor, dist.Work | None] | None = None

    def open(self, layout: Layout) -> None:
        """A step begins: settle the last one, clear the buffer."""
        self.settle()
        self.opened += 1
        if layout is not self.layout:
            self.layout = layout
            self._memory, self._alpha = self._memory.to(layout.device), self._alpha.to(layout.device)
            self._moved = self._moved.to(layout.device)
            if len(self._alpha) != layout.rows:
                self._alpha = torch.ones(layout.rows, dtype=torch.float64, device=layout.device)
        counts, telemetry = 2 * layout.rows * self.options.masked, self.options.telemetry
        norms = (self.options.with_norm or telemetry) + telemetry
        self._buffer = torch.zeros(counts + norms, dtype=torch.float64, device=layout.device)
        self._norms = self._buffer[counts:]
        if not self.options.reads_first:
            self._moved.zero_()
        self._strengths = None
        self.skipping = False
        self._applied = self._memory[0] + 1
        if not self.options.masked:
            self._alpha.fill_(1.0)
        elif self.options.sync == "delayed":
            self._alpha = self._alpha_of(self._memory[2:])

    def add(self, segments: tuple[Segment, ...], counts: Tensor) -> None:
        """Add the counts, int64 (n, 2), of n segments; those of segments that another rank owns are dropped."""
        assert self.layout is not None
        if not segments:
            return
        rows, owned = self.layout.indices(segments)
        mine = counts.to(self.layout.device, torch.float64) * owned[:, None]
        self._buffer[: 2 * self.layout.rows].view(-1, 2).index_add_(0, rows, mine)

    def add_norms(self, segments: tuple[Segment, ...], squared_norms: Tensor) -> None:
        """Add squared gradient norms, float64 (n,), of n segments, as ``add`` does counts."""
        assert self.layout is not None
        if segments:
            _, owned = self.layout.indices(segments)
            self._norms[0].add_((squared_norms.to(self.layout.device) * owned).sum())

    def add_update(self, segments: tuple[Segment, ...], squared_norms: Tensor) -> None:
        """Add those of gradients and of updates, float64 (n, 2), as ``add_norms``; the first unless counted before."""
        assert self.layout is not None
        if segments:
            _, owned = self.layout.indices(segments)
            # no product: another rank's infinity times 0 is a NaN
            gradient, update = torch.where(owned[:, None] > 0, squared_norms.to(self.layout.device), 0.0).sum(0)
            self._moved.add_(update)
            if not self.options.reads_first:
                self._norms[0].add_(gradient)

    def reduce_norms(self) -> None:
        """All-reduce the norms by themselves, before anything is counted: ``norm_first``."""
        self._send_update()
        norms = self._norms.clone()
        self._norms.zero_()
        self._all_reduce(norms)
        self._take_norms(norms)

    def reduce(self) -> None:
        """All-reduce the open step's counts, take its alpha from them and remember both, unless it is left out."""
        if not self.options.norm_first:
            self._send_update()
        self._all_reduce(self._buffer)
        if not self.options.norm_first:
            self._take_norms(self._norms)
        if self.skipping:
            return
        counts = self._counts(self._buffer)
        alpha = self._alpha_of(counts)
        self._alpha.copy_(torch.where(counts.sum() > 0, alpha, self._alpha))
        self._strengths = None
        self._remember(
            counts, alpha[0] if self.options.scope == "global" else self._alpha_of(counts.view(-1, 2).sum(0))[0]
        )

    def _send_update(self) -> None:
        if self.options.telemetry:
            self._norms[1].copy_(self._moved)

    def _take_norms(self, norms: Tensor) -> None:
        """Those of the open step are known, if it has any. With ``skip_nonfinite`` one is read here: synchronises."""
        if len(norms):
            self._squared_norm = norms[0]
            self.skipping = self.options.skip_nonfinite and not math.isfinite(float(norms[0]))
            self.skipped += self.skipping
        if len(norms) == 2:
            self._squared_update = norms[1]
            if self.options.reads_first and not self.skipping:  # this step's own comes after, and goes with the next
                self._moved.zero_()

    def close(self, counts: bool) -> None:
        """The step ends. One that did not read first sends its numbers off, to be awaited when the next step opens.

        ``counts``: T goes on, where no evidence says so.
        """
        if not self.options.masked:
            self._memory[0] += counts
            self._memory[1] = 1.0
            self._memory[2:] = 0.0
        if not self.options.reads_first and len(self._buffer):
            self._send_update()
            self._in_flight = self._buffer, self._norms, self._all_reduce(self._buffer, async_op=True)

    def settle(self) -> None:
        """Await the numbers in flight and remember them. Starts no collective."""
        if self._in_flight is not None:
            buffer, norms, work = self._in_flight
            self._in_flight = None
            if work is not None:
                try:
                    work.wait()
                except RuntimeError as error:
                    raise self._lost(error) from error
            if len(buffer) > len(norms):
                self._remember(self._counts(buffer), self._alpha[0])
            self._take_norms(norms)

    def strengths(self, segments: tuple[Segment, ...]) -> Tensor:
        """f where each of n segments agrees and where it conflicts: float64 (n, 2)."""
        assert self.layout is not None
        if self._strengths is None:
            f_agree, f_conflict = rule.strengths(
                self._alpha, self._applied, self.options.gamma, self.options.alpha_warmup
            )
            self._strengths = torch.stack((f_agree, f_conflict.expand_as(f_agree)), dim=1)
        return (
            self._strengths.expand(len(segments), 2)
            if self.options.scope == "global"
            else self._strengths[self.layout.indices(segments)[0]]
        )

    def clip_coefficient(self) -> Tensor | None:
        """min(1, clip_norm / (norm + 1e-6)), 0-dim float64, as in torch's clip_grad_norm_; None without clipping."""
        if self._squared_norm is None or self.options.clip_norm is None:
            return None
        return (self.options.clip_norm / (self._squared_norm.sqrt() + 1e-6)).clamp(max=1.0)

    def norm(self) -> float | None:
        """The L2 norm of the whole model's gradient in the last step, before clipping. None where it was not taken.

        Reads the device: synchronises.
        """
        return None if self._squared_norm is None else float(self._squared_norm.sqrt())

    def update_norm(self) -> float | None:
        """The L2 norm of the last update of the whole model that is known; None before there is one.

        Reads the device: synchronises.
        """
        squared = -1.0 if self._squared_update is None else float(self._squared_update)
        return None if squared < 0 else math.sqrt(squared)

    @torch.inference_mode(False)
    def load(self, values: list[float]) -> None:
        """Take over [T, alpha, A, C] in place of this run's own; alphas by layer start at 1 again, norms unknown."""
        self.settle()
        self._memory = torch.tensor(values, dtype=torch.float64, device=self._memory.device)
        self._alpha = torch.full_like(self._alpha, values[1] if self.options.scope == "global" else 1.0)
        self._strengths = None
        self._moved.fill_(-1.0)
        self._squared_norm = self._squared_update = None

    def state(self) -> list[float]:
        """[T, alpha, A, C]. Settles and reads the device: synchronises."""
        self.settle()
        return self._memory.tolist()

    def alphas(self) -> list[float]:
        """alpha of every row in the last step. Settles and reads the device: synchronises."""
        self.settle()
        return self._alpha.tolist()

    def _all_reduce(self, tensor: Tensor, async_op: bool = False) -> dist.Work | None:
        assert self.layout is not None
        if self.layout.group is None:
            return None
        try:
            return dist.all_reduce(tensor, group=self.layout.group, async_op=async_op)
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> RuntimeError:
        assert self.layout is not None
        assert self.layout.group is not None
        return rank_failures.explained(
            error, f"all-reduce of the counts of this process's step {self.opened}", self.layout.group
        )

    def _counts(self, buffer: Tensor) -> Tensor:
        assert self.layout is not None
        return buffer[: 2 * self.layout.rows]

    def _alpha_of(self, counts: Tensor) -> Tensor:
        agree, conflict = counts.view(-1, 2).unbind(1)
        return rule.alpha_from_counts(agree, conflict, self.options.gamma, self.options.alpha_max)

    def _remember(self, counts: Tensor, alpha: Tensor) -> None:
        """Make a step that had evidence the last one; a step without any changes nothing."""
        total = counts.view(-1, 2).sum(0)
        after = torch.stack((self._applied, alpha, total[0], total[1]))
        # in place: a CUDA graph goes on from what the last replay left here
        self._memory.copy_(torch.where(total.sum() > 0, after, self._memory))
