# By its own number, Slurm takes the last task of an array for all of them. Sourced, as all here.
this_job() {
    local array=${SLURM_ARRAY_JOB_ID:-}
    echo "${array:-$SLURM_JOB_ID}${array:+_$SLURM_ARRAY_TASK_ID}"
}

# forwarding "<got>:<given> ..." <command...>: run it, pass signals on to it, return its exit code.
# A command in the foreground would hold bash's traps back until it ends, so it goes behind, and is waited for; and
# where Slurm tracks processes by cgroup, it signals only those it started itself: a shell must pass on what it gets.
forwarding() {
    local pairs=$1 child code interrupted=1 pair
    shift
    trap '' USR1 # the command inherits this: elsewhere Slurm signals every process, data loader workers too
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
