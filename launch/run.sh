#!/usr/bin/env bash
# Tries the machine with `jaxrlhf doctor`, then runs a jaxrlhf command so that the same line continues it:
#
#     bash launch/run.sh align --policy models/base --data prompts.jsonl --annotator judges:prefer --run mine
#
# Every process of a run starts it. PROCESSES in the environment, where it is set, says which of several processes this is,
# as --processes does. DOCTOR=off leaves the doctor out.
set -euo pipefail

if [ "$#" = 0 ]; then
    echo "launch/run.sh: give a command of jaxrlhf, such as: launch/run.sh align --config run.yaml --run mine" >&2
    exit 2
fi
case "$1" in
sft | reward | dpo | align | evaluate) ;;
*) exec jaxrlhf "$@" ;;
esac
case " $* " in
*" --help "* | *" -h "* | *" --print-config "*) exec jaxrlhf "$@" ;;
esac

settings=$(mktemp)
trap 'rm -f "$settings"' EXIT
jaxrlhf "$@" --print-config > "$settings"
# Settings that only a training run has.
if grep -q '^resume: ' "$settings"; then
    if grep -q '^run: null$' "$settings"; then
        echo "launch/run.sh: give --run NAME, by which $1 goes on after it was stopped." >&2
        exit 2
    fi
    if grep -q '^resume: false$' "$settings"; then
        set -- "$@" --resume
    fi
    if [ -n "${PROCESSES:-}" ] && grep -q '^processes: null$' "$settings"; then
        set -- "$@" --processes "$PROCESSES"
        jaxrlhf "$@" --print-config > "$settings"
    fi
fi
if [ "${DOCTOR:-on}" != off ]; then
    jaxrlhf doctor --config "$settings"
fi
rm -f "$settings"
# In place of this shell, so that the run itself gets the signals of whoever stops it.
exec jaxrlhf "$@"
