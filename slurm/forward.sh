# forwarding "<signals>" <command...>: run it, pass these signals on to it, return its exit code. Sourced.
# A command in the foreground would hold bash's traps back until it ends, so it goes behind, and is waited for; and
# where Slurm tracks processes by cgroup, it signals only those it started itself: a shell must pass on what it gets.
forwarding() {
    local signals=$1 child code interrupted=1 signal
    shift
    trap '' USR1 # inherited: until the program's own handler stands, the warning must not kill it
    "$@" &
    child=$!
    for signal in $signals; do
        # shellcheck disable=SC2064
        trap "interrupted=1; kill -s $signal $child 2>/dev/null" "$signal"
    done
    while ((interrupted)); do
        interrupted=0
        wait "$child"
        code=$?
    done
    return "$code"
}
