"""Damaged copies of valid files, for the fuzz tests of all parsers."""

from __future__ import annotations

from hypothesis import strategies as st


@st.composite
def mutated(draw: st.DrawFn, original: bytes, snippets: st.SearchStrategy[bytes]) -> bytes:
    """The original with one to four places overwritten, cut out, doubled, replaced or cut off."""
    content = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, 12))
        match draw(st.integers(0, 4)):
            case 0:
                content[place : place + length] = draw(st.binary(max_size=length))
            case 1:
                del content[place : place + length]
            case 2:
                content[place:place] = content[place : place + 40]
            case 3:
                content[place : place + length] = draw(snippets)
            case 4:
                content = content[:place]
    return bytes(content)
