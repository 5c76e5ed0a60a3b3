/* tapeft doctor: what this machine offers and what tapeft makes of it. */
#include <string.h>

#include "backend/backend.h"
#include "base/allowance.h"
#include "base/json.h"
#include "base/version.h"
#include "cli/command.h"
#include "cli/limits.h"

/* {"device": ..., "opens": true, ...} of one device, or why it does not open. */
static tp_status describe(const char *name, tp_buf *out)
{
    tp_ctx ctx;
    tp_device *device;
    tp_ctx_init(&ctx);
    tp_status status = tp_device_open(&ctx, name, 0, &device);
    tp_buf_text(out, "{\"device\": ");
    tp_json_write_string(out, name, strlen(name));
    tp_buf_printf(out, ", \"opens\": %s", status == TP_OK ? "true" : "false");
    if (status == TP_OK) {
        tp_buf_printf(out, ", \"auto_precision\": \"%s\", \"fp16\": %s, \"workspace_bytes\": %llu, ",
                      device->auto_precision == TP_BF16 ? "bf16" : "fp32", device->f16 ? "true" : "false",
                      (unsigned long long)device->workspace_bytes);
        device->backend->describe(device, out);
        tp_device_close(device);
    } else {
        tp_buf_text(out, ", \"why\": ");
        tp_json_write_string(out, ctx.message, strlen(ctx.message));
    }
    tp_buf_char(out, '}');
    return status;
}

/* What the system allows this process. */
static void describe_process(tp_buf *out)
{
    tp_allowance a;
    tp_allowance_read("", &a);
    const struct {
        const char *name;
        uint64_t value;
    } all[] = {{"container_memory_bytes", a.container_bytes},
               {"address_space_bytes", a.address_bytes},
               {"file_bytes", a.file_bytes},
               {"open_files", a.open_files}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        tp_buf_printf(out, "%s\"%s\": ", i > 0 ? ", " : "{", all[i].name);
        if (all[i].value == TP_NO_LIMIT)
            tp_buf_text(out, "null");
        else
            tp_buf_printf(out, "%llu", (unsigned long long)all[i].value);
    }
    tp_buf_char(out, '}');
}

/* "key: value" lines from an object, nested ones indented. */
static void print_object(const tp_json *object, int indent, tp_buf *out)
{
    for (size_t i = 0; i < tp_json_count(object); i++) {
        tp_span key = tp_json_key_at(object, i);
        const tp_json *value = tp_json_at(object, i);
        tp_buf_printf(out, "%*s%.*s:", indent, "", (int)key.len, key.data);
        if (tp_json_type_of(value) == TP_JSON_OBJECT && indent < 8) {
            tp_buf_char(out, '\n');
            print_object(value, indent + 2, out);
            continue;
        }
        tp_buf_char(out, ' ');
        if (tp_json_type_of(value) == TP_JSON_NULL)
            tp_buf_text(out, "none");
        else if (tp_json_type_of(value) == TP_JSON_STRING)
            tp_buf_append(out, tp_json_string(value).data, tp_json_string(value).len);
        else
            tp_json_write(out, value, 0);
        tp_buf_char(out, '\n');
    }
}

static tp_status print_text(tp_ctx *ctx, const tp_buf *json)
{
    tp_json_doc *doc;
    tp_json_options options = {.name = "doctor"};
    tp_buf text;
    TP_TRY(tp_json_parse(ctx, json->data, json->len, &options, &doc));
    const tp_json *devices = tp_json_get(tp_json_root(doc), "devices");
    tp_buf_init(&text, 0);
    tp_buf_printf(&text, "tapeft %s\n", TP_VERSION);
    for (size_t i = 0; i < tp_json_count(devices); i++) {
        tp_buf_char(&text, '\n');
        print_object(tp_json_at(devices, i), 0, &text);
    }
    tp_buf_text(&text, "\nlimits of this process\n");
    print_object(tp_json_get(tp_json_root(doc), "process"), 2, &text);
    tp_buf_text(&text, "\nlimits of tapeft\n");
    print_object(tp_json_get(tp_json_root(doc), "limits"), 2, &text);
    tp_status status = tp_buf_status(ctx, &text, "doctor");
    if (status == TP_OK) status = tp_cli_print(ctx, text.data, text.len);
    tp_buf_free(&text);
    tp_json_free(doc);
    return status;
}

static tp_status run(tp_ctx *ctx, const tp_args *args)
{
    const char *wanted = tp_args_value(args, "device");
    tp_buf json;
    tp_status opened = TP_OK;
    if (wanted != NULL) TP_TRY(tp_cli_check_device(ctx, wanted));
    tp_buf_init(&json, 0);
    tp_buf_printf(&json, "{\"version\": \"%s\", \"devices\": [", TP_VERSION);
    if (wanted != NULL) {
        opened = describe(wanted, &json);
    } else {
        (void)describe("cpu", &json);
        tp_buf_text(&json, ", ");
        (void)describe("cuda", &json); /* a machine without a GPU is fine */
    }
    tp_buf_text(&json, "], \"process\": ");
    describe_process(&json);
    tp_buf_text(&json, ", \"limits\": ");
    tp_cli_write_limits(&json);
    tp_buf_text(&json, "}\n");
    tp_status status = tp_buf_status(ctx, &json, "doctor");
    if (status == TP_OK) status = tp_args_has(args, "json") ? tp_cli_print(ctx, json.data, json.len) : print_text(ctx, &json);
    tp_buf_free(&json);
    if (status == TP_OK && opened != TP_OK) return tp_fail(ctx, TP_DEVICE, "the device \"%s\" does not open", wanted);
    return status;
}

static const tp_flag flags[] = {
    {"device", "NAME", false, false, "auto, cpu, cuda or cuda:N: fails with 4 if it does not open"}, TP_FLAG_JSON, TP_FLAG_END};

const tp_command tp_command_doctor = {"doctor",
                                      "[--device NAME] [--json]",
                                      "what this machine offers: CPU features, BLAS kernel, GPU, memory, limits",
                                      flags,
                                      0,
                                      0,
                                      run};
