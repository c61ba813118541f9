"""A paletted PNG from an array of colour numbers: what a heat map of thousands of cells is in a static picture."""

import base64
import struct
import zlib

import numpy as np


def indexed_png(cells: np.ndarray, palette: list[str]) -> str:
    """Encode uint8 cells [rows, columns] as base64 PNG; 0 is transparent, n is `palette[n - 1]` ("#rrggbb")."""
    rows, columns = cells.shape
    colors = bytes(3) + b"".join(bytes.fromhex(color.removeprefix("#")) for color in palette)
    lines = np.pad(cells, ((0, 0), (1, 0))).tobytes()  # a filter byte (0: none) before each line
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)),
        (b"PLTE", colors),
        (b"tRNS", b"\0"),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    ]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in chunks)
    return base64.b64encode(png).decode()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
