#!/usr/bin/env bash
# A run on a TPU VM slice of any number of hosts, started from the clone and from a machine that stays up:
#
#     TPU=mine ZONE=us-west4-a TYPE=v5litepod-16 VERSION=v2-alpha-tpuv5-lite STORE=10.0.0.2:/share bash launch/tpu_vm.sh \
#         align --policy /mnt/store/base --data /mnt/store/prompts.jsonl --annotator judges:prefer --mesh fsdp=-1 \
#         --output /mnt/store/runs --run mine
#
# Creates the slice, installs the committed state of the clone on its hosts, and runs the command there. A slice that is
# preempted is created again, and the run continues. Models, data and runs lie in a store that all hosts see.
#
#     TPU, ZONE, TYPE, VERSION   name, zone, accelerator type and runtime version, as gcloud takes them
#     STORE                      an NFS export, mounted as /mnt/store on each host
#     FILES                      files of yours in the clone that are not committed, such as "judges.py run.yaml"
#     SPOT=no                    a slice on demand in place of one that may be preempted
#     KEEP=yes                   leaves the slice running after the run
#     TRIES                      times that the slice is looked at or created before giving up (1000, every PAUSE=60 s)
set -euo pipefail

: "${TPU:?set TPU, the name of the slice}" "${ZONE:?set ZONE, such as us-west4-a}"
: "${TYPE:?set TYPE, such as v5litepod-16}" "${VERSION:?set VERSION, such as v2-alpha-tpuv5-lite}"
if [ "$#" = 0 ]; then
    echo "launch/tpu_vm.sh: give a command of jaxrlhf, such as: align --config run.yaml --run mine" >&2
    exit 2
fi
if ! command -v gcloud > /dev/null; then
    echo "launch/tpu_vm.sh: there is no gcloud on PATH; install the Google Cloud CLI and log in." >&2
    exit 2
fi
cd "$(dirname "$0")/.."
if ! git diff --quiet HEAD; then
    echo "launch/tpu_vm.sh: the hosts get the committed state of the clone, without what was changed since." >&2
fi
clone=$(mktemp -d)
trap 'rm -rf "$clone"' EXIT
pause=${PAUSE:-60}

tpu() {
    gcloud compute tpus tpu-vm "$1" "$TPU" --zone "$ZONE" "${@:2}"
}

on_all_hosts() {
    tpu ssh --worker=all --command "$1"
}

state() {
    tpu describe --format='value(state)' 2> /dev/null || echo NONE
}

create() {
    local spot=(--spot)
    [ "${SPOT:-yes}" = yes ] || spot=()
    tpu create --accelerator-type "$TYPE" --version "$VERSION" "${spot[@]}"
}

install() {
    local added=() file
    for file in ${FILES:-}; do
        added+=(--add-file="$file")
    done
    git archive --format=tar.gz --prefix=jaxrlhf/ "${added[@]}" --output="$clone/jaxrlhf.tar.gz" HEAD || return
    gcloud compute tpus tpu-vm scp "$clone/jaxrlhf.tar.gz" "$TPU:" --zone "$ZONE" --worker=all || return
    if [ -n "${STORE:-}" ]; then
        on_all_hosts "sudo mkdir -p /mnt/store && { mountpoint -q /mnt/store || sudo mount -t nfs $STORE /mnt/store; }" || return
    fi
    # By uv, which brings a newer Python where the hosts' own is older than 3.11.
    on_all_hosts "tar -xzf jaxrlhf.tar.gz && cd jaxrlhf \
&& PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv \
&& { [ -d .venv ] || python3 -m uv venv --quiet --python '>=3.11' .venv; } \
&& python3 -m uv pip install --quiet --python .venv/bin/python -c constraints.txt '.[tpu]'"
}

# The variables of the remote shell, and the user's command as it was written.
# shellcheck disable=SC2016
command='cd jaxrlhf && PATH=$PWD/.venv/bin:$PATH PROCESSES=${PROCESSES:-auto} bash launch/run.sh'$(printf ' %q' "$@")
own=no
installed=no
for ((try = 1; try <= ${TRIES:-1000}; try++)); do
    case $(state) in
    READY)
        if [ "$installed" = no ]; then
            install || { sleep "$pause"; continue; }
            installed=yes
        fi
        if on_all_hosts "$command"; then
            if [ "$own" = yes ] && [ "${KEEP:-no}" != yes ]; then
                tpu delete --quiet
            fi
            exit 0
        fi
        # A slice that is being preempted is READY for a while longer.
        sleep "$pause"
        if [ "$(state)" = READY ]; then
            echo "launch/tpu_vm.sh: the command failed, and $TPU is there; mend the cause, then start this line again." >&2
            echo "To delete it: gcloud compute tpus tpu-vm delete $TPU --zone $ZONE" >&2
            exit 1
        fi
        ;;
    NONE)
        installed=no
        if create; then own=yes; else sleep "$pause"; fi
        ;;
    PREEMPTED | TERMINATED | STOPPED | FAILED)
        installed=no
        tpu delete --quiet || sleep "$pause"
        ;;
    *)
        sleep "$pause"
        ;;
    esac
done
echo "launch/tpu_vm.sh: gave up after ${TRIES:-1000} tries; what was trained is in the run's folder." >&2
exit 1
