/* What every x86-64 has (SSE2), and every arm64 (NEON). */
#define LANES 4
#define ISA baseline
#include "kernels.h"
