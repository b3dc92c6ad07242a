"""A picture of a partition: which share of each device's examples has which label, and how many it has. Plain SVG."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

MOST_COLUMNS = 1000  # more devices share columns
WIDTH, RIGHT = 640, 18  # as plots have it; wider where there are more columns than that
TOP, BARS, GAP = 56, 90, 14
# From light to dark in one hue, so that it can be read without telling colours apart; nothing at all is grey.
LIGHT, DARK, NONE = (222, 235, 247), (8, 48, 107), (242, 242, 242)
NAMED = 60  # so many labels are named one by one


def draw_partition(counts: NDArray[np.int64], labels: Sequence[str], title: str) -> str:
    """counts: (devices, labels), as `partition.label_counts` makes them. Readable for one to a thousand devices."""
    devices, each = len(counts), -(-len(counts) // MOST_COLUMNS)
    starts = np.arange(0, devices, each)
    held = np.add.reduceat(counts, starts, axis=0)  # (columns, labels)
    columns, rows = held.shape
    totals = held.sum(1)
    per_device = totals / np.diff(np.append(starts, devices))
    shares = (held / np.maximum(totals, 1)[:, None]).T  # (labels, columns)
    left = max(64, 44 + round(6.7 * max((len(_short(label)) for label in labels), default=0)))
    width = max(WIDTH - left - RIGHT, columns)
    whole = left + width + RIGHT
    cell = max(4, min(22, 640 // max(rows, 1)))
    height, below = cell * rows, TOP + BARS + GAP
    bottom = below + height
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole} {bottom + 106}" width="{whole}" '
        'style="max-width:100%;height:auto" font-family="system-ui, sans-serif" font-size="13" fill="#24292f">',
        f'<rect width="{whole}" height="{bottom + 106}" fill="#fff"/>',
        f'<text x="{left}" y="20" font-weight="600">{escape(title)}</text>',
        f'<text x="{left}" y="40">{devices:,} devices, {int(counts.sum()):,} examples, {rows:,} labels</text>',
        *_bars(per_device, left, width),
        f'<image x="{left}" y="{below}" width="{width}" height="{height}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{_png(_colours(shares), width, cell)}"/>',
        *_label_axis(labels, left, below, cell),
        *_device_axis(devices, left, width, bottom),
        *_legend(left, bottom + 66),
        "</svg>",
        "",
    ]
    return "\n".join(out)


def _bars(values: NDArray[np.float64], left: int, width: int) -> list[str]:
    most, step, floor = max(float(values.max()), 1.0), width / len(values), TOP + BARS
    path = "".join(f"V{floor - BARS * value / most:.1f}h{step:.3f}" for value in values)
    return [
        f'<path d="M{left} {floor}{path}V{floor}z" fill="#0072b2"/>',
        f'<path d="M{left} {floor}h{width}M{left} {TOP}h{width}" stroke="#d0d7de"/>',
        f'<text x="{left - 8}" y="{TOP + 10}" text-anchor="end">{most:,.0f}</text>',
        f'<text x="{left - 8}" y="{floor}" text-anchor="end">0</text>',
        f'<text transform="translate(18 {TOP + BARS / 2}) rotate(-90)" text-anchor="middle">examples</text>',
    ]


def _label_axis(labels: Sequence[str], left: int, top: float, cell: int) -> list[str]:
    every = 1 if len(labels) <= NAMED and cell >= 10 else -(-10 * len(labels) // (cell * len(labels)))
    texts = [
        f'<text x="{left - 8}" y="{top + cell * (i + 0.5) + 4:.1f}" text-anchor="end" font-size="{min(12, max(9, cell))}">'
        f"{escape(_short(label))}</text>"
        for i, label in enumerate(labels)
        if i % every == 0
    ]
    middle = top + cell * len(labels) / 2
    return [*texts, f'<text transform="translate(18 {middle:.1f}) rotate(-90)" text-anchor="middle">label</text>']


def _short(label: str) -> str:
    return label if len(label) <= 20 else f"{label[:19]}…"


def _device_axis(devices: int, left: int, width: int, bottom: float) -> list[str]:
    every = next(step for step in (10**k * m for k in range(9) for m in (1, 2, 5)) if devices / step <= 20)
    places = [(i, left + width * (i + 0.5) / devices) for i in range(0, devices, every)]
    return [
        *(f'<path d="M{x:.1f} {bottom}v4" stroke="#57606a"/>' for _, x in places),
        *(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{i}</text>' for i, x in places),
        f'<text x="{left + width / 2}" y="{bottom + 36}" text-anchor="middle">device</text>',
    ]


def _legend(left: int, top: float) -> list[str]:
    shades = _colours(np.linspace(1 / 64, 1, 64)[None])
    return [
        f'<text x="{left}" y="{top - 6}">share of a device\'s examples</text>',
        f'<rect x="{left}" y="{top}" width="14" height="14" fill="rgb{NONE}"/>'
        f'<text x="{left + 18}" y="{top + 12}">none</text>',
        f'<image x="{left + 70}" y="{top}" width="192" height="14" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{_png(shades, 192, 1)}"/>',
        f'<text x="{left + 70}" y="{top + 28}">a few</text>',
        f'<text x="{left + 262}" y="{top + 28}" text-anchor="end">100 %</text>',
    ]


def _colours(shares: NDArray[np.float64]) -> NDArray[np.uint8]:
    """(rows, columns, 3) of shares 0 to 1."""
    light, dark = np.array(LIGHT, np.float64), np.array(DARK, np.float64)
    mixed = light + (dark - light) * np.sqrt(shares)[..., None]  # small shares are told from each other, too
    return np.where((shares > 0)[..., None], np.rint(mixed), NONE).astype(np.uint8)


def _png(pixels: NDArray[np.uint8], width: int, cell: int) -> str:
    """Base64. Cells are drawn as several pixels, so that a viewer that smooths what it enlarges does not blur them."""
    wide = max(1, min(8, width // pixels.shape[1]))
    image = np.repeat(np.repeat(pixels, min(cell, 8), axis=0), wide, axis=1)
    lines = np.concatenate([np.zeros((len(image), 1), np.uint8), image.reshape(len(image), -1)], axis=1)  # filter: none
    header = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header)
    data += _chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)) + _chunk(b"IEND", b"")
    return base64.b64encode(data).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
