"""Programs for the pickle machine, and changes to zip files of torch and NumPy."""

from __future__ import annotations

import io
import random
import struct
import zipfile
from collections.abc import Callable

from detector.weights.pickle_names import ALLOWED_NAMES
from tests.fuzz.mutations import ODD_TEXTS, mutate_bytes

FORBIDDEN = ("os.system", "builtins.eval", "torch.load", "numpy.load", "torch.nn.modules.linear.Linear", "x.y", "a\nb")


def _text(rng: random.Random) -> bytes:
    text = rng.choice([*ODD_TEXTS, "storage", "cpu", "latin1", "f4", "<", "0", "state_dict"])[:300]
    data = text.encode("utf-8", "surrogatepass")
    return rng.choice([b"X" + struct.pack("<I", len(data)) + data, b"\x8c" + bytes([len(data[:255])]) + data[:255]])


def _integer(rng: random.Random) -> bytes:
    value = rng.choice([0, 1, 2, 3, 7, 255, 2**31 - 1, -1, 2**40, 2**62, 2**200, 6 * 10**9])
    data = value.to_bytes(30, "little", signed=True)
    small = b"J" + struct.pack("<i", value) if abs(value) < 2**31 else b"\x8a\x1e" + data
    return rng.choice([small, b"I%d\n" % value, b"L%dL\n" % value, b"\x8a\x1e" + data])


def _global(rng: random.Random) -> bytes:
    name = rng.choice(sorted(ALLOWED_NAMES) * 2 + list(FORBIDDEN))
    module, _, attribute = name.rpartition(".")
    if rng.random() < 0.2:
        short = [b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, attribute)]
        return short[0] + short[1] + b"\x93"
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def _tensor(rng: random.Random) -> bytes:
    """A tensor of a storage, with sizes that may not fit."""
    numbers = [rng.choice([0, 1, 2, 3, 4, 1000, -1, 2**33]) for _ in range(4)]
    kind = rng.choice(["FloatStorage", "HalfStorage", "LongStorage", "ByteStorage", "QInt8Storage"])
    reference = b"(X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    reference += b"J" + struct.pack("<i", rng.choice([12, 12, 12, 3, -1])) + b"tQ"
    sizes = [b"\x8a\x08" + number.to_bytes(8, "little", signed=True) for number in numbers]
    shape = b"(" + sizes[1] + sizes[2] + b"t(" + sizes[2] + b"K\x01t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + sizes[0] + shape + b"\x89}tR"


def _array(rng: random.Random) -> bytes:
    size = rng.choice([b"K\x03", b"K\x00", b"\x8a\x06\x00\x00\x00\x00\x00\x7f", b"J\xff\xff\xff\xff"])
    code = rng.choice([b"f4", b"i8", b"O8", b"S4", b"V9", b"f2"])
    dtype = b"cnumpy\ndtype\n(X\x02\x00\x00\x00" + code + b"\x89\x88tR(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xff"
    dtype += b"J\xff\xff\xff\xffK\x00tb"
    start = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
    return start + b"(K\x01" + size + b"\x85" + dtype + b"\x89C\x0c" + bytes(12) + b"tb"


def _tower(rng: random.Random) -> bytes:
    """A container whose repr, hash or comparison has no end."""
    levels, step = rng.choice([5, 60, 3000]), rng.choice([b"q\x05h\x05\x86", b"2\x86", b"\x85", b"q\x05]h\x05ah\x05a"])
    return rng.choice([b")", b"]", b"}", b"K\x01"]) + step * levels


def _bomb(rng: random.Random) -> bytes:
    return rng.choice([
        b"\x8e" + struct.pack("<Q", 2**40) + b"x", b"\x96" + struct.pack("<Q", 2**33), b"r\xff\xff\xff\x7f",
        b"(" * 3000, b"N" * 50_000 + b"t", b"]" * 2000, b"p99999999999\n", b"}" * 20_000, b"\x8f" * 20_000,
        b"c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x7f\x01\x85R",
    ])  # fmt: skip


_PARTS: tuple[Callable[[random.Random], bytes], ...] = (
    _text, _text, _integer, _integer, _global, _tensor, _tensor, _array, _tower, _bomb,
    lambda rng: rng.choice([b"N", b"\x88", b"\x89", b")", b"]", b"}", b"\x8f", b"(", b"G" + bytes(8), b"C\x03abc"]),
    lambda rng: rng.choice([b"0", b"1", b"2", b"a", b"e", b"s", b"u", b"t", b"l", b"d", b"\x85", b"\x86", b"\x87"]),
    lambda rng: rng.choice([b"R", b"b", b"\x81", b"\x92", b"o", b"Q", b"\x90", b"\x91", b"\x82\x01", b"ios\nx\n"]),
    lambda rng: rng.choice([b"q", b"h"]) + bytes([rng.randrange(4)]),
)  # fmt: skip


def program(rng: random.Random) -> bytes:
    """A pickle of random operations; half of them end in a dict of named values."""
    parts = b"".join(rng.choice(_PARTS)(rng) for _ in range(rng.choice([1, 3, 10, 60])))
    if rng.random() < 0.5:
        values = [rng.choice(_PARTS[:9])(rng) for _ in range(rng.choice([1, 3]))]
        names = [b"X\x01\x00\x00\x00" + bytes([97 + k]) for k in range(len(values))]
        parts = b"}(" + b"".join(name + value for name, value in zip(names, values, strict=True)) + b"u"
    return b"\x80\x02" + parts + b"."


def records_of(data: bytes) -> list[tuple[str, bytes]]:
    """The records of a zip file."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def archive_of(records: list[tuple[str, bytes]], *, method: int = zipfile.ZIP_STORED, comment: bytes = b"") -> bytes:
    """A zip file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method, compresslevel=1) as archive:
        for name, data in records:
            archive.writestr(name, data)
        archive.comment = comment
    return file.getvalue()


def changed_archive(rng: random.Random, data: bytes) -> bytes:
    """Change the records of a zip file, which keeps correct checksums; or the file itself."""
    records = records_of(data)
    k = rng.randrange(len(records))
    name, content = records[k]
    kind = rng.randrange(9)
    if kind == 0:
        del records[k]
    elif kind == 1:
        records[k] = (rng.choice([name + "x", "x/" + name, name.upper(), "../" + name, "\x1b[2J"]), content)
    elif kind == 2:
        records.append((name, content))
    elif kind == 3:
        records[k] = (name, mutate_bytes(rng, content))
    elif kind == 4:
        records[k] = (name, rng.choice([b"", bytes(10), content * 2, content[: len(content) // 2]]))
    elif kind in (5, 6):
        pickled = [i for i, (other, _) in enumerate(records) if other.endswith("data.pkl")]
        for i in pickled:
            changed = program(rng) if rng.random() < 0.5 else mutate_bytes(rng, records[i][1])
            records[i] = (records[i][0], changed)
    elif kind == 7:
        records.append(
            (rng.choice(["a/data.pkl", "archive/byteorder", "archive/data/999"]), rng.choice([b"big", b"N."]))
        )
    method = rng.choice([zipfile.ZIP_STORED] * 3 + [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    comment = rng.choice([b""] * 9 + [b"PK\x05\x06" + bytes(18)])
    written = archive_of(records, method=method, comment=comment)
    return mutate_bytes(rng, written) if rng.random() < 0.2 else written
