/* Rotary scaling in config.json: "rope_theta" with "rope_scaling" (transformers 4) or all of it in "rope_parameters" (5). */
#include "models/config_rope.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "base/mem.h"

/* One object under reading. */
struct scaling {
    const tp_config_reader *r;
    const tp_json *object;
};

static tp_status need_number(const struct scaling *s, const char *key, bool required, double min, double max, double *out)
{
    return tp_json_need_f64(s->r->ctx, s->r->doc, s->object, key, required, min, max, out);
}

static tp_status need_factor(const struct scaling *s, bool required)
{
    return need_number(s, "factor", required, 1e-3, 1e6, &s->r->config->rope.factor);
}

/* Older files keep it beside rope_scaling; that place wins. */
static tp_status need_original(const struct scaling *s, bool required)
{
    const char *key = "original_max_position_embeddings";
    int64_t *out = &s->r->config->rope.original_max_positions;
    bool top = tp_json_type_of(tp_json_get(s->r->root, key)) != TP_JSON_NULL;
    return tp_json_need_i64(s->r->ctx, s->r->doc, top ? s->r->root : s->object, key, required, 1, TP_LIMIT_POSITIONS, out);
}

static tp_status read_dynamic(const struct scaling *s)
{
    if (s->r->config->head_dim <= 2)
        return tp_config_refuse(s->r, s->object, TP_UNSUPPORTED, "dynamic rope scaling needs a head size above 2");
    return need_factor(s, true);
}

static tp_status read_llama3(const struct scaling *s)
{
    tp_rope_config *rope = &s->r->config->rope;
    TP_TRY(need_factor(s, true));
    TP_TRY(need_original(s, true));
    TP_TRY(need_number(s, "low_freq_factor", true, 1e-6, 1e6, &rope->low_freq_factor));
    TP_TRY(need_number(s, "high_freq_factor", true, 1e-6, 1e6, &rope->high_freq_factor));
    if (rope->high_freq_factor > rope->low_freq_factor) return TP_OK;
    return tp_config_refuse(s->r, tp_json_get(s->object, "high_freq_factor"), TP_FORMAT,
                            "high_freq_factor: expected more than low_freq_factor, got %g and %g", rope->high_freq_factor,
                            rope->low_freq_factor);
}

static tp_status read_yarn(const struct scaling *s)
{
    tp_rope_config *rope = &s->r->config->rope;
    TP_TRY(need_factor(s, true));
    rope->original_max_positions = s->r->config->max_positions;
    TP_TRY(need_original(s, false));
    TP_TRY(need_number(s, "beta_fast", false, 0, 1e6, &rope->beta_fast));
    TP_TRY(need_number(s, "beta_slow", false, 0, 1e6, &rope->beta_slow));
    TP_TRY(need_number(s, "attention_factor", false, 1e-6, 1e6, &rope->attention_factor));
    TP_TRY(need_number(s, "mscale", false, 0, 1e6, &rope->mscale));
    TP_TRY(need_number(s, "mscale_all_dim", false, 0, 1e6, &rope->mscale_all_dim));
    rope->truncate = true;
    TP_TRY(tp_json_need_bool(s->r->ctx, s->r->doc, s->object, "truncate", false, &rope->truncate));
    if (rope->beta_fast == 0) rope->beta_fast = 32; /* absent, null and 0 mean the paper's values */
    if (rope->beta_slow == 0) rope->beta_slow = 1;
    if (rope->theta > 1) return TP_OK;
    return tp_config_refuse(s->r, s->object, TP_UNSUPPORTED, "yarn needs a rope_theta above 1, got %g", rope->theta);
}

static tp_status read_stretch(const struct scaling *s, const char *key, float *out)
{
    int64_t half = s->r->config->head_dim / 2;
    const tp_json *list = tp_json_get(s->object, key);
    if (tp_json_type_of(list) != TP_JSON_ARRAY || tp_json_count(list) != (size_t)half)
        return tp_config_refuse(s->r, list != NULL ? list : s->object, TP_FORMAT, "%s: expected a list of %lld numbers", key,
                                (long long)half);
    for (int64_t i = 0; i < half; i++) {
        double value;
        if (!tp_json_f64(tp_json_at(list, (size_t)i), &value) || !(value >= 1e-6 && value <= 1e9))
            return tp_config_refuse(s->r, tp_json_at(list, (size_t)i), TP_FORMAT, "%s: expected a number from 1e-6 to 1e9",
                                    key);
        out[i] = (float)value;
    }
    return TP_OK;
}

