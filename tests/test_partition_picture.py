"""The picture of a partition: what is in it, at every size, and that it stands on its own."""

from __future__ import annotations

import base64
import re
import struct
import zlib
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray

from pocketfed.simulations.partition_picture import DARK, LIGHT, NONE, draw_partition

SVG = "{http://www.w3.org/2000/svg}"


def pixels(svg: str) -> NDArray[np.uint8]:
    """(height, width, 3) of the picture's first image."""
    data = base64.b64decode(re.search(r"base64,([^\"]+)", svg).group(1))  # type: ignore[union-attr]
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    place, body = 8, b""
    while place < len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        content = data[place + 8 : place + 8 + length]
        assert struct.unpack(">I", data[place + 8 + length : place + 12 + length])[0] == zlib.crc32(kind + content)
        body += content if kind == b"IDAT" else b""
        place += 12 + length
    lines = np.frombuffer(zlib.decompress(body), np.uint8).reshape(height, 1 + 3 * width)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width, 3)


def test_a_cell_is_as_dark_as_the_share_of_its_device_and_nothing_is_grey() -> None:
    """Two devices, two labels: the first has only the first label, the second a quarter of it."""
    image = pixels(draw_partition(np.array([[8, 0], [1, 3]]), ("x", "y"), "two"))
    half, middle = image.shape[0] // 2, image.shape[1] // 2
    assert tuple(image[0, 0]) == DARK
    assert tuple(image[half, 0]) == NONE
    # Square roots, so that small shares show: a quarter is half way from light to dark.
    assert tuple(image[0, middle]) == tuple(np.rint((np.array(LIGHT) + DARK) / 2).astype(int))
    assert image[half, middle, 0] < image[0, middle, 0]


@pytest.mark.parametrize(("devices", "labels"), [(1, 1), (10, 7), (100, 150), (1000, 7), (2500, 77)])
def test_it_is_small_well_formed_and_whole_at_every_size(devices: int, labels: int) -> None:
    counts = np.random.default_rng(0).integers(0, 5, (devices, labels))
    names = [f"label {i} " + "long " * 9 for i in range(labels)]
    svg = draw_partition(counts, names, "SNIPS & <others>, dirichlet:0.3")
    assert len(svg) < 400_000
    root = ElementTree.fromstring(svg)
    texts = [element.text or "" for element in root.iter(f"{SVG}text")]
    assert texts[0] == "SNIPS & <others>, dirichlet:0.3"
    assert texts[1] == f"{devices:,} devices, {counts.sum():,} examples, {labels:,} labels"
    assert {"device", "label", "examples", "share of a device's examples", "none", "100 %"} <= set(texts)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    assert 640 <= width < 1300
    assert width == 640 or devices > 400  # as wide as the plots beside it
    assert height < 1200
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")  # it loads nothing
    named = [text for text in texts if text.startswith("label ")]
    assert 0 < len(named) <= 70
    assert len(named) == labels or labels > 60


def test_more_devices_than_columns_share_them_and_the_bars_say_what_one_has() -> None:
    counts = np.full((2000, 2), 3)
    svg = draw_partition(counts, ("a", "b"), "many")
    assert pixels(svg).shape[1] == 1000
    assert ">6<" in svg  # a device has six examples, not a column's twelve
