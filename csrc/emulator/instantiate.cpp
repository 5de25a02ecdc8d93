// The CUDA kernels for the emulator.
#include "../cuda/instantiate.cu"
