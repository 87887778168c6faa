"""The process that :func:`benchmarks._harness.peak_memory` starts: prepare, forget the peak, run, report.

``python -m benchmarks._memory '["benchmarks.module:function", {"argument": 1}]'``
"""

from __future__ import annotations

import gc
import json
import resource
import sys
from pathlib import Path

from ._harness import build


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise KeyError(field)


def measure(spec: str, arguments: dict[str, object]) -> float:
    """Peak bytes of one run beyond what was resident before it."""
    run = build(spec, arguments)
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before, files = status("VmRSS"), status("RssFile")
        result = run()
        loaded = status("RssFile") - files  # program code that was touched for the first time
        peak = status("VmHWM") - before - loaded
    except OSError:  # no /proc: the mark of the whole process, which preparing may have set already
        scale = 1 if sys.platform == "darwin" else 1 << 10
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
        result = run()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale - before
    del result
    return max(0.0, float(peak))


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps({"peak_mb": measure(*given) / 2**20}))
