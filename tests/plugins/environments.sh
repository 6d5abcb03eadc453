#!/usr/bin/env bash
# Makes an environment for each framework, and runs its tests there: tests/plugins/environments.sh [NAME...]
#
# An environment shares what `make install` installed, torch above all. In front of it come the framework, the versions that
# it pins and what it imports, without their dependencies: environments/NAME.txt. They lie under ENVIRONMENTS.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
ENVIRONMENTS=${ENVIRONMENTS:-/tmp/plot-align-plugins}
BASE=$(cd "${VENV:-.venv}" && pwd)/bin/python
packages_of() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

[ $# -gt 0 ] || set -- axolotl llamafactory swift unsloth
for name in "$@"; do
    folder=$ENVIRONMENTS/$name
    list=tests/plugins/environments/$name.txt
    if ! cmp -s "$list" "$folder/installed.txt"; then
        "$BASE" -m venv --clear "$folder"
        site=$(packages_of "$folder/bin/python")
        packages_of "$BASE" > "$site/base.pth"
        "$folder/bin/python" -m pip install --quiet --no-deps --ignore-requires-python -r "$list"
        # Its library wants a torch for GPUs. LLaMA-Factory needs the package to be there, and uses it for sounds alone.
        rm -f "$site"/torchaudio/lib/*.so
        cp "$list" "$folder/installed.txt"
    fi
    "$folder/bin/python" -m pip install --quiet --no-deps --no-build-isolation -e . # for its entry points
    OMP_NUM_THREADS=1 AXOLOTL_DO_NOT_TRACK=1 "$folder/bin/python" -m pytest -q -p no:cacheprovider \
        "tests/plugins/test_$name.py"
done
