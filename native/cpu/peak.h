/* Arithmetic probes of single instruction sets. */
#ifndef CPU_PEAK_H
#define CPU_PEAK_H
#include <stdbool.h>
#include <stdint.h>

bool peak_vnni_ready(void);
/* Runs `rounds` rounds of VNNI_OPERATIONS int8 operations each; the result only keeps the compiler honest. */
int32_t peak_vnni(int64_t rounds);

enum { VNNI_CHAINS = 12, VNNI_OPERATIONS = VNNI_CHAINS * 64 * 2 };

#endif
