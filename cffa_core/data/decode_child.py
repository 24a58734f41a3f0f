"""The process in which images of strangers are decoded; a script of its own that imports nothing of CFFA.

Started by ``decoding.Decoder`` as ``python -I decode_child.py MEMORY_BYTES``. It reads requests from standard input,
one JSON line followed by raw bytes, and answers each the same way. Address space, core dumps and file writes are
limited, and every request runs against an alarm that kills the process: whatever a file does, it does it here.
"""

from __future__ import annotations

import io
import json
import re
import resource
import signal
import struct
import sys
import zlib
from typing import Any, BinaryIO

from PIL import (
    Image,
    ImageOps,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
)

# Imported before the limits close: Pillow finds its decoders in these modules.
PLUGINS = (JpegImagePlugin, MpoImagePlugin, PngImagePlugin, TiffImagePlugin)
FORMATS = ("PNG", "JPEG", "TIFF")
OTHER_IMAGES = (b"GIF8", b"BM", b"RIFF", b"\x00\x00\x01\x00", b"\x00\x00\x00\x0cjP  ", b"8BPS", b"P5", b"P6")
OURS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\x00", b"MM\x00*")
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, struct.error, zlib.error)
# Images up to this many pixels may be as flat as they like: they cost little.
RATIO_GRACE_PIXELS = 1 << 24
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")

Reply = tuple[dict[str, Any], bytes]


def refusal(code: str, message: str) -> Reply:
    """Answer that refuses the image."""
    return {"code": code, "message": message}, b""


def kind_of(data: bytes) -> str:
    """Tell an image of ours from another image format and from no image, by content."""
    if data.startswith(OURS):
        return "ours"
    if data.startswith(OTHER_IMAGES) or data[128:132] == b"DICM" or data[4:8] == b"ftyp":
        return "other"
    return "none"


def decode(data: bytes, max_pixels: int, min_side: int, max_ratio: float) -> Reply:
    """Decode one PNG, JPEG or TIFF to 8-bit grey or RGB; size is checked before any pixel is decoded.

    A large image that would unpack to more than ``max_ratio`` times its file's bytes is one of nothing, or a bomb.
    """
    kind = kind_of(data)
    if kind == "none":
        return refusal("not_an_image", "the content is not an image; PNG, JPEG or TIFF is expected")
    if kind == "other":
        return refusal("unsupported", "this image format is not taken; convert it to PNG, JPEG or TIFF")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                return refusal("too_large", f"{width}x{height} pixels; at most {max_pixels} pixels are taken")
            if min(width, height) < min_side:
                return refusal("too_small", f"{width}x{height} pixels; each side needs at least {min_side}")
            raw = width * height * (0.125 if image.mode == "1" else len(image.getbands()))
            if width * height > RATIO_GRACE_PIXELS and raw > max_ratio * len(data):
                return refusal("ratio", f"{width}x{height} pixels in {len(data)} bytes: there can be no retina in it")
            image.load()
            pages = int(getattr(image, "n_frames", 1))
            upright = ImageOps.exif_transpose(image)
            return to_eight_bit(upright, ["multi_page"] if pages > 1 and image.format == "TIFF" else [])
    except UnidentifiedImageError:
        return refusal("truncated", "the file starts like an image but cannot be read: truncated or damaged")
    except DAMAGE as error:
        return refusal("truncated", f"the image is truncated or damaged ({str(error)[:120]})")
    except MemoryError:
        return refusal("too_large", "decoding needs more memory than one image is given")


def to_eight_bit(image: Image.Image, notes: list[str]) -> Reply:
    """Bring any mode to L or RGB. Transparent areas become black, so that they count as not seen."""
    mode = image.mode
    if mode in SIXTEEN_BIT:
        return from_sixteen_bit(image, notes)
    if mode in ("P", "PA"):
        notes.append("palette")
        image = image.convert("RGBA" if mode == "PA" or "transparency" in image.info else "RGB")
    elif mode in ("1", "YCbCr"):
        image = image.convert("L" if mode == "1" else "RGB")
    if image.mode in ("RGBA", "LA"):
        notes.append("alpha")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        flat = Image.alpha_composite(black, image.convert("RGBA"))
        image = flat.convert("L" if image.mode == "LA" else "RGB")
    if image.mode not in ("L", "RGB"):
        return refusal(
            "unsupported", f"colour mode {mode} is not taken; save the image as grey or RGB with 8 or 16 bits"
        )
    shape = [image.height, image.width] if image.mode == "L" else [image.height, image.width, 3]
    return {"shape": shape, "notes": notes}, image.tobytes()


def from_sixteen_bit(image: Image.Image, notes: list[str]) -> Reply:
    """Scale grey values to 8 bits by the smallest power of two that holds them: 12-bit cameras use 16-bit files."""
    import numpy as np  # here, since most images do without and its import is most of the start

    grey = np.asarray(image)
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 65535:
        return refusal("unsupported", "grey values outside 0..65535; save the image with 8 or 16 bits")
    bits = max(8, high.bit_length())
    notes.append("sixteen_bit")
    pixels = (grey.astype(np.uint32) >> (bits - 8)).astype(np.uint8)
    return {"shape": list(pixels.shape), "notes": notes}, pixels.tobytes()


def matches(pattern: str, names: list[str]) -> Reply:
    """Key of each name's eye or patient: the pattern's groups that matched, joined; the whole match without a group.

    It runs here because a regular expression of a stranger may take forever.
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return refusal("bad_pattern", f"not a regular expression: {error}")
    found: list[str | None] = []
    for name in names:
        match = compiled.search(name)
        found.append(None if match is None else "".join(g for g in match.groups() if g) or match.group(0) or None)
    return {"matches": found}, b""


def limit(memory_bytes: int) -> None:
    """Close the limits of this process. A system that does not know one of them (macOS: address space) goes without."""
    wanted = ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0))
    for what, value in wanted:
        try:
            resource.setrlimit(what, (value, value))
        except (ValueError, OSError) as error:
            print(f"limit {what} not set: {error}", file=sys.stderr)  # noqa: T201 - a script's standard error


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests until standard input ends."""
    while line := requests.readline():
        request = json.loads(line)
        data = requests.read(int(request["size"]))
        signal.alarm(int(request["seconds"]))
        if request["op"] == "matches":
            head, body = matches(request["pattern"], json.loads(data))
        else:
            head, body = decode(data, int(request["max_pixels"]), int(request["min_side"]), float(request["max_ratio"]))
        signal.alarm(0)
        head["size"] = len(body)
        replies.write(json.dumps(head).encode() + b"\n")
        replies.write(body)
        replies.flush()


def main() -> None:
    """Set the limits, say that we are ready, serve."""
    Image.MAX_IMAGE_PIXELS = None  # our own cap is checked before decoding
    limit(int(sys.argv[1]))
    sys.stdout.buffer.write(b"ready\n")
    sys.stdout.buffer.flush()
    serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
