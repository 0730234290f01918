# Sourced by the commands beside it: makes the Python environment, sets `root`, `here` and `python`.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
venv=${XDG_CACHE_HOME:-$HOME/.cache}/pointwise/peers
python=$venv/bin/python

# The copy of the requirements says what is installed, and comes last.
if ! cmp -s "$here/requirements.txt" "$venv/requirements.txt"; then
    echo "installing $(grep -c == "$here/requirements.txt") pinned packages into $venv (6 GB with PyPI's torch)" >&2
    rm -rf "$venv"
    "${PYTHON:-python3.11}" -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements.txt" >&2
    cp "$here/requirements.txt" "$venv/"
fi
