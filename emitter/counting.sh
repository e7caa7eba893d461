#!/bin/sh
# Runs rustc for a build in which candle-mi counts the branches that it takes (candle_mi_parity/candidate/branches.py).
# candle is not instrumented, as it would be by RUSTFLAGS, which would make its kernels slow. The emitter is, because
# candle-mi's generic functions are compiled with it.
case " $* " in
*" --crate-name candle_mi "* | *" --crate-name parity_emitter "*)
    # The counters must lie where the file is mapped, threads must not lose counts, and the linker must not leave out
    # the part of a crate that nothing calls.
    set -- "$@" -C instrument-coverage -C llvm-args=-runtime-counter-relocation \
        -C llvm-args=-instrprof-atomic-counter-update-all -C codegen-units=1
    ;;
esac
exec ${PARITY_WRAPPED:+"$PARITY_WRAPPED"} "$@"
