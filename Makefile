# tapeft: `make help` lists the targets. Every build mode has its own folder under build/.
VERSION := $(shell sed -n 's/.*TP_VERSION "\(.*\)"/\1/p' base/version.h)
SONAME  := libtapeft.so.0

ifeq ($(origin CC),default)
CC      := gcc
endif
BUILD   ?= build
CFLAGS  ?= -O2 -g
PREFIX  ?= /usr/local
JOBS    ?= $(shell nproc)
SECONDS ?= 60
WARN    := -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wvla -Wformat=2 -Wundef -Wpointer-arith -Wcast-qual -Werror
# gcc lets functions that take a va_list pass their format on; clang would have every one of them annotated.
WARN    += $(if $(findstring clang,$(CC)),-Wno-format-nonliteral)
STD     := -std=c11 -D_GNU_SOURCE -I. -fPIC -fvisibility=hidden -ffp-contract=off -pthread
comma   := ,
DEPS    := -lyaml -lz -lpcre2-8 -lutf8proc -lnettle
# STATIC_DEPS=1 links the third-party libraries into the command, so that it runs where they are not installed.
LIBS    := $(if $(STATIC_DEPS),-Wl$(comma)-Bstatic $(DEPS) -Wl$(comma)-Bdynamic,$(DEPS)) -lm -ldl -pthread

# Hardening, as far as the compiler knows the flags. Not with sanitizers or -O0, which they disturb.
try     = $(shell $(CC) -Werror $(1) -c -x c /dev/null -o /dev/null 2>/dev/null && echo '$(1)')
ifeq ($(findstring -fsanitize,$(CFLAGS))$(findstring -O0,$(CFLAGS)),)
HARDEN  := -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=3 -fstack-protector-strong $(foreach f,-fstack-clash-protection -fcf-protection=full -ftrivial-auto-var-init=zero,$(call try,$(f)))
LDHARD  := -pie -Wl,-z,relro,-z,now,-z,noexecstack
endif
# The entry point of a fuzz target has no header. Zeroing the big tiles that kernels keep on the stack would cost time in every call.
# What is fuzzed are the readers: instrumented for it, some kernels take clang minutes to compile.
FLAGS_tests/fuzz  := -Wno-missing-prototypes
FLAGS_backend/cpu := $(if $(findstring auto-var-init,$(HARDEN)),-ftrivial-auto-var-init=uninitialized) $(if $(findstring fuzzer,$(CFLAGS)),-fno-sanitize=all)

