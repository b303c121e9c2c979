#!/usr/bin/env bash
# Process 1 of a pod of render.py's JobSet, started with EXTRA URL COMMIT COMMAND...
#
# Gets the code (if URL is not empty), sets it up, and ends with the exit code of COMMAND. TERM reaches what is running.
# Kubernetes replaces a name in round brackets after a dollar sign, and two of those signs: there are none here.
set -u
extra=$1 url=$2 commit=$3
shift 3

stopped='' child=''
trap 'stopped=1; [[ ! $child ]] || kill -TERM "$child" 2>/dev/null' TERM INT
exec {never}<> <(:) # nothing comes from it
run() {
    [[ $stopped ]] && exit 75 # there is nothing to save yet
    "$@" {never}>&- &
    child=$!
    [[ $stopped ]] && kill -TERM "$child"
    # Not by `wait`: if a signal comes in it just as the command ends, bash 5.2 loses the code, and waits for ever.
    while kill -0 "$child" 2>/dev/null; do read -rt 0.2 -u "$never" _; done
    wait "$child"
    code=$?
    child=''
    return "$code"
}
# shellcheck disable=SC2317 # called by run
clone() {
    mkdir -p ~/llm_jax && cd ~/llm_jax && git init -q && git fetch -q --depth=1 "$url" "$commit" &&
        git checkout -q "$commit"
}

if [[ $url ]]; then
    run clone || { run sleep 10; run clone; } || { run sleep 30; run clone; } || exit 70
fi
cd ~/llm_jax || { echo 'pod.sh: no ~/llm_jax in this image; build it by launch/gke/Dockerfile' >&2; exit 78; }
run launch/setup_vm.sh --extra="$extra" || { [[ $stopped ]] && exit 75; exit "$code"; }
run launch/run_host.sh --restarts=0 -- "$@"
ended=$code

# A crash is told late. If it came from another pod that was preempted, the end of that one is seen first, and the
# restart is not counted.
[[ $stopped || $ended == 0 || $ended == 75 || $ended == 78 ]] || run sleep 15
exit "$ended"
