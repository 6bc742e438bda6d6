# The one file to edit for your site. Nothing in it needs a change on a cluster that needs no account, no modules and no
# container. slurm/submit.sh and slurm/pipeline.sh read it where you submit, launch.sh in the job, task.sh for each rank.
# SITE=other/file.sh, in the environment of the submission, reads another file in its place.

# 1. What sbatch must be given. sbatch itself does not read this file, but submit.sh and pipeline.sh do, and so does
#    your shell after `source slurm/site.sh`. Options on the command line take precedence.
#export SBATCH_PARTITION=${SBATCH_PARTITION:-gpu}
#export SBATCH_ACCOUNT=${SBATCH_ACCOUNT:-project}
#export SBATCH_TIMELIMIT=${SBATCH_TIMELIMIT:-24:00:00}
#export SBATCH_QOS=${SBATCH_QOS:-normal}

# 2. What happens to a job that asks to be started again, was preempted, or crashed:
#    requeue   scontrol requeue: it keeps its number. Where preemption requeues, or gives a job time to save (GraceTime).
#    self      it submits itself again, to start when it has ended. Where preemption cancels, or users may not requeue.
#              Needs slurm/submit.sh or slurm/pipeline.sh: sbatch does not tell a job how it was submitted.
#    no        it ends; the same line submitted again continues.
REQUEUE=${REQUEUE:-requeue}

# 3. A disk that each node has for itself; the name is resolved on each node. One folder per job below it holds temporary
#    files and the caches of compilers, and is removed at the end. Programs see the name as LOCAL_DISK, so options may
#    contain it: store.cache='$LOCAL_DISK/shards' training.scratch='$LOCAL_DISK'
LOCAL_DISK=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}
#LOCAL_DISK=/local/scratch/$USER
# Copy the shards that a node reads to its own disk first, for all jobs; STORE_CACHE_GB: how many gigabytes at most.
#export STORE_CACHE='$LOCAL_DISK/shards' STORE_CACHE_GB=500

# 4. Beside the job's log, each rank's own: LOGS/<job>/rank-<rank>.log below the folder of submission. Empty: none.
LOGS=slurm/logs

# 5. Options of srun. cores: each rank keeps to its own cores. A rank takes the GPU with its own number on the node, and
#    sees the others, which NCCL needs for direct copies; --gpu-bind=map_gpu:2,3,0,1 gives each rank one that lies near
#    its cores (nvidia-smi topo -m).
SRUN_OPTIONS=(--cpu-bind=cores)
#SRUN_OPTIONS=(--cpu-bind=cores --gpu-bind=map_gpu:2,3,0,1)
#SRUN_OPTIONS=(--cpu-bind=cores --hint=nomultithread)                          # one thread per core
#SRUN_OPTIONS=(--container-image="$PWD/ldt.sqsh" --container-mounts="$PWD")    # pyxis and enroot, for 7.

# 6. Run once per job, before the ranks start, which inherit what it exports.
prepare_job() {
    #module load cuda/12.8 gcc/12 || return 1
    #source ~/miniforge3/etc/profile.d/conda.sh && conda activate ldt || return 1
    #export PYTHON=${PYTHON:-$(command -v python)} # default: .venv/bin/python, else python3
    :
}

# 7. A container for the ranks' Python: the command before it. slurm/apptainer.def and slurm/Dockerfile make an image
#    with all dependencies; the code is this folder's. Data outside it needs a --bind of its own.
CONTAINER=()
#CONTAINER=(apptainer exec --nv --bind "$PWD,$LOCAL_DISK,/data" --env PYTHONPATH="$PWD" /images/ldt.sif)

# 8. The network between the nodes. Without these lines NCCL and gloo choose for themselves.
#    InfiniBand: data by RDMA, the rendezvous by TCP on the same network.
#export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0   # the interface that connects the nodes (ip -br address)
#export NCCL_IB_HCA=mlx5                                # its adapters (ibstat -l); =mlx5_0:1,mlx5_3:1 names ports
#export NCCL_IB_TIMEOUT=22                              # on a large, busy fabric
#export NCCL_DEBUG=INFO                                 # the log then says NET/IB, or NET/Socket if RDMA is not used
#export NCCL_DMABUF_ENABLE=1                            # GPUDirect RDMA by the kernel's DMA-BUF
#export NCCL_IB_GID_INDEX=3                             # RoCE (RDMA over Ethernet) only
#export NCCL_IB_DISABLE=1                               # no RDMA: to see whether it is the cause of a failure
#ulimit -l unlimited                                    # RDMA pins memory; if this fails, ask your administrator
