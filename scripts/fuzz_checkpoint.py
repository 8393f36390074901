"""Search for weights files that break our readers, guided by the code that they reach.

    make fuzz                                  # both formats, a few minutes
    python scripts/fuzz_checkpoint.py bin -max_total_time=600

It needs atheris (requirements-fuzz.txt), Google's fuzzer on libFuzzer, and takes libFuzzer's
options. "bin" mutates whole PyTorch files, "pickle" only the pickle inside a valid archive,
"safetensors" files in that format. Every file must be read, or refused with a CheckpointError;
tests/helpers/hostile.py says what else holds. A file that breaks this stops the search, and is
written to a crash-* file.
"""

import os
import sys
import tempfile
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
with atheris.instrument_imports(include=["mamba.checkpoint", "pickletools", "zipfile"]):
    from tests.helpers import bin_files
    from tests.helpers.hostile import outcome

GOLDEN = ROOT / "tests" / "golden" / "bin"
TARGETS = ("bin", "pickle", "safetensors")


def seeds(target, folder):
    """Write what the search starts from."""
    import zipfile

    for path in GOLDEN.glob("*.safetensors" if target == "safetensors" else "*.bin"):
        data = path.read_bytes()
        if target == "pickle":
            if path.stem == "legacy":
                continue
            with zipfile.ZipFile(path) as archive:
                (name,) = [n for n in archive.namelist() if n.endswith("data.pkl")]
                data = archive.read(name)
        (folder / path.name).write_bytes(data)


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"which target? One of {', '.join(TARGETS)}")
    target, options = sys.argv[1], sys.argv[2:]
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    corpus = folder / "corpus"
    corpus.mkdir()
    seeds(target, corpus)
    suffix = ".safetensors" if target == "safetensors" else ".bin"
    file = folder / f"{os.getpid()}{suffix}"
    storages = [bytes(range(24)), bytes(48), bytes(256)]

    def one(data):
        if target == "pickle":
            bin_files.write_archive(file, data, storages)
        else:
            file.write_bytes(data)
        outcome(file)

    fixed = ["-max_len=8192", "-rss_limit_mb=1024", "-timeout=10", f"-artifact_prefix={folder}/"]
    atheris.Setup([sys.argv[0], *fixed, *options, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
