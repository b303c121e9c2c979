#!/usr/bin/env bash
# Runs a command on this host, anywhere: with its environment, a log, a file with its exit code, and restarts by it.
#
#   launch/run_host.sh [flags] -- COMMAND...
#     --run_dir=DIR    where log, exit, lock and env lie: ~/llm_jax_run
#     --restarts=N     how many crashes in a row are followed by another start: 10; with 0, whatever ends the command
#                      ends this, too, with its code (for Slurm and Kubernetes, which start it again themselves)
#     --env_file=FILE  NAME=VALUE lines for the environment of the command (secrets; mode 600): RUN_DIR/env, if it
#                      exists. A value is taken as it stands, but for one pair of quotes around the whole of it
#     --dry_run        say what would be run, and run nothing
#
# Exit codes of the command: 0 done; 75 saved after a preemption notice, started again at once and for free; 78 a bad
# config, never started again; any other is a crash, followed by a start after a pause that grows. A start that lived
# for an hour forgets the crashes before it. TERM or INT (Ctrl-C): the command gets TERM once, nothing is started
# again, and its exit code comes back; 75 if TERM came too early for it to have had anything to save. HUP is ignored.
#
# RUN_DIR/log   the command's output, added to what was there; also on standard output
# RUN_DIR/exit  the exit code, once all is over; absent until then
# RUN_DIR/lock  held by this and by the command: no second start of the same RUN_DIR, even if this was killed
# LLM_JAX_VENV  the virtual environment whose programs the command finds first: ~/llm_jax_venv, if it exists
set -euo pipefail
{ # read as a whole, since the code may be replaced while this runs

die() { # the exit code is 78
    printf 'run_host.sh: %s\n' "$*" >&2
    exit 78
}
stopping='' pid='' told=''
tell() { # once: to TERM, JAX's preemption service listens from early on
    if [[ $stopping && $pid && ! $told ]]; then
        told=1
        kill -TERM "$pid" 2>/dev/null || true
    fi
}
trap 'stopping=1; tell' TERM INT
trap '' HUP

run_dir=~/llm_jax_run restarts=10 env_file='' dry_run=''
while (($#)); do
    case $1 in
        --run_dir=?*) run_dir=${1#*=} ;;
        --restarts=*) restarts=${1#*=} ;;
        --env_file=?*) env_file=${1#*=} ;;
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
[[ $restarts =~ ^[0-9]{1,6}$ ]] || die "--restarts=$restarts must be a number, 0 or more"

code_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
commit=$(cat "$code_dir/COMMIT" 2>/dev/null ||
    git -C "$code_dir" describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null || echo unknown)
venv=${LLM_JAX_VENV:-$HOME/llm_jax_venv}
command=$(printf ' %q' "$@")
command=${command:1}

files=$(ulimit -Hn)
[[ $files != unlimited ]] && ((files <= 1048576)) || files=1048576
if [[ $dry_run ]]; then
    [[ -d $venv/bin ]] && command="PATH=$(printf %q "$venv/bin"):\$PATH $command"
    env_file=${env_file:-$run_dir/env}
    [[ -e $env_file ]] && printf '# with the environment of %q, and up to %d restarts:\n' "$env_file" "$restarts"
    printf 'mkdir -p %q\nulimit -n %d\n%s 2>&1 | tee -a %q\n' "$run_dir" "$files" "$command" "$run_dir/log"
    exit 0
fi

if ! { mkdir -p "$run_dir" && : >>"$run_dir/lock" && : >>"$run_dir/log"; } 2>/dev/null; then
    die "--run_dir=$run_dir cannot be written to; give a directory of yours, on a disk that is not full"
fi
run_dir=$(cd "$run_dir" && pwd -P)
exec 9>>"$run_dir/lock"
if ! flock -w 2 9; then # an earlier start may have written its exit code and not be gone
    holders=$(
        exec 9>&-
        find /proc/[0-9]*/fd -lname "$run_dir/lock" 2>/dev/null | cut -d/ -f3 | sort -un | grep -vx $$ | xargs
    ) || true
    die "--run_dir=$run_dir is in use by an earlier start; wait for its end, or end it${holders:+: kill -TERM $holders}"
fi
rm -f "$run_dir/exit"

# All output, the command's and the lines from here, goes through one pipe, and so is in order. It outlives signals to
# all processes, a full disk and a reader of standard output that has gone.
exec 8>&1
exec > >(
    trap '' INT TERM
    exec 9>&-
    tee -p -a "$run_dir/log" >&8 || true
    exec cat >/dev/null
) 2>&1 8>&-
pump=$!

say() { printf 'run_host.sh: %s %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$*"; }

# shellcheck disable=SC2317 # called by the trap
finish() { # the exit code is written when the log is complete
    local code=$? _
    exec >&- 2>&-
    for _ in {1..100}; do
        kill -0 "$pump" 2>/dev/null || break
        sleep 0.05
    done
    if echo "$code" >"$run_dir/exit.new"; then mv -f "$run_dir/exit.new" "$run_dir/exit"; fi
    exit "$code"
}
trap finish EXIT

# What an earlier start, or this one, has left running: it would keep the accelerators, the port and the memory.
clear_leftovers() {
    local signal left try
    for signal in TERM KILL; do
        for try in {1..50}; do
            left=$(grep -lzxF "LLM_JAX_RUN_DIR=$run_dir" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3 | xargs) || true
            [[ $left ]] || return 0
            if ((try == 1)); then
                say "SIG$signal to what was left running: $left"
                # shellcheck disable=SC2086 # numbers
                kill "-$signal" $left 2>/dev/null || true
            fi
            sleep 0.1
        done
    done
    say "WARNING: still running, perhaps in the kernel: $left; if the accelerator is busy, restart this host"
}

environment=("LLM_JAX_RUN_DIR=$run_dir" PYTHONUNBUFFERED=1)
read_environment() { # $1 is the file; its lines are not shown
    local line number=0 mode
    mode=$(stat -Lc %a "$1") || die "--env_file=$1 cannot be read; see that it exists"
    ((0$mode & 077)) && die "--env_file=$1 has mode $mode, so that others may read what is secret: chmod 600 $1"
    while IFS= read -r line || [[ $line ]]; do
        number=$((number + 1))
        line=${line%$'\r'}
        [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
        [[ $line =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || die "--env_file=$1: line $number is not NAME=VALUE"
        [[ $line =~ ^([^=]*=)(\"(.*)\"|\'(.*)\')$ ]] && line=${BASH_REMATCH[1]}${BASH_REMATCH[3]}${BASH_REMATCH[4]}
        environment+=("$line")
    done <"$1"
}
[[ -z $env_file && -e $run_dir/env ]] && env_file=$run_dir/env
[[ $env_file ]] && read_environment "$env_file"

ulimit -n "$files" 2>/dev/null || say "WARNING: at most $(ulimit -n) files can be open"

exec {never}<> <(:) # nothing comes from it
start() {
    trap '' INT # Ctrl-C goes to all processes of a terminal: the command is told by TERM
    export "${environment[@]}"
    [[ -d $venv/bin ]] && export PATH="$venv/bin:$PATH"
    command -v -- "$1" >/dev/null || die "$1: no such command; see PATH, or give its path"
    exec "$@"
}

code=75 crashes=0 pause=5
clear_leftovers
while [[ ! $stopping ]]; do
    say "$HOSTNAME, commit $commit, starts: $command"
    began=$(date +%s)
    told=''
    start "$@" </dev/null {never}>&- &
    pid=$!
    tell
    # Not by `wait`: if a signal comes in it just as the command ends, bash 5.2 loses the code, and waits for ever.
    while kill -0 "$pid" 2>/dev/null; do read -rt 0.2 -u "$never" _ || true; done
    wait "$pid" && code=0 || code=$?
    pid=''
    seconds=$(($(date +%s) - began))
    ended="exit code $code after $seconds s"
    clear_leftovers
    if [[ $stopping ]]; then
        [[ $code == 143 ]] && code=75 # TERM itself ended it: it had not come so far that it could save
        say "$ended; was told to stop: ends with $code"
    elif [[ $code == 0 || $code == 78 ]] || ((restarts == 0)); then
        say "$ended; ends"
    elif [[ $code == 75 ]]; then
        say "$ended; starts again"
        continue
    else
        if ((seconds >= 3600)); then crashes=0 pause=5; fi
        crashes=$((crashes + 1))
        if ((crashes <= restarts)); then
            say "$ended; starts again in $pause s (crash $crashes, of at most $restarts in a row)"
            for ((waited = 0; waited < pause && !stopping; waited++)); do sleep 1 9>&-; done
            pause=$((pause < 160 ? 2 * pause : 300))
            continue
        fi
        say "$ended; ends after $crashes crashes in a row"
    fi
    break
done
exit "$code"
}
