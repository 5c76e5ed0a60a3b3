# tapeft: `make help` lists the targets.
CC      ?= gcc
BUILD   ?= build
CFLAGS  ?= -O2 -g
WARN    := -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wvla -Wformat=2 -Wundef -Wpointer-arith -Wcast-qual -Werror
STD     := -std=c11 -D_GNU_SOURCE -I. -fPIC -fvisibility=hidden -ffp-contract=off -pthread
LIBS    := -lyaml -lz -lpcre2-8 -lutf8proc -lnettle -lm -ldl -pthread

# Folders of the library, from the bottom layer up.
DIRS    := base recipes backend backend/cpu quant autograd autograd/ops data models peft adapters inference trainers server
# SRCS may be given on the command line to build a part: make SRCS="base/status.c ..." test
SRCS    ?= $(wildcard $(addsuffix /*.c,$(DIRS)))
OBJS    := $(SRCS:%.c=$(BUILD)/%.o)
CLI     := $(wildcard cli/*.c)
TESTS   ?= $(patsubst %.c,$(BUILD)/%,$(wildcard $(addsuffix /test_*.c,tests $(addprefix tests/,$(DIRS) cli))))

all: $(BUILD)/tapeft $(BUILD)/libtapeft.so

$(BUILD)/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(STD) $(CFLAGS) $(WARN) -MMD -MP -c -o $@ $<

$(BUILD)/libtapeft.a: $(OBJS)
	rm -f $@ && ar rcs $@ $^

$(BUILD)/libtapeft.so: $(OBJS)
	$(CC) -shared -o $@ $^ $(LIBS)

$(BUILD)/tapeft: $(CLI:%.c=$(BUILD)/%.o) $(BUILD)/libtapeft.a
	$(CC) $(CFLAGS) -o $@ $^ $(LIBS)

$(BUILD)/tests/%: $(BUILD)/tests/%.o $(BUILD)/libtapeft.a
	$(CC) $(CFLAGS) -o $@ $^ -lcmocka $(LIBS)

test: $(TESTS)
	@for t in $(TESTS); do $$t || exit 1; done

clean:
	rm -rf $(BUILD)

-include $(shell find $(BUILD) -name '*.d' 2>/dev/null)
.PHONY: all test clean
.PRECIOUS: $(BUILD)/%.o
