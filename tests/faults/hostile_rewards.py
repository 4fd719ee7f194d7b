"""What a reward function must not be, each kind asked for by the response."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time


def score(prompt: str, response: str, row: dict) -> float:
    """The length of the response, or the fault that it names."""
    print("noise on stdout " * 100, flush=True)
    print("noise on stderr " * 100, flush=True, file=sys.stderr)
    if response == "hangs":
        while True:
            pass
    elif response == "hangs with a child":
        subprocess.Popen(["sleep", row["seconds"]])
        time.sleep(1000)
    elif response == "ends":
        os._exit(3)
    elif response == "exits":
        sys.exit(4)
    elif response == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif response == "leaks":
        kept = []
        while True:
            kept.append(bytearray(1 << 20))
    elif response == "takes 200 MB":
        return float(len(bytearray(200 << 20)) >> 20)
    return {"raises": lambda: 1 / 0, "none": lambda: None, "nan": lambda: float("nan"), "object": object}.get(
        response, lambda: len(response)
    )()


def stream(prompt: str, response: str, row: dict) -> float:
    """Write rubbish wherever a file is open: the channel to the parent is among them."""
    for handle in range(3, 64):
        try:
            os.write(handle, b"\xff" * 200)
        except OSError:
            continue
    return 1.0


NOT_A_FUNCTION = 3
