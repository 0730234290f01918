// Layers of floats of 8 bits: fprop_fp8_sm89_{rows}x{positions}x{depth}. An image of its own, which
// devices from sm_89 on load where it is asked for.
#include "epilogues/bytes.cuh"

#define PW_FPROP_F32_SIMT(...)
#define PW_FPROP_16BIT_SIMT(...)
#define PW_FPROP_TF32_MMA(...)
#define PW_FPROP_F32_MMA(...)
#define PW_FPROP_16BIT_MMA(...)
#define PW_FPROP_F16_MMA_SM75(...)
#define PW_INT8(...)
#define PW_FP8(...) PW_BYTE_KERNEL(fp8_sm89, true, __VA_ARGS__)

#include "kernels.def"
