# Stages that are skipped when complete, for the demo and the reproductions. Sourced, not run.
#
# The caller sets RUN, the folder of a run. No state but files: $RUN/done/NAME says that a stage ran to its end, and holds
# how long it took.

PROGRAM=$(basename "$0")

fail() { echo "$PROGRAM: error: $1" >&2; exit 2; }

# begin SETTINGS: makes $RUN and refuses to mix two runs in it.
begin() {
    mkdir -p "$RUN/done"
    if [[ -e $RUN/settings && $(<"$RUN/settings") != "$1" ]]; then
        fail "$RUN holds a run with other settings ($(<"$RUN/settings")); delete it or choose another folder with --out"
    fi
    echo "$1" >"$RUN/settings"
}

# show COMMAND...: the command as one can type it.
show() {
    local word line='$'
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_./:=,@+-]+$ ]]; then line+=" $word"; else line+=" \"$word\""; fi
    done
    printf '\n%s\n' "$line"
}

# stage NAME COMMAND...: runs the command unless it ran to its end before.
stage() {
    local name=$1 begin=$SECONDS
    shift
    if [[ -e $RUN/done/$name ]]; then return; fi
    show "$@"
    "$@"
    echo "$((SECONDS - begin)) s" >"$RUN/done/$name"
}
