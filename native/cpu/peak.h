/* What this machine does at best: the floors under speed, which `adaptrt bench` compares against. */
#ifndef CPU_PEAK_H
#define CPU_PEAK_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "adaptrt.h"

enum { PEAK_THREADS = 256 }; /* at most */

/* Bytes a second at which `threads` threads together read `bytes` of memory once; 0 when out of memory. */
double cpu_read_bandwidth(uint64_t bytes, int32_t threads);
/* Int8 operations a second (a multiply and an add are two) of `threads` threads, everything in registers; 0 when the
 * CPU has no int8 dot product that is probed. */
double cpu_int8_peak(int32_t threads);

/* The table's read_step (adaptrt.h). */
int cpu_read_step(adrt_executable *e, int32_t n, const int32_t *handles, adrt_reads *out, adrt_error *error);

double peak_now(void); /* seconds */
/* Sums into independent lanes so that the loads, not the additions, are the limit. Reads whole 128 bytes. */
uint64_t peak_read(const uint64_t *words, size_t count);

/* The probe of an instruction set. */
bool peak_vnni_ready(void);
/* Runs `rounds` rounds of VNNI_OPERATIONS int8 operations each; the result only keeps the compiler honest. */
int32_t peak_vnni(int64_t rounds);

enum { VNNI_CHAINS = 12, VNNI_OPERATIONS = VNNI_CHAINS * 64 * 2 };

#endif
