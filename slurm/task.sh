# What srun starts for every rank: task.sh <script.py> [overrides...]. The names of torch's launcher, from Slurm's.
source slurm/forward.sh
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
# A site may show each task nothing but its own GPU, which is number 0 then.
[[ ${CUDA_VISIBLE_DEVICES:-,} == *,* ]] || LOCAL_RANK=0
export PATH=${PYTHON%/*}:$PATH # tools beside the interpreter, ninja for one

# The warning reaches the program, and it alone, as TERM: USR1 itself is ignored by it and by all that it starts.
forwarding "USR1:TERM TERM:TERM" "$PYTHON" "$@"
code=$?
if ((code == START_ME_AGAIN || code == USER_ERROR || code == DATA_ERROR)); then
    # The batch shell must know; srun will tell it the highest code of all ranks only, also of those it kills for this
    # one. Rank 0 runs beside it, the others reach it through Slurm; the second is for the signal to arrive.
    if ((RANK == 0)); then
        echo "$code" >"$NOTE"
    elif ((code != START_ME_AGAIN)); then
        scancel --batch --signal=USR2 "$(this_job)" && sleep 1
    fi
fi
# All ranks agreed to stop and have saved, so none is a failure that srun must stop the others for, while they still
# close their logs.
((code == START_ME_AGAIN)) && exit 0
exit "$code"
