#!/usr/bin/env bash
# Builds the images of the Dockerfile with docker or podman, and runs them as deploy/kubernetes and docker-compose.yml do.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat << 'END'
usage: deploy/images.sh [build] [run] [compose]      all three by default

  build     builds every target of the Dockerfile
  run       runs each image read-only, without privileges and with the memory limit of deploy/kubernetes/deployment.yaml:
            it gets ready and healthy, is not root, recognises the example, and ends with code 0 on SIGTERM
  compose   runs docker-compose.yml: the default profile, then `scale` with one replica killed and the other stopped under load

Where no registry can be reached, debootstrap (as root) makes stand-ins for the public images, and the output says so.
Logs are in build/images/. Settings in the environment: ENGINE (docker or podman; default: the one that works), BUILD_OPTIONS and
RUN_OPTIONS for the engine, PORT (18000), PROXY_PORT (18080), IMAGES to recognise under load (1000), and for the stand-ins
DEBIAN_MIRROR (http://deb.debian.org/debian) and PYTHON (python3.11, of which they need 3.11.3 or later).
END
}

WORK=$PWD/build/images
TARGETS=(cpu milvus load gpu)
BASE=$(sed -nE 's/^FROM (.*) AS base$/\1/p' Dockerfile)
MEMORY=$(sed -nE 's/.*limits: \{memory: ([0-9]+[GM])i\}.*/\1/p' deploy/kubernetes/deployment.yaml)
EXAMPLE=demo/example.jpg
EXPECTED='"title":"Flag of Sweden"'
export BUNDLE=$PWD/demo/bundle PORT=${PORT:-18000} PROXY_PORT=${PROXY_PORT:-18080} IMAGES=${IMAGES:-1000}
URL=http://127.0.0.1:$PORT podman_options=() compose=()

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }
seconds_since() { awk -v from="$1" -v to="$EPOCHREALTIME" 'BEGIN { printf "%.1f", to - from }'; }
quietly() { local log=$WORK/$1.log; shift; "$@" > "$log" 2>&1 || fail "failed: $*; see $log"; } # quietly LOG COMMAND...
engine() { "$ENGINE" ${podman_options[@]+"${podman_options[@]}"} "$@"; }
build_image() { nice "$ENGINE" build ${build_options[@]+"${build_options[@]}"} "$@"; }
wait_for() { # wait_for SECONDS COMMAND...
  local deadline=$((SECONDS + $1)); shift
  until "$@" > /dev/null 2>&1; do
    (( SECONDS < deadline )) || fail "timed out waiting for: $*; the containers' logs are in $WORK"
    sleep 0.05
  done
}

choose_engine() {
  local name certificate
  for name in ${ENGINE:-docker podman} none; do
    if command -v "$name" > /dev/null && "$name" info > /dev/null 2>&1; then break; fi
  done
  [[ "$name" != none ]] || fail "neither docker nor podman works here; start Docker's daemon, or install podman, for example" \
    "with 'apt-get install podman runc netavark aardvark-dns debootstrap curl'"
  ENGINE=$name
  read -ra build_options <<< "${BUILD_OPTIONS:-}"; read -ra run_options <<< "${RUN_OPTIONS:-}"
  [[ "$ENGINE" == podman ]] || return 0
  # So that it also works in a virtual machine without all rights: builds in a chroot, and limits that it may set.
  build_options+=(--format docker --isolation chroot --network host)
  run_options+=(--ulimit "nofile=$(ulimit -Sn):$(ulimit -Hn)" --ulimit nproc=4096:4096)
  command -v crun > /dev/null || podman_options+=(--runtime runc)
  # podman's timers for health checks are systemd's.
  [[ -d /run/systemd/system ]] || export DISABLE_HC_SYSTEMD=true
  # Builds use the package index and certificate of pip here, if there is a pip.
  { python3 -m pip config list 2> "$WORK/pip.log" || true; } | awk -F "'" 'BEGIN { print "[global]" }
    match($1, /\.(index-url|extra-index-url|trusted-host|proxy|cert)=$/) && $2 !~ /file:/ {
      key = substr($1, RSTART + 1, RLENGTH - 2); if (!seen[key]++) print key " = " $2
    }' > "$WORK/pip.conf"
  build_options+=(--volume "$WORK/pip.conf:/etc/pip.conf:ro")
  certificate=$(sed -n 's/^cert = //p' "$WORK/pip.conf")
  [[ -z "$certificate" ]] || build_options+=(--volume "$certificate:$certificate:ro")
}

