#!/bin/bash
# What `make install` leaves is usable: a program compiled with pkg-config against the installed library runs, static and shared.
. "$(dirname "$0")/tap.inc"
unset MAKEFLAGS MFLAGS MAKELEVEL BUILD CFLAGS # an ordinary build, whatever the suite runs as
root=$scratch/root

run_make() { make --no-print-directory -j2 "$@"; }
pc() { PKG_CONFIG_SYSROOT_DIR=$root PKG_CONFIG_PATH=$root/usr/lib/pkgconfig pkg-config "$@" tapeft; }

cat >"$scratch/program.c" <<'EOF'
#include <base/dtype.h>
#include <base/status.h>
#include <string.h>

int main(void)
{
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    return strcmp(tp_status_name(TP_OK), "") == 0 || ctx.status != TP_OK;
}
EOF
compile_shared() { read -ra flags < <(pc --cflags --libs) && gcc -o "$scratch/shared" "$scratch/program.c" "${flags[@]}"; }
compile_static() {
    read -ra flags < <(pc --cflags) && read -ra libs < <(pc --static --libs-only-other --libs-only-l | sed 's/-ltapeft//') &&
        gcc -o "$scratch/static" "$scratch/program.c" "${flags[@]}" "$root/usr/lib/libtapeft.a" "${libs[@]}"
}
files_left() { [ -n "$(find "$root" -type f -o -type l)" ]; }

check "make all" run_make all
check "only tp_ names are exported, no writable data" scripts/check_symbols build
check "install" run_make install PREFIX=/usr DESTDIR="$root"
check "the installed command runs" "$root/usr/bin/tapeft" help
check "compiling against the shared library" compile_shared
check "running with it" env LD_LIBRARY_PATH="$root/usr/lib" "$scratch/shared"
check "compiling against the static library" compile_static
check "running it" "$scratch/static"
check "uninstall" run_make uninstall PREFIX=/usr DESTDIR="$root"
check_exit "nothing is left" 1 files_left
finish
