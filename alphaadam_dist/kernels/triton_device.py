"""What runs on the GPU: the functions that triton.py launches."""

import triton
import triton.language as tl

ADAM, LION, SGD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
CALLS = tl.constexpr(16)  # of Philox, that 128 elements share: element 16 l + c takes lane l of call c
LANES = tl.constexpr(8)


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
def _pointer(table, row, tensors, tensor, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table + row * tensors + tensor).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _stepped(p, g, m, v, f, mine, DIRECTION: tl.constexpr, NESTEROV: tl.constexpr, T: tl.constexpr):
    """The parameter and its moments after the update; ``v`` is the second, which only Adam has."""
    decay, size = tl.load(mine).to(T), tl.load(mine + 1).to(T)
    p *= decay
    if DIRECTION == ADAM:
        root, keep = tl.load(mine + 2).to(T), tl.load(mine + 3).to(T)
        beta2, gain, eps = tl.load(mine + 4).to(T), tl.load(mine + 5).to(T), tl.load(mine + 6).to(T)
        m = _lerp(m, g, keep)
        v = tl.fma(gain * g, g, v * beta2)
        ahead = tl.load(mine + 7).to(T)
        direction = tl.where(ahead != 0, tl.fma(g, ahead + tl.zeros_like(g), m), m)
        p += _divided(size * (direction * f), _divided(_root(v, T), root + tl.zeros_like(v), T) + eps, T)
    elif DIRECTION == LION:
        ahead, keep = tl.load(mine + 2).to(T), tl.load(mine + 3).to(T)
        between = _lerp(m, g, ahead)
        sign = (between > 0).to(T) - (between < 0).to(T)
        p = tl.fma(sign * f, size + tl.zeros_like(p), p)
        m = _lerp(m, g, keep)
    else:
        momentum = tl.load(mine + 2).to(T)
        m = m * momentum + g
        direction = tl.fma(m, momentum + tl.zeros_like(m), g) if NESTEROV else m
        p = tl.fma(direction * f, size + tl.zeros_like(p), p)
    return p, m, v


# What the kernels read and write. Float64 where nothing is said; `tensors` is the length of a list.
#
#   work       int64 (programs, 2)     which tensor a program takes, and from which element on
#   table      int64 (lists, tensors)  addresses: row 0 the gradients, then for count the momenta, for update the
#                                      parameters and each moment
#   numels     int64 (tensors,)        elements of each tensor
#   scale      ()                      makes gradients true ones; read with SCALE
#   threshold  ()                      read with THRESHOLD
#   rounding   int64 (1 + 4 tensors,)  Rounding.numbers: n; then key, start, inner, stride of each tensor
#   strengths  (tensors, 2)            f where a tensor agrees and where it conflicts, from Statistics.strengths
#   numbers    (tensors, COLUMNS)      decay, size; then for Adam the root of 1 - beta2^t, 1 - beta1, beta2, 1 - beta2,
#                                      eps, and c (1 - beta1^t) of look-ahead, 0 without; for Lion 1 - beta1,
#                                      1 - beta2; for SGD momentum. `decay` and `size` are rule.decay_of and
#                                      rule.size_of
#   counts     int64 (tensors, 2)      agree and conflict, added to; Statistics.add reads them
#   squares    (programs,)             the squared norm of what a program read; count adds them up by tensor


