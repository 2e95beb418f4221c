/* adaptrt.h: the one ABI between adaptrt and a native backend (spec/backend.md).
 *
 *   load(program, options) -> executable      tensors stay where they are: usually a mapped file
 *   reserve(pages)                            grow the paged KV cache
 *   attach / detach                           an adapter lowered to the normal form
 *   step(batch) -> logits                     one call for a ragged batch of many sequences
 *
 * A backend is one table of functions, returned by one exported symbol. Functions return ADRT_OK or an error code
 * and fill `error`; they never abort, never print and never read past the sizes they are given. A tensor's bytes are
 * laid out as spec/format.md says ("Data types"). An executable is used by one thread at a time.
 *
 * cffi reads everything between the two marks below.
 */
#ifndef ADAPTRT_H
#define ADAPTRT_H
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
/* cffi: begin */

#define ADRT_ABI_VERSION 3
#define ADRT_MESSAGE_BYTES 512

enum adrt_code {
  ADRT_OK = 0,
  ADRT_BAD_ARGUMENT = 1, /* a size, index, shape or value does not fit */
  ADRT_NO_MEMORY = 2,
  ADRT_UNAVAILABLE = 3, /* no such device, driver or instruction set here */
  ADRT_DEVICE_FAULT = 4
};

typedef struct {
  int32_t code;
  char message[ADRT_MESSAGE_BYTES]; /* one line, zero-terminated, with every number */
} adrt_error;

enum adrt_dtype { ADRT_F32 = 0, ADRT_F16 = 1, ADRT_BF16 = 2, ADRT_INT8 = 3, ADRT_NF4 = 4 };

typedef struct {
  int32_t dtype;
  int64_t rows, cols; /* a vector is one row */
  const void *data;   /* row-major */
  uint64_t bytes;
} adrt_tensor;

/* The closed set of operations (spec/program.md). T = tokens in the batch, [w] = width of a register. */
enum adrt_op_kind {
  ADRT_EMBED = 1,     /* out[T,cols] = weight[token]                               target: adds U (d * V[:, token]) */
  ADRT_NORM = 2,      /* out = a / sqrt(mean(a^2) + value[0]) * weight             RMS norm; target: g_out only */
  ADRT_LINEAR = 3,    /* out[T,rows] = weight[rows,cols] a[T,cols] + bias          target: the normal form */
  ADRT_ROPE = 4,      /* out = a rotated, halves paired; weight = f32 inverse frequencies [head_dim/2];
                         cos and sin are multiplied by value[0]; `heads` heads of `head_dim` */
  ADRT_ATTENTION = 5, /* stores b (k) and c (v) in the pages of `layer`, then causal softmax(value[0] q k^T) v;
                         scores are capped to value[1] * tanh(s / value[1]) when value[1] > 0 */
  ADRT_GATED = 6,     /* out = activation(a) * b, activation by `mode` */
  ADRT_ADD = 7,       /* out = a + b */
  ADRT_SCALE = 8,     /* out = a * value[0], then capped to value[1] * tanh(. / value[1]) when value[1] > 0 */
  ADRT_LOGITS = 9     /* logits[n_logits,rows] = weight[rows,cols] a[logit_rows] + bias, the last operation */
};

enum adrt_activation { ADRT_SILU = 0, ADRT_GELU_TANH = 1 };

typedef struct {
  int32_t kind;
  int32_t out, a, b, c;  /* registers; -1 = none */
  int32_t weight, bias;  /* tensors; -1 = none */
  int32_t target;        /* attach point; -1 = none */
  int32_t layer;         /* KV layer of ATTENTION */
  int32_t heads, kv_heads, head_dim;
  int32_t mode;
  float value[2];
} adrt_op;

typedef struct {
  int32_t n_registers;
  const int64_t *register_widths; /* float32 values per token */
  int32_t n_tensors;
  const adrt_tensor *tensors;
  int32_t n_ops;
  const adrt_op *ops;
  int32_t n_targets; /* attach points 0 .. n_targets-1, each named by exactly one op */
} adrt_program;

enum adrt_precision { ADRT_EXACT = 0, ADRT_FAST = 1 };
enum adrt_isa {
  ADRT_ISA_AUTO = 0,
  ADRT_ISA_PORTABLE = 1,
  ADRT_ISA_AVX2 = 2,
  ADRT_ISA_AVX512 = 3,
  ADRT_ISA_AVX512_VNNI = 4,
  ADRT_ISA_NEON = 5,
  ADRT_ISA_NEON_DOT = 6,
  ADRT_ISA_AVX_VNNI = 7
};

typedef struct {
  int32_t threads;     /* >= 1, the caller's thread included */
  int32_t precision;   /* adrt_precision */
  int32_t kv_dtype;    /* ADRT_F16 or ADRT_F32 */
  int32_t page_tokens; /* tokens in a KV page, a power of two */
  int32_t isa;         /* adrt_isa; CPU only */
  int32_t device;      /* which one of several, from 0; 0 on the CPU */
  uint64_t gpu_memory; /* bytes of the device's memory that may be used, 0: all there is; 0 on the CPU */
} adrt_options;

/* The adapter normal form (spec/adapters.md):  y = g_out * [ W R(g_in * x) + sum_k scale_k T_k(x) ] + bias + c
 * A stack is applied in order: each adapter's g_in, then its R, act on the input that W sees; its terms add to what was
 * accumulated so far and its g_out multiplies all of that (and, when it scales the bias, the bias so far); the op's
 * bias and every c are added last. Equal data pointers mean shared tensors. Memory stays the caller's until detach. */
