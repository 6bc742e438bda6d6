#!/usr/bin/env bash
# Runs a command with Ceph's S3 gateway: one monitor, one object store in memory and one gateway, on loopback, stopped
# when the command ends. The command finds the gateway and new keys in its environment (AWS_*, S3_TEST_PORT).
#
#   apt-get install -y --no-install-recommends radosgw ceph-mon ceph-osd
#   benchmarks/ceph.sh output=/tmp/ceph python -m pytest tests/s3
#   benchmarks/ceph.sh output=/tmp/ceph bash    # then, for example:
#       python data_pipeline/make_shards.py source=openmoji_demo output=s3://trial/shards
#
# output=: a new folder for configuration and logs (mode 700; removed at the end, kept if the start fails).
# Environment variables: PORT of the gateway (17480; the monitor uses the next port), BUCKET to create (trial), RUN,
# the Python that creates it (python).
set -euo pipefail

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }
fail() { echo "error: $1" >&2; exit 2; }

[[ "${1:-}" == --help ]] && { usage; exit 0; }
[[ "${1:-}" == output=?* && $# -ge 2 ]] || fail "output=FOLDER and a command must be given (see --help)."
folder=$(realpath -m "${1#output=}"); shift
[[ -e "$folder" ]] && fail "$folder already exists: choose a new folder."
for tool in ceph-mon ceph-osd radosgw radosgw-admin ceph monmaptool; do
    command -v "$tool" >/dev/null || fail "$tool is missing: apt-get install radosgw ceph-mon ceph-osd."
done
port=${PORT:-17480}
(umask 077; mkdir -p "$folder"/{mon,osd,run,log})
export CEPH_CONF="$folder/ceph.conf"

# Any user of this machine can access the monitor (auth none); it stores only what the command writes.
cat >"$CEPH_CONF" <<CONF
[global]
fsid = $(cat /proc/sys/kernel/random/uuid)
mon_host = [v2:127.0.0.1:$((port + 1))]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_mon_client_mode = crc
run_dir = $folder/run
admin_socket = $folder/run/\$name.asok
log_file = $folder/log/\$name.log
crash_dir = $folder/log
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
osd_crush_chooseleaf_type = 0
osd_crush_update_on_start = false
[mon.a]
mon_data = $folder/mon
[osd.0]
osd_data = $folder/osd
osd_objectstore = memstore
memstore_device_bytes = 4294967296
[client.gateway]
rgw_frontends = beast endpoint=127.0.0.1:$port
CONF

daemons=()
stop() {
    trap - EXIT
    if ((${#daemons[@]})); then
        kill "${daemons[@]}" 2>/dev/null || true
        for _ in {1..50}; do kill -0 "${daemons[@]}" 2>/dev/null || break; sleep 0.1; done
        kill -9 "${daemons[@]}" 2>/dev/null || true
    fi
    [[ -n "${ready:-}" ]] && rm -rf "$folder"
    return 0
}
trap stop EXIT
trap 'exit 130' INT TERM

start() { "$@" >>"$folder/log/output.log" 2>&1 & daemons+=($!); }
until_it_works() {  # seconds, command...
    local seconds=$1 end; shift; end=$((SECONDS + seconds))
    until "$@" >>"$folder/log/output.log" 2>&1; do
        ((SECONDS < end)) || fail "Ceph did not start within $seconds s ($1): see $folder/log."
        sleep 0.3
    done
}

begun=$SECONDS
monmaptool --create --addv a "[v2:127.0.0.1:$((port + 1))]" --fsid "$(sed -n 's/^fsid = //p' "$CEPH_CONF")" \
    "$folder/monmap" >/dev/null
ceph-mon --mkfs -i a --monmap "$folder/monmap" >>"$folder/log/output.log" 2>&1
start ceph-mon -f -i a
until_it_works 60 timeout 5 ceph --connect-timeout 4 -s
uuid=$(cat /proc/sys/kernel/random/uuid)
ceph osd new "$uuid" >/dev/null
ceph osd crush add osd.0 1.0 host=here root=default >>"$folder/log/output.log" 2>&1
ceph-osd --mkfs -i 0 --osd-uuid "$uuid" >>"$folder/log/output.log" 2>&1
start ceph-osd -f -i 0
until_it_works 60 bash -c 'timeout 5 ceph osd stat | grep -q "1 up"'
start radosgw -f -n client.gateway
until_it_works 120 bash -c "exec 3<>/dev/tcp/127.0.0.1/$port"

# The keys go from the gateway into the environment, never into a command line, which other users could list.
made=$(radosgw-admin user create --uid trainer --display-name trainer 2>>"$folder/log/output.log")
field() { sed -n "s/^ *\"$1\": \"\(.*\)\",\{0,1\}$/\1/p" <<<"$made" | head -n1; }
AWS_ACCESS_KEY_ID=$(field access_key) AWS_SECRET_ACCESS_KEY=$(field secret_key)
export AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
export AWS_ENDPOINT_URL=http://127.0.0.1:$port AWS_REGION=us-east-1 S3_TEST_PORT=$port
"${RUN:-python}" - "${BUCKET:-trial}" <<'PYTHON' || fail "the bucket could not be created: set RUN= to the Python of this project's .venv."
import os
import sys

import botocore.session

client = botocore.session.get_session().create_client("s3", os.environ["AWS_REGION"])
client.create_bucket(Bucket=sys.argv[1])
PYTHON
ready=yes
echo "ceph.sh: $(ceph --version | cut -d' ' -f1-3) answers on 127.0.0.1:$port after $((SECONDS - begun)) s"
"$@"
