"""The messages that devices send each other, counted in a compiled program."""

import math
import re

__all__ = ["messages"]

KINDS = "collective-permute|all-gather|all-reduce|all-to-all|reduce-scatter"


def messages(compiled):
    """The collectives of a compiled program -> [(kind, bytes that one device gets)].

    compiled: what ``jax.jit(f).lower(…).compile()`` returns. A message in the body of a loop is
    counted once.
    """
    found = re.findall(rf"= (.+?) ({KINDS})(?:-start)?\(", compiled.as_text())
    return [(kind, sum(map(_bytes, re.findall(r"\w+\[[\d,]*\]", shape)))) for shape, kind in found]


def _bytes(shape):
    """Of one array, such as "f32[2,3]": 24."""
    dtype, sizes = shape.rstrip("]").split("[")
    bits = 8 if dtype == "pred" else int(re.search(r"\d+$", dtype)[0])
    return bits // 8 * math.prod(int(size) for size in sizes.split(",") if size)
