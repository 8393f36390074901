"""The zip archive in which PyTorch keeps its tensors -> where in the file each member lies.

PyTorch stores the members uncompressed, so a tensor's numbers can be read where they are. No other
archive is accepted: nothing is decompressed, and no two members share a byte, so that a small file
cannot turn into a large one. Names serve as keys only; nothing is ever written to disk.

Source: PKWARE's APPNOTE.TXT (sections 4.3.7 and 4.3.12), through Python's ``zipfile``.
"""

import io
import struct
import zipfile

from mamba.checkpoint.tensors import MAX_METADATA_BYTES, CheckpointError, quote

__all__ = ["zip_members"]


def zip_members(path):
    """List the members of a zip archive -> {name: (offset, size)}, in bytes.

    All members are uncompressed, lie inside the file and do not overlap.

    Raises:
        CheckpointError: the file is no zip archive, or a member is compressed, encrypted, overlaps
            another, reaches beyond the file, or has a name that occurs twice or differs from that
            in the archive's directory.
    """
    spans, members = [], {}
    with _ShortReads(path) as file:
        try:
            infos = zipfile.ZipFile(file).infolist()
        except Exception as error:  # zipfile raises exceptions of many kinds for broken input
            raise CheckpointError(
                f"{path}: not a PyTorch file (a zip archive): {str(error)[:300]}"
            ) from error
        total = file.seek(0, io.SEEK_END)
        for info in infos:
            name, size, start = info.filename, info.file_size, info.header_offset
            member = f"{path}: member {quote(name)}"
            stored = info.compress_type == zipfile.ZIP_STORED and size == info.compress_size
            encrypted = info.flag_bits & 1
            if not stored or encrypted:
                raise CheckpointError(f"{member} is compressed or encrypted; PyTorch does neither")
            if name in members:
                raise CheckpointError(f"{member} occurs twice")
            # The directory says where the member's own header is. The header ends with the lengths
            # of two fields of variable size, the name and another. The data follow those.
            header = b""
            if 0 <= start <= total - 30:
                file.seek(start)
                header = file.read(30)
            if header[:4] != b"PK\3\4":
                raise CheckpointError(f"{member} is not where the archive's directory says")
            name_length, extra_length = struct.unpack("<HH", header[26:])
            encoding = "utf-8" if info.flag_bits & 0x800 else "cp437"
            if file.read(name_length).decode(encoding, "replace") != info.orig_filename:
                raise CheckpointError(f"{member} has another name in its own header")
            offset = start + 30 + name_length + extra_length
            if offset + size > total:
                raise CheckpointError(f"{member} reaches beyond the end of the file: truncated?")
            spans.append((start, offset + size, name))
            members[name] = (offset, size)
    spans.sort()
    for (_, end, first), (start, _, second) in zip(spans, spans[1:]):
        if end > start:
            raise CheckpointError(f"{path}: members {quote(first)} and {quote(second)} overlap")
    return members


class _ShortReads(io.FileIO):
    """A file for ``zipfile`` that refuses to read a directory of absurd size into memory."""

    def read(self, size=-1):
        if size > MAX_METADATA_BYTES:
            raise CheckpointError(f"its directory has {size} bytes, more than any state dict's")
        return super().read(size)