enum adrt_term_kind {
  ADRT_LOW_RANK = 0, /* e * U (d * (V x)): u [>= out, rank], v [rank, >= in], what lies beyond is ignored; u without data
                        is the identity, rank = out. f32, f16, bf16; or int8, nf4 with exact sizes, u then stored
                        transposed [rank, out]. On EMBED, V x is the column of V of the token */
  ADRT_SPARSE = 1,   /* row r of the weight (on EMBED: of the table) changes by values[k] at columns[k],
                        row_start[r] <= k < row_start[r + 1]; columns rise in a row */
  ADRT_KRONECKER = 2 /* (u kron v) x: u [a, b], v [c, d] f32, f16 or bf16, out = a c, in = b d; not on EMBED */
};

typedef struct {
  int32_t kind;
  float scale;
  adrt_tensor u, v;
  const float *d; /* LOW_RANK: [rank] or NULL */
  const float *e; /* LOW_RANK: [out] or NULL */
  int64_t n_values; /* SPARSE, and the three arrays below it */
  const int32_t *row_start; /* [rows + 1] */
  const int32_t *columns;   /* [n_values] */
  const float *values;      /* [n_values] */
} adrt_term;

typedef struct {
  int32_t target;
  int32_t n_terms;
  const adrt_term *terms;
  const float *g_in;      /* [in] or NULL */
  const float *rotation;  /* [in / rotation_block][rotation_block][rotation_block] or NULL; x'_j = R_j x_j; not on EMBED */
  int64_t rotation_block;
  const float *g_out;     /* [out] or NULL */
  const float *c;         /* [out] or NULL */
  int32_t scales_bias;
} adrt_attachment;

/* A run is consecutive tokens of one sequence that share an adapter stack. Runs of one sequence may share pages. */
typedef struct {
  int32_t n_tokens;
  const int32_t *tokens;      /* [n_tokens] */
  const int32_t *positions;   /* [n_tokens], rising by one inside a run */
  int32_t n_runs;
  const int32_t *run_start;   /* [n_runs + 1] into tokens */
  const int32_t *page_start;  /* [n_runs + 1] into pages */
  const int32_t *pages;       /* position p of a run lives in its page p / page_tokens */
  const int32_t *stack_start; /* [n_runs + 1] into stacks */
  const int32_t *stacks;      /* handles from attach, in stacking order */
  int32_t n_logits;
  const int32_t *logit_rows;  /* [n_logits] into tokens */
  float *logits;              /* [n_logits, vocabulary], written */
} adrt_batch;

typedef struct adrt_executable adrt_executable;

/* What the hardware under an executable does at best, measured when asked for; 0 where nothing is known. */
typedef struct {
  double bytes_per_second;      /* the CPU's threads reading memory; a GPU copying its own, reads and writes counted */
  double operations_per_second; /* of the arithmetic that products use; a multiply and an add are two */
  uint64_t device_bytes;        /* in use of the device's own memory */
  double bus_bytes_per_second;  /* from pinned memory of the host to the device */
  uint64_t streamed_bytes;      /* of weights that come that way in every step */
} adrt_peaks;

/* What the reads of a step take at this moment, without its arithmetic. */
typedef struct {
  double bytes_per_second; /* of the weights */
  double shared_seconds;   /* to read what targets of an adapter share, between the weights of the others */
} adrt_reads;

typedef struct {
  uint32_t abi_version;
  uint32_t struct_bytes; /* sizeof(adrt_backend): slots past it are absent */
  const char *name;
  int (*probe)(adrt_error *error); /* can this backend run here? */
  int (*load)(const adrt_program *program, const adrt_options *options, adrt_executable **out, adrt_error *error);
  void (*unload)(adrt_executable *executable);
  int (*reserve)(adrt_executable *executable, int32_t n_pages, adrt_error *error); /* pages 0 .. n_pages-1 exist after */
  int (*attach)(adrt_executable *executable, int32_t n, const adrt_attachment *attachments, int32_t *handle,
                adrt_error *error);
  int (*detach)(adrt_executable *executable, int32_t handle, adrt_error *error);
  int (*step)(adrt_executable *executable, const adrt_batch *batch, adrt_error *error);
  const char *(*describe)(const adrt_executable *executable); /* the kernels in use, one line */
  int (*peaks)(adrt_executable *executable, adrt_peaks *peaks, adrt_error *error); /* or NULL */
  /* These adapters will be named soon: bring them near while the next step runs. NULL where that means nothing. */
  int (*prefetch)(adrt_executable *executable, int32_t n, const int32_t *handles, adrt_error *error);
  /* Do the reads of a step with these adapters. NULL where no one can say. */
  int (*read_step)(adrt_executable *executable, int32_t n, const int32_t *handles, adrt_reads *reads, adrt_error *error);
} adrt_backend;

const adrt_backend *adrt_cpu_backend(void);

/* The quantizers of adaptrt.quant in C, equal bit for bit (facts and rules: spec/format.md). Single-threaded.
 * nf4: x[n] -> codes[ceil(n/2)], absmax[ceil(n/64)]; the first element must start a block and, unless it is the
 * tensor's end, n must be a multiple of 64. Returns ADRT_BAD_ARGUMENT for a NaN or infinity, its index in *bad. */
int adrt_quantize_nf4(const float *x, int64_t n, uint8_t *codes, float *absmax, int64_t *bad);
/* absmax[n_blocks] minus offset -> q[n_blocks], nested[ceil(n_blocks/256)] */
int adrt_quantize_absmax(const float *absmax, int64_t n_blocks, float offset, uint8_t *q, float *nested);
/* x[rows,cols] -> codes[rows*cols], bfloat16 scales[rows*ceil(cols/64)] */
int adrt_quantize_int8(const float *x, int64_t rows, int64_t cols, int8_t *codes, uint16_t *scales, int64_t *bad);

/* cffi: end */
#ifdef __cplusplus
}
#endif
#endif
