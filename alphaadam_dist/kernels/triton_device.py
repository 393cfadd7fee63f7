"""What runs on the GPU: the functions that triton.py launches.

A program takes the elements ``start`` to ``stop`` of one tensor, a block at a time. Up to ``whole`` its blocks are full
and every tensor is aligned to 16 bytes: there nothing is masked, and a thread reads and writes 16 bytes at once. The
rest is masked. What does not change from block to block is read before the first one: the compiler cannot know that
the stores leave it as it is.
"""

import triton
import triton.language as tl

ADAM, LION, SGD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
CALLS = tl.constexpr(16)  # of Philox, that 128 elements share: element 16 l + c takes lane l of call c
LANES = tl.constexpr(8)
COLUMNS = tl.constexpr(8)  # of numbers
REST = tl.constexpr(256)  # of a masked block; as long as a whole one, the compiler would give both one layout


@triton.jit
def _opposes(g, m, threshold, THRESHOLD: tl.constexpr):
    """rule.classify's conflict."""
    if THRESHOLD:
        against = tl.where(g > 0, m, -m)
        return (g != 0) & (against < -threshold * tl.abs(g))
    return ((g > 0) & (m < 0)) | ((g < 0) & (m > 0))


@triton.jit
def _lerp(a, b, weight):
    """a + weight (b - a) as torch's lerp computes it."""
    small = weight < 0.5
    return tl.fma(tl.where(small, weight, weight - 1) + tl.zeros_like(a), b - a, tl.where(small, a, b))


@triton.jit
def _divided(a, b, T: tl.constexpr):
    """Correctly rounded, as fp64 division is anyway."""
    return tl.div_rn(a, b) if tl.float32 == T else a / b


@triton.jit
def _root(a, T: tl.constexpr):
    return tl.sqrt_rn(a) if tl.float32 == T else tl.sqrt(a)


@triton.jit
def _numbers(numbers, tensor, T: tl.constexpr):
    """A tensor's row of ``numbers``, in T. One by one: older versions of Triton have no tuples as arguments."""
    mine = numbers + tensor * COLUMNS
    decay, size, third, fourth = tl.load(mine), tl.load(mine + 1), tl.load(mine + 2), tl.load(mine + 3)
    beta2, gain, eps, fresh = tl.load(mine + 4), tl.load(mine + 5), tl.load(mine + 6), tl.load(mine + 7)
    return decay.to(T), size.to(T), third.to(T), fourth.to(T), beta2.to(T), gain.to(T), eps.to(T), fresh.to(T)


