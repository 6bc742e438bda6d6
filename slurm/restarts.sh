# Whether and how a job is requeued. Sourced by launch.sh.

# requeue <why>: never returns. A cancelled job does not get here: the TERM of scancel ends this shell.
requeue() {
    local restarts=${SLURM_RESTART_COUNT:-0} limit=${MAX_RESTARTS:-20}
    if ((restarts >= limit)); then
        complain "stopped after $restarts restarts (MAX_RESTARTS=$limit):" \
            "submit the same line again to continue."
    elif [[ $(scontrol show job --oneliner "$(this_job)") == *" JobState=RUNNING "* ]]; then # not cancelled in the meantime
        # Print first: Slurm may end this shell before the next line.
        echo "job $SLURM_JOB_ID: $1; back into the queue (restart $((restarts + 1)) of at most $limit)"
        scontrol requeue "$(this_job)" && exit 0
        complain "Slurm could not requeue the job: submit the same line again to continue."
    fi
    exit "$START_ME_AGAIN"
}

# crashes_without_progress <script.py> [overrides...]: count this crash; false after too many in a row.
crashes_without_progress() {
    local before count=0 now limit=${MAX_CRASHES:-3} note
    note=$(crash_note)
    now=$(progress_of "$@")
    if [[ -f $note ]]; then
        { read -r count; read -r before; } <"$note"
        [[ $before == "$now" ]] || count=0
    fi
    ((++count))
    if ((count >= limit)); then
        rm -f "$note"
        complain "crashed $count times in a row without getting further than $now (MAX_CRASHES=$limit):" \
            "see the messages above; submit the same line again to continue."
        return 1
    fi
    mkdir -p "${note%/*}" && printf '%s\n' "$count" "$now" >"$note"
}

# This job's file, in the submission folder, which exists on every node that it may run on.
crash_note() { echo ".slurm/crashes-$SLURM_JOB_ID"; }

# progress_of <script.py> [overrides...]: the newest checkpoint below output=, else the number of finished shards.
progress_of() {
    local argument output
    for argument in "$@"; do
        [[ $argument == output=* ]] && output=${argument#output=}
    done
    if [[ -f ${output:-}/checkpoints/latest ]]; then
        echo "$(<"$output/checkpoints/latest")"
    else
        echo "$(find "${output:-/nowhere}" -name '*.done.json' 2>/dev/null | wc -l) finished shards"
    fi
}
