#!/usr/bin/env bash
# A run on TPU slices of a GKE cluster, by xpk (https://github.com/AI-Hypercomputer/xpk):
#
#     CLUSTER=mine TYPE=v5litepod-16 IMAGE=REGISTRY/jaxrlhf:tpu STORAGE=store bash launch/xpk.sh \
#         align --policy /mnt/store/base --data /mnt/store/prompts.jsonl --annotator http://judge:8000/v1#MODEL \
#         --mesh fsdp=-1 --output /mnt/store/runs --run mine
#
# A workload that is preempted or evicted is started again by its JobSet, and the run continues.
#
#     CLUSTER, TYPE   the cluster, and the slices' type, as xpk takes them
#     IMAGE           built from launch/Dockerfile with ACCELERATOR=tpu, and pushed to a registry
#     STORAGE         a storage that `xpk storage attach` made, of a file system with locks that all hosts share, such as
#                     Filestore; it holds models, data and runs
#     WORKLOAD        the workload's name (jaxrlhf)
#     SLICES          number of slices (1)
#     RESTARTS        times that the workload is started again (100)
#     CAPACITY        spot, on-demand, flex, or reservation=NAME, where the cluster provisions nodes itself
set -euo pipefail

: "${CLUSTER:?set CLUSTER, the name of the cluster}" "${TYPE:?set TYPE, such as v5litepod-16}"
: "${IMAGE:?set IMAGE, built from launch/Dockerfile with ACCELERATOR=tpu}"
if [ "$#" = 0 ]; then
    echo "launch/xpk.sh: give a command of jaxrlhf, such as: align --config run.yaml --run mine" >&2
    exit 2
fi
if ! command -v xpk > /dev/null; then
    echo "launch/xpk.sh: there is no xpk on PATH; pip install xpk." >&2
    exit 2
fi
exec xpk workload create \
    --cluster "$CLUSTER" \
    --workload "${WORKLOAD:-jaxrlhf}" \
    --tpu-type "$TYPE" \
    --num-slices "${SLICES:-1}" \
    --docker-image "$IMAGE" \
    --env PROCESSES=auto \
    --max-restarts "${RESTARTS:-100}" \
    --termination-grace-period-seconds 300 \
    ${STORAGE:+--storage "$STORAGE"} \
    ${CAPACITY:+--"$CAPACITY"} \
    --command "exec bash /opt/jaxrlhf/launch/run.sh$(printf ' %q' "$@")"
