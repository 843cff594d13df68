#!/bin/sh
# `quietly.sh LOG WHAT COMMAND...`: says WHAT and runs the command with its output in LOG; shows it all where it fails.
log=$1
what=$2
shift 2

mkdir -p "$(dirname "$log")"
echo "$what"
echo "== $what: $*" >>"$log"
start=$(wc -c <"$log")
"$@" >>"$log" 2>&1 && exit 0
status=$?

tail -c "+$((start + 1))" "$log" >&2
echo "failed with exit code $status: $*" >&2
exit "$status"