need() { # need IMAGE COMMAND...: pull a public image, or make its stand-in with the command
  local image=$1 log=$WORK/pull.log what; shift
  if timeout 600 "$ENGINE" pull --quiet "$image" > "$log" 2>&1; then say "$image: pulled"; return; fi
  engine image inspect "$image" > /dev/null 2>&1 || "$@" "$image"
  what=$(engine image inspect --format '{{index .Config.Labels "wikiclip.base"}}' "$image")
  say "$image: cannot be pulled (see $log); used here: ${what:-the one stored under that name}"
}

make_base() { # make_base IMAGE: a Debian with a Python
  local python=${PYTHON:-python3.11} root=$WORK/base prefix
  command -v debootstrap > /dev/null || fail "$1 cannot be pulled, and debootstrap is not installed to make a stand-in"
  prefix=$("$python" -c 'import sys; print(sys.base_prefix); sys.exit(not (3, 11, 3) <= sys.version_info < (3, 12))') ||
    fail "the stand-in for $1 needs a Python 3.11.3 or later of 3.11; set PYTHON"
  rm -rf "$root"
  quietly debootstrap nice debootstrap --variant=minbase \
    --include=ca-certificates,libbz2-1.0,libffi8,libncursesw6,libreadline8,libsqlite3-0,libssl3,libuuid1 \
    bookworm "$root" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}"
  tar -C "$prefix" --exclude=site-packages --exclude=__pycache__ --exclude=test --exclude='*.a' -c bin/python3.11 lib |
    tar -C "$root/usr/local" -x
  ln -s python3.11 "$root/usr/local/bin/python3"
  chroot "$root" ldconfig
  quietly python chroot "$root" /usr/local/bin/python3 -c 'import bz2, ctypes, lzma, sqlite3, ssl, zlib'
  tar -C "$root" --exclude='var/cache/apt/*' --exclude='var/lib/apt/lists/*' -c . > "$root.tar"
  quietly import engine import --change 'LABEL wikiclip.base="a STAND-IN made by debootstrap"' "$root.tar" "$1"
  rm -rf "$root" "$root.tar"
}

make_package() { # make_package PACKAGES... IMAGE < INSTRUCTIONS: the base with packages of Debian
  local image=${*: -1} file=$WORK/Dockerfile.stand-in
  { printf 'FROM %s\nRUN apt-get update && apt-get install -y --no-install-recommends %s\n' "$BASE" "${*:1:$#-1}"; cat; } > "$file"
  quietly stand-in build_image -t "$image" -f "$file" "$WORK"
}

build() {
  local target from size
  need "$BASE" make_base
  for target in "${TARGETS[@]}"; do
    from=$EPOCHREALTIME
    quietly "build-$target" build_image --target "$target" -t "wikiclip-serve:$target" .
    size=$(engine image inspect --format '{{.Size}}' "wikiclip-serve:$target")
    say "wikiclip-serve:$target: built in $(seconds_since "$from") s, $((size / 1000000)) MB"
  done
}

hardened() { # hardened NAME OPTIONS... IMAGE ARGUMENTS...: run an image as the manifests do
  local name=wikiclip-check-$1; shift
  engine run --name "$name" --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges --memory "$MEMORY" \
    ${run_options[@]+"${run_options[@]}"} "$@"
}

healthy() { # healthy CONTAINER
  if [[ "$ENGINE" == podman ]]; then podman healthcheck run "$1"; return; fi
  [[ "$(docker inspect --format '{{.State.Health.Status}}' "$1")" == healthy ]]
}
check_example() { # check_example WHAT
  quietly answer curl -fsS -H 'Content-Type: image/jpeg' --data-binary "@$EXAMPLE" "$URL/recognize?top_k=1"
  grep -q "$EXPECTED" "$WORK/answer.log" || fail "$1 does not recognise $EXAMPLE; see $WORK/answer.log"
}

