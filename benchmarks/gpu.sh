#!/bin/bash
# All that a machine with a GPU is asked, in one go and with nobody watching: the tests that need a GPU, then
# benchmarks/gpu.py. Needs no argument. Each part has a timeout; what they say and measure is in one folder.
#   OUT=data/gpu-results   the folder         PYTHON=python3     with the libraries, or PYTHONPATH=/tmp/site
#   BUDGET=540             seconds in all     TEST_SECONDS=120   of them for the tests, which run all at once
#   BACK=                  another folder, not in OUT, for where little can be taken home: it gets the few files that
#                          matter and one archive of the others, every 10 s and at the end
set -u
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-data/gpu-results} PYTHON=${PYTHON:-python3} BUDGET=${BUDGET:-540} TEST_SECONDS=${TEST_SECONDS:-120}
BACK=${BACK:-}
[ -z "${PYTHONPATH:-}" ] && [ -d /tmp/site ] && export PYTHONPATH=/tmp/site
export REQUIRE_GPU=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
ulimit -c 0 # a core file of a process on a card takes many GB and a minute
mkdir -p "$OUT/tests"
rm -f "$OUT/tests.txt" # of an earlier run

keep() { # each file whole or not at all; what is large is left
    local name
    for name in results.jsonl table.md tests.txt gpu.txt cases.txt; do
        [ -f "$OUT/$name" ] && cp "$OUT/$name" "$BACK/.$name" && mv "$BACK/.$name" "$BACK/$name"
    done
    (cd "$OUT" && find . -type f -size -4096k -print0 | tar -cz --null -T -) > "$BACK/.rest.tgz" 2> /dev/null
    mv "$BACK/.rest.tgz" "$BACK/rest.tgz"
}

unfinished() { # which tests of a log began and have no verdict, whether pytest ran them or workers did
    awk '{ verdict = /(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)( |$)/ }
        /^(\[gw[0-9]+\] .*)?tests\// && match($0, /tests\/[^ []+::[^ []+(\[[^]]*\])?/) {
            name = substr($0, RSTART, RLENGTH)
            if (verdict) delete open[name]; else open[name]
            next
        }
        verdict && /^[A-Z]+ +\[ *[0-9]+%\]$/ { delete open } # something was printed after the name
        END { for (name in open) print substr(name, index(name, "::") + 2) }' "$1" | paste -s -d ,
}

ends() { # of all that began, when this does
    local pids
    pids=$(jobs -p)
    [ -z "$pids" ] || { kill $pids && wait; } 2> /dev/null
    [ -z "$BACK" ] || keep
}
trap ends EXIT
if [ -n "$BACK" ]; then
    mkdir -p "$BACK"
    while sleep 10; do keep; done > /dev/null 2>&1 &
fi

timeout -k 20 20 nvidia-smi > "$OUT/nvidia-smi.txt" 2>&1
timeout -k 20 60 "$PYTHON" benchmarks/gpu.py --list > "$OUT/cases.txt" 2>&1
about=$(head -n 1 "$OUT/cases.txt") # card, versions, commit
# The clips are drawn on the cores meanwhile; tests are not timed.
timeout -k 20 150 "$PYTHON" benchmarks/gpu.py --parts data --out "$OUT/data" > "$OUT/data.txt" 2>&1 &
data=$!

can=$("$PYTHON" -c 'import pytest, xdist; print("workers", "leave" * (pytest.version_tuple >= (9,)))' 2> /dev/null)
test_file() { # what kills one file's process leaves the others; where there are workers, one test's leaves its file's
    local file=$1 log code said open options=()
    log=$OUT/tests/$(basename "$file" .py).txt
    case $can in *workers*)
        case $file in
            */test_crf_triton.py | */test_dali_pipes.py | */test_fused.py | */test_graph.py) options=(-n 3) ;;
            *) options=(-n 1) ;;
        esac
        ;;
    esac
    # A test that hangs: where it does is printed, and its worker is left, in time for those behind it.
    case $can in *leave*) options+=(-o faulthandler_exit_on_timeout=true) ;; esac
    echo "$about" > "$log"
    trap 'kill $!' TERM
    # SIGINT, as pytest says what it has then.
    COLUMNS=200 timeout -s INT -k 15 "$TEST_SECONDS" "$PYTHON" -m pytest -m "gpu and not slow" -v --tb=short \
        -o faulthandler_timeout=$((TEST_SECONDS * 3 / 5)) -o filterwarnings=default -p no:cacheprovider \
        --durations=5 "${options[@]}" "$file" >> "$log" 2>&1 &
    { wait $!; } 2> /dev/null
    code=$?
    said=$(tail -n 1 "$log" | sed 's/^=* *//; s/ *=*$//')
    open=$(unfinished "$log")
    # 124 and 137 are of `timeout`; over 128 it is a signal.
    echo "$file: exit code $code; ${open:+without a verdict: $open; }$said" | tee -a "$OUT/tests.txt"
}
tests=()
for file in $(grep -l "pytest.mark.gpu" tests/test_*.py); do
    test_file "$file" &
    tests+=($!)
done

# Kernels are compiled beside the tests and kept, so that no figure waits for it. Nothing needs it.
wait "$data"
timeout -k 20 "$TEST_SECONDS" "$PYTHON" benchmarks/gpu.py --parts warm --out "$OUT/warm" > "$OUT/warm.txt" 2>&1 &
warm=$!
wait "${tests[@]}"
kill "$warm" 2> /dev/null
wait "$warm"
failed=$(grep -vc ": exit code 0;" "$OUT/tests.txt")
awk -v failed="$failed" '{
        n = split($0, words, /[ ,;]+/)
        for (i = 2; i <= n; i++) sum[words[i]] += words[i - 1]
    }
    END { printf "all %d files: %d with exit code 0", NR, NR - failed
        printf "; %d passed, %d failed, %d skipped, ", sum["passed"], sum["failed"], sum["skipped"]
        print sum["error"] + sum["errors"] " errors" }' "$OUT/tests.txt" | tee -a "$OUT/tests.txt"

left=$((BUDGET - SECONDS))
[ $left -ge 60 ] || left=60
timeout -k 20 $((left + 15)) "$PYTHON" benchmarks/gpu.py --peers --budget "$left" --out "$OUT" > "$OUT/gpu.txt" 2>&1 &
wait $!
code=$?
cat "$OUT/gpu.txt"
[ "$code" -eq 0 ] && exit $((failed > 0))
exit "$code"
