"""Device code: L2 norms from sums of squares that neither overflow nor vanish in float32."""

import triton
import triton.language as tl

# Squares are summed three times: as they are, of entries shrunk by 2^-80 and of entries grown by 2^80. At least one of
# the three sums is exact to float32 rounding for every finite row (the idea of Blue 1978, doi:10.1145/355769.355771).
SHRINK = tl.constexpr(2.0**-80)
GROW = tl.constexpr(2.0**80)
SMALLEST_PLAIN_SUM = tl.constexpr(2.0**-60)


@triton.jit
def norm_from_sums(plain, shrunk, grown):
    """Return the norm that three sums of squares stand for; NaN or infinite if an entry was."""
    vanishing = plain < SMALLEST_PLAIN_SUM
    finite = plain < float("inf")
    norm = tl.where(finite, tl.sqrt(plain), tl.sqrt(shrunk) * GROW)
    return tl.where(vanishing, tl.sqrt(grown) * SHRINK, norm)