start() { # start TARGET OPTIONS...: start a service and check it
  local target=$1 name=wikiclip-check-$1 from=$EPOCHREALTIME; shift
  quietly start hardened "$target" -d -p "127.0.0.1:$PORT:8000" -v "$BUNDLE:/bundle:ro" "$@" "wikiclip-serve:$target"
  wait_for 120 curl -fsS "$URL/readyz"
  ready_s=$(seconds_since "$from")
  wait_for 60 healthy "$name"
  check_example "$target"
  [[ "$(engine exec "$name" id -u)" == 10001 ]] || fail "$target runs as another user"
  ! engine exec "$name" touch /opt/x 2> /dev/null || fail "$target can write to its own files"
  memory=$(engine stats --no-stream --format '{{.MemUsage}}' "$name")
}

stop() { # stop TARGET
  local name=wikiclip-check-$1 from=$EPOCHREALTIME
  quietly stop engine stop -t 30 "$name"
  stop_s=$(seconds_since "$from")
  [[ "$(engine inspect --format '{{.State.ExitCode}}' "$name")" == 0 ]] || fail "$1 did not end with code 0 on SIGTERM"
  engine rm "$name" > /dev/null
}

run() {
  local target options
  for target in cpu milvus gpu; do
    options=()
    if [[ "$target" == gpu ]]; then
      quietly gpu hardened gpu --rm --entrypoint python wikiclip-serve:gpu -c 'import faiss, onnxruntime'
      if [[ ! -e /dev/nvidia0 ]]; then say "gpu: its libraries load; serving is skipped: no GPU"; continue; fi
      if [[ "$ENGINE" == podman ]]; then options=(--device nvidia.com/gpu=all); else options=(--gpus all); fi
    fi
    start "$target" ${options[@]+"${options[@]}"}
    stop "$target"
    say "$target: ready in $ready_s s, healthy, memory $memory, ended $stop_s s after SIGTERM"
  done
  start cpu
  quietly load hardened load --rm --network container:wikiclip-check-cpu wikiclip-serve:load --headless --only-summary \
    --host http://127.0.0.1:8000 --shape steady --rate 5 --minutes 0.1 --max-failed 0
  stop cpu
  say "load: $(awk '/Aggregated/ { print $2 " requests, " $3 " failed"; exit }' "$WORK/load.log")"
}

container_of() { engine ps -aq --filter name="^wikiclip-check[-_]$1[-_]1\$"; } # container_of SERVICE

# Recognise images through the proxy, with the client's retries, and end a replica after a third of them:
# under_load REPLICA COMMAND..., a command of the engine
under_load() {
  local replica=$1 answers=$WORK/answers.jsonl from client i before after by_replica; shift
  # A JPEG may have anything after its end. So each is an image that no cache has.
  for ((i = 0; i < IMAGES; i++)); do { cat "$EXAMPLE"; echo "$EPOCHREALTIME $i"; } > "$WORK/load/$i.jpg"; done
  : > "$answers"; from=$(date +%s)
  hardened client --rm --network wikiclip-check_default -v "$WORK/load:/images:ro" wikiclip-serve:cpu \
    recognize /images --url http://proxy:8080 --json > "$answers" 2> "$WORK/client.log" &
  client=$!
  a_third_answered() { (( $(wc -l < "$answers") >= IMAGES / 3 )) || ! kill -0 "$client"; }
  wait_for 120 a_third_answered
  before=$(wc -l < "$answers")
  quietly end engine "$@" "$(container_of "$replica")"
  after=$(wc -l < "$answers")
  by_replica=$(engine logs --since "$from" "$(container_of "$replica")" 2>&1 | grep -c 'POST /recognize 200')
  wait "$client" || fail "the client failed; see $WORK/client.log"
  say "scale, $1 $replica: called after $before answers ($by_replica by it), over after $after; $(tail -1 "$WORK/client.log")"
  (( after < IMAGES && by_replica > 0 )) || fail "$replica was not ended under load; raise IMAGES"
  [[ "$(grep -vc '"error"' "$answers")" == "$IMAGES" ]] || fail "not every image was recognised; see $answers"
}

