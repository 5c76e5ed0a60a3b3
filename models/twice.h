/* Inside models/: loops compiled twice from one source, for AVX2 and for any machine. */
#ifndef TP_MODELS_TWICE_H
#define TP_MODELS_TWICE_H

#define TP_INLINE static inline __attribute__((always_inline))

/* From name_body(arguments), a TP_INLINE function, makes name(arguments), which picks what the machine can run. */
#if defined(__x86_64__)
#define TP_TWICE(result, name, parameters, arguments)                                                                          \
    __attribute__((target("avx2"))) static result name##_avx2 parameters                                                       \
    {                                                                                                                          \
        return name##_body arguments;                                                                                          \
    }                                                                                                                          \
    static result name##_any parameters                                                                                        \
    {                                                                                                                          \
        return name##_body arguments;                                                                                          \
    }                                                                                                                          \
    static result name parameters                                                                                              \
    {                                                                                                                          \
        return __builtin_cpu_supports("avx2") ? name##_avx2 arguments : name##_any arguments;                                  \
    }
#else
#define TP_TWICE(result, name, parameters, arguments)                                                                          \
    static result name parameters                                                                                              \
    {                                                                                                                          \
        return name##_body arguments;                                                                                          \
    }
#endif

#endif
