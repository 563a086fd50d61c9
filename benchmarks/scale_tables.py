"""Print the predicted tables of docs/scale.md: ``python -m benchmarks.scale_tables``."""

from __future__ import annotations

from collections.abc import Iterator

from ._scale import STRATEGIES, calls_of, expected_padding, state_bytes
from ._shapes import Shape
from .bench_scale import EXPECTED_BATCH, MICRO_BATCH, fits, large_shapes, markdown, predicted_pair

SIZES = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
GIB = 2**30


def tables() -> Iterator[str]:
    """Yield each table in Markdown."""
    shapes = large_shapes()
    yield _work(shapes)
    yield _bytes(shapes)
    yield _padding()
    for name, shape in shapes.items():
        yield f"**{name}** (prediction)\n\n" + _times(shape)
    yield _parts(shapes)


def _work(shapes: dict[str, Shape]) -> str:
    """FLOPs and state of each shape."""
    head = ["model", "trained", "forward", "backward", "trained weights", "norms", "private / ordinary"]
    rows = []
    for name, shape in shapes.items():
        trained = sum(parameter.entries for parameter in shape.trainable)
        parts = (shape.forward, shape.backward, shape.weights, shape.norms)
        ratio = shape.flops(private=True) / shape.flops(private=False)
        rows.append(
            [name, f"{trained / 1e6:,.1f} M", *(f"{part / 1e12:.3f}" for part in parts), f"{ratio:.3f}"]
        )
    return markdown(head, rows)


def _bytes(shapes: dict[str, Shape]) -> str:
    """Bytes that a process sends, and state that it holds, on 64 GPUs."""
    size = 64
    padding = expected_padding(EXPECTED_BATCH, size, MICRO_BATCH)
    head = ["model", "strategy", "collectives", "sent, private", "sent, ordinary", "state on a GPU"]
    rows = []
    for name, shape in shapes.items():
        for strategy in STRATEGIES:
            private = calls_of(strategy, shape, size, padding.micro_batches)
            ordinary = calls_of(strategy, shape, size, EXPECTED_BATCH // size // MICRO_BATCH, private=False)
            sent = [
                sum(call.sent(size) for call in calls if not call.is_side) for calls in (private, ordinary)
            ]
            count = sum(call.times for call in private if not call.is_side)
            side = sum(call.times for call in private if call.is_side)
            held = state_bytes(strategy, shape, size) / GIB
            rows.append(
                [
                    name,
                    strategy,
                    f"{count:,.0f} + {side:.1f}",
                    *(f"{amount / GIB:,.2f} GiB" for amount in sent),
                    f"{held:,.1f} GiB",
                ]
            )
    return markdown(head, rows)


def _padding() -> str:
    """What the Poisson draw costs processes that wait for each other."""
    head = ["GPUs", "mean share", "expected largest share", "longer by", "expected micro-batches"]
    rows = []
    for size in SIZES:
        padding, mean = expected_padding(EXPECTED_BATCH, size, MICRO_BATCH), EXPECTED_BATCH / size
        rows.append(
            [
                f"{size}",
                f"{mean:g}",
                f"{padding.share:.2f}",
                f"{max(0.0, padding.share / mean - 1):.1%}",
                f"{padding.micro_batches:.2f}",
            ]
        )
    return markdown(head, rows)


def _times(shape: Shape) -> str:
    """Step time of each strategy, and its ratio to the ordinary step."""
    rows = []
    for size in SIZES:
        cells = []
        for strategy in STRATEGIES:
            private, ordinary = predicted_pair(strategy, shape, size)
            cell = f"{private.total:.3g} s ({private.total / ordinary.total:.2f})"
            cells.append(cell if fits(strategy, shape, size) else "too large")
        rows.append([f"{size}", *cells])
    return markdown(["GPUs", *STRATEGIES], rows)


def _parts(shapes: dict[str, Shape]) -> str:
    """Where the time goes under FSDP2."""
    head = ["model", "GPUs", "passes", "collectives", "agreement", "speed-up from 8", "of the ideal"]
    rows = []
    for name, shape in shapes.items():
        base = predicted_pair("fsdp2", shape, 8)[0].total
        for size in SIZES[1:]:
            private, _ = predicted_pair("fsdp2", shape, size)
            speedup = base / private.total
            shares = (private.compute, private.exposed, private.side)
            rows.append(
                [
                    name,
                    f"{size}",
                    *(f"{part * 1e3:,.3g} ms" for part in shares),
                    f"{speedup:.1f}",
                    f"{speedup * 8 / size:.0%}",
                ]
            )
    return markdown(head, rows)


if __name__ == "__main__":
    print("\n\n".join(tables()))
