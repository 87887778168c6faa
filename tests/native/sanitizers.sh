#!/usr/bin/env bash
# The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: those for the CPU compiled for that into
# build/sanitized, those for CUDA to run on the CPU by the tests themselves; then driven by the tests of values, sets,
# graphs and refusals. Any report ends the run with an error.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

PYTHON=${PYTHON:-python}
CXX=${CXX:-c++}
OUT=$PWD/build/sanitized
TESTS=$PWD/tests/native

TORCHZYGOTE_NATIVE=require TORCHZYGOTE_SANITIZE=1 FORCE_CUDA=0 \
    "$PYTHON" setup.py -q build --build-lib "$OUT" --build-temp "$PWD/build/sanitized-objects"

# The runtime must come first, and the C++ library with it, so that exceptions are seen.
LD_PRELOAD="$("$CXX" -print-file-name=libasan.so) $("$CXX" -print-file-name=libstdc++.so)"
cd "$OUT"
export LD_PRELOAD TORCHZYGOTE_NATIVE=require TORCHZYGOTE_SANITIZE=1 HYPOTHESIS_PROFILE=ci OMP_NUM_THREADS=2
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
"$PYTHON" -c "from torchzygote import native; print(native.info()['files'])"
"$PYTHON" -m pytest -q -p no:cacheprovider -p no:xdist \
    "$TESTS/test_native_values.py" "$TESTS/test_native_sets_and_graphs.py" "$TESTS/test_native_refusals.py" \
    "$TESTS/test_native_blocks_and_tangents.py" \
    --deselect "$TESTS/test_native_values.py::test_offsets_beyond_32_bits_of_bytes_are_reached"