static tp_status read_longrope(const struct scaling *s)
{
    tp_model_config *c = s->r->config;
    TP_TRY(need_original(s, true));
    c->rope.factor = (double)c->max_positions / (double)c->rope.original_max_positions;
    TP_TRY(need_factor(s, false));
    TP_TRY(need_number(s, "attention_factor", false, 1e-6, 1e6, &c->rope.attention_factor));
    c->rope.factors = tp_alloc(s->r->ctx, (size_t)c->head_dim, sizeof(float));
    if (c->rope.factors == NULL) return TP_NOMEM;
    TP_TRY(read_stretch(s, "short_factor", c->rope.factors));
    return read_stretch(s, "long_factor", c->rope.factors + c->head_dim / 2);
}

static tp_status read_type(const struct scaling *s, tp_rope_type *type)
{
    static const struct {
        const char *name;
        tp_rope_type type;
    } types[] = {{"default", TP_ROPE_DEFAULT}, {"linear", TP_ROPE_LINEAR}, {"dynamic", TP_ROPE_DYNAMIC},
                 {"yarn", TP_ROPE_YARN},       {"llama3", TP_ROPE_LLAMA3}, {"longrope", TP_ROPE_LONGROPE}};
    const char *key = tp_json_type_of(tp_json_get(s->object, "rope_type")) != TP_JSON_NULL ? "rope_type" : "type";
    bool scales = tp_json_get(s->object, "factor") != NULL; /* a factor without a type has no meaning of its own */
    tp_span name = tp_span_of("default");
    TP_TRY(tp_json_need_string(s->r->ctx, s->r->doc, s->object, key, scales, &name));
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        if (!tp_span_is(name, types[i].name)) continue;
        *type = types[i].type;
        return TP_OK;
    }
    return tp_config_refuse(
        s->r, tp_json_get(s->object, key), TP_UNSUPPORTED,
        "rope scaling \"%.*s\" is not supported; available: default, linear, dynamic, yarn, llama3, longrope", (int)name.len,
        name.data);
}

static tp_status check_object(const struct scaling *s)
{
    for (size_t i = 0; i < tp_json_count(s->object); i++)
        if (tp_json_type_of(tp_json_at(s->object, i)) == TP_JSON_OBJECT)
            return tp_config_refuse(s->r, tp_json_at(s->object, i), TP_UNSUPPORTED,
                                    "rotary parameters per layer type are not supported");
    return TP_OK;
}

static tp_status check_partial(const tp_config_reader *r, const tp_json *object)
{
    double partial = 1;
    TP_TRY(tp_json_need_f64(r->ctx, r->doc, object, "partial_rotary_factor", false, 0, 1, &partial));
    if (partial == 1) return TP_OK;
    return tp_config_refuse(r, tp_json_get(object, "partial_rotary_factor"), TP_UNSUPPORTED,
                            "partial_rotary_factor: only 1 is supported, got %g", partial);
}

tp_status tp_config_read_rope(const tp_config_reader *r)
{
    static tp_status (*const readers[])(const struct scaling *) = {[TP_ROPE_DYNAMIC] = read_dynamic,
                                                                   [TP_ROPE_YARN] = read_yarn,
                                                                   [TP_ROPE_LLAMA3] = read_llama3,
                                                                   [TP_ROPE_LONGROPE] = read_longrope};
    tp_rope_config *rope = &r->config->rope;
    const char *key =
        tp_json_type_of(tp_json_get(r->root, "rope_parameters")) != TP_JSON_NULL ? "rope_parameters" : "rope_scaling";
    struct scaling s = {r, tp_json_get(r->root, key)};
    rope->theta = 10000;
    TP_TRY(tp_json_need_f64(r->ctx, r->doc, r->root, "rope_theta", false, 1e-3, 1e15, &rope->theta));
    TP_TRY(check_partial(r, r->root));
    if (tp_json_type_of(s.object) == TP_JSON_NULL) return TP_OK;
    if (tp_json_type_of(s.object) != TP_JSON_OBJECT)
        return tp_config_refuse(r, s.object, TP_FORMAT, "%s: expected an object, got %s", key,
                                tp_json_type_name(tp_json_type_of(s.object)));
    TP_TRY(check_object(&s));
    TP_TRY(check_partial(r, s.object));
    TP_TRY(need_number(&s, "rope_theta", false, 1e-3, 1e15, &rope->theta));
    TP_TRY(read_type(&s, &rope->type));
    if (rope->type == TP_ROPE_DEFAULT) return TP_OK;
    if (rope->type == TP_ROPE_LINEAR) return need_factor(&s, true);
    return readers[rope->type](&s);
}
