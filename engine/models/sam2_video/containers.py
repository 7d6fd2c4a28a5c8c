"""Video files that may be given to the decoder when they come from somebody else: real containers, not lists of files.

FFmpeg tells a format by content, whatever the name, and among its formats are texts that name *other* files: a list of
parts (``ffconcat``), playlists (HLS, DASH). Such a text, sent as a video, makes the decoder open files of this machine.
"""

from __future__ import annotations

import re

HEAD_BYTES = 4096
"""Bytes of the beginning that `is_container` looks at."""

_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
_SIGNATURES = (
    b"\x1aE\xdf\xa3",  # Matroska, WebM
    b"FLV\x01",
    b"OggS\x00",
    b"GIF87a",
    b"GIF89a",
    b"DKIF\x00",  # IVF
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # ASF, WMV
    b"\x00\x00\x01",  # MPEG program and elementary streams, H.264 and H.265 with short start codes
    b"\x00\x00\x00\x01",
)
_LISTS = re.compile(rb"ffconcat|#EXTM3U|<MPD|<AssetMap|<CompositionPlaylist", re.IGNORECASE)
_TS = 188


def is_container(head: bytes) -> bool:
    """Whether a file that begins like this is a video container, and not a text that names other files.

    Args:
        head: The first `HEAD_BYTES`, or the whole file where it is shorter.
    """
    if _LISTS.search(head[:HEAD_BYTES]):
        return False
    if head[:2] == b"\0\0" and head[4:8] in _BOXES:  # MP4, MOV, 3GP; the first box is short
        return True
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return True
    for start in (0, 4):  # MPEG-TS, plain and with time codes (M2TS)
        packets = head[start :: _TS + start][:3]
        if packets == b"GGG":
            return True
    return head.startswith(_SIGNATURES)
