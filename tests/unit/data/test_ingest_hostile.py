"""Bad and hostile input: every problem is named, per file, at once; nothing is taken in and nothing breaks out."""

from __future__ import annotations

import json
import stat
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cffa_core.data.decoding import Decoded, Decoder, Refused
from cffa_core.data.ingest import Checked, Limits, check, write
from cffa_core.errors import InvalidDataset
from tests.raw_pairs import draw_pair, encode, pair_files, write_folder, write_zip


def codes(checked: Checked) -> set[tuple[str, str]]:
    return {(problem.pointer, problem.code) for problem in checked.problems}


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises a size and holds a few compressed zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    good = pair_files(3)
    cf, fa = draw_pair(5)
    bad = {
        "cf/alone.png": encode(cf),
        "fa/single.png": encode(fa),
        "cf/size.png": encode(cf),
        "fa/size.png": encode(fa[:80]),
        "cf/text.png": b"this is no image\n",
        "fa/text.png": encode(fa),
        "cf/dot.png": encode(cf[:1, :1]),
        "fa/dot.png": encode(fa[:1, :1]),
        "cf/cut.png": encode(cf)[:900],
        "fa/cut.png": encode(fa, "JPEG")[:700],
        "cf/gif.png": encode(Image.fromarray(cf), "GIF"),
        "fa/gif.png": encode(fa),
        "cf/twice.png": encode(cf),
        "cf/twice.jpg": encode(cf, "JPEG"),
        "fa/twice.png": encode(fa),
        "cf/black.png": encode(cf * 0),
        "fa/black.png": encode(fa),
        "cf/empty.png": b"",
        "fa/empty.png": encode(fa),
    }
    checked = check(write_zip(tmp_path / "bad.zip", {**good, **bad}))
    assert codes(checked) == {
        ("cf/alone.png", "orphan_cf"),
        ("fa/single.png", "orphan_fa"),
        ("fa/size.png", "size_mismatch"),
        ("cf/text.png", "not_an_image"),
        ("cf/dot.png", "too_small"),
        ("fa/dot.png", "too_small"),
        ("cf/cut.png", "truncated"),
        ("fa/cut.png", "truncated"),
        ("cf/gif.png", "unsupported"),
        ("cf/twice.png", "duplicate_name"),
        ("cf/twice.jpg", "duplicate_name"),
        ("cf/black.png", "black"),
        ("cf/empty.png", "not_an_image"),
    }
    assert all(problem.message for problem in checked.problems)
    assert not checked.ok
    with pytest.raises(InvalidDataset) as raised:
        write(checked, tmp_path / "out")
    assert raised.value.problems == checked.problems
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    ["../evil.png", "/etc/evil.png", "cf/../../evil.png", "cf\\evil.png", "C:/evil.png", "cf//x.png", "cf/a\nb.png"],
)
def test_names_that_would_leave_the_folder(tmp_path: Path, name: str) -> None:
    checked = check(write_zip(tmp_path / "bad.zip", [*pair_files(2).items(), (name, b"x")]))
    assert [problem.code for problem in checked.problems] == ["unsafe_name"]
    assert "\n" not in checked.problems[0].pointer
    assert not (tmp_path.parent / "evil.png").exists()


def test_a_name_cut_by_a_zero_byte(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "bad.zip", [*pair_files(2).items(), ("cf/x.png#.txt", b"x")])
    path.write_bytes(path.read_bytes().replace(b"cf/x.png#.txt", b"cf/x.png\0.txt"))
    assert [problem.code for problem in check(path).problems] == ["unsafe_name"]


