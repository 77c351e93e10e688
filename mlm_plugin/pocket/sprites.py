"""Sprites as text: one letter per pixel, `.` for transparent. Knows no scenes and no colours.

Letters that take the colour of the object: ``b`` body (with patterns), ``s`` its shade, ``l`` its
light. Fixed colours: ``w`` white, ``k`` black, ``d`` dark gray, ``n`` brown, ``o`` orange,
``y`` yellow, ``g`` glass, ``r`` red, ``u`` blue, ``p`` pink, ``e`` green.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["COMPANIONS", "EMPTY", "HATS", "SUBJECTS", "Sprite"]

EMPTY = "."


class Sprite(NamedTuple):
    """A sprite as letters, and the horizontal position of a hat as a share of the width."""

    letters: np.ndarray  # (height, width) of one-letter strings
    head: float = 0.5


def _sprite(text: str, *, head: float = 0.5) -> Sprite:
    rows = text.split()
    width = max(map(len, rows))
    return Sprite(np.array([list(row.ljust(width, EMPTY)) for row in rows]), head)


LARGE_SUBJECTS: dict[str, Sprite] = {
    "cat": _sprite(
        """
        .b.....b........
        .bb...bb........
        .bpbbbpb......bb
        .bbbbbbb.......b
        bbkkbkkbb......b
        bbkkbkkbb......b
        bwwwpwwwb.....bb
        .wwwwwww.....bb.
        ..bbbbbbbbbbbbb.
        ..bwwbbbbbbbbb..
        ..bwwbbbbbbbbb..
        ..bbbbbbbbbbbb..
        ..bb.bb..bb.bb..
        ..ww.ww..ww.ww..
        """,
        head=0.28,
    ),
    "dog": _sprite(
        """
        .........sbbbb..
        ........ssbbbbb.
        ........ssbbkbbb
        ........ssbbkbbb
        b.......ssbbbbkk
        bb......s.bbwwkk
        .b.......bbbwww.
        .bb.....bbbbb...
        ..bbbbbbbbbb....
        ..bbbbbbbbbb....
        ..bbbbbbbwww....
        ..bbbbbbbbww....
        ..bb.bb.bb.bb...
        ..bb.bb.bb.bb...
        ..ww.ww.ww.ww...
        """,
        head=0.75,
    ),
    "bird": _sprite(
        """
        ........bbbb....
        .......bbbbbb...
        .......bbbkkb...
        .......bbbkkboo.
        b......bbbbbbooo
        bb....bbbbbbbo..
        bbbbbbssbbbbb...
        .bbbbssssbbww...
        ..bbsssssbwww...
        ...bbsssbbww....
        ....bbbbbbb.....
        .....bbbbb......
        .......o..o.....
        .......o..o.....
        ......oo.oo.....
        """,
        head=0.62,
    ),
    "fish": _sprite(
        """
        .......ss.......
        ......ssss......
        b....bbbbbbb....
        bb..bbbbbbbbbb..
        bbb.bbbbbbbkkbb.
        .bbbbbbbbbbkkbbb
        .sbbbbbssbbbbbbb
        .sbbbbbsssbbbboo
        bbbbbbbssbbbbbb.
        bbb.bbbbbbbbww..
        bb...bbbbwww....
        b.....sss.......
        """,
        head=0.52,
    ),
    "robot": _sprite(
        """
        .......y........
        .......d........
        ...bbbbbbbbbb...
        ...bggggggggb...
        .d.bgkkggkkgb.d.
        .d.bgkkggkkgb.d.
        ...bggggggggb...
        ...bbbbbbbbbb...
        ......dddd......
        .dbbbbbbbbbbbbd.
        .d.bbbbbbbbbb.d.
        .d.bbbyrebbbb.d.
        .o.bbbbbbbbbb.o.
        ....bbb..bbb....
        ....ddd..ddd....
        """,
        head=0.48,
    ),
    "car": _sprite(
        """
        ....bbbbbbbb....
        ...bbbbbbbbbb...
        ..bbgggbbgggbb..
        ..bggggbbggggb..
        .bbggggbbggggbb.
        bbbbbbbbbbbbbbbb
        ybbbbbbbbbbbbbby
        ybbbbbbbbbbbbbby
        bbbkkkbbbbkkkbbb
        sskkkkkssskkkkks
        ..kkwkk..kkwkk..
        ...kkk....kkk...
        """,
        head=0.5,
    ),
    "house": _sprite(
        """
        .......ss.......
        ......ssss..nn..
        .....ssssss.nn..
        ....ssssssssnn..
        ...ssssssssssn..
        ..ssssssssssss..
        .ssssssssssssss.
        ssssssssssssssss
        ..bbbbbbbbbbbb..
        ..bgggbbbbgggb..
        ..bgggbnnbgggb..
        ..bbbbbnnbbbbb..
        ..bbbbbnnbbbbb..
        ..bbbbbnnbbbbb..
        """,
        head=0.5,
    ),
    "boat": _sprite(
        """
        .......n........
        .......nb.......
        .......nbb......
        ....b..nbbb.....
        ...bb..nbbbb....
        ..bbb..nbbbbb...
        .bbbb..nbbbbbb..
        bbbbb..nbbbbbbb.
        .......n........
        nnnnnnnnnnnnnnnn
        nwnnwnnwnnwnnwn.
        .nnnnnnnnnnnnn..
        ..nnnnnnnnnnn...
        """,
        head=0.47,
    ),
    "mushroom": _sprite(
        """
        .....bbbbbb.....
        ...bbbbbbbbbb...
        ..bbbbbbbbbbbb..
        .bbbbbbbbbbbbbb.
        bbbbbbbbbbbbbbbb
        bbbbbbbbbbbbbbbb
        bbbbbbbbbbbbbbbb
        .ssssssssssssss.
        ....wwwwwwww....
        ....wkkwwkkw....
        ....wkkwwkkw....
        ....wwwppwww....
        ....wwwwwwww....
        .....wwwwww.....
        """,
        head=0.5,
    ),
    "cup": _sprite(
        """
        ....w...w.......
        ...w...w........
        ....w...w.......
        wwwwwwwwwwwww...
        wnnnnnnnnnnnw...
        bbbbbbbbbbbbbbb.
        bbbbbbbbbbbbb.bb
        bbbbbbbbbbbbb..b
        bbbbbbbbbbbbb..b
        bbbbbbbbbbbbb.bb
        bbbbbbbbbbbbbbb.
        .bbbbbbbbbbb....
        ..bbbbbbbbb.....
        ..sssssssss.....
        """,
        head=0.4,
    ),
}

SMALL_SUBJECTS: dict[str, Sprite] = {
    "cat": _sprite(
        """
        b...b......
        bb.bb.....b
        bbbbb.....b
        bkbkb....bb
        bbpbb...bb.
        .wwwbbbbbb.
        ..bwbbbbbb.
        ..bbbbbbbb.
        ..b.b..b.b.
        ..w.w..w.w.
        """,
        head=0.2,
    ),
    "dog": _sprite(
        """
        ......sbb..
        .....ssbbb.
        .....ssbkbb
        b....ssbbkk
        b.....bbww.
        bb....bbb..
        .bbbbbbbb..
        .bbbbbbww..
        .bbbbbbbw..
        .b.bb.b.b..
        .w.ww.w.w..
        """,
        head=0.72,
    ),
    "bird": _sprite(
        """
        .....bbbb..
        .....bbkb..
        b....bbbboo
        bb..bbbbbo.
        bbbssbbbb..
        .bbsssbww..
        ..bbsbbww..
        ...bbbbb...
        ....o.o....
        ...oo.oo...
        """,
        head=0.65,
    ),
    "fish": _sprite(
        """
        .....sss...
        b...bbbbb..
        bb.bbbbbbb.
        .bbbbbbbkbb
        .sbbbssbkbb
        .sbbbssbbbo
        bb.bbbbbbw.
        b...bbwww..
        .....ss....
        """,
        head=0.6,
    ),
    "robot": _sprite(
        """
        .....y.....
        ..bbbbbbb..
        .dbgggggbd.
        .dbgkgkgbd.
        ..bgggggb..
        ..bbbbbbb..
        ....ddd....
        .dbbbbbbbd.
        .dbbyrebbd.
        .o.bbbbb.o.
        ...dd.dd...
        """,
        head=0.5,
    ),
    "car": _sprite(
        """
        ...bbbbb...
        ..bggbgbb..
        .bgggbggb..
        bbbbbbbbbbb
        ybbbbbbbbby
        bbkkbbbkkbb
        skkkksskkks
        ..kk...kk..
        """,
        head=0.5,
    ),
    "house": _sprite(
        """
        .....s..n..
        ....sss.n..
        ...sssssn..
        ..sssssss..
        .sssssssss.
        sssssssssss
        .bbbbbbbbb.
        .bggbbnnbb.
        .bggbbnnbb.
        .bbbbbnnbb.
        """,
        head=0.5,
    ),
    "boat": _sprite(
        """
        .....n.....
        .....nb....
        ...b.nbb...
        ..bb.nbbb..
        .bbb.nbbbb.
        bbbb.nbbbbb
        .....n.....
        nnnnnnnnnnn
        .nwnnwnnwn.
        ..nnnnnnn..
        """,
        head=0.5,
    ),
    "mushroom": _sprite(
        """
        ...bbbbb...
        .bbbbbbbbb.
        bbbbbbbbbbb
        bbbbbbbbbbb
        bbbbbbbbbbb
        .sssssssss.
        ..wwwwwww..
        ..wkwwwkw..
        ..wwwpwww..
        ...wwwww...
        """,
        head=0.5,
    ),
    "cup": _sprite(
        """
        ...w..w....
        ..w..w.....
        wwwwwwwww..
        wnnnnnnnw..
        bbbbbbbbbbb
        bbbbbbbbb.b
        bbbbbbbbb.b
        bbbbbbbbbbb
        .bbbbbbb...
        ..sssss....
        """,
        head=0.42,
    ),
}

HATS: dict[str, Sprite] = {
    "red hat": _sprite(
        """
        ..rrrr..
        ..rrrr..
        ..rrrr..
        ..wwww..
        rrrrrrrr
        """
    ),
    "blue hat": _sprite(
        """
        ....w...
        ...uu...
        ...uuu..
        ..uuuu..
        .uuuuuu.
        wwwwwwww
        """
    ),
    "crown": _sprite(
        """
        y..yy..y
        y..yy..y
        yyyyyyyy
        yryyuyry
        yyyyyyyy
        """
    ),
}

COMPANIONS: dict[str, Sprite] = {
    "ball": _sprite(
        """
        ..rrww..
        .rrrwww.
        rrrrwwww
        rrrrwwww
        wwwwrrrr
        wwwwrrrr
        .wwwrrr.
        ..wwrr..
        """
    ),
    "flower": _sprite(
        """
        ..pp..
        .pppp.
        ppyypp
        ppyypp
        .pppp.
        ..pp..
        ..ee..
        e.ee.e
        eeeeee
        ..ee..
        """
    ),
    "duckling": _sprite(
        """
        ...yyy..
        ..yyyyy.
        ..ykyyy.
        ooyyyyy.
        ..yyyyyy
        .yyyyyyy
        .yyoyyy.
        ..yyyy..
        ..o..o..
        """
    ),
}

SUBJECTS = {"large": LARGE_SUBJECTS, "small": SMALL_SUBJECTS}
"""Subjects by size: each is drawn in both sizes, since pixel art does not scale."""
