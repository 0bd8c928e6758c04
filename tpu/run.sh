#!/usr/bin/env bash
# Start one `sdjax run` on every worker of a TPU slice:
#   tpu/run.sh [--dry-run] NAME ZONE CONFIG --out DIR [more options of `sdjax run`]
# NAME is the TPU VM (or the node of a queued resource). CONFIG is a path in this checkout or on the
# workers. DIR must be on storage shared by all workers. PROJECT defaults to gcloud's project.
set -euo pipefail

dry=
for argument; do  # accepted in any position, so that a misplaced one never launches a run
  shift
  if [[ $argument == --dry-run ]]; then dry=1; else set -- "$@" "$argument"; fi
done
if (( $# < 3 )); then
  sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
name=$1 zone=$2
shift 2

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=("$name" --zone="$zone" ${PROJECT:+--project="$PROJECT"} --worker=all)

call() {  # run a command, or print it quoted for the shell
  if [[ $dry ]]; then printf '%q ' "$@" | sed 's/ $//'; echo; else "$@"; fi
}
on_workers() { call gcloud compute tpus tpu-vm ssh "${target[@]}" --command="$1"; }

# Copy the checkout as one archive, without its history, virtual environments, run folders and the
# documentation site.
archive=$(mktemp -u -t sdjax-XXXXXX.tar.gz)
trap 'rm -f "$archive"' EXIT
[[ $dry ]] && archive=/tmp/sdjax.tar.gz
call tar -C "$root" --exclude-vcs --exclude='./.venv*' --exclude=./runs --exclude=./site -czf "$archive" .
call gcloud compute tpus tpu-vm scp "$archive" "$name":sdjax.tar.gz --zone="$zone" \
  ${PROJECT:+--project="$PROJECT"} --worker=all

# If the image of the TPU VM has no Python 3.11 or newer, uv installs one.
on_workers 'mkdir -p sdjax && tar -C sdjax -xzf sdjax.tar.gz && python3 -m pip install -q --user uv && python3 -m uv venv -q --clear --python ">=3.11" sdjax/.venv && python3 -m uv pip install -q --python sdjax/.venv "./sdjax[tpu]"'

run=$(printf ' %q' "$@")
on_workers "cd sdjax && SDJAX_COORDINATOR=auto .venv/bin/sdjax run$run"
