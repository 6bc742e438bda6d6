# Sourced by launch.sh and task.sh.

# This job's number for scontrol and scancel. For the last task of an array they take SLURM_JOB_ID to mean all of it.
this_job() {
    local array=${SLURM_ARRAY_JOB_ID:-}
    echo "${array:-$SLURM_JOB_ID}${array:+_$SLURM_ARRAY_TASK_ID}"
}

# forwarding "<got>:<given> ..." <command...>: run it, pass signals on to it, return its exit code.
# bash delays traps until a foreground command ends, so the command runs in the background and is waited for. Where
# Slurm tracks processes by cgroup, it signals only those that it started itself: a shell must pass signals on.
forwarding() {
    local pairs=$1 child code interrupted=1 pair
    shift
    trap '' USR1 # the command inherits this: without cgroups, Slurm signals every process, also data loader workers
    "$@" &
    child=$!
    for pair in $pairs; do
        # shellcheck disable=SC2064
        trap "interrupted=1; ${pair%:*}_came=yes; kill -s ${pair#*:} $child 2>/dev/null" "${pair%:*}"
    done
    while ((interrupted)); do
        interrupted=0
        wait "$child"
        code=$?
    done
    return "$code"
}
