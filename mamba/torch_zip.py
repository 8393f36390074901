"""The zip archive in which PyTorch keeps its tensors -> where in the file each member lies.

PyTorch stores its members plain, so that a tensor's numbers can be read where they are. Only that
is accepted: nothing is decompressed, and no two members share a byte, so a small file cannot turn
into a large one. Names are mere keys; nothing is ever written to disk.

Source: PKWARE's APPNOTE.TXT (sections 4.3.7 and 4.3.12), through Python's ``zipfile``.
"""

import io
import struct
import zipfile

from mamba.tensors import MAX_METADATA, CheckpointError, quote

__all__ = ["zip_members"]


def zip_members(path):
    """List a zip archive's members -> {name: (offset, size)}, in bytes: plain, disjoint, inside.

    Raises CheckpointError for what is no such archive: compressed or encrypted members, a name that
    occurs twice or differs between a member and the archive's directory, members that overlap or
    reach beyond the file.
    """
    spans, members = [], {}
    with _ShortReads(path) as file:
        try:
            infos = zipfile.ZipFile(file).infolist()
        except Exception as error:  # zipfile meets broken input with exceptions of many kinds
            raise CheckpointError(
                f"{path}: not a PyTorch file (a zip archive): {str(error)[:300]}"
            ) from error
        total = file.seek(0, io.SEEK_END)
        for info in infos:
            name, size, start = info.filename, info.file_size, info.header_offset
            told = f"{path}: member {quote(name)}"
            plain = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
            if not plain or size != info.compress_size:
                raise CheckpointError(f"{told} is compressed or encrypted; PyTorch does neither")
            if name in members:
                raise CheckpointError(f"{told} occurs twice")
            # The directory gives the place of the member's own header. It ends with the lengths of
            # two fields of variable size, the name and another; the data come after those.
            header = b""
            if 0 <= start <= total - 30:
                file.seek(start)
                header = file.read(30)
            if header[:4] != b"PK\3\4":
                raise CheckpointError(f"{told} is not where the archive's directory says")
            name_length, extra_length = struct.unpack("<HH", header[26:])
            encoding = "utf-8" if info.flag_bits & 0x800 else "cp437"
            if file.read(name_length).decode(encoding, "replace") != info.orig_filename:
                raise CheckpointError(f"{told} has another name in its own header")
            offset = start + 30 + name_length + extra_length
            if offset + size > total:
                raise CheckpointError(f"{told} reaches beyond the end of the file: truncated?")
            spans.append((start, offset + size, name))
            members[name] = (offset, size)
    spans.sort()
    for (_, end, first), (start, _, second) in zip(spans, spans[1:]):
        if end > start:
            raise CheckpointError(f"{path}: members {quote(first)} and {quote(second)} overlap")
    return members


class _ShortReads(io.FileIO):
    """A file for ``zipfile`` that refuses to read a directory of absurd size in one piece."""

    def read(self, size=-1):
        if size > MAX_METADATA:
            raise CheckpointError(f"its directory has {size} bytes, more than any state dict's")
        return super().read(size)
