"""The hostile corpus: uploads made to break what unpacks and decodes them, each written by code and a few KB to MB.

Every maker returns the bytes of a file named ``*.zip``. :data:`UPLOADS` says of each which codes may name it. What
must happen to them is the business of the tests.
"""

from __future__ import annotations

import io
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tests.raw_pairs import draw_pair, encode, pair_files

Members = Iterable[tuple[str | zipfile.ZipInfo, bytes]]
MIB = 1 << 20
# What unpickling would do, if anybody did: make the folder `unpickled` where the process stands.
PICKLE = b"cos\nmkdir\n(S'unpickled'\ntR."


@dataclass(frozen=True)
class Upload:
    """One hostile file: how it is made, and the codes of which the answer must name at least one."""

    make: Callable[[], bytes]
    codes: frozenset[str]
    form: dict[str, str] = field(default_factory=dict)


def zipped(members: Members, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip of ``members``; names may repeat."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return out.getvalue()


def with_pairs(*members: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    """Two good pairs and ``members``: nothing but those is wrong with the archive."""
    return zipped([*pair_files(2, 64).items(), *members])


def pair_of(cf: bytes) -> bytes:
    """Two good pairs and a third whose CF is ``cf``."""
    return with_pairs(("cf/x.png", cf), ("fa/x.png", encode(draw_pair(9, 64)[1])))


# --- names --------------------------------------------------------------------------------------------------------


def special(kind: int) -> bytes:
    """A member that is a link, device or pipe by its Unix mode."""
    info = zipfile.ZipInfo("cf/link.png")
    info.external_attr = (kind | 0o777) << 16
    return with_pairs((info, b"/etc/passwd"))


def name_with_zero_byte() -> bytes:
    """``cf/x.png`` to who stops reading a name at a zero byte."""
    return with_pairs(("cf/x.png#.txt", b"x")).replace(b"cf/x.png#.txt", b"cf/x.png\0.txt")


def name_that_is_no_utf8() -> bytes:
    """A name that is said to be UTF-8 and is not."""
    return with_pairs(("cf/\u00e4.png", b"x")).replace("\u00e4".encode(), b"\xff\xfe")


def deep_name() -> bytes:
    """A name of 20,000 folders."""
    return zipped([("a/" * 20_000 + "x.png", b"x"), ("a/" * 20_000 + "y.png", b"y")])


def csv_of_paths(*rows: str) -> bytes:
    """A pair list that names files elsewhere."""
    return with_pairs(("pairs.csv", "\n".join(("cf_path,fa_path", *rows)).encode()))


# --- what zip headers promise -------------------------------------------------------------------------------------


def encrypted() -> bytes:
    """The bit for a password set in the local and the central header of the first member."""
    data = bytearray(with_pairs())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.find(signature) + flags] |= 1
    return bytes(data)


def lying_size(real: int, promised: int) -> bytes:
    """A member of ``real`` zeros whose headers promise another size."""
    made = with_pairs(("cf/bomb.png", bytes(real)), ("fa/bomb.png", b"x"))
    return made.replace(struct.pack("<I", real), struct.pack("<I", promised))


def zip64_size() -> bytes:
    """A member of a few bytes that promises 4 EiB in a ZIP64 field."""
    name, data = b"cf/x.png", b"x" * 100
    crc = zlib.crc32(data)
    local = struct.pack("<IHHHHHIIIHH", 0x04034B50, 45, 0, 0, 0, 0x21, crc, 100, 100, len(name), 0) + name + data
    extra = struct.pack("<HHQQ", 1, 16, 1 << 62, 1 << 62)
    central = struct.pack(
        "<IHHHHHHIIIHHHHHII",
        *(0x02014B50, 45, 45, 0, 0, 0, 0x21, crc, 0xFFFFFFFF, 0xFFFFFFFF, len(name), len(extra), 0, 0, 0, 0, 0),
    )
    directory = central + name + extra
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 1, 1, len(directory), len(local), 0)
    return local + directory + end


