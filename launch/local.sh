#!/usr/bin/env bash
# Runs a command as several processes of one run on this machine: on its CPU, or with a GPU each.
#
#   launch/local.sh --processes=N [flags] -- COMMAND...
#     --processes=N  how many; process I gets --coordinator=127.0.0.1:PORT --num_processes=N --process_id=I added
#     --gpus         one GPU for each, of CUDA_VISIBLE_DEVICES, or of all there are
#     --grace=S      how many seconds after TERM a process is killed: 60
#     --dry_run      say what would be run, and run nothing
#
# Each line of output begins with [I]. The first process that fails ends all, and its exit code comes back. TERM or
# Ctrl-C: all get TERM, save what they have, and their exit code comes back, which is 75 for `llm-jax train`.
set -euo pipefail

die() { # the exit code is 78
    printf 'local.sh: %s\n' "$*" >&2
    exit 78
}
processes='' gpus='' grace=60 dry_run=''
while (($#)); do
    case $1 in
        --processes=*) processes=${1#*=} ;;
        --gpus) gpus=1 ;;
        --grace=*) grace=${1#*=} ;;
        --dry_run | --dry-run) dry_run=1 ;;
        --help | -h)
            sed -n '2,/^set /{s/^# \{0,1\}//p}' "$0"
            exit 0
            ;;
        --) shift; break ;;
        *) die "$1 is no flag of this; see --help, and put -- before the command" ;;
    esac
    shift
done
(($#)) || die "no command; give it after --"
[[ $processes =~ ^[1-9][0-9]{0,2}$ ]] || die "--processes=$processes must be a number from 1 to 999"
[[ $grace =~ ^[0-9]{1,6}$ ]] || die "--grace=$grace must be a number of seconds"
command -v -- "$1" >/dev/null || die "$1: no such command; see PATH, or give its path"

gpu_ids=()
if [[ $gpus ]]; then
    if [[ ${CUDA_VISIBLE_DEVICES+set} ]]; then
        IFS=, read -ra gpu_ids <<<"$CUDA_VISIBLE_DEVICES"
    else
        command -v nvidia-smi >/dev/null || die "--gpus: no nvidia-smi here; install the driver, or leave --gpus out"
        list=$(nvidia-smi -L 2>&1) ||
            die "--gpus: nvidia-smi -L says: ${list//$'\n'/ }; mend the driver, or leave --gpus out"
        mapfile -t gpu_ids < <(sed -n 's/^GPU \([0-9]*\):.*/\1/p' <<<"$list")
    fi
    visible=${CUDA_VISIBLE_DEVICES+ (CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES)}
    ((processes <= ${#gpu_ids[@]})) ||
        die "--processes=$processes, but there are ${#gpu_ids[@]} GPUs$visible, and each needs its own; start fewer"
fi

port=''
while [[ ! $port ]]; do
    port=$((61440 + RANDOM % 4096)) # above what Linux hands out to clients
    (: >"/dev/tcp/127.0.0.1/$port") 2>/dev/null && port=''
done
flags=("--coordinator=127.0.0.1:$port" "--num_processes=$processes")
if [[ $dry_run ]]; then
    for ((i = 0; i < processes; i++)); do
        [[ $gpus ]] && printf 'CUDA_VISIBLE_DEVICES=%q ' "${gpu_ids[i]}"
        printf '%q ' "$@" "${flags[@]}"
        printf -- '--process_id=%d &\n' "$i"
    done
    exit 0
fi

declare -A number=() told=() # by process id, of those that run
declare -a pumps=()
exec {never}<> <(:) # nothing comes from it
stopping=''
tell() { # TERM, once: JAX's preemption service listens to it
    local pid
    for pid in "${!number[@]}"; do
        [[ ${told[$pid]-} ]] && continue
        told[$pid]=1
        kill -TERM "$pid" 2>/dev/null || true
    done
}
# shellcheck disable=SC2317 # called by the traps
stop() {
    [[ $1 == INT && $stopping ]] && kill -KILL "${!number[@]}" 2>/dev/null
    stopping=1
    tell
}
trap 'stop TERM' TERM HUP
trap 'stop INT' INT

prefixed() { # whole lines, and the last one, too, if it is none
    local line
    trap '' INT TERM HUP
    while IFS= read -r line || [[ $line ]]; do printf '[%d] %s\n' "$1" "$line"; done
}
for ((i = 0; i < processes; i++)); do
    [[ $stopping ]] && break
    exec {pipe}> >(prefixed "$i")
    pumps+=($!)
    (
        trap '' INT HUP # Ctrl-C goes to all processes of a terminal: they are told by TERM
        [[ $gpus ]] && export CUDA_VISIBLE_DEVICES=${gpu_ids[i]}
        exec "$@" "${flags[@]}" "--process_id=$i"
    ) >&"$pipe" 2>&1 </dev/null {pipe}>&- {never}>&- &
    number[$!]=$i
    exec {pipe}>&-
done
echo "local.sh: $processes processes, coordinator 127.0.0.1:$port" >&2
[[ $stopping ]] && tell

code=0 killing=''
while ((${#number[@]})); do
    # Not by `wait`: if a signal comes in it just as a process ends, bash 5.2 loses the exit code, and waits for ever.
    read -rt 0.1 -u "$never" _ || true
    ended='' first='' now=''
    for pid in "${!number[@]}"; do
        kill -0 "$pid" 2>/dev/null && continue
        wait "$pid" && now=0 || now=$?
        [[ $stopping && $now == 143 ]] && now=75 # it had not come so far that it could save
        # Of several, not one that has lost another and so ends with 70, nor one that has saved
        if [[ $now != 0 && (! $ended || $ended == 75 || $ended == 70 && $now != 75) ]]; then
            ended=$now first=${number[$pid]}
        fi
        unset "number[$pid]"
    done
    if [[ $ended && ($code == 0 || $stopping && $code == 75) ]]; then code=$ended; fi
    if [[ $ended && ! $killing ]]; then
        killing=$((SECONDS + grace))
        echo "local.sh: process $first was the first to end, with exit code $ended" >&2
        [[ $ended == 75 ]] || tell # else they end by themselves
    elif [[ $killing && ${#number[@]} != 0 ]] && ((SECONDS >= killing)); then
        echo "local.sh: killed, $grace s later: process ${number[*]}" >&2
        kill -KILL "${!number[@]}" 2>/dev/null || true
        killing=$((SECONDS + 10))
    fi
done
for _ in {1..100}; do
    kill -0 "${pumps[@]}" 2>/dev/null || break
    sleep 0.05
done
exit "$code"
