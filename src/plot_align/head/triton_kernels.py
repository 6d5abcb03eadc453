"""The kernels of ``block_triton.py``. A block of raw products is ``(T, V)``, its rows ``stride`` elements apart.

An argument means the same in every kernel: ``bias_ptr (V,)``; per row ``log_z``, ``weights`` (the row's weight in its
output distribution), ``segments`` and ``targets`` (a column); ``scale``, ``softcap`` and ``inv_t`` turn raw products
into logits. A pointer that a flag switches off is ``None``.
"""

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    # libdevice's is not available everywhere; 2·sigmoid(2x) − 1 cancels near 0, where most raw logits are.
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    far = tl.where(x < 0, -far, far)
    square = x * x
    near = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    return tl.where(tl.abs(x) < 0.1, near, far)


@triton.jit
def _logits(raw, bias_ptr, columns, mask, scale, softcap, inv_t, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Logits and 1 − tanh² of raw products: the formula of ``block_torch.transform``."""
    z = raw.to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=mask, other=0.0)
    z *= scale
    slope = 1.0
    if HAS_SOFTCAP:
        tanh = _tanh(z / softcap)
        slope = 1 - tanh * tanh
        z = softcap * tanh
    return z * inv_t, slope


@triton.jit
def statistics(
    raw_ptr, stride, bias_ptr, targets_ptr, tokens_ptr,
    log_z_ptr, target_logit_ptr, entropy_ptr, sum_sq_ptr, mean_ptr, top1_ptr,
    vocab, scale, softcap, inv_t, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_TOKENS: tl.constexpr,
    ENTROPY: tl.constexpr, SUM_SQ: tl.constexpr, MEAN: tl.constexpr, TOP1: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program per row: an online log-sum-exp, and all other statistics that one read of the row yields.
    row = tl.program_id(0)
    raw_ptr += row.to(tl.int64) * stride
    target = tl.load(targets_ptr + row)
    target_logit, _target_slope = _logits(
        tl.load(raw_ptr + target), bias_ptr, target, target >= 0, scale, softcap, inv_t, HAS_BIAS, HAS_SOFTCAP
    )
    target_token = target
    if HAS_TOKENS:
        target_token = tl.load(tokens_ptr + target)
    top = -float("inf")
    total = 0.0
    weighted = 0.0
    squares = 0.0
    plain = 0.0
    ahead = 0
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < vocab
        raw = tl.load(raw_ptr + columns, mask=mask, other=0.0)
        z, _slope = _logits(raw, bias_ptr, columns, mask, scale, softcap, inv_t, HAS_BIAS, HAS_SOFTCAP)
        new_top = tl.maximum(top, tl.max(tl.where(mask, z, -float("inf")), axis=0))
        rescale = tl.exp(top - new_top)
        e = tl.where(mask, tl.exp(z - new_top), 0.0)
        total = total * rescale + tl.sum(e, axis=0)
        if ENTROPY:
            weighted = weighted * rescale + tl.sum(tl.where(mask, e * z, 0.0), axis=0)
        if SUM_SQ:
            squares = squares * rescale * rescale + tl.sum(e * e, axis=0)
        if MEAN:
            plain += tl.sum(tl.where(mask, z, 0.0), axis=0)
        if TOP1:  # the first maximum, as argmax: no larger logit, and no equal one of an earlier token
            tokens = columns
            if HAS_TOKENS:
                tokens = tl.load(tokens_ptr + columns, mask=mask, other=0)
            beats = (z > target_logit) | ((z == target_logit) & (tokens < target_token))
            ahead += tl.sum((beats & mask & (columns != target)).to(tl.int32), axis=0)
        top = new_top
    log_z = top + tl.log(total)
    tl.store(log_z_ptr + row, log_z)
    tl.store(target_logit_ptr + row, target_logit)
    if ENTROPY:
        tl.store(entropy_ptr + row, log_z - weighted / total)
    if SUM_SQ:
        tl.store(sum_sq_ptr + row, tl.log(squares) - 2 * tl.log(total))
    if MEAN:
        tl.store(mean_ptr + row, plain / vocab)
    if TOP1:
        tl.store(top1_ptr + row, ahead == 0)


@triton.jit
def column_sums(
    raw_ptr, stride, bias_ptr, log_z_ptr, weights_ptr, partial_ptr, rows,
    vocab, scale, softcap, inv_t, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program for BLOCK columns of ROWS rows: their weighted softmax, summed into a row of `partial`. A row of
    # weight 0 is not read, here and below: finding such rows beforehand would make the GPU wait for the CPU.
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    split = tl.program_id(1)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, ROWS, STEP):
        row = split * ROWS + start + tl.arange(0, STEP)
        exists = row < rows
        weight = tl.load(weights_ptr + row, mask=exists, other=0.0)
        mask = (weight > 0)[:, None] & inside[None, :]
        raw = tl.load(raw_ptr + row.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)
        z, _slope = _logits(
            raw, bias_ptr, columns[None, :], inside[None, :], scale, softcap, inv_t, HAS_BIAS, HAS_SOFTCAP
        )
        log_z = tl.load(log_z_ptr + row, mask=exists, other=0.0)
        total += tl.sum(tl.where(mask, weight[:, None] * tl.exp(z - log_z[:, None]), 0.0), axis=0)
    tl.store(partial_ptr + split.to(tl.int64) * vocab + columns, total, mask=inside)


@triton.jit
def potential(
    raw_ptr, stride, bias_ptr, log_z_ptr, weights_ptr, segments_ptr, potential_ptr, factor_ptr,
    vocab, scale, softcap, inv_t, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program per row: factor −= w·⟨p, s⟩.
    row = tl.program_id(0)
    weight = tl.load(weights_ptr + row)
    if weight > 0:
        raw_ptr += row.to(tl.int64) * stride
        potential_ptr += tl.load(segments_ptr + row) * vocab
        log_z = tl.load(log_z_ptr + row)
        mean = 0.0
        for start in range(0, vocab, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = columns < vocab
            raw = tl.load(raw_ptr + columns, mask=mask, other=0.0)
            z, _slope = _logits(raw, bias_ptr, columns, mask, scale, softcap, inv_t, HAS_BIAS, HAS_SOFTCAP)
            mean += tl.sum(tl.exp(z - log_z) * tl.load(potential_ptr + columns, mask=mask, other=0.0), axis=0)
        tl.store(factor_ptr + row, tl.load(factor_ptr + row) - weight * mean)


@triton.jit
def _to_gradient(
    z, slope, log_z, factor, columns, target, of_log_prob, entropy, of_entropy, outer, ENTROPY: tl.constexpr
):
    """The gradient of raw products: the formula of ``block_torch.backward``."""
    log_p = z - log_z
    p = tl.exp(log_p)
    gradient = p * factor
    if ENTROPY:
        gradient -= of_entropy * p * (log_p + entropy)
    gradient += tl.where(columns == target, of_log_prob, 0.0)
    return gradient * slope * outer


@triton.jit
def gradient(
    raw_ptr, stride, bias_ptr, targets_ptr, log_z_ptr, of_log_prob_ptr, entropy_ptr, of_entropy_ptr,
    factor_ptr, weights_ptr, segments_ptr, potential_ptr, vocab, scale, softcap, inv_t, outer,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, PLOT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # Elementwise: one program for BLOCK columns of a row, which it overwrites.
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < vocab
    places = raw_ptr + row.to(tl.int64) * stride + columns
    z, slope = _logits(
        tl.load(places, mask=mask, other=0.0), bias_ptr, columns, mask, scale, softcap, inv_t, HAS_BIAS, HAS_SOFTCAP
    )
    factor = tl.load(factor_ptr + row) + tl.zeros((BLOCK,), tl.float32)
    if PLOT:
        weight = tl.load(weights_ptr + row)
        potential_ptr += tl.load(segments_ptr + row) * vocab
        wanted = tl.where(weight > 0, vocab, 0)  # a row of weight 0 reads nothing
        factor += weight * tl.load(potential_ptr + columns, mask=columns < wanted, other=0.0)
    entropy = 0.0
    of_entropy = 0.0
    if ENTROPY:
        entropy = tl.load(entropy_ptr + row)
        of_entropy = tl.load(of_entropy_ptr + row)
    gradient = _to_gradient(
        z, slope, tl.load(log_z_ptr + row), factor, columns, tl.load(targets_ptr + row),
        tl.load(of_log_prob_ptr + row), entropy, of_entropy, outer, ENTROPY,
    )  # fmt: skip
    tl.store(places, gradient.to(raw_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _along_line(
    raw_ptr, bias_ptr, log_z, target_ptr, gaps_ptr, before, start, vocab, scale, softcap, inv_t,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of a row along its line, given ``before``, F_p − F_P ahead of them. Returns the columns, z and its
    slope, p, F_p − F_P and the gap at each, and F_p − F_P behind them."""
    columns = start + tl.arange(0, BLOCK)
    mask = columns < vocab
    raw = tl.load(raw_ptr + columns, mask=mask, other=0.0)
    z, slope = _logits(raw, bias_ptr, columns, mask, scale, softcap, inv_t, HAS_BIAS, HAS_SOFTCAP)
    p = tl.where(mask, tl.exp(z - log_z), 0.0)
    difference = p - tl.load(target_ptr + columns, mask=mask, other=0.0)
    gaps = tl.load(gaps_ptr + columns, mask=mask, other=0.0)
    return columns, z, slope, p, before + tl.cumsum(difference, axis=0), gaps, before + tl.sum(difference, axis=0)


@triton.jit
def _signed(tail, gaps):
    """c_k = sign(F_p(k) − F_P(k))·gap_k, with sign(0) = 0."""
    return tl.where(tail > 0, gaps, tl.where(tail < 0, -gaps, 0.0))


@triton.jit
def line_values(
    raw_ptr, stride, bias_ptr, log_z_ptr, weights_ptr, target_ptr, gaps_ptr, values_ptr,
    vocab, scale, softcap, inv_t, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program per row: W1 = Σ_k |F_p(k) − F_P(k)|·gap_k along the line, the cumulative sum carried along.
    row = tl.program_id(0)
    if tl.load(weights_ptr + row) > 0:
        raw_ptr += row.to(tl.int64) * stride
        log_z = tl.load(log_z_ptr + row)
        before = 0.0
        distance = 0.0
        for start in range(0, vocab, BLOCK):
            _columns, _z, _slope, _p, tail, gaps, before = _along_line(
                raw_ptr, bias_ptr, log_z, target_ptr, gaps_ptr, before, start, vocab, scale, softcap, inv_t,
                HAS_BIAS, HAS_SOFTCAP, BLOCK,
            )  # fmt: skip
            distance += tl.sum(tl.abs(tail) * gaps, axis=0)
        tl.store(values_ptr + row, distance)


@triton.jit
def line_gradient(
    raw_ptr, stride, bias_ptr, targets_ptr, log_z_ptr, of_log_prob_ptr, entropy_ptr, of_entropy_ptr,
    of_value_ptr, target_ptr, gaps_ptr, vocab, scale, softcap, inv_t, outer,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program per row, whose own potential is s_j = Σ_{k ≥ j} c_k with c_k = sign(F_p(k) − F_P(k))·gap_k.
    # First Σ c_k and ⟨p, s⟩ = Σ_k c_k·F_p(k); then the row again, from the cache, with s_j = Σ c_k − Σ_{k < j} c_k.
    row = tl.program_id(0)
    raw_ptr += row.to(tl.int64) * stride
    log_z = tl.load(log_z_ptr + row)
    weight = tl.load(of_value_ptr + row)
    of_log_prob = tl.load(of_log_prob_ptr + row)
    target = tl.load(targets_ptr + row)
    entropy = 0.0
    of_entropy = 0.0
    if ENTROPY:
        entropy = tl.load(entropy_ptr + row)
        of_entropy = tl.load(of_entropy_ptr + row)
    whole = 0.0
    mean = 0.0
    if weight != 0:
        before = 0.0
        mass = 0.0
        for start in range(0, vocab, BLOCK):
            _columns, _z, _slope, p, tail, gaps, before = _along_line(
                raw_ptr, bias_ptr, log_z, target_ptr, gaps_ptr, before, start, vocab, scale, softcap, inv_t,
                HAS_BIAS, HAS_SOFTCAP, BLOCK,
            )  # fmt: skip
            c = _signed(tail, gaps)
            whole += tl.sum(c, axis=0)
            mean += tl.sum(c * (mass + tl.cumsum(p, axis=0)), axis=0)
            mass += tl.sum(p, axis=0)
    before = 0.0
    passed = 0.0
    for start in range(0, vocab, BLOCK):
        columns, z, slope, _p, tail, gaps, before = _along_line(
            raw_ptr, bias_ptr, log_z, target_ptr, gaps_ptr, before, start, vocab, scale, softcap, inv_t,
            HAS_BIAS, HAS_SOFTCAP, BLOCK,
        )  # fmt: skip
        c = _signed(tail, gaps)
        potential = whole - (passed + tl.cumsum(c, axis=0) - c)
        gradient = _to_gradient(
            z, slope, log_z, weight * (potential - mean) - of_log_prob, columns, target, of_log_prob, entropy,
            of_entropy, outer, ENTROPY,
        )  # fmt: skip
        tl.store(raw_ptr + columns, gradient.to(raw_ptr.dtype.element_ty), mask=columns < vocab)
        passed += tl.sum(c, axis=0)