def zip64_directory() -> bytes:
    """An end record that promises 2^63 members in a directory of 1 EiB."""
    local = zipped([("cf/x.png", b"x")])
    at = len(local)
    record = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, 1 << 63, 1 << 63, 1 << 60, 0)
    locator = struct.pack("<IIQI", 0x07064B50, 0, at, 1)
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return local + record + locator + end


def truncated() -> bytes:
    """The first half of a good archive: no directory."""
    data = with_pairs()
    return data[: len(data) // 2]


def truncated_member() -> bytes:
    """A good directory over a member whose bytes were cut out and replaced."""
    data = bytearray(with_pairs())
    at = data.find(b"PK\x03\x04") + 60
    data[at : at + 400] = bytes(400)
    return bytes(data)


# --- bombs --------------------------------------------------------------------------------------------------------


def many_members(count: int) -> bytes:
    """``count`` empty members, written by hand since zipfile needs longer to write them than anybody to refuse them."""
    locals_, directory, offset = [], [], 0
    for number in range(count):
        name = b"cf/%07d.png" % number
        local = struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, 0, 0, 0, 0x21, 0, 0, 0, len(name), 0) + name
        directory.append(
            struct.pack(
                "<IHHHHHHIIIHHHHHII", *(0x02014B50, 20, 20, 0, 0, 0, 0x21, 0, 0, 0, len(name), 0, 0, 0, 0, 0, offset)
            )
            + name
        )
        locals_.append(local)
        offset += len(local)
    central = b"".join(directory)
    record = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, len(central), offset)
    locator = struct.pack("<IIQI", 0x07064B50, 0, offset + len(central), 1)
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, len(central), offset, 0)
    return b"".join(locals_) + central + record + locator + end


