"""Cost of node-deduplicated dispatch in pieces (`NodeDispatcher.pieces`)."""

from __future__ import annotations


def in_pieces(alpha: float, between: float, inside: float, pieces: int) -> tuple[float, float]:
    """Predict the time of an exchange between nodes and one inside them, for rows that travel in pieces.

    The shorter exchange hides behind the longer one, except for one piece. Each piece has its own messages.

    Args:
        alpha: seconds of both exchanges without their bytes.
        between: seconds of the bytes between nodes.
        inside: seconds of the bytes inside the node.
        pieces: number of pieces.

    Returns:
        Seconds without the bytes, and seconds of the bytes.

    >>> in_pieces(1.0, 30.0, 8.0, pieces=1)
    (1.0, 38.0)
    >>> in_pieces(1.0, 30.0, 8.0, pieces=4)
    (4.0, 32.0)
    """
    return pieces * alpha, max(between, inside) + min(between, inside) / pieces
