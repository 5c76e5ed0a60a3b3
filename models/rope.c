/* Rotary frequencies, and how families stretch them to longer contexts.
 *
 *     f_i = theta^(-2i/d), i = 0 .. d/2 - 1, d = head_dim          Su et al. 2021, arXiv:2104.09864
 *
 * transformers computes tensors in f32 and plain numbers in f64; so do we, because a frequency that is one rounding off
 * turns the angles of distant positions. */
#include "models/config.h"

#include <math.h>

#define PI 3.14159265358979323846

/* theta^(2i/d) */
static float period(double theta, int64_t i, int64_t dim)
{
    return powf((float)theta, (float)(2 * i) / (float)dim);
}

static void plain(double theta, int64_t dim, float *f)
{
    for (int64_t i = 0; i < dim / 2; i++) f[i] = 1.0f / period(theta, i, dim);
}

/* The base grows with the part of the batch that lies beyond the trained length ("NTK-aware" scaling). */
static double dynamic_theta(const tp_model_config *config, int64_t length, int64_t dim)
{
    float trained = (float)config->max_positions, now = length > config->max_positions ? (float)length : trained;
    float growth = (float)config->rope.factor * now / trained - (float)(config->rope.factor - 1);
    return (double)((float)config->rope.theta * powf(growth, (float)((double)dim / (double)(dim - 2))));
}

/* Wavelengths beyond the trained context are stretched, short ones kept, and those between are mixed (Llama 3.1). */
static void llama3(const tp_rope_config *rope, int64_t half, float *f)
{
    float factor = (float)rope->factor, low = (float)rope->low_freq_factor;
    double context = (double)rope->original_max_positions;
    float longest = (float)(context / rope->low_freq_factor), shortest = (float)(context / rope->high_freq_factor);
    for (int64_t i = 0; i < half; i++) {
        float wavelength = (float)(2 * PI) / f[i];
        float smooth = ((float)context / wavelength - low) / (float)(rope->high_freq_factor - rope->low_freq_factor);
        if (wavelength > longest)
            f[i] /= factor;
        else if (!(wavelength < shortest))
            f[i] = (1 - smooth) * f[i] / factor + smooth * f[i];
    }
}

static double yarn_magnitude(double factor, double weight)
{
    return factor <= 1 ? 1 : 0.1 * weight * log(factor) + 1;
}

/* Channel whose wave turns `turns` times over the trained context. */
static double yarn_channel(const tp_rope_config *rope, double turns, int64_t dim)
{
    return (double)dim * log((double)rope->original_max_positions / (turns * 2 * PI)) / (2 * log(rope->theta));
}

/* Fast channels keep their frequency, slow ones are interpolated, a ramp lies between: Peng et al. 2023, arXiv:2309.00071. */
static void yarn(const tp_rope_config *rope, int64_t dim, float *f)
{
    double low = yarn_channel(rope, rope->beta_fast, dim), high = yarn_channel(rope, rope->beta_slow, dim);
    if (rope->truncate) {
        low = floor(low);
        high = ceil(high);
    }
    if (low < 0) low = 0;
    if (high > (double)(dim - 1)) high = (double)(dim - 1);
    if (low == high) high += 0.001;
    for (int64_t i = 0; i < dim / 2; i++) {
        float ramp = ((float)i - (float)low) / (float)(high - low);
        float keep = 1.0f - (ramp < 0 ? 0.0f : ramp > 1 ? 1.0f : ramp);
        float p = period(rope->theta, i, dim);
        f[i] = 1.0f / ((float)rope->factor * p) * (1.0f - keep) + 1.0f / p * keep;
    }
}

static double attention_factor(const tp_rope_config *rope)
{
    if (rope->attention_factor != 0) return rope->attention_factor;
    if (rope->type == TP_ROPE_LONGROPE)
        return rope->factor <= 1 ? 1 : sqrt(1 + log(rope->factor) / log((double)rope->original_max_positions));
    if (rope->mscale != 0 && rope->mscale_all_dim != 0)
        return yarn_magnitude(rope->factor, rope->mscale) / yarn_magnitude(rope->factor, rope->mscale_all_dim);
    return yarn_magnitude(rope->factor, 1);
}

void tp_rope_frequencies(const tp_model_config *config, int64_t length, float *inv_freq, float *factor)
{
    const tp_rope_config *rope = &config->rope;
    int64_t dim = config->head_dim, half = dim / 2;
    *factor = 1;
    plain(rope->theta, dim, inv_freq);
    switch (rope->type) {
    case TP_ROPE_DEFAULT: break;
    case TP_ROPE_LINEAR:
        for (int64_t i = 0; i < half; i++) inv_freq[i] /= (float)rope->factor;
        break;
    case TP_ROPE_DYNAMIC: plain(dynamic_theta(config, length, dim), dim, inv_freq); break;
    case TP_ROPE_YARN:
        yarn(rope, dim, inv_freq);
        *factor = (float)attention_factor(rope);
        break;
    case TP_ROPE_LLAMA3: llama3(rope, half, inv_freq); break;
    case TP_ROPE_FACTORS:
        for (int64_t i = 0; i < half; i++) inv_freq[i] /= rope->factors[i];
        break;
    case TP_ROPE_LONGROPE: {
        const float *stretch = rope->factors + (length > rope->original_max_positions ? half : 0);
        for (int64_t i = 0; i < half; i++) inv_freq[i] = 1.0f / (stretch[i] * period(rope->theta, i, dim));
        *factor = (float)attention_factor(rope);
        break;
    }
    }
}
