"""What the ops on a dense layer's factors ``a`` and ``g`` share: their checks, segments, and tiles.

A dense layer's per-sample gradient is ``g_i^T a_i``, with ``a_i [T, d]`` the layer's inputs and ``g_i [T,
p]`` the gradients of its outputs. The samples come as a batch ``[U, T, ...]``, or packed one after another
without padding, ``[N, ...]`` with ``cu_seqlens``.
"""

from .inputs import Segments, check_layer_factors, is_in_float64, offsets_of

__all__ = ["Segments", "check_layer_factors", "is_in_float64", "offsets_of"]
