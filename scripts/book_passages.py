"""Copy 24 passages of held-out code for chapter 10: mamba_book/data/passages.json.

    python scripts/book_passages.py    # from the standard library of the running interpreter

The modules are among those that train_language_model.py held out. Each passage begins at a line and
has PASSAGE characters. It is copied so that the chapter's numbers do not change with the version of
Python.
"""

import hashlib
import json
import platform
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULES = ["calendar.py", "http/server.py", "pydoc.py", "random.py", "warnings.py", "zipimport.py"]
EACH = 4  # passages of a module
PASSAGE = 2700  # characters
LICENCE = (
    "Copyright © 2001-2023 Python Software Foundation; All Rights Reserved. PSF License Agreement: "
    "https://docs.python.org/3.11/license.html"
)


def main():
    library = Path(sysconfig.get_paths()["stdlib"])
    passages = []
    for name in MODULES:
        assert hashlib.sha256(name.encode()).digest()[0] % 20 == 0  # held out
        text = (library / name).read_text(encoding="utf-8")
        for k in range(EACH):
            start = text.index("\n", 600 + k * (len(text) - 5000) // (EACH - 1)) + 1
            passage = text[start : start + PASSAGE]
            passages.append({"module": name, "start": start, "text": passage})
    record = {"python": platform.python_version(), "licence": LICENCE, "passages": passages}
    path = ROOT / "mamba_book" / "data" / "passages.json"
    path.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{len(passages)} passages -> {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