def test_links_are_refused_in_zips_and_where_they_leave_a_folder(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("cf/link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    checked = check(write_zip(tmp_path / "bad.zip", [*pair_files(2).items(), (link, b"/etc/passwd")]))
    assert codes(checked) == {("cf/link.png", "unsafe_name")}
    folder = write_folder(tmp_path / "set", pair_files(2))
    outside = tmp_path / "outside.png"
    outside.write_bytes(b"secret")
    (folder / "cf" / "p9.png").symlink_to(outside)
    (folder / "fa" / "p9.png").symlink_to(folder / "fa" / "p1.png")
    assert codes(check(folder)) == {("cf/p9.png", "unsafe_name"), ("fa/p9.png", "orphan_fa")}


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_the_same_name_twice(tmp_path: Path) -> None:
    files = list(pair_files(3).items())
    checked = check(write_zip(tmp_path / "bad.zip", [*files, files[0], ("fa/P1.png", b"x")]))
    assert {("cf/p0.png", "duplicate_name"), ("fa/p1.png", "duplicate_name"), ("fa/P1.png", "duplicate_name")} <= codes(
        checked
    )


def test_encrypted_members(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "bad.zip", pair_files(2))
    data = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flag in the local and central headers
        at = data.find(signature)
        data[at + flags] |= 1
    path.write_bytes(bytes(data))
    assert ("cf/p0.png", "encrypted") in codes(check(path))


@pytest.mark.parametrize("count", [21, 8000], ids=["counted", "directory too large to read"])
def test_too_many_members(tmp_path: Path, count: int) -> None:
    path = write_zip(tmp_path / "bad.zip", {f"cf/{index:0250}.png": b"" for index in range(count)})
    assert codes(check(path, Limits(max_members=20))) == {("", "too_many_members"), ("", "too_few_pairs")}


def test_too_many_files_in_a_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", {f"cf/{index}.png": b"" for index in range(21)})
    assert ("", "too_many_members") in codes(check(folder, Limits(max_members=20)))


def test_a_member_that_unpacks_to_too_much(tmp_path: Path) -> None:
    bomb = {"cf/bomb.png": bytes(8 << 20), "fa/bomb.png": encode(draw_pair(0)[1])}
    path = write_zip(tmp_path / "bad.zip", {**pair_files(2), **bomb})
    assert codes(check(path)) == {("cf/bomb.png", "ratio")}
    assert codes(check(path, Limits(max_member_bytes=1 << 20))) == {
        ("cf/bomb.png", "too_large"),
        ("fa/bomb.png", "orphan_fa"),
    }
    assert ("", "too_large") in codes(check(path, Limits(max_total_bytes=1 << 20)))


def test_a_member_whose_header_lies_about_its_size(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "bad.zip", {**pair_files(2), "cf/bomb.png": bytes(8 << 20), "fa/bomb.png": b"x"})
    real, claimed = struct.pack("<I", 8 << 20), struct.pack("<I", 1000)
    path.write_bytes(path.read_bytes().replace(real, claimed))
    found = codes(check(path))
    assert ("cf/bomb.png", "truncated") in found or ("cf/bomb.png", "ratio") in found


def test_overlapping_members(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        for name, data in pair_files(2).items():
            archive.writestr(name, data)
        first = archive.infolist()[0]
        for index in range(30):  # thirty names for the bytes of one member
            twin = zipfile.ZipInfo(f"cf/twin{index}.png")
            twin.header_offset, twin.CRC = first.header_offset, first.CRC
            twin.compress_size, twin.file_size = first.compress_size, first.file_size
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
    assert ("", "ratio") in codes(check(tmp_path / "bad.zip"))


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"", "empty_archive"), (b"hello", "not_an_archive"), (b"PK\x05\x06" + bytes(18), "empty_archive")],
)
def test_archives_that_are_none(tmp_path: Path, content: bytes, code: str) -> None:
    path = tmp_path / "bad.zip"
    path.write_bytes(content)
    assert codes(check(path)) == {("", code), ("", "too_few_pairs")}


