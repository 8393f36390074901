"""Mamba, the selective state space model, in JAX: the module that the book is about.

model, params = Mamba.from_pretrained("state-spaces/mamba-370m")
logits = model.apply({"params": params}, tokens)
text = generate(model, key=key, params=params, tokenizer=tokenizer, prompt=..., ...)
"""

import contextlib
import os
import signal
import sys


@contextlib.contextmanager
def _leaving_on_ctrl_c(command):
    """In a command that has not begun, Ctrl-C ends the process at once, without a traceback.

    Importing JAX takes a second or two, and parts in C swallow a KeyboardInterrupt.
    """
    before = signal.getsignal(signal.SIGINT)
    if not command or before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


with _leaving_on_ctrl_c(command=sys.argv[:1] == ["-m"]):  # python -m mamba is being found
    from mamba.checkpoint.hub import EMBEDDED, load_tokenizer
    from mamba.cores import use_every_core
    from mamba.layers import RMSNorm
    from mamba.mamba1 import LayerState, MambaBlock, MambaConfig
    from mamba.mamba2 import Mamba2Block, Mamba2Config, Mamba2State
    from mamba.mamba3 import Mamba3Block, Mamba3Config
    from mamba.model import Mamba, ResidualBlock
    from mamba.scan import selective_scan
    from mamba.text.generate import Generated, generate, stream
    from mamba.text.prompt import read_prompt
    from mamba.text.state import TextState, load_state, save_state, state_bytes
    from mamba.trapezoid import TrapezoidState

__version__ = "0.2.0"

__all__ = [
    "EMBEDDED",
    "Generated",
    "LayerState",
    "Mamba",
    "Mamba2Block",
    "Mamba2Config",
    "Mamba2State",
    "Mamba3Block",
    "Mamba3Config",
    "MambaBlock",
    "MambaConfig",
    "RMSNorm",
    "ResidualBlock",
    "TextState",
    "TrapezoidState",
    "generate",
    "load_state",
    "load_tokenizer",
    "read_prompt",
    "save_state",
    "selective_scan",
    "state_bytes",
    "stream",
    "use_every_core",
]