# Folders of the library, from the bottom layer up. SRCS="base/status.c ..." on the command line builds a part of it.
DIRS    := base recipes backend backend/cpu quant autograd autograd/ops data models peft adapters inference trainers server
SRCS    ?= $(wildcard $(addsuffix /*.c,$(DIRS)))
# CUDA=1 (needs nvcc) puts backend/cuda/ in the place of backend/cuda_absent.c, which says when it is opened that there is no CUDA.
# The default is 1 where nvcc is, except under sanitizers, which cannot look into it.
NVCC    ?= $(firstword $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
CUDA    ?= $(if $(findstring -fsanitize,$(CFLAGS)),0,$(if $(NVCC),1,0))
CU      := $(if $(filter 1,$(CUDA)),$(if $(filter backend/cuda_absent.c,$(SRCS)),$(wildcard backend/cuda/*.cu)))
# The runtime is linked in; the driver and cuBLASLt are opened when a GPU is, so that the binary starts without them.
CULIBS  := $(if $(CU),-L$(dir $(NVCC))../lib64 -lcudart_static -lrt)
# Code for Hopper, and PTX that drivers compile for other GPUs from Ampere on; CUDA_ARCHS=all has code for every generation.
CUDA_ARCHS ?= 90a
GENCODE := $(foreach a,$(if $(filter all,$(CUDA_ARCHS)),80 86 89 90a 100 120,$(CUDA_ARCHS)),-gencode arch=compute_$(a)$(comma)code=sm_$(a)) -gencode arch=compute_80$(comma)code=compute_80
NVFLAGS := -std=c++17 -O2 -g -I. $(GENCODE) -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror,-fno-exceptions,-fno-rtti,-fno-threadsafe-statics
OBJS    := $(patsubst %.c,$(BUILD)/%.o,$(if $(CU),$(filter-out backend/cuda_absent.c,$(SRCS)),$(SRCS))) $(CU:%.cu=$(BUILD)/%.cu.o)
CLI     := $(patsubst %.c,$(BUILD)/%.o,$(wildcard cli/*.c))
TESTS   ?= $(patsubst %.c,$(BUILD)/%,$(wildcard $(addsuffix /test_*.c,tests $(addprefix tests/,$(DIRS) cli))))
REPLAYS := $(patsubst tests/fuzz/fuzz_%.c,$(BUILD)/tests/fuzz/replay_%,$(wildcard tests/fuzz/fuzz_*.c))
BENCHES := $(patsubst %.c,$(BUILD)/%,$(wildcard tests/bench/bench_*.c))
HEADERS := $(foreach d,$(filter-out backend/cpu,$(DIRS)),$(wildcard $(d)/*.h $(d)/*.def))

all: $(BUILD)/tapeft $(BUILD)/libtapeft.a $(BUILD)/libtapeft.so ## Build the command and the library (default)

# V=1 shows the commands. A changed flag or list of sources rebuilds what depends on it: the stamp files are rewritten only when their text changes.
COMPILE := $(CC) $(STD) $(CFLAGS) $(HARDEN) $(WARN)
say      = $(if $(V),,@echo '  $@' && )
stamp    = @mkdir -p $(@D); printf '%s\n' $(1) | cmp -s - $@ || printf '%s\n' $(1) >$@
$(BUILD)/.flags: FORCE
	$(call stamp,'$(COMPILE) $(LIBS) $(NVCC)')
$(BUILD)/.nvflags: FORCE
	$(call stamp,'$(NVCC) $(NVFLAGS)')
$(BUILD)/.sources: FORCE
	$(call stamp,$(OBJS) $(CLI))

$(BUILD)/%.o: %.c $(BUILD)/.flags
	@mkdir -p $(@D)
	$(say)$(COMPILE) $(FLAGS_$(patsubst %/,%,$(dir $*))) -MMD -MP -c -o $@ $<

# A token cache is good for the code that made it: its key holds a digest of that code.
TEXT_CODE := $(wildcard data/*.c data/*.h) base/json.c base/text.c
$(BUILD)/data/token_cache.o: FLAGS_data = -DTP_TEXT_CODE='"$(firstword $(shell cat $(TEXT_CODE) | sha256sum))"'
$(BUILD)/data/token_cache.o: $(TEXT_CODE)

$(BUILD)/%.cu.o: %.cu $(BUILD)/.nvflags
	@mkdir -p $(@D)
	$(say)$(NVCC) $(NVFLAGS) -MMD -MP -c -o $@ $<

$(BUILD)/libtapeft.a: $(OBJS) $(BUILD)/.sources
	$(say)rm -f $@ && ar rcs $@ $(OBJS)

$(BUILD)/$(SONAME): $(OBJS) $(BUILD)/.sources scripts/exports.map
	$(say)$(CC) $(CFLAGS) -shared -Wl,-soname,$(SONAME) -Wl,--version-script=scripts/exports.map -Wl,-z,relro,-z,now,-z,noexecstack -Wl,--no-undefined -o $@ $(OBJS) $(LIBS) $(CULIBS)

$(BUILD)/libtapeft.so: $(BUILD)/$(SONAME)
	ln -sf $(SONAME) $@

$(BUILD)/tapeft: $(CLI) $(BUILD)/libtapeft.a
	$(say)$(CC) $(CFLAGS) $(LDHARD) -o $@ $(CLI) $(BUILD)/libtapeft.a $(LIBS) $(CULIBS)

# A test program is one file plus the helpers whose headers it includes (tests/gradcheck.h brings tests/gradcheck.c); those of the
# command line may call the commands.
.SECONDEXPANSION:
helpers  = $(patsubst %.c,$(BUILD)/%.o,$(wildcard $(patsubst %.h,%.c,$(shell grep -so '"tests/[^"]*\.h"' $(1) | tr -d '"'))))
commands = $(if $(filter cli/%,$(1)),$(filter-out %/cli/main.o,$(CLI)))
$(BUILD)/tests/%: $(BUILD)/tests/%.o $$(call helpers,tests/$$*.c) $$(call commands,$$*) $(BUILD)/libtapeft.a
	$(say)$(CC) $(CFLAGS) $(LDHARD) -o $@ $^ -lcmocka $(LIBS) $(CULIBS)

$(BUILD)/tests/fuzz/replay_%: $(BUILD)/tests/fuzz/replay.o $(BUILD)/tests/fuzz/fuzz_%.o $(BUILD)/libtapeft.a
	$(say)$(CC) $(CFLAGS) $(LDHARD) -o $@ $^ $(LIBS) $(CULIBS)

demo: ## From a fresh machine to a trained adapter: setup, build, fetch the model, train, compare
	@MAKEFLAGS= scripts/demo

test: ## Build and run every test (installs what is missing)
	@scripts/setup --quiet
	@+$(MAKE) --no-print-directory $(if $(findstring -j,$(MAKEFLAGS)),,-j$(JOBS)) check

check: $(TESTS) $(REPLAYS) $(BUILD)/tapeft
	@TAPEFT=$(BUILD)/tapeft BUILD=$(BUILD) scripts/run_tests $(TESTS) $(REPLAYS) $(wildcard tests/e2e/*.sh)

asan: ## The whole test suite under the address and undefined-behaviour sanitizers
	@+$(MAKE) test BUILD=build/asan CFLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"

lint: ## Formatting, warnings of gcc and clang, cppcheck, layers, names, banned calls, symbols
	@scripts/setup --quiet --dev
	@MAKEFLAGS= JOBS=$(JOBS) scripts/lint

format: ## Rewrite all C files with clang-format
	git ls-files -co --exclude-standard '*.c' '*.h' '*.cu' | xargs clang-format -i

bench: $(BENCHES) $(BUILD)/tapeft ## Build and run the benchmarks
	@for b in $(BENCHES); do echo "== $$b"; TAPEFT=$(BUILD)/tapeft $$b || exit 1; done

bench-peers: $(BUILD)/tapeft ## Train the same adapter with Hugging Face PEFT beside us and print both speeds
	TAPEFT=$(BUILD)/tapeft scripts/bench_peers

# With clang and its fuzzer; scripts/fuzz sets the flags.
$(BUILD)/tests/fuzz/fuzz_%: $(BUILD)/tests/fuzz/fuzz_%.o $(BUILD)/libtapeft.a
	$(say)$(CC) $(CFLAGS) -fsanitize=fuzzer -o $@ $^ $(LIBS) $(CULIBS)

fuzz: ## Fuzz one reader: make fuzz TARGET=json SECONDS=60
	@MAKEFLAGS= scripts/fuzz $(TARGET) $(SECONDS)

objects: $(OBJS) $(CLI) $(TESTS:%=%.o) $(REPLAYS:$(BUILD)/tests/fuzz/replay_%=$(BUILD)/tests/fuzz/fuzz_%.o)

install: all ## Install under PREFIX (default /usr/local), inside DESTDIR if given
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/lib/pkgconfig
	install -m 755 $(BUILD)/tapeft $(DESTDIR)$(PREFIX)/bin/
	install -m 644 $(BUILD)/libtapeft.a $(BUILD)/$(SONAME) $(DESTDIR)$(PREFIX)/lib/
	ln -sf $(SONAME) $(DESTDIR)$(PREFIX)/lib/libtapeft.so
	for h in $(HEADERS); do install -D -m 644 $$h $(DESTDIR)$(PREFIX)/include/tapeft/$$h; done
	sed 's|@PREFIX@|$(PREFIX)|; s|@VERSION@|$(VERSION)|; s|@LIBS@|$(LIBS) $(CULIBS)|' scripts/tapeft.pc.in >$(DESTDIR)$(PREFIX)/lib/pkgconfig/tapeft.pc

uninstall: ## Remove what install wrote
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/,bin/tapeft lib/libtapeft.a lib/libtapeft.so lib/$(SONAME) lib/pkgconfig/tapeft.pc)
	rm -rf $(DESTDIR)$(PREFIX)/include/tapeft

compile_commands.json: FORCE ## For editors and clang tools
	@scripts/compile_commands '$(COMPILE)' $(SRCS) $(wildcard cli/*.c tests/*.c tests/*/*.c tests/*/*/*.c) >$@

print-config: ## Compiler, flags and libraries that would be used
	@printf '%s\n' 'version    $(VERSION)' 'folder     $(BUILD)' 'compiler   '"$$($(CC) --version | head -n 1)" 'flags      $(COMPILE)' 'libraries  $(LIBS) $(CULIBS)' 'CUDA       $(if $(CU),$(NVCC),not built in$(if $(NVCC),,: no nvcc))'

clean: ## Remove everything that was built
	rm -rf build $(BUILD) compile_commands.json

help: ## This list
	@sed -n 's/^\([a-z_.-]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "%-22s %s\n", $$1, $$2 }'

-include $(shell find $(BUILD) -name '*.d' 2>/dev/null)
FORCE:
.PHONY: all demo test check asan lint format bench bench-peers fuzz objects install uninstall print-config clean help FORCE
.PRECIOUS: $(BUILD)/%.o
.DELETE_ON_ERROR:
