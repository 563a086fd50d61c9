"""Device functions of the random generators: ChaCha20, Philox-4x32-10, and Box-Muller on 64-bit words.

Imported by the ``triton_kernels`` of ops that draw, and by nothing else: it needs triton.

Words are numbers from 0 to 2^32 - 1 in ``uint32`` tensors, whose additions wrap. The generators are integer
arithmetic, so their words are the same bits everywhere. Normals are float32 arithmetic of a few roundings.
"""

import triton
import triton.language as tl

# ChaCha20's constants, "expand 32-byte k" in little-endian words (RFC 8439, section 2.3).
_SIGMA0 = tl.constexpr(0x61707865)
_SIGMA1 = tl.constexpr(0x3320646E)
_SIGMA2 = tl.constexpr(0x79622D32)
_SIGMA3 = tl.constexpr(0x6B206574)
# Philox-4x32 (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405): multipliers and key increments.
_PHILOX_M0 = tl.constexpr(0xD2511F53)
_PHILOX_M1 = tl.constexpr(0xCD9E8D57)
_PHILOX_W0 = tl.constexpr(0x9E3779B9)
_PHILOX_W1 = tl.constexpr(0xBB67AE85)

_TWO_TO_MINUS_32 = tl.constexpr(2.0**-32)
_TWO_TO_MINUS_64 = tl.constexpr(2.0**-64)
_TURN = tl.constexpr(6.283185307179586)
_ALL_ONES = tl.constexpr(0xFFFFFFFF)  # `~` fails in the interpreter of triton 3.6
_SQRT_HALF = tl.constexpr(0.7071067811865476)
# 1 - sqrt(1/2): above it the logarithm is taken of the mantissa, below it of one minus the distance to one
_FAR_FROM_ONE = tl.constexpr(0.2928932188134524)


@triton.jit
def load_word(pointer, index):
    """Read one 32-bit word of a key that is stored as ``int32``."""
    return tl.load(pointer + index).to(tl.uint32, bitcast=True)


@triton.jit
def _rotated(x, COUNT: tl.constexpr):
    return (x << COUNT) | (x >> (32 - COUNT))


@triton.jit
def _quarter_round(a, b, c, d):
    a = a + b
    d = _rotated(d ^ a, 16)
    c = c + d
    b = _rotated(b ^ c, 12)
    a = a + b
    d = _rotated(d ^ a, 8)
    c = c + d
    b = _rotated(b ^ c, 7)
    return a, b, c, d


