/* The one place that knows the version. */
#ifndef TP_BASE_VERSION_H
#define TP_BASE_VERSION_H

#define TP_VERSION "0.1.0"

#endif
