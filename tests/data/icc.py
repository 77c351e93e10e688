"""Small ICC profiles, built byte by byte: wide RGB, grey with another gamma, CMYK with a table."""

import itertools
import struct

D50 = (0.9642, 1.0, 0.8249)
ADOBE = ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))
"""Primaries of Adobe RGB, adapted to D50. Source: Adobe RGB (1998) Color Image Encoding."""


def profile(space, tags, *, pcs=b"XYZ ", name="wide"):
    """Bytes of a version 2 profile."""
    text = name.encode() + b"\0"
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78), **tags}
    tags[b"wtpt"] = xyz(D50)
    offset = 128 + 4 + 12 * len(tags)
    table, body = b"", b""
    for key, data in tags.items():
        data += bytes(-len(data) % 4)
        table += key + struct.pack(">II", offset + len(body), len(data))
        body += data
    size = offset + len(body)
    header = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02100000, b"scnr", space, pcs)
    header += bytes(12) + b"acsp" + bytes(28) + xyz(D50)[8:]
    header += bytes(128 - len(header))
    return header + struct.pack(">I", len(tags)) + table + body


def xyz(values):
    return b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(v * 65536)) for v in values)


def gamma(value):
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256)) + bytes(2)


def wide_rgb(name="wide"):
    """Adobe RGB's primaries, gamma 2.2."""
    primaries = {key: xyz(v) for key, v in zip((b"rXYZ", b"gXYZ", b"bXYZ"), ADOBE, strict=True)}
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma(2.2))
    return profile(b"RGB ", primaries | curves, name=name)


def grey():
    """Linear grey, which is far darker in bytes than sRGB's."""
    return profile(b"GRAY", {b"kTRC": gamma(1.0)}, name="linear grey")


def cmyk():
    """Every ink darkens L, and cyan and magenta shift a and b: two points for each ink."""
    ramp = bytes(range(256))
    corners = []
    for c, m, y, k in itertools.product((0, 1), repeat=4):
        lightness = 255 * max(0.0, 1 - 0.3 * (c + m + y) - 0.8 * k)
        corners += [round(lightness), 128 - 40 * c + 50 * m, 128 - 30 * c + 60 * y]
    matrix = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + 4 * ramp
    return profile(b"CMYK", {b"A2B0": table + bytes(corners) + 3 * ramp}, pcs=b"Lab ", name="inks")
