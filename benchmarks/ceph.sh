#!/usr/bin/env bash
# Ceph's S3 gateway on loopback, in memory: what docs/buckets.md was tried against. Needs root's Debian packages
# radosgw ceph-mon ceph-osd, and no root itself. `benchmarks/ceph.sh FOLDER COMMAND ...` runs COMMAND beside it, with
# AWS_ENDPOINT_URL and keys set; FOLDER must not exist, and holds logs afterwards.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 FOLDER COMMAND ..." >&2; exit 2; }
mkdir "$1"
folder=$(cd "$1" && pwd)
shift
MON_PORT=${MON_PORT:-16789} GATEWAY_PORT=${GATEWAY_PORT:-17480}
export CEPH_CONF="$folder/ceph.conf"
mkdir "$folder"/{mon,osd,rgw}
fsid=$(cat /proc/sys/kernel/random/uuid)
cat >"$CEPH_CONF" <<CONF
[global]
fsid = $fsid
mon host = [v2:127.0.0.1:$MON_PORT]
mon initial members = a
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pg autoscale mode = off
mon allow pool size one = true
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 4294967296
ms bind ipv6 = false
run dir = $folder
admin socket = $folder/\$name.asok
log file = $folder/\$name.log
pid file = $folder/\$name.pid
mon data = $folder/mon
osd data = $folder/osd
osd max object name len = 256
rgw data = $folder/rgw
rgw frontends = beast endpoint=127.0.0.1:$GATEWAY_PORT
CONF

pids=()
stop() {
    for pid in "${pids[@]}"; do kill -9 "$pid" 2>/dev/null || true; done
}
trap stop EXIT
begin() {
    "$@" -f >>"$folder/${1##*/}.out" 2>&1 &
    pids+=($!)
}

monmaptool --create --clobber --fsid "$fsid" --addv a "[v2:127.0.0.1:$MON_PORT]" "$folder/monmap" >/dev/null
ceph-mon -i a --mkfs --monmap "$folder/monmap"
begin ceph-mon -i a
timeout 60 ceph mon stat >/dev/null
timeout 60 ceph osd new "$(cat /proc/sys/kernel/random/uuid | tee "$folder/osd.uuid")" >/dev/null
ceph-osd -i 0 --mkfs --osd-uuid "$(cat "$folder/osd.uuid")"
begin ceph-osd -i 0
begin radosgw -n client.rgw
user=$(timeout 120 radosgw-admin user create --uid=trainer --display-name=trainer)
read -r AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY < <(
    python3 -c 'import json, sys; k = json.load(sys.stdin)["keys"][0]; print(k["access_key"], k["secret_key"])' <<<"$user"
)
export AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_ENDPOINT_URL="http://127.0.0.1:$GATEWAY_PORT" AWS_REGION=us-east-1
for _ in $(seq 120); do
    (exec 3<>"/dev/tcp/127.0.0.1/$GATEWAY_PORT") 2>/dev/null && break
    sleep 0.5
done
"$@"
