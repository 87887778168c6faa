"""Every case on two emulated devices, in a process of its own: ``python on_devices.py LIBRARY [CASE ...]``.

Prints a line for each: its name and what went wrong as JSON, ``""`` where nothing did.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import traceback
import warnings
from pathlib import Path

import fake_cuda

# Beyond this a thread waits for another one that waits for it.
LONG_ENOUGH = 120


def main(library: str, names: list[str]) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    faulthandler.dump_traceback_later(LONG_ENOUGH, exit=True)
    fake_cuda.switch_on(library)
    with fake_cuda.unavailable():  # the package would load its kernels, which need a device
        import torchzygote  # noqa: F401 (here, not where the cases import it)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
    # from one device to another, as docs/limitations.md says
    warnings.filterwarnings("ignore", ".*could not batch an operation: .*Cannot access storage of Batched")
    from all_cases import CASES

    for name in names or CASES:
        try:
            CASES[name]()
        except Exception:
            print(json.dumps([name, traceback.format_exc()]), flush=True)
        else:
            print(json.dumps([name, ""]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
