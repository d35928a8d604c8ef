#!/bin/bash
# One job of GitHub's on this Mac, in an account that is made for it and thrown away after it.
# As root, by launchd, again and again: docs/runner.md.
#
# In $STORE (root's alone): runner/, GitHub's runner unpacked; token, which may register runners;
# environment, what goes into the runner's .env; number, of the last account, which this counts up.
set -euo pipefail

STORE=${STORE:-/usr/local/pagedkv}
ACCOUNTS=${ACCOUNTS:-/Users}
PROGRAMS=${PROGRAMS:-/usr/bin:/bin:/usr/sbin:/sbin:/usr/local/bin}
name=bench
home=$ACCOUNTS/$name

# No number is used twice: what forget does not find belongs to nobody afterwards.
forget() {
    local number=$1
    launchctl bootout "user/$number" 2>/dev/null || true
    pkill -KILL -U "$number" || true
    crontab -u "$name" -r 2>/dev/null || true
    if id "$name" >/dev/null 2>&1; then
        sysadminctl -deleteUser "$name"
    fi
    rm -rf "$home"
    find -x /private/tmp /private/var/tmp /private/var/folders "$ACCOUNTS/Shared" \
        -user "$number" -delete 2>/dev/null || true
}

forget "$(cat "$STORE/number")" # of a job that a power cut ended
number=$(($(cat "$STORE/number") + 1))
echo "$number" >"$STORE/number"
trap 'forget "$number"' EXIT

sysadminctl -addUser "$name" -UID "$number" -shell /bin/bash -home "$home" -password "$(uuidgen)"
createhomedir -c -u "$name" >/dev/null
cp -R "$STORE/runner" "$home/actions-runner"
cp "$STORE/environment" "$home/actions-runner/.env"
chown -R "$name:staff" "$home/actions-runner"

# A configuration for one job; the token that it was asked with stays here.
configuration=$(
    curl --fail --silent --show-error --request POST \
        --header @<(printf 'Authorization: Bearer %s\n' "$(cat "$STORE/token")") \
        --data "{\"name\": \"$name-$number\", \"runner_group_id\": 1,
            \"labels\": [\"self-hosted\", \"macOS\", \"ARM64\"], \"work_folder\": \"_work\"}" \
        "https://api.github.com/repos/$REPOSITORY/actions/runners/generate-jitconfig" |
        /usr/bin/python3 -I -c 'import json, sys; print(json.load(sys.stdin)["encoded_jit_config"])'
)
cd "$home/actions-runner"
sudo -u "$name" env -i HOME="$home" USER="$name" LOGNAME="$name" LANG=en_US.UTF-8 \
    PATH="$PROGRAMS" ./run.sh --jitconfig "$configuration"