@triton.jit
def chacha20(key_ptr, block_low, block_high, step, stream):
    """Return the sixteen words of ChaCha20 blocks (RFC 8439, section 2.3).

    State words 12 and 13 are the halves of the block number, 14 is the step, 15 the stream. All four are
    ``uint32`` tensors of one shape; the key is eight ``int32`` at ``key_ptr``.
    """
    zero = block_low ^ block_low
    k0 = load_word(key_ptr, 0) + zero
    k1 = load_word(key_ptr, 1) + zero
    k2 = load_word(key_ptr, 2) + zero
    k3 = load_word(key_ptr, 3) + zero
    k4 = load_word(key_ptr, 4) + zero
    k5 = load_word(key_ptr, 5) + zero
    k6 = load_word(key_ptr, 6) + zero
    k7 = load_word(key_ptr, 7) + zero
    x0, x1, x2, x3 = zero + _SIGMA0, zero + _SIGMA1, zero + _SIGMA2, zero + _SIGMA3
    x4, x5, x6, x7 = k0, k1, k2, k3
    x8, x9, x10, x11 = k4, k5, k6, k7
    x12, x13, x14, x15 = block_low, block_high, step, stream
    for _ in range(10):
        x0, x4, x8, x12 = _quarter_round(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter_round(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter_round(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter_round(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter_round(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter_round(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter_round(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter_round(x3, x4, x9, x14)
    return (
        x0 + _SIGMA0,
        x1 + _SIGMA1,
        x2 + _SIGMA2,
        x3 + _SIGMA3,
        x4 + k0,
        x5 + k1,
        x6 + k2,
        x7 + k3,
        x8 + k4,
        x9 + k5,
        x10 + k6,
        x11 + k7,
        x12 + block_low,
        x13 + block_high,
        x14 + step,
        x15 + stream,
    )


@triton.jit
def philox(key_ptr, counter_low, counter_high, step, stream):
    """Return the four words of Philox-4x32-10 at the counter ``(low, high, step, stream)``.

    All four are ``uint32`` tensors of one shape; the key is the first two ``int32`` at ``key_ptr``.
    """
    zero = counter_low ^ counter_low
    k0, k1 = load_word(key_ptr, 0) + zero, load_word(key_ptr, 1) + zero
    c0, c1, c2, c3 = counter_low, counter_high, step, stream
    m0, m1 = zero + _PHILOX_M0, zero + _PHILOX_M1
    for _ in range(10):
        high0, high1 = tl.umulhi(m0, c0), tl.umulhi(m1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, m1 * c2, high0 ^ c3 ^ k1, m0 * c0
        k0 = k0 + _PHILOX_W0
        k1 = k1 + _PHILOX_W1
    return c0, c1, c2, c3


@triton.jit
def _fraction(low, high):
    # a 64-bit word over 2^64, to float32's relative precision
    return high.to(tl.float32) * _TWO_TO_MINUS_32 + low.to(tl.float32) * _TWO_TO_MINUS_64


@triton.jit
def _log_of_fraction(low, high):
    # ln((word + 1) / 2^64): accurate near 1, where it is taken of the distance to 1, and far into the tail
    distance = _fraction(low ^ _ALL_ONES, high ^ _ALL_ONES)
    near_one = distance < _FAR_FROM_ONE
    value = high.to(tl.float32) * _TWO_TO_MINUS_32 + (low.to(tl.float32) + 1.0) * _TWO_TO_MINUS_64
    bits = value.to(tl.uint32, bitcast=True)
    exponent = (bits >> 23).to(tl.int32) - 126
    mantissa = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)  # [1/2, 1)
    is_small = mantissa < _SQRT_HALF
    mantissa = tl.where(is_small, mantissa + mantissa, mantissa)
    power = tl.where(is_small, exponent - 1, exponent).to(tl.float32)
    power = tl.where(near_one, 0.0, power)
    x = tl.where(near_one, -distance, mantissa - 1.0)
    # ln(1 + x) on [sqrt(1/2) - 1, sqrt(2) - 1], polynomial of the Cephes library (Moshier 1989)
    z = x * x
    y = 7.0376836292e-2 * x - 1.1514610310e-1
    y = y * x + 1.1676998740e-1
    y = y * x - 1.2420140846e-1
    y = y * x + 1.4249322787e-1
    y = y * x - 1.6668057665e-1
    y = y * x + 2.0000714765e-1
    y = y * x - 2.4999993993e-1
    y = y * x + 3.3333331174e-1
    y = y * x * z
    y = y + power * -2.12194440e-4
    y = y - 0.5 * z
    return (x + y) + power * 0.693359375


@triton.jit
def normal_pair(first_low, first_high, second_low, second_high):
    """Turn two 64-bit words into two standard normals (Box and Muller 1958), in float32.

    The first word gives the radius, up to ``sqrt(128 ln 2) = 9.42``, the second the angle. Errors against
    float64 are a few units in the last place of the radius.
    """
    radius = tl.sqrt_rn(-2.0 * _log_of_fraction(first_low, first_high))
    # nearest quarter turn, and what is left of it in [-1/8, 1/8) turns, exactly
    quarter = (second_high + 0x20000000) >> 30
    rest = (second_high - (quarter << 30)).to(tl.int32, bitcast=True)
    turns = rest.to(tl.float32) * _TWO_TO_MINUS_32 + second_low.to(tl.float32) * _TWO_TO_MINUS_64
    angle = turns * _TURN
    z = angle * angle
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * angle + angle
    cosine = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z
    cosine = cosine - 0.5 * z + 1.0
    is_odd = (quarter & 1) != 0
    along, across = tl.where(is_odd, sine, cosine), tl.where(is_odd, cosine, sine)
    is_left = (quarter == 1) | (quarter == 2)
    is_below = quarter >= 2
    along = tl.where(is_left, -along, along)
    across = tl.where(is_below, -across, across)
    return radius * along, radius * across


@triton.jit
def eight_normals(key_ptr, block, step, stream, part, IS_CHACHA: tl.constexpr):
    """Return the standard normals of addresses ``8 * block`` to ``8 * block + 7``.

    ``block``: ``int64``, below 2^45; ``step`` and ``stream``: ``uint32`` scalars. ``part`` (0 to 3) keeps
    independent draws of one address apart.
    """
    low = block.to(tl.uint32)
    high = (block >> 32).to(tl.uint32) | (part << 30)
    steps, streams = (low ^ low) + step, (low ^ low) + stream
    if IS_CHACHA:
        w = chacha20(key_ptr, low, high, steps, streams)
        n0, n1 = normal_pair(w[0], w[1], w[2], w[3])
        n2, n3 = normal_pair(w[4], w[5], w[6], w[7])
        n4, n5 = normal_pair(w[8], w[9], w[10], w[11])
        n6, n7 = normal_pair(w[12], w[13], w[14], w[15])
    else:
        # four counters to a block of eight
        high = (block >> 30).to(tl.uint32) | (part << 30)
        a = philox(key_ptr, low * 4, high, steps, streams)
        b = philox(key_ptr, low * 4 + 1, high, steps, streams)
        c = philox(key_ptr, low * 4 + 2, high, steps, streams)
        d = philox(key_ptr, low * 4 + 3, high, steps, streams)
        n0, n1 = normal_pair(a[0], a[1], a[2], a[3])
        n2, n3 = normal_pair(b[0], b[1], b[2], b[3])
        n4, n5 = normal_pair(c[0], c[1], c[2], c[3])
        n6, n7 = normal_pair(d[0], d[1], d[2], d[3])
    return n0, n1, n2, n3, n4, n5, n6, n7


@triton.jit
def noise_tile(
    key_ptr,
    coefficients_ptr,
    block,
    step,
    stream,
    num_coefficients,
    IS_CHACHA: tl.constexpr,
    HAS_COEFFICIENTS: tl.constexpr,
    SUMMANDS: tl.constexpr,
):
    """Return the noise of unit deviation at ``8 * block`` to ``8 * block + 7``, in address order.

    ``block``: ``[BLOCK]``, ``int64``; ``step``: ``int64`` scalar; the result is ``[8 * BLOCK]``, float32.
    With coefficients ``c`` it is the sum over ``k`` of ``c_k`` times the noise of step ``step - k``, as far
    as there are such steps.
    """
    zero = (block ^ block).to(tl.float32)
    n0, n1, n2, n3, n4, n5, n6, n7 = zero, zero, zero, zero, zero, zero, zero, zero
    lags = 1
    if HAS_COEFFICIENTS:
        lags = tl.minimum(num_coefficients, (step + 1).to(tl.int32))
    for lag in range(lags):
        scale = 1.0
        if HAS_COEFFICIENTS:
            scale = tl.load(coefficients_ptr + lag)
        if SUMMANDS == 4:
            scale = scale * 0.5
        for part in range(SUMMANDS):
            word = (step - lag).to(tl.uint32)
            z0, z1, z2, z3, z4, z5, z6, z7 = eight_normals(
                key_ptr, block, word, stream, tl.cast(part, tl.uint32), IS_CHACHA
            )
            n0, n1, n2, n3 = n0 + scale * z0, n1 + scale * z1, n2 + scale * z2, n3 + scale * z3
            n4, n5, n6, n7 = n4 + scale * z4, n5 + scale * z5, n6 + scale * z6, n7 + scale * z7
    # joined so that each thread holds eight neighbours and stores them together
    even = tl.join(tl.join(n0, n4), tl.join(n2, n6))
    odd = tl.join(tl.join(n1, n5), tl.join(n3, n7))
    return tl.reshape(tl.join(even, odd), (8 * block.shape[0],))