def test_an_empty_folder_and_one_without_pairs(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert ("", "empty_archive") in codes(check(tmp_path / "empty"))
    folder = write_folder(tmp_path / "other", {"a.png": b"x", "b/c.png": b"y"})
    assert codes(check(folder)) == {("", "unknown_layout"), ("", "too_few_pairs")}


def test_one_pair_is_enough_and_none_is_not(tmp_path: Path) -> None:
    checked = check(write_folder(tmp_path / "set", pair_files(1)))
    assert checked.ok and len(write(checked, tmp_path / "one")["pairs"]) == 1
    files = pair_files(1)
    files["fa/p0.png"] = b"broken"
    broken = check(write_folder(tmp_path / "broken", files))
    assert ("", "too_few_pairs") in codes(broken)
    with pytest.raises(InvalidDataset):
        write(broken, tmp_path / "none")


def test_a_cut_zip_and_flipped_bits_are_problems_not_crashes(tmp_path: Path) -> None:
    data = write_zip(tmp_path / "good.zip", pair_files(2)).read_bytes()
    random = np.random.default_rng(0)
    for round_ in range(12):
        broken = bytearray(data if round_ % 5 else data[: int(random.integers(len(data)))])
        for at in random.integers(len(broken), size=20):
            broken[at] ^= 1 << int(random.integers(8))
        path = tmp_path / "broken.zip"
        path.write_bytes(bytes(broken))
        assert not check(path).ok


def test_large_text_is_not_parsed(tmp_path: Path) -> None:
    files = {
        **pair_files(2),
        "pairs.csv": b"cf_path,fa_path\n" + b"\n" * 5000,
        "eyes.csv": b"name,eye\n" + b"\n" * 5000,
    }
    found = codes(check(write_folder(tmp_path / "set", files), Limits(max_text_bytes=1000)))
    assert {("eyes.csv", "too_large"), ("pairs.csv", "too_large")} <= found


def test_lists_of_too_many_rows_are_one_problem(tmp_path: Path) -> None:
    files = {**pair_files(2), "pairs.csv": b"cf_path,fa_path\n" + b"a,b\n" * 20_002}
    found = codes(check(write_folder(tmp_path / "set", files)))
    assert found == {("pairs.csv", "bad_csv"), ("", "too_few_pairs")}


def test_pixels_are_capped_over_all_images(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", pair_files(3))
    found = codes(check(folder, Limits(max_total_pixels=3 * 96 * 96)))
    assert found == {("cf/p2.png", "too_large"), ("fa/p2.png", "too_large")}


class TestDecoder:
    """The limited child process."""

    def test_a_size_beyond_the_cap_is_refused_before_decoding(self) -> None:
        with Decoder(Limits(max_pixels=10_000)) as decoder:
            answer = decoder.decode(encode(np.zeros((101, 100), np.uint8)))
            assert isinstance(answer, Refused)
            assert answer.code == "too_large"
            huge = decoder.decode(png_header(60_000, 60_000))
            assert isinstance(huge, Refused)
            assert huge.code == "too_large"

    def test_a_large_image_of_nothing_is_refused_before_decoding(self) -> None:
        with Decoder(Limits()) as decoder:
            answer = decoder.decode(png_header(5000, 5000))
            assert isinstance(answer, Refused)
            assert answer.code == "ratio"
            small = decoder.decode(png_header(4000, 4000))  # below the grace: decoded, and found to be cut short
            assert isinstance(small, Refused)
            assert small.code == "truncated"

    def test_a_pattern_that_does_not_end_is_ended(self) -> None:
        with Decoder(Limits()) as decoder:
            began = time.monotonic()
            answer = decoder.matches("(a|a)*b", ["a" * 40])
            assert isinstance(answer, Refused)
            assert answer.code == "bad_pattern"
            assert time.monotonic() - began < 20
            assert decoder.matches("(a+)", ["aab"]) == ["aa"]

    def test_a_child_out_of_memory_refuses_one_file_and_goes_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cffa_core.data.decoding.BASE_MEMORY", 0)
        monkeypatch.setattr("cffa_core.data.decoding.BYTES_PER_PIXEL", 0)
        limits = Limits(max_member_bytes=150 << 20, max_pixels=10**9, max_ratio=1e9)
        with Decoder(limits) as decoder:
            bomb = decoder.decode(png_header(12_000, 12_000))
            assert isinstance(bomb, Refused)
            assert bomb.code in ("too_large", "undecodable")
            assert isinstance(decoder.decode(encode(draw_pair(0)[0])), Decoded)

    def test_a_child_that_dies_is_replaced(self) -> None:
        with Decoder(Limits()) as decoder:
            good = encode(draw_pair(0)[0])
            assert isinstance(decoder.decode(good), Decoded)
            assert decoder._child is not None
            decoder._child.kill()
            decoder._child.wait()
            answer = decoder.decode(good)
            assert isinstance(answer, Refused)
            assert answer.code == "undecodable"
            assert isinstance(decoder.decode(good), Decoded)

    def test_the_child_sees_no_secret(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CFFA_BLOB_SECRET", "do not tell")
        with Decoder(Limits()) as decoder:
            decoder.decode(b"x")
            assert decoder._child is not None
            assert b"do not tell" not in Path(f"/proc/{decoder._child.pid}/environ").read_bytes()

    def test_many_broken_images(self) -> None:
        """Every answer is pixels or a refusal, whatever bytes are flipped."""
        random = np.random.default_rng(1)
        cf = draw_pair(3)[0]
        originals = [encode(cf), encode(cf, "JPEG"), encode(cf, "TIFF"), encode(cf, "TIFF", compression="tiff_lzw")]
        with Decoder(Limits(decode_seconds=5, max_pixels=1_000_000)) as decoder:
            for round_ in range(80):
                broken = bytearray(originals[round_ % len(originals)])
                for at in random.integers(8, min(len(broken), 4000), size=6):
                    broken[at] = int(random.integers(256))
                answer = decoder.decode(bytes(broken))
                assert isinstance(answer, Decoded | Refused)

    def test_modes(self) -> None:
        """Every way to store pixels that is taken gives the same grey or colour, with a note where it was changed."""
        cf, fa = draw_pair(1)
        alpha = Image.fromarray(cf).convert("RGBA")
        alpha.putalpha(Image.fromarray(np.where(np.arange(96) < 48, 0, 255).astype(np.uint8)[None].repeat(96, 0)))
        cases = [
            (encode(cf), cf, ()),
            (encode(fa), fa, ()),
            (encode(Image.fromarray(fa).convert("P")), np.repeat(fa[..., None], 3, 2), ("palette",)),
            (encode(alpha), np.where((np.arange(96) < 48)[None, :, None], 0, cf), ("alpha",)),
            (encode((fa.astype(np.uint16) << 8) | 0x80), fa, ("sixteen_bit",)),
            (encode((fa.astype(np.uint16) << 4) | 0x8, "TIFF"), fa, ("sixteen_bit",)),
            (encode(Image.fromarray(fa).convert("1").convert("L"), "PNG"), None, ()),
        ]
        with Decoder(Limits()) as decoder:
            for data, expected, notes in cases:
                answer = decoder.decode(data)
                assert isinstance(answer, Decoded)
                assert answer.notes == notes
                if expected is not None:
                    np.testing.assert_array_equal(answer.pixels, expected)
            cmyk = decoder.decode(encode(Image.fromarray(cf).convert("CMYK"), "JPEG"))
            assert isinstance(cmyk, Refused)
            assert cmyk.code == "unsupported"

    @pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG"])
    def test_exif_orientation_is_honoured(self, kind: str) -> None:
        pixels = np.full((64, 96, 3), 200, np.uint8)
        pixels[:16, :16] = 20
        exif = Image.Exif()
        exif[0x0112] = 6  # rotate by a quarter turn to the right to see it upright
        with Decoder(Limits()) as decoder:
            answer = decoder.decode(encode(pixels, kind, exif=exif))
        assert isinstance(answer, Decoded)
        assert answer.pixels.shape == (96, 64, 3)
        assert answer.pixels[4, 60, 0] < 60
        assert answer.pixels[4, 4, 0] > 150


def test_unusual_images_are_taken_with_a_warning(tmp_path: Path) -> None:
    cf, fa = draw_pair(0)
    files = {
        **pair_files(2),
        "cf/grey.png": encode(cf[..., 1]),
        "fa/grey.png": encode(np.stack([fa, fa // 2, fa], axis=-1)),
        "cf/same.png": encode(np.repeat(cf[..., :1], 3, axis=2)),
        "fa/same.png": encode(np.repeat(fa[..., None], 3, axis=2)),
    }
    checked = check(write_folder(tmp_path / "set", files))
    assert checked.ok
    assert {(w.pointer, w.code) for w in checked.warnings} == {
        ("cf/grey.png", "grey_cf"),
        ("fa/grey.png", "colour_fa"),
        ("cf/same.png", "grey_cf"),
    }
    images = {pair.name: found for pair, found in checked.decoded()}
    luminance = np.round(0.299 * fa + 0.587 * (fa // 2) + 0.114 * fa)
    assert np.abs(images["grey"].fa - luminance).max() <= 1
    np.testing.assert_array_equal(images["same"].fa, fa)


def test_the_check_imports_no_torch() -> None:
    code = "import sys, cffa_core.data.ingest; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_report_is_json(tmp_path: Path) -> None:
    report = check(write_zip(tmp_path / "bad.zip", {**pair_files(2), "cf/x.png": b"x"})).report()
    assert json.loads(json.dumps(report)) == report
    assert report["counts"] == {"pairs": 2, "eyes": 2, "problems": 1, "warnings": 0}
    assert report["problems"][0]["pointer"] == "cf/x.png"
