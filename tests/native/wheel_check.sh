#!/usr/bin/env bash
# Builds a wheel here, installs it beside another torch in a fresh environment and runs the native tests there; then
# builds another one against that torch, whose headers may lack what those here have.
#
#     tests/native/wheel_check.sh [torch version, the newest by default]
#
# PYTHON: what builds, with torch and setuptools installed. OTHER_PYTHON: the interpreter of the fresh environment.
# KEEP=1 leaves the environment in place (several gigabytes).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

PYTHON=${PYTHON:-python}
OTHER_PYTHON=${OTHER_PYTHON:-$PYTHON}
WANTED=torch${1:+==$1}
WHEELS=build/wheels
ENVIRONMENT=$PWD/build/wheel-check
PIP=(-m pip --quiet --disable-pip-version-check)

rm -rf "$WHEELS" "$ENVIRONMENT" build/lib* build/bdist*  # a wheel takes whatever an earlier build left
TORCHZYGOTE_NATIVE=require "$PYTHON" "${PIP[@]}" wheel --no-build-isolation --no-deps -w "$WHEELS" .
ls "$WHEELS"
"$PYTHON" -c "import torch; print('built with torch', torch.__version__)"

"$OTHER_PYTHON" -m venv "$ENVIRONMENT"
trap '[ "${KEEP:-0}" = 1 ] || rm -rf "$ENVIRONMENT"' EXIT
"$ENVIRONMENT/bin/python" "${PIP[@]}" install "$WANTED" "$(echo "$WHEELS"/*.whl)" pytest hypothesis

# Only the tests are copied: the package comes from the wheel.
cp -r tests/native "$ENVIRONMENT/native-tests"
cd "$ENVIRONMENT"
export TORCHZYGOTE_NATIVE=require OMP_NUM_THREADS=1
bin/python -c "
import sys, torch, torchzygote
from torchzygote import native
print('runs with torch', torch.__version__, 'python', sys.version.split()[0])
print(native.info())
"
bin/python -m pytest -q -p no:cacheprovider -c /dev/null --rootdir . --confcutdir native-tests native-tests -W error \
    --hypothesis-profile=ci \
    -W 'ignore:`torch.jit.script` is deprecated:DeprecationWarning' \
    -W 'ignore:`torch.jit.script` is deprecated:FutureWarning' \
    --deselect native-tests/test_native_loading.py::test_every_operator_has_its_files_and_its_kernels \
    --deselect native-tests/test_native_loading.py::test_the_sources_use_no_newer_headers_than_those_of_the_oldest_torch

cd "$OLDPWD"
"$ENVIRONMENT/bin/python" "${PIP[@]}" install "setuptools>=77" wheel ninja
rm -rf build/lib* build/bdist*
TORCHZYGOTE_NATIVE=require "$ENVIRONMENT/bin/python" "${PIP[@]}" wheel --no-build-isolation --no-deps -w "$WHEELS/other" .
echo "it can be built with that torch, too"
