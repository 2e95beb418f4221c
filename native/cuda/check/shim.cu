// The launchers behind C functions, for product_check.py. Sizes and pointers as in product.cuh.
#include "../product.cuh"

using namespace adaptrt;

#define CHECK_API extern "C" __attribute__((visibility("default")))

CHECK_API int check_create(int device, void **context) {
  return product_create(device, reinterpret_cast<product_context **>(context));
}

CHECK_API uint64_t check_packed_bytes(int dtype, int64_t rows, int64_t cols) {
  return packed_bytes(adrt_dtype(dtype), rows, cols);
}

CHECK_API int check_pack(int dtype, int64_t rows, int64_t cols, const void *stored, void *packed, void *stream) {
  return launch_pack(adrt_dtype(dtype), stored, describe_packed(adrt_dtype(dtype), rows, cols, packed),
                     static_cast<cudaStream_t>(stream));
}

CHECK_API uint64_t check_workspace_bytes(void *context, int dtype, int64_t rows, int64_t cols, int tokens) {
  return product_workspace_bytes(static_cast<product_context *>(context),
                                 describe_packed(adrt_dtype(dtype), rows, cols, nullptr), tokens);
}

CHECK_API int check_product(void *context, int dtype, int64_t rows, int64_t cols, void *packed, const void *x,
                            int64_t x_stride, int tokens, void *y, int64_t y_stride, int bf16, int accumulate,
                            void *workspace, void *stream) {
  return launch_product(static_cast<product_context *>(context),
                        describe_packed(adrt_dtype(dtype), rows, cols, packed),
                        static_cast<const __nv_bfloat16 *>(x), x_stride, tokens,
                        {y, y_stride, bf16 != 0, accumulate != 0}, workspace, static_cast<cudaStream_t>(stream));
}

CHECK_API int check_rows(int dtype, int64_t rows, int64_t cols, void *packed, const int32_t *indices, int n,
                         float *out, void *stream) {
  return launch_rows(describe_packed(adrt_dtype(dtype), rows, cols, packed), indices, n, out, cols,
                     static_cast<cudaStream_t>(stream));
}

CHECK_API int check_dequantize(int dtype, int64_t rows, int64_t cols, void *packed, void *out, void *stream) {
  return launch_dequantize(describe_packed(adrt_dtype(dtype), rows, cols, packed), static_cast<__nv_bfloat16 *>(out),
                           static_cast<cudaStream_t>(stream));
}