run_compose() {
  local image from replica
  compose=(docker compose)
  if [[ "$ENGINE" == podman ]]; then
    [[ -x "$WORK/venv/bin/pip" ]] || quietly venv python3 -m venv "$WORK/venv"
    [[ -x "$WORK/venv/bin/podman-compose" ]] || quietly venv "$WORK/venv/bin/pip" install podman-compose==1.6.0
    compose=("$WORK/venv/bin/podman-compose" "--podman-args=${podman_options[*]-}" "--podman-run-args=${run_options[*]-}")
  fi
  compose+=(--project-name wikiclip-check --profile scale)
  for image in $(sed -nE 's/^ *image: (.*(redis|nginx).*)$/\1/p' docker-compose.yml); do
    if [[ "$image" == *redis* ]]; then need "$image" make_package redis-server <<< 'WORKDIR /data'; continue; fi
    need "$image" make_package nginx-light gettext-base << 'END'
RUN printf 'pid /tmp/pid; error_log stderr; events {} http { access_log off; client_body_temp_path /tmp/body; proxy_temp_path \
/tmp/proxy; fastcgi_temp_path /tmp/f; uwsgi_temp_path /tmp/u; scgi_temp_path /tmp/s; include /etc/nginx/conf.d/*.conf; }' \
> /etc/nginx/nginx.conf && useradd --uid 101 --no-create-home unprivileged && chown 101 /etc/nginx/conf.d
USER 101
CMD cd /etc/nginx && envsubst '$REPLICA_A $REPLICA_B $LISTEN' < templates/default.conf.template > conf.d/default.conf \
&& exec nginx -g 'daemon off;'
END
  done
  from=$EPOCHREALTIME
  quietly compose "${compose[@]}" up -d service
  wait_for 120 curl -fsS "$URL/readyz"
  check_example "the default profile"
  [[ "$(engine exec "$(container_of redis)" redis-cli dbsize)" -gt 0 ]] || fail "nothing was cached in Redis"
  say "compose, default profile: ready, and an answer cached in Redis, in $(seconds_since "$from") s"
  quietly compose "${compose[@]}" down
  rm -rf "$WORK/load" && mkdir "$WORK/load"
  quietly compose "${compose[@]}" up -d proxy
  wait_for 120 curl -fsS "http://127.0.0.1:$PROXY_PORT/readyz"
  for replica in replica-a replica-b; do wait_for 120 healthy "$(container_of "$replica")"; done
  under_load replica-b kill --signal KILL
  quietly compose "${compose[@]}" start replica-b
  quietly compose "${compose[@]}" restart proxy  # it looks up names only when it starts
  wait_for 120 healthy "$(container_of replica-b)"
  wait_for 120 curl -fsS "http://127.0.0.1:$PROXY_PORT/readyz"
  under_load replica-a stop
}

left_over() { engine ps --all --filter name='^wikiclip-check[-_]' --format '{{.Names}}'; }
clean_up() { # remove containers, also of a run that was killed, and keep their logs
  local name
  for name in $(left_over); do engine logs "$name" > "$WORK/container-$name.log" 2>&1; done
  [[ -z "${compose[*]-}" ]] || quietly compose "${compose[@]}" down --volumes
  for name in $(left_over); do engine rm -f "$name" > /dev/null; done
}

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then usage; exit 0; fi
(( $# )) || set -- build run compose
for step in "$@"; do
  [[ "$step" =~ ^(build|run|compose)$ ]] || { say "error: '$step' is not one of build, run and compose; see --help"; exit 2; }
done
mkdir -p "$WORK"
choose_engine
clean_up
trap clean_up EXIT
for step in "$@"; do if [[ "$step" == compose ]]; then run_compose; else "$step"; fi; done
