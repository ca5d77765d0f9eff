"""Bytes that memory moves: whole sectors, of which entries that lie scattered touch more than their share."""

SECTOR = 32  # bytes that memory hands out at least
BF16, FLOAT32 = 2, 4
UPDATE_BYTES = (
    16 + 12
)  # of AdamW, a value: weight, gradient and moments read; weight and moments written


def touched(p: float, alignment: int, itemsize: int = BF16) -> float:
    """Share of a row's sectors that a choice of a share ``p`` of its entries touches, on average."""
    return 1 - (1 - p) ** max(1, SECTOR // (itemsize * alignment))


def scattered(k_out: int, inner: int, k_in: int, alignment: int = 1, itemsize: int = BF16) -> float:
    """Bytes that ``k_in`` values in each of ``k_out`` rows of ``inner`` cost: memory is written in whole sectors, and
    one that is not full is read before."""
    alignment = inner if k_in == inner else alignment  # all of a row is one run
    sectors = k_out * inner * itemsize / SECTOR * touched(k_in / inner, alignment, itemsize)
    return (1 if alignment * itemsize >= SECTOR else 2) * SECTOR * sectors
