#!/usr/bin/env bash
# scripts/chromium.sh: the browser that the report's tests open pages in, from the distribution, unless it is there.
#
# Debian and Ubuntu, as root or with a passwordless sudo: about 300 MB. Elsewhere it says what to install.
set -euo pipefail

if command -v chromium >/dev/null; then
    exit 0
fi
help="install Chromium so that 'chromium' is on PATH (Debian: apt-get install chromium fonts-dejavu-core; Fedora: dnf
install chromium): the tests of the report open pages in it. Nothing else needs it"
if ! command -v apt-get >/dev/null; then
    echo "no chromium, and no apt-get to install it with; $help" >&2
    exit 1
fi
as_root=()
if [ "$(id -u)" -ne 0 ]; then
    if ! sudo -n true 2>/dev/null; then
        echo "no chromium, and no right to install it; $help" >&2
        exit 1
    fi
    as_root=(sudo -n)
fi
if ! { "${as_root[@]}" apt-get update -qq &&
    DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; }; then
    echo "apt-get could not install chromium (see above); $help" >&2
    exit 1
fi
