# This job's folder on the node's own disk, and the log of each rank. Sourced by task.sh.

# enter_job_folder: temporary files and the caches of compilers lie in one folder, shared by the job's ranks on this
# node. Each holds a lock on it until its last process ends, however it ends; whoever finds none removes the folder.
enter_job_folder() {
    remove_abandoned
    JOB_FOLDER=$LOCAL_DISK/ldt-$UID-$(this_job)
    local tries=0
    while :; do
        if ! (umask 077 && mkdir -p "$JOB_FOLDER" 2>/dev/null) || [[ ! -O $JOB_FOLDER || -L $JOB_FOLDER ]]; then
            # Another job may remove it between mkdir and the lock: it can't tell a new folder from an abandoned one.
            ((tries++ < 50)) && sleep 0.1 && continue
            complain "LOCAL_DISK=$LOCAL_DISK on $(hostname) can't hold $JOB_FOLDER: name another disk in slurm/site.sh."
            return
        fi
        exec {job_lock}<"$JOB_FOLDER" || continue
        flock --shared "$job_lock" # not possible on some network file systems, where the folder is then not removed
        [[ /dev/fd/$job_lock -ef $JOB_FOLDER ]] && break # not removed in between
        exec {job_lock}<&-
    done
    export LOCAL_DISK TMPDIR=$JOB_FOLDER
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$JOB_FOLDER/triton}
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$JOB_FOLDER/inductor}
    export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$JOB_FOLDER/torch_extensions}
    export CUDA_CACHE_PATH=${CUDA_CACHE_PATH:-$JOB_FOLDER/cuda}
}

leave_job_folder() {
    exec {job_lock}<&-
    remove_unlocked "$JOB_FOLDER"
}

# Those of jobs that were killed: no process holds a lock any more.
remove_abandoned() {
    local folder
    for folder in "$LOCAL_DISK/ldt-$UID-"*; do
        [[ ! -d $folder || ! -O $folder ]] || remove_unlocked "$folder"
    done
}

remove_unlocked() (
    exec 2>/dev/null {lock}<"$1" && flock --exclusive --nonblock "$lock" && [[ /dev/fd/$lock -ef $1 ]] && rm -rf "$1"
)

# log_to <file>: what this shell's commands write goes on to where it went, and also to the file.
log_to() {
    exec {out}>&1 {err}>&2
    exec > >(copying_to "$1")
    copiers=($!)
    exec 2> >(copying_to "$1" >&2)
    copiers+=($!)
}

# A copier ends when the last process that writes to it does, not by the signals that Slurm sends to all processes.
copying_to() {
    trap '' TERM USR1 INT
    exec tee -a "$1" {job_lock}<&-
}

# log_no_more: wait until all is written; not for a process that was left behind and may still write.
log_no_more() {
    local copier
    exec >&"$out" 2>&"$err" {out}>&- {err}>&-
    for copier in "${copiers[@]}"; do timeout 10 tail -s 0.05 --pid="$copier" -f /dev/null; done
}