@triton.jit
def _stepped(
    p, g, m, v, f, decay, size, third, fourth, beta2, gain, eps, fresh,
    DIRECTION: tl.constexpr, NESTEROV: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The parameter and its moments after the update; ``v`` is the second, which only Adam has."""
    p *= decay
    if DIRECTION == ADAM:
        root, keep = third, fourth
        m = _lerp(m, g, keep)
        v = tl.fma(gain * g, g, v * beta2)
        direction = tl.where(fresh != 0, tl.fma(g, fresh + tl.zeros_like(g), m), m)
        p += _divided(size * (direction * f), _divided(_root(v, T), root + tl.zeros_like(v), T) + eps, T)
    elif DIRECTION == LION:
        ahead, keep = third, fourth
        between = _lerp(m, g, ahead)
        sign = (between > 0).to(T) - (between < 0).to(T)
        p = tl.fma(sign * f, size + tl.zeros_like(p), p)
        m = _lerp(m, g, keep)
    else:
        momentum = third
        m = m * momentum + g
        direction = tl.fma(m, momentum + tl.zeros_like(m), g) if NESTEROV else m
        p = tl.fma(direction * f, size + tl.zeros_like(p), p)
    return p, m, v


@triton.jit
def _task(work, program, BLOCK: tl.constexpr):
    """A program's row of ``work``. Its whole blocks begin and end at multiples of BLOCK."""
    mine = work + 4 * program
    start, whole = tl.load(mine + 1), tl.load(mine + 2)
    return tl.load(mine), tl.multiple_of(start, BLOCK), tl.multiple_of(whole, BLOCK), tl.load(mine + 3)


@triton.jit
def _pointer(table, row, tensors, tensor, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table + row * tensors + tensor).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _read(pointers, inside, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(pointers)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _write(pointers, values, inside, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=inside)


@triton.jit
def _add(counts, tensor, evidence, conflicts):
    """Counts of a program to those of its tensor."""
    conflict = tl.sum(conflicts.to(tl.int64))
    tl.atomic_add(counts + 2 * tensor, tl.sum(evidence.to(tl.int64)) - conflict)
    tl.atomic_add(counts + 2 * tensor + 1, conflict)


@triton.jit
def _squared_change(now, before, inside):
    """(new - old)^2 in float64; 0 outside of the tensor, where eps = 0 makes a NaN."""
    change = now.to(tl.float64) - before.to(tl.float64)
    return tl.where(inside, change * change, 0.0)


@triton.jit
def _write_norms(squares, norm, moved):
    """Squared norms of a program's gradients and of its changes."""
    tl.store(squares + 2 * tl.program_id(0), norm)
    tl.store(squares + 2 * tl.program_id(0) + 1, moved)


# What the kernels read and write. Float64 where nothing is said; `tensors` is the length of a list.
#
#   work       int64 (programs, 4)     which tensor a program takes, and the elements start, whole and stop in it
#   table      int64 (lists, tensors)  addresses: row 0 the gradients, then for count the momenta, for update the
#                                      parameters and each moment
#   scale      ()                      makes gradients true ones; read with SCALE
#   threshold  ()                      read with THRESHOLD
#   rounding   int64 (1 + 4 tensors,)  Rounding.numbers: n; then key, start, inner, stride of each tensor
#   strengths  (tensors, 2)            f where a tensor agrees and where it conflicts, from Statistics.strengths
#   numbers    (tensors, COLUMNS)      decay, size; then for Adam the root of 1 - beta2^t, 1 - beta1, beta2, 1 - beta2,
#                                      eps, and c (1 - beta1^t) of look-ahead, 0 without; for Lion 1 - beta1,
#                                      1 - beta2; for SGD momentum; zeros. `decay` and `size` are rule.decay_of and
#                                      rule.size_of
#   counts     int64 (tensors, 2)      agree and conflict, added to; Statistics.add reads them
#   squares    (programs,)             written with NORMS: the squared norm of what a program read, which are added up
#              (programs, 2) of update by tensor; of an update that and the squared norm of new minus old parameters
#
# Nothing is specialised for a value: another number of tensors or another address compiles nothing in mid-run.
_FIXED = ("work", "table", "tensors", "scale", "threshold", "strengths", "strengths_stride", "numbers", "rounding",
          "counts", "squares")  # fmt: skip


@triton.jit(do_not_specialize=_FIXED)
def _count(
    work, table, tensors, scale, threshold,  # read
    counts, squares,  # written
    G: tl.constexpr, M: tl.constexpr, T: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr,
    NORMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tensor, start, whole, stop = _task(work, program, BLOCK)
    bound, factor = tl.load(threshold).to(T), tl.load(scale).to(T)
    norm = tl.zeros([], tl.float64)
    for WHOLE in tl.static_range(1, -1, -1):  # the blocks that are, then the rest
        grads = _pointer(table, 0, tensors, tensor, G, WHOLE)
        momenta = _pointer(table, 1, tensors, tensor, M, WHOLE)
        evidence = tl.zeros([BLOCK if WHOLE else REST], tl.int32)
        conflicts = tl.zeros([BLOCK if WHOLE else REST], tl.int32)
        squared = tl.zeros([BLOCK if WHOLE else REST], tl.float64)
        for at in range(start if WHOLE else whole, whole if WHOLE else stop, BLOCK if WHOLE else REST):
            offsets = at + tl.arange(0, BLOCK if WHOLE else REST)
            inside = offsets < stop
            g = _read(grads + offsets, inside, WHOLE).to(T)
            m = _read(momenta + offsets, inside, WHOLE).to(T)
            if NORMS:
                squared += g.to(tl.float64) * g.to(tl.float64)
            if SCALE:
                g *= factor
            evidence += (g != 0).to(tl.int32)
            conflicts += _opposes(g, m, bound, THRESHOLD).to(tl.int32)
        _add(counts, tensor, evidence, conflicts)
        if NORMS:
            norm += tl.sum(squared)
    if NORMS:
        tl.store(squares + program, norm)


@triton.jit(do_not_specialize=_FIXED)
def _update(
    work, table, tensors, scale, threshold, strengths, strengths_stride, numbers,  # read
    counts, squares,  # written, as the tensors in the table but the gradients
    DIRECTION: tl.constexpr, NESTEROV: tl.constexpr, G: tl.constexpr, T: tl.constexpr,
    SCALE: tl.constexpr, THRESHOLD: tl.constexpr, COUNTING: tl.constexpr, NORMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, start, whole, stop = _task(work, tl.program_id(0), BLOCK)
    bound, factor = tl.load(threshold).to(T), tl.load(scale).to(T)
    f_agree = tl.load(strengths + tensor * strengths_stride).to(T)
    f_conflict = tl.load(strengths + tensor * strengths_stride + 1).to(T)
    decay, size, third, fourth, beta2, gain, eps, fresh = _numbers(numbers, tensor, T)
    norm, moved = tl.zeros([], tl.float64), tl.zeros([], tl.float64)
    for WHOLE in tl.static_range(1, -1, -1):  # the blocks that are, then the rest
        grads = _pointer(table, 0, tensors, tensor, G, WHOLE)
        params = _pointer(table, 1, tensors, tensor, T, WHOLE)
        firsts = _pointer(table, 2, tensors, tensor, T, WHOLE)
        seconds = _pointer(table, 3, tensors, tensor, T, WHOLE) if DIRECTION == ADAM else firsts
        evidence = tl.zeros([BLOCK if WHOLE else REST], tl.int32)
        conflicts = tl.zeros([BLOCK if WHOLE else REST], tl.int32)
        squared = tl.zeros([BLOCK if WHOLE else REST], tl.float64)
        changed = tl.zeros([BLOCK if WHOLE else REST], tl.float64)
        for at in range(start if WHOLE else whole, whole if WHOLE else stop, BLOCK if WHOLE else REST):
            offsets = at + tl.arange(0, BLOCK if WHOLE else REST)
            inside = offsets < stop
            g = _read(grads + offsets, inside, WHOLE).to(T)
            p = _read(params + offsets, inside, WHOLE)
            m = _read(firsts + offsets, inside, WHOLE)
            v = _read(seconds + offsets, inside, WHOLE) if DIRECTION == ADAM else m
            before = p
            if NORMS:
                squared += g.to(tl.float64) * g.to(tl.float64)
            if SCALE:
                g *= factor
            against = _opposes(g, m, bound, THRESHOLD)
            f = tl.where(against, f_conflict, tl.where(g != 0, f_agree, tl.full([], 1.0, T)))
            if COUNTING:
                evidence += (g != 0).to(tl.int32)
                conflicts += against.to(tl.int32)
            p, m, v = _stepped(
                p, g, m, v, f, decay, size, third, fourth, beta2, gain, eps, fresh, DIRECTION, NESTEROV, T
            )  # fmt: skip
            if NORMS:
                changed += _squared_change(p, before, inside)
            _write(params + offsets, p, inside, WHOLE)
            _write(firsts + offsets, m, inside, WHOLE)
            if DIRECTION == ADAM:
                _write(seconds + offsets, v, inside, WHOLE)
        if COUNTING:
            _add(counts, tensor, evidence, conflicts)
        if NORMS:
            norm += tl.sum(squared)
            moved += tl.sum(changed)
    if NORMS:
        _write_norms(squares, norm, moved)


@triton.jit
def _rounded(value, word0, word1, word2, word3, LANE: tl.constexpr):
    """rounding.rounded of fp32 values, by their lane of the words of a call."""
    word = (word0 if LANE < 2 else word1) if LANE < 4 else (word2 if LANE < 6 else word3)
    bits = (word >> 16 if LANE % 2 else word & 0xFFFF).to(tl.uint32)
    raw = value.to(tl.uint32, bitcast=True)
    magnitude = raw & 0x7FFFFFFF
    finite = tl.minimum(magnitude + bits, tl.full([], 0x7F7FFFFF, tl.uint32))
    kept = tl.where(magnitude < 0x7F800000, finite, magnitude) | (raw & 0x80000000)
    kept = tl.where(magnitude > 0x7F800000, tl.full([], 0x7FC00000, tl.uint32), kept)
    return (kept >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit(do_not_specialize=_FIXED)
def _update_rounded(
    work, table, tensors, scale, threshold, strengths, strengths_stride, numbers, rounding,  # read
    counts, squares,  # written, as the tensors in the table but the gradients
    DIRECTION: tl.constexpr, NESTEROV: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
    SCALE: tl.constexpr, THRESHOLD: tl.constexpr, COUNTING: tl.constexpr, NORMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As _update in fp32, of moments in bf16 and parameters in P.

    It goes through runs of elements that follow each other in the model parameter, blocks of 128 of that at a time, so
    that one call of Philox serves 8 elements. Those are 16 apart, so a thread reads and writes one at a time, and a
    warp 32 neighbours.
    """
    tensor, at, _, end = _task(work, tl.program_id(0), BLOCK)
    grads = _pointer(table, 0, tensors, tensor, G, False)
    params = _pointer(table, 1, tensors, tensor, P, False)
    firsts = _pointer(table, 2, tensors, tensor, tl.bfloat16, False)
    seconds = _pointer(table, 3, tensors, tensor, tl.bfloat16, False) if DIRECTION == ADAM else firsts
    bound, factor = tl.load(threshold).to(tl.float32), tl.load(scale).to(tl.float32)
    f_agree = tl.load(strengths + tensor * strengths_stride).to(tl.float32)
    f_conflict = tl.load(strengths + tensor * strengths_stride + 1).to(tl.float32)
    decay, size, third, fourth, beta2, gain, eps, fresh = _numbers(numbers, tensor, tl.float32)
    n = tl.load(rounding).to(tl.uint32)
    bits = rounding + 1 + 4 * tensor
    key, first = tl.load(bits), tl.load(bits + 1)
    inner, stride = tl.load(bits + 2), tl.load(bits + 3)
    evidence = tl.zeros([BLOCK // LANES], tl.int32)
    conflicts = tl.zeros([BLOCK // LANES], tl.int32)
    squared, changed = tl.zeros([BLOCK // LANES], tl.float64), tl.zeros([BLOCK // LANES], tl.float64)
    number = tl.arange(0, BLOCK // LANES).to(tl.int64)
    while at < end:
        place = first + at // inner * stride + at % inner
        stop = tl.minimum(end, at - at % inner + inner)
        call = place // (CALLS * LANES) * CALLS + number
        low, high = call.to(tl.uint32), (call >> 32).to(tl.uint32)
        p0, p1, p2, p3 = tl.philox(key, low, high, tl.zeros_like(low) + n, tl.zeros_like(low))
        m0, m1, m2, m3 = tl.philox(key, low, high, tl.zeros_like(low) + n, tl.zeros_like(low) + 1)
        v0, v1, v2, v3 = m0, m1, m2, m3
        if DIRECTION == ADAM:
            v0, v1, v2, v3 = tl.philox(key, low, high, tl.zeros_like(low) + n, tl.zeros_like(low) + 2)
        for lane in tl.static_range(8):
            offsets = at - place + call // CALLS * (CALLS * LANES) + lane * CALLS + call % CALLS
            inside = (offsets >= at) & (offsets < stop)
            g = _read(grads + offsets, inside, False).to(tl.float32)
            p = _read(params + offsets, inside, False).to(tl.float32)
            m = _read(firsts + offsets, inside, False).to(tl.float32)
            v = _read(seconds + offsets, inside, False).to(tl.float32) if DIRECTION == ADAM else m
            before = p
            if NORMS:
                squared += g.to(tl.float64) * g.to(tl.float64)
            if SCALE:
                g *= factor
            against = _opposes(g, m, bound, THRESHOLD)
            f = tl.where(against, f_conflict, tl.where(g != 0, f_agree, tl.full([], 1.0, tl.float32)))
            if COUNTING:
                evidence += (g != 0).to(tl.int32)
                conflicts += against.to(tl.int32)
            p, m, v = _stepped(
                p, g, m, v, f, decay, size, third, fourth, beta2, gain, eps, fresh, DIRECTION, NESTEROV, tl.float32
            )  # fmt: skip
            kept = _rounded(p, p0, p1, p2, p3, lane) if tl.bfloat16 == P else p
            if NORMS:
                changed += _squared_change(kept.to(tl.float32), before, inside)
            _write(params + offsets, kept, inside, False)
            _write(firsts + offsets, _rounded(m, m0, m1, m2, m3, lane), inside, False)
            if DIRECTION == ADAM:
                _write(seconds + offsets, _rounded(v, v0, v1, v2, v3, lane), inside, False)
        at = tl.minimum(stop, at - place + place // (CALLS * LANES) * (CALLS * LANES) + BLOCK)
    if COUNTING:
        _add(counts, tensor, evidence, conflicts)
    if NORMS:
        _write_norms(squares, tl.sum(squared), tl.sum(changed))