@triton.jit
def _count(
    work, table, numels, tensors, scale, threshold,  # read
    counts, squares,  # written
    G: tl.constexpr, M: tl.constexpr, T: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr,
    NORMS: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tensor, start = tl.load(work + 2 * program), tl.load(work + 2 * program + 1)
    numel = tl.load(numels + tensor)
    grads = _pointer(table, 0, tensors, tensor, G, ALIGNED)
    momenta = _pointer(table, 1, tensors, tensor, M, ALIGNED)
    bound = tl.load(threshold).to(T)
    evidence = tl.zeros([BLOCK], tl.int64)
    conflicts = tl.zeros([BLOCK], tl.int64)
    squared = tl.zeros([BLOCK], tl.float64)
    for at in range(start, tl.minimum(start + CHUNK, numel), BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        inside = offsets < numel
        g = tl.load(grads + offsets, mask=inside, other=0.0).to(T)
        m = tl.load(momenta + offsets, mask=inside, other=0.0).to(T)
        if NORMS:
            squared += g.to(tl.float64) * g.to(tl.float64)
        if SCALE:
            g *= tl.load(scale).to(T)
        evidence += (g != 0).to(tl.int64)
        conflicts += _opposes(g, m, bound, THRESHOLD).to(tl.int64)
    conflict = tl.sum(conflicts)
    tl.atomic_add(counts + 2 * tensor, tl.sum(evidence) - conflict)
    tl.atomic_add(counts + 2 * tensor + 1, conflict)
    if NORMS:
        tl.store(squares + program, tl.sum(squared))


@triton.jit
def _update(
    work, table, numels, tensors, scale, threshold, strengths, strengths_stride, numbers,  # read
    counts,  # written, as the tensors in the table but the gradients
    DIRECTION: tl.constexpr, NESTEROV: tl.constexpr, COLUMNS: tl.constexpr, G: tl.constexpr, T: tl.constexpr,
    SCALE: tl.constexpr, THRESHOLD: tl.constexpr, COUNTING: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tensor, start = tl.load(work + 2 * program), tl.load(work + 2 * program + 1)
    numel = tl.load(numels + tensor)
    grads = _pointer(table, 0, tensors, tensor, G, ALIGNED)
    params = _pointer(table, 1, tensors, tensor, T, ALIGNED)
    firsts = _pointer(table, 2, tensors, tensor, T, ALIGNED)
    bound = tl.load(threshold).to(T)
    f_agree = tl.load(strengths + tensor * strengths_stride).to(T)
    f_conflict = tl.load(strengths + tensor * strengths_stride + 1).to(T)
    mine = numbers + tensor * COLUMNS
    evidence = tl.zeros([BLOCK], tl.int64)
    conflicts = tl.zeros([BLOCK], tl.int64)
    for at in range(start, tl.minimum(start + CHUNK, numel), BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        inside = offsets < numel
        g = tl.load(grads + offsets, mask=inside, other=0.0).to(T)
        p = tl.load(params + offsets, mask=inside, other=0.0)
        m = tl.load(firsts + offsets, mask=inside, other=0.0)
        if SCALE:
            g *= tl.load(scale).to(T)
        against = _opposes(g, m, bound, THRESHOLD)
        f = tl.where(against, f_conflict, tl.where(g != 0, f_agree, tl.full([], 1.0, T)))
        if COUNTING:
            evidence += (g != 0).to(tl.int64)
            conflicts += against.to(tl.int64)
        v = m
        if DIRECTION == ADAM:
            seconds = _pointer(table, 3, tensors, tensor, T, ALIGNED)
            v = tl.load(seconds + offsets, mask=inside, other=0.0)
        p, m, v = _stepped(p, g, m, v, f, mine, DIRECTION, NESTEROV, T)
        if DIRECTION == ADAM:
            tl.store(seconds + offsets, v, mask=inside)
        tl.store(params + offsets, p, mask=inside)
        tl.store(firsts + offsets, m, mask=inside)
    if COUNTING:
        conflict = tl.sum(conflicts)
        tl.atomic_add(counts + 2 * tensor, tl.sum(evidence) - conflict)
        tl.atomic_add(counts + 2 * tensor + 1, conflict)


@triton.jit
def _rounded(value, words, LANE: tl.constexpr):
    """rounding.rounded of fp32 values, by their lane of the words of a call."""
    word = words[LANE // 2]
    bits = (word >> 16 if LANE % 2 else word & 0xFFFF).to(tl.uint32)
    raw = value.to(tl.uint32, bitcast=True)
    magnitude = raw & 0x7FFFFFFF
    finite = tl.minimum(magnitude + bits, tl.full([], 0x7F7FFFFF, tl.uint32))
    kept = tl.where(magnitude < 0x7F800000, finite, magnitude) | (raw & 0x80000000)
    kept = tl.where(magnitude > 0x7F800000, tl.full([], 0x7FC00000, tl.uint32), kept)
    return (kept >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _update_rounded(
    work, table, numels, tensors, scale, threshold, strengths, strengths_stride, numbers, rounding,  # read
    counts,  # written, as the tensors in the table but the gradients
    DIRECTION: tl.constexpr, NESTEROV: tl.constexpr, COLUMNS: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
    SCALE: tl.constexpr, THRESHOLD: tl.constexpr, COUNTING: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As _update in fp32, of moments in bf16 and parameters in P.

    It goes through runs of elements that follow each other in the model parameter, blocks of 128 of that at a time, so
    that one call of Philox serves 8 elements.
    """
    program = tl.program_id(0)
    tensor, at = tl.load(work + 2 * program), tl.load(work + 2 * program + 1)
    end = tl.minimum(at + CHUNK, tl.load(numels + tensor))
    grads = _pointer(table, 0, tensors, tensor, G, ALIGNED)
    params = _pointer(table, 1, tensors, tensor, P, ALIGNED)
    firsts = _pointer(table, 2, tensors, tensor, tl.bfloat16, ALIGNED)
    seconds = _pointer(table, 3, tensors, tensor, tl.bfloat16, ALIGNED) if DIRECTION == ADAM else firsts
    bound = tl.load(threshold).to(tl.float32)
    f_agree = tl.load(strengths + tensor * strengths_stride).to(tl.float32)
    f_conflict = tl.load(strengths + tensor * strengths_stride + 1).to(tl.float32)
    mine = numbers + tensor * COLUMNS
    n = tl.load(rounding).to(tl.uint32)
    own = rounding + 1 + 4 * tensor
    key, first = tl.load(own), tl.load(own + 1)
    inner, stride = tl.load(own + 2), tl.load(own + 3)
    evidence = tl.zeros([BLOCK // LANES], tl.int64)
    conflicts = tl.zeros([BLOCK // LANES], tl.int64)
    number = tl.arange(0, BLOCK // LANES).to(tl.int64)
    while at < end:
        place = first + at // inner * stride + at % inner
        stop = tl.minimum(end, at - at % inner + inner)
        call = place // (CALLS * LANES) * CALLS + number
        low, high = call.to(tl.uint32), (call >> 32).to(tl.uint32)
        of_p = tl.philox(key, low, high, tl.zeros_like(low) + n, tl.zeros_like(low))
        of_m = tl.philox(key, low, high, tl.zeros_like(low) + n, tl.zeros_like(low) + 1)
        of_v = of_m
        if DIRECTION == ADAM:
            of_v = tl.philox(key, low, high, tl.zeros_like(low) + n, tl.zeros_like(low) + 2)
        for lane in tl.static_range(8):
            offsets = at - place + call // CALLS * (CALLS * LANES) + lane * CALLS + call % CALLS
            inside = (offsets >= at) & (offsets < stop)
            g = tl.load(grads + offsets, mask=inside, other=0.0).to(tl.float32)
            p = tl.load(params + offsets, mask=inside, other=0.0).to(tl.float32)
            m = tl.load(firsts + offsets, mask=inside, other=0.0).to(tl.float32)
            if SCALE:
                g *= tl.load(scale).to(tl.float32)
            against = _opposes(g, m, bound, THRESHOLD)
            f = tl.where(against, f_conflict, tl.where(g != 0, f_agree, tl.full([], 1.0, tl.float32)))
            if COUNTING:
                evidence += (g != 0).to(tl.int64)
                conflicts += against.to(tl.int64)
            v = m
            if DIRECTION == ADAM:
                v = tl.load(seconds + offsets, mask=inside, other=0.0).to(tl.float32)
            p, m, v = _stepped(p, g, m, v, f, mine, DIRECTION, NESTEROV, tl.float32)
            if tl.bfloat16 == P:
                tl.store(params + offsets, _rounded(p, of_p, lane), mask=inside)
            else:
                tl.store(params + offsets, p, mask=inside)
            tl.store(firsts + offsets, _rounded(m, of_m, lane), mask=inside)
            if DIRECTION == ADAM:
                tl.store(seconds + offsets, _rounded(v, of_v, lane), mask=inside)
        at = tl.minimum(stop, at - place + place // (CALLS * LANES) * (CALLS * LANES) + BLOCK)
    if COUNTING:
        conflict = tl.sum(conflicts)
        tl.atomic_add(counts + 2 * tensor, tl.sum(evidence) - conflict)
        tl.atomic_add(counts + 2 * tensor + 1, conflict)