def same_bytes_many_names() -> bytes:
    """Thirty names for the bytes of one member (full overlap)."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in pair_files(2, 64).items():
            archive.writestr(name, data)
        first = archive.infolist()[0]
        for index in range(30):
            twin = zipfile.ZipInfo(f"cf/twin{index}.png")
            twin.header_offset, twin.CRC = first.header_offset, first.CRC
            twin.compress_size, twin.file_size = first.compress_size, first.file_size
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
    return out.getvalue()


def quoted_overlap(count: int = 100, kernel_bytes: int = MIB) -> bytes:
    """``count`` members that share one deflated kernel: each quotes the next one's header in a stored block.

    D. Fifield, "A better zip bomb" (WOOT 2019), section 3: the unpacked size grows with count times kernel.
    """
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = packer.compress(bytes(kernel_bytes)) + packer.flush()
    crc, size = zlib.crc32(bytes(kernel_bytes)), kernel_bytes
    entries: list[tuple[bytes, int, int, int, int]] = []
    tail = b""
    for number in reversed(range(count)):
        name = b"cf/%05d.png" % number
        if tail:  # quote what follows, up to the next member's data, and go on with those
            quoted = tail[: 30 + len(name)]
            body = struct.pack("<BHH", 0, len(quoted), len(quoted) ^ 0xFFFF) + tail
            crc, size = zlib.crc32(zlib.decompressobj(-15).decompress(body)), size + len(quoted)
        header = struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, 0, 8, 0, 0x21, crc, len(body), size, len(name), 0)
        tail = header + name + body
        entries.append((name, crc, len(body), size, len(tail)))
    directory = b"".join(
        struct.pack(
            "<IHHHHHHIIIHHHHHII",
            *(0x02014B50, 20, 20, 0, 8, 0, 0x21, crc, packed, size, len(name), 0, 0, 0, 0, 0, len(tail) - from_end),
        )
        + name
        for name, crc, packed, size, from_end in reversed(entries)
    )
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, count, count, len(directory), len(tail), 0)
    return tail + directory + end


def nested(levels: int = 4) -> bytes:
    """A zip in a zip in a zip ... of zeros, ten times on each level."""
    data = zipped([("zeros.png", bytes(MIB))])
    for _ in range(levels):
        data = zipped([(f"cf/{index}.zip", data) for index in range(10)])
    return data


# --- images -------------------------------------------------------------------------------------------------------


def png(width: int, height: int, pixels: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """An 8-bit RGB PNG by hand; ``pixels`` are the deflated rows, ``chunks`` stand in front of them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    middle = b"".join(chunk(kind, data) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + middle + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def zeros(count: int) -> bytes:
    """``count`` zeros, deflated, made without holding them."""
    packer = zlib.compressobj(9)
    out = [packer.compress(bytes(min(MIB, count - done))) for done in range(0, count, MIB)]
    return b"".join([*out, packer.flush()])


def flat_png(side: int) -> bytes:
    """A whole PNG of ``side`` x ``side`` black pixels: a thousandth of what it decodes to."""
    return png(side, side, zeros(side * (3 * side + 1)))


def jpeg(width: int, height: int) -> bytes:
    """A JPEG that promises a size."""
    data = bytearray(encode(draw_pair(1, 64)[0], "JPEG"))
    at = data.find(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def tiff(width: int, height: int) -> bytes:
    """A TIFF that promises a size."""
    data = bytearray(encode(draw_pair(1, 64)[0], "TIFF"))
    (directory,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, directory)
    for number in range(entries):
        at = directory + 2 + 12 * number
        tag = struct.unpack_from("<H", data, at)[0]
        if tag in (256, 257):
            struct.pack_into("<HI", data, at + 2, 4, 1)
            struct.pack_into("<I", data, at + 8, width if tag == 256 else height)
    return bytes(data)


def tiff_of_pages(pages: int) -> bytes:
    """A TIFF of a small image and ``pages`` empty directories in a row."""
    data = bytearray(encode(draw_pair(1, 64)[0], "TIFF"))
    (directory,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, directory)
    start = len(data)
    struct.pack_into("<I", data, directory + 2 + 12 * entries, start)
    one = struct.pack("<HHHII", 1, 256, 4, 1, 64)  # one entry: a width
    for page in range(pages):
        data += one + struct.pack("<I", start + (page + 1) * 18 if page + 1 < pages else 0)
    return bytes(data)


def text_bomb() -> bytes:
    """A PNG whose compressed text chunk unpacks to 64 MB."""
    return png(64, 64, zeros(64 * 193), (b"zTXt", b"Comment\0\0" + zeros(64 * MIB)))


def tar_named_zip() -> bytes:
    """Another kind of archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        info = tarfile.TarInfo("../../evil")
        archive.addfile(info, io.BytesIO(b""))
    return out.getvalue()


def _said(make: Callable[[], bytes], *codes: str, **form: str) -> Upload:
    return Upload(make, frozenset(codes), form)


HUGE = 60_000
UPLOADS: dict[str, Upload] = {
    **{
        f"name {name!r}": _said(lambda name=name: with_pairs((name, b"x")), "unsafe_name")  # type: ignore[misc]
        for name in (
            "../evil.png",
            "/etc/evil.png",
            "cf/../../evil.png",
            "cf\\..\\evil.png",
            "C:/evil.png",
            "cf//x.png",
        )
    },
    "name with a control character": _said(lambda: with_pairs(("cf/a\nb.png", b"x")), "unsafe_name"),
    "name with a zero byte": _said(name_with_zero_byte, "unsafe_name"),
    "name that is no UTF-8": _said(name_that_is_no_utf8, "unsafe_name", "not_an_archive", "not_an_image"),
    "name of 20,000 folders": _said(deep_name, "unsafe_name", "unknown_layout"),
    "symbolic link": _said(lambda: special(stat.S_IFLNK), "unsafe_name"),
    "character device": _said(lambda: special(stat.S_IFCHR), "unsafe_name"),
    "named pipe": _said(lambda: special(stat.S_IFIFO), "unsafe_name"),
    "the same name twice": _said(lambda: with_pairs(("cf/p0.png", b"x")), "duplicate_name"),
    "the same name in capitals": _said(lambda: with_pairs(("cf/P0.png", b"x")), "duplicate_name"),
    "CSV with paths elsewhere": _said(lambda: csv_of_paths("../../etc/passwd,/etc/shadow"), "unsafe_name"),
    "CSV of 250,000 rows": _said(lambda: csv_of_paths(*["a,b"] * 250_000), "bad_csv", "too_large"),
    "landmarks of 1 MB": _said(
        lambda: zipped(
            [(f"1/1_0{n}.png", encode(draw_pair(1, 64)[n - 1])) for n in (1, 2)]
            + [(f"1/1_0{n}.txt", b"10 20\n" * 170_000) for n in (1, 2)]
        ),
        *("bad_landmarks", "too_large"),
    ),
    "encrypted": _said(encrypted, "encrypted"),
    "bzip2 member": _said(lambda: zipped(pair_files(2, 64).items(), zipfile.ZIP_BZIP2), "unsupported"),
    "LZMA member": _said(lambda: zipped(pair_files(2, 64).items(), zipfile.ZIP_LZMA), "unsupported"),
    "64 MB of zeros": _said(lambda: with_pairs(("cf/b.png", bytes(64 * MIB)), ("fa/b.png", b"x")), "ratio"),
    "promises less than it unpacks to": _said(lambda: lying_size(64 * MIB, 1000), "truncated", "ratio"),
    "promises 3 GB": _said(lambda: lying_size(12345, 3 << 30), "too_large"),
    "promises 4 EiB (ZIP64)": _said(zip64_size, "too_large"),
    "directory of 1 EiB (ZIP64)": _said(zip64_directory, "not_an_archive", "too_many_members"),
    "one member under thirty names": _said(same_bytes_many_names, "ratio"),
    "quoted overlap, 100 x 1 MB": _said(quoted_overlap, "ratio"),
    "zips in zips": _said(nested, "not_an_image", "orphan_cf"),
    "a zip named png": _said(lambda: pair_of(nested(1)), "not_an_image"),
    "100,000 members": _said(lambda: many_members(100_000), "too_many_members"),
    "400,000 members": _said(lambda: many_members(400_000), "too_many_members"),
    "cut in half": _said(truncated, "not_an_archive"),
    "a member cut out": _said(truncated_member, "truncated"),
    "no bytes": _said(bytes, "empty_archive"),
    "tar named zip": _said(tar_named_zip, "not_an_archive"),
    "PNG of 60,000 x 60,000": _said(lambda: pair_of(png(HUGE, HUGE, zeros(1000))), "too_large"),
    "JPEG of 60,000 x 60,000": _said(lambda: pair_of(jpeg(HUGE, HUGE)), "too_large"),
    "TIFF of 60,000 x 60,000": _said(lambda: pair_of(tiff(HUGE, HUGE)), "too_large"),
    "black PNG of 7,900 x 7,900": _said(lambda: pair_of(flat_png(7_900)), "ratio"),
    "black PNG of 4,000 x 4,000": _said(lambda: pair_of(flat_png(4_000)), "black", "size_mismatch"),
    "PNG with 64 MB of text": _said(lambda: pair_of(text_bomb()), "truncated", "too_large", "ratio"),
    "TIFF of 200,000 pages": _said(lambda: pair_of(tiff_of_pages(200_000)), "truncated", "multi_page", "unsupported"),
    "pickle named png": _said(lambda: pair_of(PICKLE), "not_an_image"),
    "pickle named safetensors": _said(lambda: with_pairs(("cf/x.safetensors", PICKLE)), "orphan_cf", "not_an_image"),
    "regular expression that never ends": _said(
        lambda: zipped(
            [(f"{m}/{'a' * 40}{i}.png", encode(draw_pair(i, 64)[m == "fa"])) for i in (1, 2) for m in ("cf", "fa")]
        ),
        "bad_eye_pattern",
        eye_pattern="(a|a)*b",
    ),
    "regular expression of a patient that never ends": _said(
        lambda: zipped(
            [(f"{m}/{'a' * 40}{i}.png", encode(draw_pair(i, 64)[m == "fa"])) for i in (1, 2) for m in ("cf", "fa")]
        ),
        "bad_patient_pattern",
        patient_pattern="(a|a)*b",
    ),
    "regular expression of a thousand groups": _said(lambda: with_pairs(), "bad_eye_pattern", eye_pattern="(" * 150),
}
